"""Kills and signals at random moments of runs that are resumed until they equal an unbroken one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import ROOT, TINY, called, start_process, wait_for
from test_train import assert_same_outcome

import generate_lra
from data.listops import generate_listops
from lra_config import dump_config, load_config, make_config
from run import checkpoint
from run.log import read_metrics
from train import train

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["campaigns", "sweep", "predict"])
COUNT = itertools.count()
LISTOPS = "lra_release/listops-1000"
SPLITS = {"train": 20_000, "val": 300, "test": 300, "min_length": 9, "max_length": 41}
GENERATED = {**SPLITS, "train": 200_000}  # seconds: a random moment of them is struck
EVAL_INTERVAL = 25
MOMENTS = (
    "start", "step", "step", "step", "writing", "evaluation", "packing", "generation", "race"
)


class Program:
    """A script in a process of its own that has the libraries loaded, used as a `Popen` is."""

    def __init__(self, script: str, arguments: Sequence[str], folder: Path) -> None:
        self._errors = folder / f"errors{next(COUNT)}"
        self._process = PROCESSES.Process(
            target=_run_script, args=(str(ROOT / script), arguments, folder, self._errors)
        )
        self._process.start()
        self.pid = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        return "", self._errors.read_text() if self._errors.exists() else ""


def _run_script(script: str, arguments: Sequence[str], folder: Path, errors: Path) -> None:
    os.chdir(folder)
    for path, number in ((os.devnull, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


@dataclass
class Campaign:
    """A run that is struck, the unbroken one beside it, and a generation that is struck."""

    folder: Path
    seed: int
    steps: int
    random: random.Random = field(init=False)
    hits: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        data = self.folder / "datasets"
        generate_listops(data, seed=0, workers=1, **SPLITS)
        generate_listops(self.folder / "expected", seed=0, workers=1, **GENERATED)
        config = make_config({
            **TINY, "data_dir": str(data), "output_dir": str(self.folder), "run_name": "struck",
            "batch_size": 4, "num_segments": 2, "dropout": 0.1, "max_steps": self.steps,
            "log_interval": 5, "eval_interval": EVAL_INTERVAL, "checkpoint_interval": 7,
        })
        self.config = self.folder / "config.yaml"
        self.config.write_text(dump_config(config), encoding="utf-8")
        train(load_config(self.config, ["run_name=whole"]))
        self.run, self.cache = self.folder / "struck", data / ".cache"

    def start(self) -> Program:
        return Program("run_train.py", ["--config", str(self.config), "--resume"], self.folder)

    def generation(self) -> list[str]:
        options = {"out": self.folder / "generated", "seed": 0, "workers": 1, **GENERATED}
        return ["listops", *(f"--{key}={value}" for key, value in options.items())]

    def last_step(self) -> int:
        try:
            return max((row["step"] for row in read_metrics(self.run)), default=0)
        except FileNotFoundError:
            return 0

    def is_evaluating(self) -> bool:
        """The line of training before an evaluation is there, that of the evaluation is not."""
        try:
            row = read_metrics(self.run)[-1]
        except (FileNotFoundError, IndexError):
            return False
        return row["step"] % EVAL_INTERVAL == 0 and "val_loss" not in row

    def started_until(self, moment: str) -> list[Program | subprocess.Popen]:
        """Processes that have come to a random moment of that kind, the one to be struck first."""
        if moment == "generation":
            shutil.rmtree(self.folder / "generated", ignore_errors=True)
            process = Program("generate_lra.py", self.generation(), self.folder)
            parent = self.folder / "generated" / Path(LISTOPS).parent
            wait_for(process, lambda: any(parent.glob("*.part")))
            time.sleep(self.random.uniform(0, 1))
            return [process]
        if moment == "start":  # with all that is loaded before the first of our lines
            process = start_process(
                "run_train.py", "--config", self.config, "--resume", cwd=self.folder,
                stdout=subprocess.DEVNULL,
            )
            time.sleep(self.random.uniform(1, 5))
            return [process]
        if moment == "packing":
            shutil.rmtree(self.cache)
        process = self.start()
        processes = [process]
        if moment == "race":
            processes.append(self.start())
            self.random.shuffle(processes)
        if moment == "packing":
            wait_for(process, lambda: any(self.cache.glob("*.part")))
            time.sleep(self.random.uniform(0, 0.3))
        else:
            goal = self.last_step() + self.random.randrange(5, 40)
            wait_for(process, lambda: time.sleep(0.02) or self.last_step() >= goal)
            if moment == "step":
                time.sleep(self.random.uniform(0, 0.1))
            elif moment == "writing":
                wait_for(process, lambda: any(self.run.glob("*.part")))
            elif moment == "evaluation":
                wait_for(process, self.is_evaluating)
                time.sleep(self.random.uniform(0, 0.01))
        return processes

    def assert_nothing_is_damaged(self) -> None:
        for path in self.run.glob("*.pt"):
            checkpoint.read(path)
        if (self.run / "config.yaml").exists():
            load_config(self.run / "config.yaml")
        if (self.run / "metrics.jsonl").exists():
            read_metrics(self.run)

    def assert_the_end_is_that_of_an_unbroken_run(self) -> None:
        """Go on to the end, and generate: as if nothing had happened, and nothing left over."""
        config = load_config(self.config)
        train(config, resume=True)
        assert_same_outcome(self.run, self.folder / "whole")
        best, whole = (checkpoint.load(f / "best.pt") for f in (self.run, self.folder / "whole"))
        assert best["step"] == whole["step"] and best["val_accuracy"] == whole["val_accuracy"]
        assert all(torch.equal(best["model"][n], whole["model"][n]) for n in whole["model"])
        assert not [*self.run.glob("*.part"), *self.run.glob("*.lock")]
        assert not [*self.cache.glob("*.part"), *self.cache.glob("*.lock")]
        shutil.rmtree(self.folder / "generated" / LISTOPS, ignore_errors=True)
        called(lambda: generate_lra.main(self.generation()), cwd=self.folder, check=True)
        for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
            ours, expected = (
                self.folder / root / LISTOPS / name for root in ("generated", "expected")
            )
            assert ours.read_bytes() == expected.read_bytes()
        parent = self.folder / "generated" / Path(LISTOPS).parent
        assert not [*parent.glob("*.part"), *parent.glob("*.lock")]

    def begin_anew(self) -> None:
        """After what ended before it was struck: a fast machine comes to the last step."""
        self.assert_the_end_is_that_of_an_unbroken_run()
        shutil.rmtree(self.run)


def kill_campaign(folder: Path, kills: int, seed: int = 0) -> dict:
    """SIGKILL at random moments; of two racing processes one is refused, and both are killed.

    Returns:
        `tried` and `held` kills, and how many were of each kind.
    """
    campaign = Campaign(folder, seed, steps=25 * kills)
    while campaign.hits.total() < kills:
        moment = campaign.random.choice(MOMENTS)
        processes = campaign.started_until(moment)
        for process in processes:
            if process.poll() is None:
                process.kill()
                campaign.hits[moment] += 1
            _, errors = process.communicate()
            # What has failed by itself was the second in the folder.
            refused = moment == "race" and "trains there" in errors
            assert process.returncode <= 0 or refused, (moment, errors)
        campaign.assert_nothing_is_damaged()
        if any(process.returncode == 0 for process in processes):
            campaign.begin_anew()
        print(f"{campaign.hits.total()} kills, the last: {moment}", flush=True)
    campaign.assert_the_end_is_that_of_an_unbroken_run()
    count = campaign.hits.total()
    return {"tried": count, "held": count, "moments": dict(sorted(campaign.hits.items()))}


def term_campaign(folder: Path, signals: int, seed: int = 1) -> dict:
    """SIGTERM at random moments: each ends with status 143 and one line.

    Returns:
        `tried` and `held` signals, of each kind, and the `longest_seconds` to the end.
    """
    campaign = Campaign(folder, seed, steps=40 * signals)
    longest = 0.0
    while (number := campaign.hits.total() + 1) <= signals:
        moment = campaign.random.choice([m for m in MOMENTS if m != "race"])
        (process,) = campaign.started_until(moment)
        start = time.monotonic()
        process.terminate()
        _, errors = process.communicate(timeout=300)
        seconds = time.monotonic() - start
        if process.returncode == 0:
            campaign.begin_anew()
            continue
        longest = max(longest, seconds)
        assert process.returncode == 143, (moment, errors)
        assert re.fullmatch(r"(run_train|generate_lra)\.py: .*\n", errors), errors
        campaign.hits[moment] += 1
        campaign.assert_nothing_is_damaged()
        print(f"{number} signals, the last: {moment}, {seconds:.2f} s", flush=True)
    campaign.assert_the_end_is_that_of_an_unbroken_run()
    return {
        "tried": signals, "held": signals, "moments": dict(sorted(campaign.hits.items())),
        "longest_seconds": round(longest, 2),
    }
