"""The log of a run: `metrics.jsonl` always, Weights & Biases (W&B) on request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lra_config import Config
from run.files import atomic_write, named_os_errors, parse_json
from run.program import UserError, log_line
from utils import first_line

ROW = TypeAdapter(dict[str, int | float | None])
WANDB_TIMEOUT = 30.0  # seconds that the start and the end of a run wait for W&B


class RunLog:
    """The `metrics.jsonl` of a run, mirrored to W&B if `wandb: true`.

    A failure of W&B never ends a training: the first one is reported in one line and ends the
    mirror. The environment variable WANDB_MODE chooses between online and offline.
    """

    def __init__(self, config: Config, *, keep_until: int) -> None:
        """Open the log and drop the rows after step `keep_until` of the run that is resumed."""
        self._path = config.run_dir / "metrics.jsonl"
        history = []
        if self._path.exists():
            history = [row for row in read_metrics(config.run_dir) if row["step"] <= keep_until]
            with atomic_write(self._path, "w") as handle:
                handle.writelines(json.dumps(row) + "\n" for row in history)
        self._wandb: Any = None
        if config.wandb:
            self._attempt(lambda: self._start_wandb(config, history))

    def write(self, step: int, **values: Any) -> None:
        """Append one row; a value that is not finite becomes null, as JSON has no NaN."""
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with named_os_errors(self._path), open(self._path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._attempt(lambda: self._wandb.log(values, step=step))

    def finish(self, summary: dict[str, Any]) -> None:
        """Pass the summary to W&B and end its run."""
        if self._wandb is not None:
            self._attempt(lambda: (self._wandb.summary.update(summary), self._wandb.finish()))

    def _start_wandb(self, config: Config, history: list[dict[str, Any]]) -> None:
        """Start a W&B run; a resumed run continues that of `wandb_id` in its folder.

        Offline, a resumed run has a new folder of W&B, which receives the `history` first.
        """
        import wandb

        # In setup, not in init: the login comes before init reads its own settings.
        wandb.setup(wandb.Settings(
            silent=True, console="off", login_timeout=WANDB_TIMEOUT, init_timeout=WANDB_TIMEOUT,
            finish_timeout=WANDB_TIMEOUT, finish_timeout_raises=True,
        ))
        id_file = config.run_dir / "wandb_id"
        self._wandb = wandb.init(
            project=config.wandb_project, name=config.wandb_run_name or config.run_name,
            config=config.model_dump(), dir=config.run_dir, resume="allow",
            id=id_file.read_text() if id_file.exists() else None,
        )
        with atomic_write(id_file, "w") as handle:
            handle.write(self._wandb.id)
        if history and self._wandb.offline:
            for row in history:
                self._wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            folder = Path(self._wandb.dir).parent
            log_line(f"wandb: {folder} holds the full history; sync this folder alone")

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._wandb = None
            log_line(f"wandb is off, the run goes on: {first_line(error)}")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`, without a last line cut short by a kill.

    Raises:
        OSError: there is none.
        UserError: a row before the last is damaged.
    """
    path = Path(folder) / "metrics.jsonl"
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line, ROW)
            if not isinstance(row.get("step"), int) or row["step"] < 0:
                raise ValueError("holds no step")
            rows.append(row)
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                raise UserError(
                    f"{path} row {number}: {error}; remove the row, or set another run_name"
                ) from None
    return rows
