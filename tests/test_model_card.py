"""Weights to share: what a run's folder, `save_pretrained` and `push_to_hub` write beside them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT, refusal, tiny_config
from huggingface_hub import ModelCard, hub_mixin

from model import RMAAT, build_model
from run import checkpoint
from run.hub import model_card
from train import train

COMMITTED = ROOT / "results/listops/rmaat"


@pytest.fixture(scope="module")
def run(tmp_path_factory, listops_dir):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(data_dir=str(listops_dir), output_dir=str(folder), run_name="shared")
    train(config)
    return config.run_dir


def metrics(card: ModelCard) -> dict[str, float]:
    """Accuracies by split, as the hub reads the `model-index`."""
    assert all(r.metric_type == "accuracy" for r in card.data.eval_results)
    return {result.dataset_split: result.metric_value for result in card.data.eval_results}


def test_a_finished_run_has_a_card_with_its_own_figures(run):
    card = ModelCard.load(run / "README.md")
    summary = json.loads((run / "summary.json").read_text())
    assert metrics(card) == {
        "test": summary["test_accuracy"], "validation": summary["best_val_accuracy"]
    }
    assert (card.data.license, card.data.model_name) == ("mit", "shared")
    assert f"{100 * summary['test_accuracy']:.1f} %, standard error" in card.text
    for text in (summary["command"], summary["versions"]["commit"], "generated", "dim: 16",
                 "@inproceedings", "2601.00426", "| seeds | one, 0 |", "## Limits"):
        assert text in card.text, text
    assert str(run.parent) not in card.content  # where it lay is nobody's concern


def test_weights_and_card_come_back_from_a_round_trip(run, tmp_path):
    model = RMAAT.from_pretrained(run)
    model.save_pretrained(tmp_path / "again")
    again = RMAAT.from_pretrained(tmp_path / "again")
    assert again.summary == json.loads((run / "summary.json").read_text())
    assert (tmp_path / "again/README.md").read_text() == (run / "README.md").read_text()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_the_hub_gets_weights_configuration_and_card(run, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    RMAAT.from_pretrained(run).push_to_hub("somebody/model")
    pushed = tmp_path / "somebody/model"
    assert {path.name for path in pushed.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "summary.json"
    }
    assert (pushed / "README.md").read_text() == (run / "README.md").read_text()


def test_weights_of_no_finished_run_claim_no_accuracy(tmp_path):
    build_model(tiny_config()).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "Not known" in card.text
    assert RMAAT.from_pretrained(tmp_path).summary is None


def test_a_damaged_summary_is_told_in_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/summary.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=r"summary\.json: not a readable"):
        RMAAT.from_pretrained(tmp_path / "run")

def test_from_pretrained_takes_a_configuration_or_single_keys(run):
    config = RMAAT.from_pretrained(run).config
    changed = RMAAT.from_pretrained(run, config=config, precision="bfloat16")
    assert changed.config == config.model_copy(update={"precision": "bfloat16"})
    assert RMAAT.from_pretrained(run, config={"precision": "float16"}).precision == "float16"
    assert RMAAT.from_pretrained(run, torch_dtype=torch.float64).memory.dtype == torch.float64


def test_what_from_pretrained_cannot_load_is_refused_in_one_line(run, tmp_path):
    assert "holds no config.json" in refusal(RMAAT.from_pretrained, tmp_path)
    assert "another model's" in refusal(lambda: RMAAT.from_pretrained(run, num_layers=1))
    assert "unknown key colour" in refusal(lambda: RMAAT.from_pretrained(run, colour=1))


@pytest.mark.parametrize("origin", ["incomplete", "unknown"])
def test_the_card_passes_on_what_is_known_of_the_data(run, origin):
    model = RMAAT.from_pretrained(run)
    card = model_card(model.config, {**model.summary, "data": origin})
    assert f"| data | {origin}; " in card and "not tested on the complete" in card


def test_the_committed_card_is_what_its_run_gives():
    """If it is not: `RMAAT.from_pretrained(folder).save_pretrained(folder)`."""
    model = RMAAT.from_pretrained(COMMITTED)
    assert (COMMITTED / "README.md").read_text() == model_card(model.config, model.summary)
