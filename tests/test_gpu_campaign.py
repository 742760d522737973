"""The GPU campaign: jobs run once, failures are recorded and repeated, time is limited."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT, assert_refused, called

import benchmark
from experiments import gpu_campaign
from experiments.gpu_campaign import Job, campaign, jobs


def python(code: str) -> list[str]:
    return ["-c", code]


def records(out) -> dict:
    return json.loads((out / "jobs.json").read_text())


def test_jobs_have_names_of_their_own_and_commands_that_exist():
    for device in ("cuda", "cpu"):
        found = list(jobs(device, smoke=False))
        assert len({job.name for job in found}) == len(found)
        for job in found:
            assert job.command[0] == "-m" or (ROOT / job.command[0]).is_file()
            assert job.limit > 0
            if job.command[0].endswith("benchmark.py"):
                assert job.command[1] in benchmark.COMMANDS
    assert sum(job.name.endswith("bfloat16") for job in jobs("cuda", smoke=False)) == 4


def test_a_job_that_failed_is_repeated_and_one_that_succeeded_is_not(tmp_path):
    count = "open('count', 'a').write('x')"
    todo = [Job("first", 60, python(count)), Job("second", 60, python("open('absent')"))]
    assert campaign(tmp_path, todo, 1) == 1
    assert records(tmp_path)["second"]["result"] == "exit status 1"
    assert "FileNotFoundError" in (tmp_path / "second.log").read_text()
    (tmp_path / "absent").touch()
    assert campaign(tmp_path, todo, 1) == 0
    assert (tmp_path / "count").read_text() == "x"

def test_a_job_that_takes_too_long_is_terminated(tmp_path):
    todo = [Job("endless", 0.5, python("import time; time.sleep(600)"))]
    assert campaign(tmp_path, todo, 1) == 1
    assert "not done in" in records(tmp_path)["endless"]["result"]


@pytest.mark.slow
def test_the_rehearsal_runs_every_job(tmp_path):
    arguments = (tmp_path / "out", "--device", "cpu", "--smoke")
    result = called(gpu_campaign.main, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert set(records(tmp_path / "out")) == {job.name for job in jobs("cpu", smoke=True)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    assert_refused(called(gpu_campaign.main, tmp_path, cwd=tmp_path), "--smoke")
