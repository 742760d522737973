"""Small data and configurations that the tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.listops import generate_listops
from dataloader import Batch
from lra_config import Config, make_config

ROOT = Path(__file__).parent.parent

# Below, a "tiny" run: seconds on a CPU.
TINY = {
    "dataset": "listops", "max_seq_len": 40, "num_segments": 4, "dim": 16, "num_heads": 2,
    "ffn_dim": 24, "batch_size": 8, "max_steps": 12, "warmup_steps": 3, "eval_interval": 5,
    "log_interval": 2, "checkpoint_interval": 4, "device": "cpu",
    "nystrom_landmarks": 4, "nystrom_conv": 3,  # fewer landmarks than rows
}


def tiny_config(**changes) -> Config:
    return make_config({**TINY, **changes})


def tiny_batch(config: Config, lengths: list[int] | None = None, seed: int = 0) -> Batch:
    """Random tokens (B, L) with the given real lengths; without lengths nothing is padded."""
    generator = torch.Generator().manual_seed(seed)
    B = 3 if lengths is None else len(lengths)
    L = config.max_seq_len
    tokens = torch.randint(1, config.task.tokenizer.vocab_size, (B, L), generator=generator)
    labels = torch.randint(config.task.num_classes, (B,), generator=generator)
    if lengths is None:
        return Batch(tokens, None, labels)
    return Batch(tokens, torch.arange(L) < torch.tensor(lengths)[:, None], labels)


def run_cli(
    *arguments: str, cwd: Path, check: bool = False, stdin: str = "",
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """`run_train.py` as a user calls it, from the folder `cwd`; `env` adds to the environment."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run_train.py"), *arguments],
        cwd=cwd, capture_output=True, text=True, check=check, timeout=300, input=stdin,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


@pytest.fixture(scope="session")
def listops_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir with a small ListOps: 200 / 20 / 20 expressions of 10 to 40 tokens."""
    folder = tmp_path_factory.mktemp("datasets")
    generate_listops(
        folder, seed=0, train=200, val=20, test=20, workers=1, min_length=9, max_length=41
    )
    return folder
