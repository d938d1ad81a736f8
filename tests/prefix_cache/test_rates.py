"""How long reading takes: learnt by depth, kept, and never a reason to fail."""

from __future__ import annotations

import stat

import pytest

from swaa_local.prefix_cache.rates import ReadingRates


def test_what_was_measured_is_what_is_estimated(tmp_path):
    rates = ReadingRates(tmp_path / "rates.json", "model")
    assert rates.estimate(0, 100) is None
    for depth in range(0, 8192, 512):
        rates.took(depth, 512, 512 * (0.01 if depth < 4096 else 0.03))
    assert rates.estimate(0, 4096) == pytest.approx(40.96)
    assert rates.estimate(4096, 8192) == pytest.approx(122.88)
    assert rates.estimate(8192, 16384) == pytest.approx(8192 * 0.03)  # of the nearest depth that is known
    rates.save()
    again = ReadingRates(tmp_path / "rates.json", "model")
    assert again.estimate(0, 8192) == pytest.approx(163.84)
    assert ReadingRates(tmp_path / "rates.json", "another model").estimate(0, 100) is None
    assert stat.S_IMODE((tmp_path / "rates.json").stat().st_mode) == 0o600


def test_a_new_measurement_counts_more_than_an_old_one(tmp_path):
    rates = ReadingRates(None, "model")
    for seconds in (10, 1, 1, 1):
        rates.took(0, 1000, seconds)
    assert 1 < rates.estimate(0, 1000) < 3
    rates.save()


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"model": 3}', '{"model": {"x": "y"}}', "\x00\xff"),
        *(f'{{"model": {{"6": {rate}}}}}' for rate in ("NaN", "Infinity", "-1", "0", "1" + "0" * 400)),
    ],
)
def test_a_damaged_file_is_no_knowledge(tmp_path, text):
    path = tmp_path / "rates.json"
    path.write_text(text)
    rates = ReadingRates(path, "model")
    assert rates.estimate(0, 100) is None
    rates.took(0, 100, 1.0)
    rates.save()
    assert ReadingRates(path, "model").estimate(0, 100) == pytest.approx(1.0)


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    rates = ReadingRates(tmp_path / "file" / "rates.json", "model")
    rates.took(0, 100, 1.0)
    rates.save()
