"""Bands of recorded numbers: exact quantiles, the promised coverage, and no say in what is recorded."""

import math
import random

import pytest

from advlearn import results
from advlearn.evaluation import interval
from advlearn.results import Row, band, compare, mean_interval, student


@pytest.mark.parametrize(
    ("tail", "dof", "t"),  # Tables of Student's distribution.
    [(0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 3, 3.182), (0.05, 4, 2.776), (0.05, 9, 2.262),
     (0.001, 2, 31.599), (0.001, 5, 6.869), (0.01, 30, 2.750), (0.05, 120, 1.980)],
)  # fmt: skip
def test_quantiles_of_student(tail, dof, t):
    assert student(tail, dof) == pytest.approx(t, rel=5e-4)


def runs(*values, numbers=1):
    """Recorded runs of which the first number has these values."""
    others = {f"other {i}": 0.5 for i in range(numbers - 1)}
    return [{"values": {"a": value, **others}} for value in values]


def test_band_by_hand():
    b = band(runs(0.8, 0.9, 1.0), "a")
    assert (b.mean, b.seeds) == (pytest.approx(0.9), 3)
    half = 4.303 * 0.1 * (4 / 3) ** 0.5
    assert (b.low, b.high) == (pytest.approx(0.9 - half, rel=1e-3), pytest.approx(0.9 + half, rel=1e-3))
    assert b.far == pytest.approx(half, rel=1e-3)
    assert band(runs(0.8, 0.9), "a") is None
    assert band(runs(0.8, 0.9, 1.0), "b") is None


def test_bands_cover_what_they_promise():
    """One number alone in 95 of 100 runs; all twenty of a run together in at least 95 of 100."""
    draw, alone, together = random.Random(0), 0, 0
    for _ in range(2000):
        sample = [{"values": {str(k): draw.gauss(0, 1) for k in range(20)}} for _ in range(4)]
        new, bands = sample[3]["values"], [band(sample[:3], str(k)) for k in range(20)]
        alone += bands[0].low <= new["0"] <= bands[0].high
        together += all(new[str(k)] in b for k, b in enumerate(bands))
    assert 0.935 <= alone / 2000 <= 0.965
    assert 0.94 <= together / 2000 <= 0.975


def test_the_table_judges_a_row_alone_and_the_check_all_together():
    recorded = runs(0.89, 0.90, 0.91, numbers=30)
    b = band(recorded, "a")
    value = b.high + 0.01
    assert value in b
    table = compare([Row("a row", "a", value), Row("another", "a", 0.9)], recorded)
    assert [row[-1] for row in table.rows] == ["NO", "yes"]
    assert b.mean + 1.01 * b.far not in b
    assert b.mean - 1.01 * b.far not in b


def test_no_band_while_a_run_is_recorded(monkeypatch):
    monkeypatch.setenv("ADVLEARN_RECORDING", "1")
    assert band(runs(0.8, 0.9, 1.0), "a") is None


def test_the_interval_of_a_mean_by_hand():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees of freedom; the deviation is 1
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-5)
    assert mean_interval([2.5])[0] == 2.5 and all(map(math.isnan, mean_interval([2.5])[1:]))


def test_the_interval_of_a_mean_covers_what_it_promises():
    rng = random.Random(0)
    hits = [mean_interval([rng.gauss(5, 2) for _ in range(4)]) for _ in range(4000)]
    share = sum(low <= 5 <= high for _, low, high in hits) / 4000
    assert abs(share - 0.95) < 0.015


def test_seeds_that_agree_show_no_spread():
    b = band(runs(0.0, 0.0, 0.0), "a")
    assert (b.mean, b.low, b.high) == (0, 0, 0) and 0.001 in b and 0.05 not in b
    (line,) = compare([Row("all at 0", "a", 0.001)], runs(0.0, 0.0, 0.0)).rows
    assert line[2] == "0.0 %" and line[4] == "–"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setattr(results.storage, "shipped", lambda: tmp_path)
    (tmp_path / "results").mkdir()
    results.store("some", [
        {"profile": "cpu", "seed": seed, "kind": kind, "images": n, "values": {"a": a}}
        for seed, kind, n, a in ((0, "x", 10, 0.5), (1, "x", 10, 0.7), (2, "x", 10, 0.6),
                                 (0, "y", 10, 0.25), (0, "y", 20, 0.3))
    ], ("seed", "kind", "images"))  # fmt: skip


def test_recorded_runs_are_chosen_by_their_fields(shelf):
    assert len(results.recorded("some")) == 5
    assert [r["seed"] for r in results.recorded("some", "cpu", kind="x")] == [0, 1, 2]
    assert results.recorded("some", "gpu") == results.recorded("some", kind="z") == []
    assert len(results.recorded("some", eps=None)) == 5, "a field that a run lacks is None"
    assert results.recorded("none") == []


def test_over_seeds(shelf):
    assert results.over_seeds("some", "a", kind="x") == ("60.0 [50.0, 70.0]", 3)
    assert results.over_seeds("some", "a", n=100, kind="x") == ("60.0 [50.0, 70.0]", 3)
    assert results.over_seeds("some", "a", kind="y", images=20) == ("30.0", 1)
    low, high = interval(300, 1000)
    assert results.over_seeds("some", "a", n=1000, kind="y", images=20) == (
        f"30.0 ± {50 * (high - low):.1f}", 1)  # fmt: skip
    assert results.over_seeds("some", "b", kind="x") == ("not recorded yet", 0)
    with pytest.raises(ValueError, match="several runs of one seed"):
        results.over_seeds("some", "a", kind="y")
