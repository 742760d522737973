"""Shared helpers: small data and configurations, command lines, gradients, and waiting."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from data.listops import generate_listops
from dataloader import Batch
from lra_config import Config, dump_config, make_config
from model import build_model
from run.program import LINE_LENGTH, UserError
from train import StepResult

ROOT = Path(__file__).parent.parent

# A "tiny" run takes seconds on a CPU.
TINY = {
    "dataset": "listops", "max_seq_len": 40, "num_segments": 4, "dim": 16, "num_heads": 2,
    "ffn_dim": 24, "batch_size": 8, "max_steps": 12, "warmup_steps": 3, "eval_interval": 5,
    "log_interval": 2, "checkpoint_interval": 4, "device": "cpu",
    "nystrom_landmarks": 4, "nystrom_conv": 3,  # fewer landmarks than rows
}


# For a process that leads a session of its own.
ENDING_SIGNALS = pytest.mark.parametrize(("send", "number"), [
    (os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT),  # Ctrl-C reaches the full group
], ids=["SIGTERM", "Ctrl-C"])


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread, and hide GPUs unless `-m gpu` is given; started processes inherit both."""
    torch.set_num_threads(1)  # more do not help small tensors, and change rounding
    os.environ["OMP_NUM_THREADS"] = "1"
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run selected tests in this process, and the full suite in one process per core.

    A selection by path, `-k` or `-m` is often finished before workers have loaded torch. It may
    also measure something that they would disturb.
    """
    chosen = (
        config.args_source is not pytest.Config.ArgsSource.TESTPATHS
        or config.option.keyword
        or config.option.markexpr not in config.getini("addopts")
    )
    return 0 if chosen else None


def tiny_config(**changes) -> Config:
    return make_config({**TINY, **changes})


def tiny_batch(config: Config, lengths: list[int] | None = None, seed: int = 0) -> Batch:
    """Return random tokens (B, L) of the given real lengths; without lengths none are padded."""
    generator = torch.Generator().manual_seed(seed)
    B = 3 if lengths is None else len(lengths)
    L = config.max_seq_len
    tokens = torch.randint(1, config.task.tokenizer.vocab_size, (B, L), generator=generator)
    labels = torch.randint(config.task.num_classes, (B,), generator=generator)
    if lengths is None:
        return Batch(tokens, None, labels)
    return Batch(tokens, torch.arange(L) < torch.tensor(lengths)[:, None], labels)


def write_config(folder: Path, data_dir: Path, **changes) -> Path:
    """Write the configuration of a tiny run named `run`; return its path."""
    path = folder / "tiny.yaml"
    config = tiny_config(**{"data_dir": str(data_dir), "run_name": "run", **changes})
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def called(
    function: Callable[[], object], *arguments: object, cwd: Path, stdin: str = "",
    check: bool = False,
) -> subprocess.CompletedProcess:
    """Call `function` as a command-line program, in this process, from the folder `cwd`."""
    arguments = tuple(map(str, arguments))
    output, errors, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["program", *arguments])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            status = function()
        except SystemExit as leave:
            status = leave.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    result = subprocess.CompletedProcess(
        arguments, status or 0, output.getvalue(), errors.getvalue()
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


def run_script(
    script: str, *arguments: object, cwd: Path, **options
) -> subprocess.CompletedProcess:
    """Run a script as a user does, but in this process, which has loaded torch already."""
    def program() -> None:
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return called(program, *arguments, cwd=cwd, **options)


def run_cli(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run `run_train.py` by `run_script`."""
    return run_script("run_train.py", *arguments, cwd=cwd, **options)


def start_process(
    script: str, *arguments: object, cwd: Path, launcher: Sequence[str] = (),
    env: dict[str, str] | None = None, **options,
) -> subprocess.Popen:
    """Start a script in a process of its own; `env` is added to the environment."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)], cwd=cwd, text=True,
        env={**os.environ, **(env or {})}, **{**pipes, **options},
    )


def finished(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a started process; return its output and exit status."""
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Return when the condition holds, or the process has ended."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not come forward"
        time.sleep(0.0005)


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """Return the one-line message of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.isprintable() and 0 < len(line) <= LINE_LENGTH, line
    return line


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert exit status 2 and one line on standard error that contains the words."""
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.isprintable() and len(line) <= LINE_LENGTH, line
    for word in words:
        assert word in result.stderr, result.stderr


Gradients = dict[str, torch.Tensor]


def gradients_of(
    config: Config, backward: Callable[..., StepResult], batch: Batch,
    dtype: torch.dtype = torch.float64,
) -> tuple[Gradients, StepResult]:
    """Return the gradients of one batch by `backward`; weights and dropout masks are fixed."""
    torch.manual_seed(0)
    model = build_model(config).to(dtype)
    torch.manual_seed(1)
    result = backward(model, batch)
    return {name: p.grad for name, p in model.named_parameters()}, result


def largest_difference(actual: Gradients, expected: Gradients) -> float:
    """Return the largest relative difference of a tensor.

    It is relative to the norm of the expected tensor, or to a thousandth of the full gradient's
    norm if that is larger.
    """
    assert actual.keys() == expected.keys()
    whole = torch.stack([e.norm() for e in expected.values()]).norm()
    return max(
        float((actual[n] - e).norm() / max(e.norm(), 1e-3 * whole)) for n, e in expected.items()
    )


@pytest.fixture(scope="session")
def listops_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data_dir with a small ListOps: 200 / 20 / 20 expressions of 10 to 40 tokens."""
    folder = tmp_path_factory.mktemp("datasets")
    generate_listops(
        folder, seed=0, train=200, val=20, test=20, workers=1, min_length=9, max_length=41
    )
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, listops_dir: Path) -> Path:
    """Return a folder with `tiny.yaml`, its finished run `runs/run`, and its printed output."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder, listops_dir, dropout=0.1, bucket_by_length=True)
    result = run_cli("--config", path, cwd=folder, check=True)
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder
