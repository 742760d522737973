"""Train RMAAT from a YAML file, evaluate a checkpoint, or predict with it.

    python run_train.py --config FILE [key=value ...] [--resume]
    python run_train.py --checkpoint FILE --eval_only
    python run_train.py --checkpoint FILE --predict INPUT
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from checkpoint import CheckpointError
from distributed import (
    FirstProcessFailed,
    current_processes,
    is_first_process,
    joined_processes,
)
from lra_config import ConfigError, load_config, single_values
from model import RMAAT
from packing import DataError
from predict import evaluate_splits, load_trained, predict
from run_state import Interrupted, NonFiniteError
from sweep import load_runs, run_sweep, sweep_table
from train import train
from utils import log_line


def _exit_on_sigterm(number: int, _frame: object) -> NoReturn:
    # As an exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)


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
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        with joined_processes():
            run(arguments)
    except (ConfigError, NonFiniteError) as error:
        return fail(error, 2)
    except (DataError, CheckpointError) as error:
        return fail(error, 2, by_all=False)
    except FirstProcessFailed:
        return 2
    except BrokenPipeError:  # the reader of the predictions has had enough
        sys.stdout = open(os.devnull, "w")
        return 0
    except torch.OutOfMemoryError as error:
        what, _, _ = str(error).partition(" GPU ")  # how the allocator's memory is laid out
        advice = "lower batch_size, for which accumulate makes up, or raise num_segments"
        return fail(f"{what} {advice}", 2, by_all=False)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror or error}" if error.filename else error
        return fail(reason, 2, by_all=False)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Interrupted as error:
        return fail(f"{error}; go on with --resume", error.exit_status)
    return 0


def fail(reason: object, exit_status: int, *, by_all: bool = True) -> int:
    """Say why, once: of several processes that all fail alike (`by_all`) the first one speaks."""
    if is_first_process() or not by_all:
        print(f"run_train.py: {reason}", file=sys.stderr)
    return exit_status


def run(arguments: argparse.Namespace) -> None:
    if arguments.eval_only and arguments.predict:
        raise ConfigError("--eval_only and --predict exclude each other; give one of them")
    if arguments.predict and current_processes().world_size > 1:
        raise ConfigError("--predict works in one process; start it without torchrun")
    if arguments.eval_only:
        print_evaluation(trained_model(arguments))
    elif arguments.predict:
        print_predictions(trained_model(arguments), arguments.predict)
    elif arguments.checkpoint:
        raise ConfigError(
            "--checkpoint goes with --eval_only or --predict; a run goes on from its own last.pt "
            "with --resume"
        )
    else:
        print_training(arguments)


def trained_model(arguments: argparse.Namespace) -> RMAAT:
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
        return load_trained(arguments.checkpoint or config.run_dir / "best.pt", config)
    if not arguments.checkpoint:
        raise ConfigError("--checkpoint is missing; name a run's best.pt, or its --config")
    return load_trained(arguments.checkpoint, overrides=single_values(arguments.overrides))


def print_training(arguments: argparse.Namespace) -> None:
    if not arguments.config:
        raise ConfigError("--config is missing; name a YAML file, as in configs/")
    configs, varied = load_runs(arguments.config, arguments.overrides)
    if len(configs) > 1:
        log_line(sweep_table(configs, run_sweep(configs, resume=arguments.resume), varied))
        return
    summary = train(configs[0], resume=arguments.resume)
    log_line(
        f"test_acc {summary.test_accuracy:.4f}  best_val_acc {summary.best_val_accuracy:.4f} "
        f"(step {summary.best_step})  steps {summary.steps}  seconds {summary.seconds:.0f}  "
        f"-> {configs[0].run_dir}/summary.json"
    )


def print_evaluation(model: RMAAT) -> None:
    result = evaluate_splits(model)
    for split in ("val", "test"):
        log_line(
            f"{split}_loss {result[f'{split}_loss']:.4f}  "
            f"{split}_acc {result[f'{split}_accuracy']:.4f}  "
            f"({result[f'{split}_examples']:,} examples)"
        )
    log_line(json.dumps(result))


def print_predictions(model: RMAAT, source: str) -> None:
    with contextlib.ExitStack() as stack:
        if source == "-":
            lines, name = sys.stdin.buffer, "standard input"
        else:
            lines, name = stack.enter_context(open(source, "rb")), source
        for prediction in predict(model, lines, name):
            print(json.dumps(prediction))


if __name__ == "__main__":
    status = main()
    if status and torch.distributed.is_initialized():
        # Without the clean-up that waits for the other processes: torchrun ends them.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
