"""Train RMAAT from a YAML file, evaluate a checkpoint, or predict with it.

    python run_train.py --config FILE [key=value ...] [--resume] [--jobs K]
    python run_train.py --checkpoint FILE --eval_only
    python run_train.py --checkpoint FILE --predict INPUT
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.grid import load_runs, single_run_arguments
from lra_config import Config, ConfigError, UserError, load_config, single_values
from run.signals import exit_on_sigterm
from run.terminal import is_first_process, log_line

# torch takes a second to load. What it is needed for is imported once the command line and the
# configuration have been found right, so that a mistake is answered at once.
if TYPE_CHECKING:
    from model import RMAAT


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file, as in configs/; a checkpoint brings its own")
    parser.add_argument(
        "--resume", action="store_true",
        help="go on from the run's last.pt, or start where there is none",
    )
    parser.add_argument(
        "--jobs", metavar="K", type=int, default=1,
        help="runs of a sweep that train side by side, on the CUDA devices or else the cores",
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
    arguments = parse_arguments()
    exit_on_sigterm()
    try:
        carry_out = checked_command(arguments)
        from run.processes import joined_processes
        from training.acceleration import told_out_of_memory

        with told_out_of_memory(), joined_processes():
            carry_out()
    except UserError as error:
        return fail(error, error.exit_status, by_all=error.met_by_all)
    except BrokenPipeError:  # the reader of the predictions has had enough
        sys.stdout = open(os.devnull, "w")
        return 0
    except OSError as error:
        reason = f"{error.filename}: {error.strerror or error}" if error.filename else error
        return fail(reason, 2, by_all=False)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return 0


def fail(reason: object, exit_status: int, *, by_all: bool = True) -> int:
    """Say why, once: of several processes that all fail alike (`by_all`) the first one speaks."""
    if is_first_process() or not by_all:
        print(f"run_train.py: {reason}", file=sys.stderr)
    return exit_status


def checked_command(arguments: argparse.Namespace) -> Callable[[], None]:
    """What the arguments ask for, its configuration read and validated.

    Raises:
        ConfigError: they contradict each other, or the configuration is wrong.
    """
    if arguments.eval_only and arguments.predict:
        raise ConfigError("--eval_only and --predict exclude each other; give one of them")
    if arguments.predict and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("--predict works in one process; start it without torchrun")
    if arguments.eval_only or arguments.predict:
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
    if arguments.jobs < 1:
        raise ConfigError(f"--jobs {arguments.jobs}: at least one run has to train; give 1 or more")
    if arguments.jobs > 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("--jobs starts processes of its own; start it without torchrun")
    configs, varied = load_runs(arguments.config, arguments.overrides)
    return lambda: print_training(configs, varied, arguments)


def checked_model(arguments: argparse.Namespace) -> Callable[[], RMAAT]:
    """The loading of the trained model that the arguments name."""
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
    from experiments.sweep import run_sweep, sweep_table
    from train import train

    if len(configs) > 1:
        commands = [
            single_run_arguments(arguments.config, arguments.overrides, config, varied)
            for config in configs
        ]
        summaries = run_sweep(configs, commands, resume=arguments.resume, jobs=arguments.jobs)
        log_line(sweep_table(configs, summaries, varied))
        return
    summary = train(configs[0], resume=arguments.resume)
    log_line(
        f"test_acc {summary.test_accuracy:.4f}  best_val_acc {summary.best_val_accuracy:.4f} "
        f"(step {summary.best_step})  steps {summary.steps}  seconds {summary.seconds:.0f}  "
        f"-> {configs[0].run_dir}/summary.json"
    )


def print_evaluation(model: RMAAT) -> None:
    from predict import evaluate_splits
    from training.slices import slices_text

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
    from predict import predict

    with contextlib.ExitStack() as stack:
        if source == "-":
            lines, name = sys.stdin.buffer, "standard input"
        else:
            lines, name = stack.enter_context(open(source, "rb")), source
        for prediction in predict(model, lines, name):
            print(json.dumps(prediction))


if __name__ == "__main__":
    status = main()
    if status and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Without the clean-up that waits for the other processes: torchrun ends them.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
