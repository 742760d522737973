"""The notebook: its cells run, agree with its text, and are committed with outputs."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT

NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
CELLS = [
    cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
]


@pytest.fixture(scope="module")
def executed():
    """Run all cells in order in the notebook's folder; return the names that they define."""
    threads, names, shown = torch.get_num_threads(), {"__name__": "__main__"}, []
    with pytest.MonkeyPatch.context() as patch, plt.rc_context():
        patch.chdir(NOTEBOOK.parent)
        patch.setattr(sys, "path", list(sys.path))
        patch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=shown.append))
        plt.switch_backend("Agg")
        patch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
        for cell in CELLS:
            exec("".join(cell["source"]), names)
    plt.close("all")
    torch.set_num_threads(threads)
    return names | {"shown": shown}


def test_every_cell_was_run_in_order_and_is_small():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert not [o for cell in CELLS for o in cell["outputs"] if o["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 400_000


def test_every_picture_is_committed(executed):
    pictures = [o for cell in CELLS for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) == len(executed["shown"]) >= 5


def test_outputs_agree_with_the_text(executed):
    assert executed["difference"] < 1e-9 < 1e-3 < executed["control"]
    bptt, amrb = executed["memory"]["BPTT"], executed["memory"]["AMRB"]
    assert bptt[-1] > 10 * bptt[0] and amrb[-1] < 1.5 * amrb[0]
    assert executed["answer"] == 9
    lost = executed["lost"]
    assert executed["tokens"][max(lost, key=lost.get)] == "9"
