"""Train RMAAT from a YAML file, evaluate a checkpoint, or predict with it.

    python run_train.py --config FILE [key=value ...] [--resume]
    python run_train.py --checkpoint FILE --eval_only
    python run_train.py --checkpoint FILE --predict INPUT
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from run.program import end_at_once, end_by_exception

# What takes time to load is imported where it is needed: torch, a second, once the command line and
# the configuration have been found right, the rest once a signal ends the program with one line.
if TYPE_CHECKING:
    from lra_config import Config
    from model import RMAAT
    from run.checkpoint import Summary

NAME = "run_train.py"


def parse_arguments() -> argparse.Namespace:
    from run.program import Parser

    parser = Parser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, as in configs/; a checkpoint brings its own")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on from the run's last.pt, or start where there is none",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="say what a run would take, and train nothing"
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
        help="over the file's values; key=a,b trains one run each",
    )
    return parser.parse_intermixed_args()


def main() -> int:
    end_at_once(NAME)
    from run.program import run_program

    return run_program(NAME, command)


def command() -> None:
    carry_out = checked_command(parse_arguments())
    for library in ("predict", "sweep"):  # with torch, which they need
        importlib.import_module(library)
    from run.processes import joined_processes
    from training.acceleration import reported_out_of_memory

    end_by_exception()
    with reported_out_of_memory(), joined_processes():
        carry_out()


def checked_command(arguments: argparse.Namespace) -> Callable[[], None]:
    """What the arguments ask for, its configuration read and validated.

    Returns:
        What carries it out, and for how many seconds processes wait for each other then.
    Raises:
        ConfigError: they contradict each other, or the configuration is wrong.
        UserError: the environment is none that a launcher leaves.
    """
    from lra_config import ConfigError
    from run.program import launched_processes
    from sweep import load_runs

    several = launched_processes().world_size > 1
    predicts = arguments.predict is not None
    if arguments.eval_only and predicts:
        raise ConfigError("--eval_only and --predict exclude each other; give one of them")
    if predicts and not arguments.predict:
        raise ConfigError("--predict names no file; name one, or - for standard input")
    if predicts and several:
        raise ConfigError("--predict works in one process; start it without torchrun")
    if arguments.eval_only or predicts:
        load_model = checked_model(arguments)
        if arguments.eval_only:
            return lambda: print_evaluation(load_model())
        return lambda: print_predictions(load_model(), arguments.predict)
    if arguments.checkpoint:
        raise ConfigError(
            "--checkpoint goes with --eval_only or --predict; a run goes on from its own last.pt "
            "with --resume"
        )
    if not arguments.config:
        raise ConfigError("--config is missing; name a YAML file, as in configs/")
    configs, varied = load_runs(arguments.config, arguments.overrides)
    return lambda: print_training(configs, varied, arguments)


def checked_model(arguments: argparse.Namespace) -> Callable[[], RMAAT]:
    """The loading of the trained model that the arguments name."""
    from lra_config import ConfigError, load_config, single_values

    config, overrides = None, {}
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
    elif arguments.checkpoint:
        overrides = single_values(arguments.overrides)
    else:
        raise ConfigError("--checkpoint is missing; name a run's best.pt, or its --config")

    def load() -> RMAAT:
        from predict import load_trained

        return load_trained(arguments.checkpoint or config.run_dir / "best.pt", config, overrides)

    return load


def print_training(
    configs: list[Config], varied: list[str], arguments: argparse.Namespace
) -> None:
    from run.program import log_line
    from sweep import run_sweep, sweep_table
    from train import plan, train

    if arguments.dry_run:
        for config in configs:
            log_line(f"{config.run_dir}\n{plan(config).text}")
        return
    if len(configs) > 1:
        summaries = run_sweep(configs, resume=arguments.resume)
        log_line(sweep_table(configs, summaries, varied))
        return
    summary = train(configs[0], resume=arguments.resume)
    log_line(closing_table(summary, configs[0].run_dir))
    log_line(
        f"test_acc {summary.test_accuracy:.4f}  best_val_acc {summary.best_val_accuracy:.4f} "
        f"(step {summary.best_step})  steps {summary.steps}  seconds {summary.seconds:.0f}  "
        f"-> {configs[0].run_dir}/summary.json"
    )


def closing_table(summary: Summary, folder: Path) -> str:
    """What came out, and what lies where."""
    from tables import markdown

    rows = [
        [f"validation, best (step {summary.best_step:,})",
         f"{100 * summary.best_val_accuracy:.2f}", f"{summary.examples['val']:,}"],
        ["test", f"{100 * summary.test_accuracy:.2f}", f"{summary.examples['test']:,}"],
    ]
    table = markdown(["split", "accuracy, %", "examples"], rows, numbers=2)
    return (
        f"{table}\n{folder}: weights (model.safetensors, config.json) and their card (README.md), "
        "best.pt, last.pt, metrics.jsonl, curves.png"
    )


def print_evaluation(model: RMAAT) -> None:
    from predict import evaluate_splits
    from run.program import is_first_process, print_result
    from training.diagnostics import slices_text

    result = evaluate_splits(model)
    if not is_first_process():
        return
    for split in ("val", "test"):
        print_result(
            f"{split}_loss {result[f'{split}_loss']:.4f}  "
            f"{split}_acc {result[f'{split}_accuracy']:.4f}  "
            f"({result[f'{split}_examples']:,} examples)"
        )
    print_result(slices_text(result["test_slices"]))
    print_result(json.dumps(result))


def print_predictions(model: RMAAT, source: str) -> None:
    from predict import bounded_lines, predict
    from run.files import named_os_errors
    from run.program import print_result

    name = "standard input" if source == "-" else source
    with contextlib.ExitStack() as stack:
        stack.enter_context(named_os_errors(name))
        lines = sys.stdin.buffer if source == "-" else stack.enter_context(open(source, "rb"))
        for prediction in predict(model, bounded_lines(lines), name):
            print_result(json.dumps(prediction))


if __name__ == "__main__":
    status = main()
    if status and os.environ.get("WORLD_SIZE", "1") != "1":
        # Without the clean-up that waits for the other processes: torchrun ends them.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
