"""Train RMAAT from a YAML file, evaluate a checkpoint, or predict with it.

    python run_train.py --config FILE [key=value ...] [--resume] [--dry_run]
    python run_train.py --checkpoint FILE --eval_only
    python run_train.py --checkpoint FILE --predict INPUT
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lra_config import Config, ConfigError, load_config, single_values
from run.program import (
    Parser,
    end_by_exception,
    launcher_variable,
    log_line,
    print_result,
    run_program,
)
from sweep import load_runs, run_sweep, sweep_table

# torch is imported once the command line and the configuration are found to be right.
if TYPE_CHECKING:
    from model import RMAAT

NAME = "run_train.py"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, as in configs/; a checkpoint has its own")
    parser.add_argument(
        "--resume", action="store_true",
        help="continue from the run's last.pt, or start if there is none",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the expected cost of a run; train nothing"
    )
    parser.add_argument(
        "--eval_only", action="store_true", help="validation and test accuracy of a checkpoint"
    )
    parser.add_argument(
        "--predict", metavar="INPUT", help="classify each line of a file, or of - (standard input)"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path,
        help="last.pt, best.pt or model.safetensors; default: best.pt of the run",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="replace values of the file; key=a,b trains one run each",
    )
    return parser.parse_intermixed_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that contradict each other."""
    predicts = arguments.predict is not None
    uses_checkpoint = arguments.eval_only or predicts
    if arguments.eval_only and predicts:
        raise ConfigError("--eval_only and --predict exclude each other; give one of them")
    if predicts and not arguments.predict:
        raise ConfigError("--predict names no file; name one, or - for standard input")
    if predicts and launcher_variable("WORLD_SIZE") > 1:
        raise ConfigError("--predict works in one process; start it without torchrun")
    if arguments.checkpoint and not uses_checkpoint:
        raise ConfigError(
            "--checkpoint needs --eval_only or --predict; a run continues from its own last.pt "
            "with --resume"
        )
    if uses_checkpoint and not (arguments.checkpoint or arguments.config):
        raise ConfigError("--checkpoint is missing; name a run's best.pt, or its --config")
    if not uses_checkpoint and not arguments.config:
        raise ConfigError("--config is missing; name a YAML file, as in configs/")


def command() -> None:
    """Carry out the command line. Mistakes in it are reported before torch is loaded."""
    arguments = parse_arguments()
    check_arguments(arguments)
    evaluates = arguments.eval_only or arguments.predict is not None
    config, overrides = None, {}
    if not evaluates:
        configs, varied = load_runs(arguments.config, arguments.overrides)
    elif arguments.config:
        config = load_config(arguments.config, arguments.overrides)
    else:
        overrides = single_values(arguments.overrides)

    from predict import load_trained
    from run.processes import joined_processes
    from training.acceleration import reported_out_of_memory

    with reported_out_of_memory(), joined_processes():
        if not evaluates:
            print_training(configs, varied, arguments)
            return
        model = load_trained(arguments.checkpoint or config.run_dir / "best.pt", config, overrides)
        if arguments.eval_only:
            print_evaluation(model)
        else:
            print_predictions(model, arguments.predict)


def print_training(
    configs: list[Config], varied: list[str], arguments: argparse.Namespace
) -> None:
    """Train the runs, or with `--dry_run` print their expected cost."""
    from train import plan, train

    if arguments.dry_run:
        for config in configs:
            log_line(f"{config.run_dir}\n{plan(config)}")
        return
    if len(configs) > 1:
        summaries = run_sweep(configs, resume=arguments.resume)
        log_line(sweep_table(configs, summaries, varied))
        return
    summary, folder = train(configs[0], resume=arguments.resume), configs[0].run_dir
    log_line(
        f"{folder}: weights (model.safetensors, config.json) and their card (README.md), best.pt, "
        "last.pt, metrics.jsonl, curves.png"
    )
    log_line(
        f"test_acc {summary.test_accuracy:.4f}  best_val_acc {summary.best_val_accuracy:.4f} "
        f"(step {summary.best_step})  steps {summary.steps}  seconds {summary.seconds:.0f}  "
        f"-> {folder}/summary.json"
    )


def print_evaluation(model: RMAAT) -> None:
    """Print loss and accuracy of the held-out splits, then the same as one line of JSON."""
    from predict import evaluate_splits
    from training.diagnostics import slices_text

    result = evaluate_splits(model)
    for split in ("val", "test"):
        log_line(
            f"{split}_loss {result[f'{split}_loss']:.4f}  "
            f"{split}_acc {result[f'{split}_accuracy']:.4f}  "
            f"({result[f'{split}_examples']:,} examples)"
        )
    log_line(slices_text(result["test_slices"]))
    log_line(json.dumps(result))


def print_predictions(model: RMAAT, source: str) -> None:
    """Print one line of JSON per line of a file, or of standard input for `-`."""
    from predict import predict

    with contextlib.ExitStack() as stack:
        lines = sys.stdin.buffer if source == "-" else stack.enter_context(open(source, "rb"))
        for prediction in predict(model, lines, "standard input" if source == "-" else source):
            print_result(json.dumps(prediction))


def main() -> int:
    """Run the command line and return its exit status; examples/own_dataset.py calls it too."""
    end_by_exception()
    return run_program(NAME, command)


if __name__ == "__main__":
    status = main()
    if status and os.environ.get("WORLD_SIZE", "1") != "1":
        # Without the clean-up that waits for the other processes: torchrun ends them.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
