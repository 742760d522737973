"""The log of a run: `metrics.jsonl` always, Weights & Biases when asked for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lra_config import LARGEST, Config
from run.files import atomic_write, named_os_errors, opened, parse_json
from run.program import UserError, log_line
from utils import first_line

MAX_LINE = 64 * 1024  # bytes of a row
ROW = TypeAdapter(dict[str, int | float | None])
WANDB_TIMEOUT = 30.0  # seconds that the start and the end of a run wait for W&B


class LogError(UserError, ValueError):
    """A `metrics.jsonl` that no run wrote, told in one line."""


class RunLog:
    """`metrics.jsonl` of a run, mirrored to Weights & Biases when asked to."""

    def __init__(self, config: Config, *, keep_until: int) -> None:
        """Open the log, dropping the lines past step `keep_until` of the run that is resumed."""
        self._path = config.run_dir / "metrics.jsonl"
        if self._path.exists():
            kept = [row for row in read_metrics(config.run_dir) if row["step"] <= keep_until]
            with atomic_write(self._path, "w") as handle:
                handle.writelines(json.dumps(row) + "\n" for row in kept)
        self._mirror = WandbMirror(config) if config.wandb else None

    def write(self, step: int, **values: Any) -> None:
        """Append one line; the operating system has it when this returns.

        JSON has no NaN, which a loss in float16 can come to: it becomes null.
        """
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with named_os_errors(self._path), open(self._path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        if self._mirror is not None:
            self._mirror.log(step, values)

    def finish(self, summary: dict[str, Any]) -> None:
        """Hand the summary to W&B and end its run."""
        if self._mirror is not None:
            self._mirror.finish(summary)


class WandbMirror:
    """A Weights & Biases run whose absence never ends a training.

    The first thing that fails, the import included, is told in one line; all later calls do
    nothing. A resumed run keeps its id, in `wandb_id` of the run's folder.
    """

    def __init__(self, config: Config) -> None:
        self._run: Any = None
        self._attempt(lambda: self._start(config))

    def _start(self, config: Config) -> None:
        import wandb

        # To setup and not to init: the login comes before init has read its own settings.
        wandb.setup(wandb.Settings(
            silent=True, console="off", login_timeout=WANDB_TIMEOUT, init_timeout=WANDB_TIMEOUT,
            finish_timeout=WANDB_TIMEOUT, finish_timeout_raises=True,
        ))
        id_file = config.run_dir / "wandb_id"
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or config.run_name,
            config=config.model_dump(),
            dir=config.run_dir,
            id=id_file.read_text() if id_file.exists() else None,
            resume="allow",
        )
        with atomic_write(id_file, "w") as handle:
            handle.write(self._run.id)

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log(values, step=step))

    def finish(self, summary: dict[str, Any]) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.summary.update(summary))
        if self._run is not None:
            self._attempt(self._run.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            log_line(f"wandb is off, the run goes on: {first_line(error)}")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line cut short by a kill is left out.

    Raises:
        OSError: there is none.
        LogError: a row before the last is none.
    """
    path = Path(folder) / "metrics.jsonl"
    rows = []
    with opened(path) as handle:
        for number in itertools.count(1):
            line = handle.readline(MAX_LINE)
            if not line:
                return rows
            try:
                row = parse_json(line, ROW)
                if not isinstance(row.get("step"), int) or not 0 <= row["step"] <= LARGEST:
                    raise ValueError("holds no step")
                rows.append(row)
            except ValueError as error:
                if line.endswith(b"\n") or len(line) == MAX_LINE:
                    raise LogError(
                        f"{path} row {number}: {error}; remove the row, or set another run_name"
                    ) from None
