"""Exported weights: the files of a run, of `save_pretrained` and of `push_to_hub`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT, refusal, tiny_config
from huggingface_hub import ModelCard, hub_mixin

from model import RMAAT, build_model
from run.hub import model_card
from train import train

COMMITTED = ROOT / "results/listops/rmaat"


@pytest.fixture(scope="module")
def run(tmp_path_factory, listops_dir):
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(data_dir=str(listops_dir), output_dir=str(folder), run_name="shared")
    train(config)
    return config.run_dir


def test_a_finished_run_has_a_card_with_its_own_figures(run):
    card = ModelCard.load(run / "README.md")
    summary = json.loads((run / "summary.json").read_text())
    (result,) = card.data.eval_results
    assert (result.dataset_split, result.metric_value) == ("test", summary["test_accuracy"])
    assert (card.data.license, card.data.model_name) == ("mit", "shared")
    for text in (f"{100 * summary['test_accuracy']:.1f} %, standard error", summary["command"],
                 summary["data"], "2601.00426", "| seed | 0 |", "10 classes"):
        assert text in card.text, text
    assert str(run.parent) not in card.content  # no path of the machine


def test_the_hub_gets_weights_configuration_and_card(run, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    model = RMAAT.from_pretrained(run)
    model.push_to_hub("somebody/model")
    pushed = tmp_path / "somebody/model"
    for name in ("README.md", "config.json", "summary.json"):
        assert (pushed / name).read_text() == (run / name).read_text()
    again = RMAAT.from_pretrained(pushed).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_weights_of_no_finished_run_claim_no_accuracy(tmp_path):
    build_model(tiny_config()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "accuracy is not known" in card.text
    assert RMAAT.from_pretrained(tmp_path).summary is None


def test_from_pretrained_takes_a_configuration_or_single_keys(run):
    config = RMAAT.from_pretrained(run).config
    changed = RMAAT.from_pretrained(run, config=config, precision="bfloat16")
    assert changed.config == config.model_copy(update={"precision": "bfloat16"})
    assert RMAAT.from_pretrained(run, config={"precision": "float16"}).precision == "float16"
    assert RMAAT.from_pretrained(run, torch_dtype=torch.float64).memory.dtype == torch.float64
    assert RMAAT.from_pretrained(run, precision="bfloat16").precision == "bfloat16"


def test_from_pretrained_refuses_unusable_files_in_one_line(run, tmp_path):
    assert "no such checkpoint" in refusal(RMAAT.from_pretrained, tmp_path)
    assert "another model's" in refusal(lambda: RMAAT.from_pretrained(run, num_layers=1))
    assert "unknown key color" in refusal(lambda: RMAAT.from_pretrained(run, color=1))
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/summary.json").write_text("{")
    assert "summary.json: not a readable" in refusal(RMAAT.from_pretrained, tmp_path / "run")


def test_the_committed_card_is_what_its_run_gives():
    """`RMAAT.from_pretrained(folder).save_pretrained(folder)` updates it."""
    model = RMAAT.from_pretrained(COMMITTED)
    assert (COMMITTED / "README.md").read_text() == model_card(model.config, model.summary)


def test_a_card_that_cannot_be_made_does_not_end_the_export(run, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("metadata")

    monkeypatch.setattr("run.hub.model_card", fail)
    RMAAT.from_pretrained(run).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
    assert "README.md: not written" in capsys.readouterr().out
