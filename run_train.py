"""Train RMAAT from a YAML file: `python run_train.py --config FILE [key=value ...] [--resume]`."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from checkpoint import CheckpointError
from lra_config import ConfigError, load_config
from packing import DataError
from train import Interrupted, train


def _exit_on_sigterm(number: int, _frame: object) -> NoReturn:
    # As an exception, so that half-written files are removed on the way out.
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, as in configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last.pt")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the file's values")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        config = load_config(arguments.config, arguments.overrides)
        summary = train(config, resume=arguments.resume)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"run_train.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"run_train.py: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_train.py: interrupted", file=sys.stderr)
        return 130
    except Interrupted as error:
        print(f"run_train.py: {error}; go on with --resume", file=sys.stderr)
        return error.exit_status
    print(
        f"test_acc {summary.test_accuracy:.4f}  best_val_acc {summary.best_val_accuracy:.4f} "
        f"(step {summary.best_step})  steps {summary.steps}  seconds {summary.seconds:.0f}  "
        f"-> {config.run_dir}/summary.json"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
