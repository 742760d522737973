"""Kills and signals at random moments: every one is resumed, the end is that of an unbroken run."""

from __future__ import annotations

import pytest
from campaigns import kill_campaign, term_campaign


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(tmp_path):
    result = kill_campaign(tmp_path, kills=30)
    assert {"step", "writing", "evaluation"} <= result["moments"].keys()


@pytest.mark.slow
def test_ten_signals_end_runs_in_order(tmp_path):
    term_campaign(tmp_path, signals=10)
