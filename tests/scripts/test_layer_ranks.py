"""`scripts/layer_ranks.py`: rank correlation against published values, and a run on the bundled model."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from layer_ranks import in_common, ranks, spearman
from swaa_local.needle.model import bundled_model
from tests.support.program import ROOT, environment


def test_ranks_share_their_places_where_values_are_equal():
    assert ranks([0.3, 0.1, 0.2]) == [1, 3, 2]
    assert ranks([1.0, 2.0, 2.0, 0.0]) == [3, 1.5, 1.5, 4]


def test_spearmans_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # IQ and hours of television of ten people, a textbook example: -29/165.
    iq = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_the_best_in_common():
    assert in_common([5, 4, 1, 0], [4, 0, 5, 1], 2) == 1
    assert in_common([5, 4, 1, 0], [5, 4, 0, 1], 2) == 2


@pytest.mark.usefixtures("engine")
def test_it_ranks_and_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "layer_ranks.py"), str(bundled_model())]
    command += ["--length", "4096", "--window", "256", "--texts", "1", "--kinds", "statements", "-t", "1"]
    env = environment()
    first = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert re.search(r"short and long: rank correlation -?\d\.\d\d; of the best 1, [01] are the same", first)
    log = (tmp_path / "needle.ranks.jsonl").read_bytes()
    assert log.count(b'"kind": "trial"') == 2 * 9
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert again == first
    assert (tmp_path / "needle.ranks.jsonl").read_bytes() == log
