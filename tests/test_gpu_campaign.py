"""The GPU campaign: rehearsed whole on the CPU, and what it does with rows that fail."""

from __future__ import annotations

import json
import tarfile

import pytest
from conftest import called

from experiments import gpu_campaign
from experiments.gpu_campaign import Job, Measurer, Rows, campaign, jobs, tables, train_cells

ROW = {"seq_len": 64, "segment_len": 32, "device": "cpu", "batch_size": 1}


def test_the_rehearsal_measures_every_row(tmp_path):
    result = called(
        gpu_campaign.main, tmp_path / "out", "--device", "cpu", "--smoke", cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").open()]
    assert {row["stage"] for row in rows} == set(gpu_campaign.STAGES)
    assert all("answer" in row for row in rows)
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text.startswith("# Rehearsal on a CPU: these are no results")
    assert "listops, float32, eager" in text and "first call ended with" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["rows.jsonl", "tables.md"]


class FakeMeasurer:
    """Answers at once; `broken` names the requests that fail."""

    asked: list
    broken: set

    def ask(self, request, limit):
        self.asked.append(request)
        return {"error": "CUDA out of memory"} if request[1] in self.broken else {"answer": {
            "step_seconds": 0.00123, "peak_mib": 10.0, "kernels": 1841}}

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    measurer = FakeMeasurer()
    measurer.asked, measurer.broken = [], {"b"}
    monkeypatch.setattr(gpu_campaign, "Measurer", lambda: measurer)
    monkeypatch.setattr(gpu_campaign, "jobs", lambda *_, **__: [
        Job("shapes", name, 10, ["row", name]) for name in "abc"
    ])
    return measurer


def test_a_row_that_fails_is_kept_and_done_again_by_the_next_call(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "tables", lambda rows: "")
    assert campaign(tmp_path, "cpu", None, 1, smoke=True) == 1
    assert [r[1] for r in fake.asked] == ["a", "b", "c"]
    fake.broken = set()
    assert campaign(tmp_path, "cpu", None, 1, smoke=True) == 0
    assert [r[1] for r in fake.asked] == ["a", "b", "c", "b"]


def test_when_the_time_is_up_the_rest_is_left_to_the_next_call(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(gpu_campaign, "tables", lambda rows: "")
    campaign(tmp_path, "cpu", None, 0, smoke=True)
    assert fake.asked == []


def test_tables_show_milliseconds_and_name_failures(tmp_path):
    rows = Rows(tmp_path)
    rows.add(Job("shapes", "listops, bfloat16, graphs", 1, ["task", {"device": "cuda"}]),
             {"answer": {"step_seconds": 0.00123, "peak_mib": 10.4, "kernels": 1841}}, 3)
    rows.add(Job("scaling", "1048576", 1, ["row", ROW]), {"error": "CUDA out of memory"}, 3)
    text = tables(Rows(tmp_path))
    assert text.startswith("# Measured on a GPU")
    assert "| listops, bfloat16, graphs | 1.230 | 10 |" in text
    assert "- scaling, 1048576: CUDA out of memory" in text


def test_a_request_that_hangs_or_kills_the_process_is_a_row(monkeypatch):
    measurer = Measurer()
    try:
        assert "not done in 0 s" in measurer.ask(["rate", "cpu"], 0.01)["error"]
        assert measurer.process is None
        assert "error" in measurer.ask(["row", {**ROW, "system": "no such"}], 120)
        assert measurer.process is not None
        measurer.process.kill()
        measurer.process.wait()
        assert "ended with status" in measurer.ask(["rate", "cpu"], 10)["error"]
    finally:
        measurer.close()


def test_on_cuda_the_campaign_has_all_the_issue_names():
    found = list(jobs("cuda", gpu_campaign.ROOT, smoke=False))
    assert len({(job.stage, job.name) for job in found}) == len(found)
    assert list(dict.fromkeys(job.stage for job in found)) == list(gpu_campaign.STAGES)
    assert sum(job.stage == "shapes" for job in found) == 4 * 4 + 4 + 3 * 2
    assert sum(job.stage == "memory" for job in found) == 5 * 4
    scaling = [job.request[1]["seq_len"] for job in found if job.stage == "scaling"]
    assert scaling[-1] == 2**20


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    result = called(gpu_campaign.main, tmp_path, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "--smoke" in result.stderr


def test_the_training_stage_keeps_its_cells_and_overwrites_nothing(tmp_path, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    out.mkdir()
    monkeypatch.setattr(gpu_campaign, "ROOT", root)
    (root / "reproduce.py").write_text(
        "import pathlib, sys\n"
        "for name in ('runs/reproduce/a/last.pt', 'results/reproduce/b/summary.json',\n"
        "             'runs/own/last.pt'):\n"
        "    path = pathlib.Path(name)\n"
        "    path.parent.mkdir(parents=True, exist_ok=True)\n"
        "    path.write_text(' '.join(sys.argv))\n"
    )
    assert train_cells(out, "cpu", 1, smoke=True) == 0
    unfinished = root / "runs/reproduce/a/last.pt"
    finished = root / "results/reproduce/b/summary.json"
    assert "--budget smoke" in unfinished.read_text()
    with tarfile.open(out / "runs.tar") as tar:
        assert {root / name for name in tar.getnames()} == {unfinished, finished}

    (root / "reproduce.py").write_text("")
    unfinished.write_text("newer")
    finished.unlink()
    assert train_cells(out, "cpu", 1, smoke=True) == 0
    assert unfinished.read_text() == "newer" and finished.exists()


def test_the_training_stage_stands_alone(tmp_path):
    command = [tmp_path / "out", "--device", "cpu", "--stage", "train", "--stage", "memory"]
    result = called(gpu_campaign.main, *command, cwd=tmp_path)
    assert result.returncode == 2 and "stands alone" in result.stderr
