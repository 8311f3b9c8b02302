"""What restarts say: exact where it can be counted, and against simulations."""

import itertools

import pytest
import record_restarts
import torch
from helpers import digits
from scipy import stats

from advlearn import zoo
from advlearn.evaluation import excluded, expected_accuracy, largest_gap, predict, unseen
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed, generator
from advlearn.threats import Linf


def fooled(chances, runs, seed=0):
    """(N, runs) bool, image i fooled with chance chances[i]."""
    return torch.rand(len(chances), runs, generator=generator(seed)) < chances[:, None]


# --- excluded -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 20, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_excluded_is_the_exact_bound_for_no_successes(n, confidence):
    limit = stats.binomtest(0, n, alternative="less").proportion_ci(confidence, "exact").high
    assert excluded(n, confidence) == pytest.approx(limit)


def test_excluded_is_the_rule_of_three():
    assert excluded(1000) * 1000 == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 5, "confidence": 1.0}, {"n": 5, "confidence": 0}])
def test_excluded_refuses(wrong):
    with pytest.raises(ValueError, match="excluded"):
        excluded(**wrong)


# --- largest_gap ----------------------------------------------------------------------------


def p_values(transform, n=200, k=20, times=1500):
    gen = generator(1)
    return [largest_gap(transform(torch.rand(n, generator=gen, dtype=torch.float64)), k)
            for _ in range(times)]  # fmt: skip


def test_exponential_tails_give_uniform_p_values():
    assert stats.kstest(p_values(lambda u: -u.log()), "uniform").pvalue > 0.01


def test_the_p_value_is_that_of_an_f_distribution():
    values = torch.tensor([9.0, 5.0, 4.0, 2.5, 2.0, 0.0], dtype=torch.float64)
    ratio = 4 / ((2 * 1 + 3 * 1.5 + 4 * 0.5) / 3)
    assert largest_gap(values, 4) == pytest.approx(stats.f.sf(ratio, 2, 6))


def test_only_the_tail_must_be_exponential():
    """Below the level the values may do what they like, and the scale does not matter."""
    p = p_values(lambda u: torch.where(u < 0.3, -7 * u.log(), -7 * torch.tensor(0.3).log() - 40 * u))
    assert stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("light", [lambda u: u, lambda u: 1 - u**2, lambda u: (-u.log()) ** 0.5])
def test_bounded_and_lighter_tails_are_rejected_less_often(light):
    p = torch.tensor(p_values(light))
    for level in (0.01, 0.05, 0.2):
        assert float((p < level).double().mean()) <= level


def test_heavy_tails_are_rejected_more_often():
    p = torch.tensor(p_values(lambda u: u**-1.0))
    assert float((p < 0.05).double().mean()) > 0.2


def test_one_that_stands_apart_is_found_and_a_group_is_not():
    values = -torch.rand(1000, generator=generator(2)).log()
    alone, group = values.clone(), values.clone()
    alone[7] = 30
    group[:9] += 30
    assert largest_gap(alone) < 1e-4 < 0.05 < largest_gap(values)
    assert largest_gap(group) > 0.05
    assert largest_gap(-alone) > 0.05


def test_ties():
    equal = torch.ones(60)
    assert largest_gap(equal) == 1
    equal[3] = 2
    assert largest_gap(equal) == 0


@pytest.mark.parametrize("k", [1, 10])
def test_largest_gap_refuses(k):
    with pytest.raises(ValueError, match="allowed are 2 to 9"):
        largest_gap(torch.rand(10, generator=generator(0)), k)


# --- expected_accuracy ----------------------------------------------------------------------


def test_expected_accuracy_is_the_mean_over_all_choices():
    matrix = fooled(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0, 0.3]), 7)
    for r, found in enumerate(expected_accuracy(matrix).tolist(), 1):
        choices = [(~matrix[:, list(c)].any(1)).double().mean()
                   for c in itertools.combinations(range(7), r)]  # fmt: skip
        assert found == pytest.approx(float(torch.stack(choices).mean()), abs=1e-12)


def test_its_last_value_is_the_accuracy_under_all_runs():
    matrix = fooled(torch.rand(300, generator=generator(3)) ** 6, 200)
    curve = expected_accuracy(matrix)
    assert float(curve[-1]) == pytest.approx(float((~matrix.any(1)).double().mean()))
    assert bool((curve.diff() <= 0).all()) and len(curve) == 200


# --- unseen ---------------------------------------------------------------------------------


def test_once_over_runs_is_what_the_last_run_brought():
    """Good's identity is exact: the images fooled only by the last run, over all orders of runs."""
    matrix = fooled(torch.rand(40, generator=generator(4)) ** 4, 6)
    only_last = [(matrix[:, r] & ~matrix[:, [s for s in range(6) if s != r]].any(1)).sum()
                 for r in range(6)]  # fmt: skip
    assert unseen(matrix).next_run == pytest.approx(float(torch.stack(only_last).double().mean()))


def test_remaining_is_chaos_number():
    matrix = torch.zeros(30, 10, dtype=torch.bool)
    matrix[:6, 3] = True
    matrix[6:8, :2] = True
    matrix[8] = True
    found = unseen(matrix)
    assert (found.once, found.twice) == (6, 2)
    assert found.remaining == pytest.approx(0.9 * 6 * 5 / (2 * 3))
    assert found.low <= found.remaining <= found.high


@pytest.mark.parametrize("easy, low", [(0, 0.8), (100, 0.2)], ids=["all alike", "mixed"])
def test_remaining_is_a_lower_bound_on_average(easy, low):
    """Close where all images are alike, and too small where easy ones are among them."""
    chances = torch.cat([torch.zeros(100), torch.full((200,), 0.04), torch.full((easy,), 0.2)])
    left, found, new = [], [], []
    for seed in range(60):
        matrix = fooled(chances, 20, seed)
        found.append(unseen(matrix, resamples=2).remaining)
        left.append(int((~matrix.any(1) & (chances > 0)).sum()))
        new.append(unseen(matrix, resamples=2).next_run)
    assert low < sum(found) / sum(left) < 1.05
    last = float((chances * (1 - chances) ** 19).sum())  # what run 20 brings on average
    assert sum(new) / 60 == pytest.approx(last, rel=0.1)


def test_the_interval_covers_chaos_number():
    matrix = fooled(torch.full((200,), 0.04), 20)
    found = unseen(matrix)
    assert 0 < found.low < found.remaining < found.high < 8 * found.remaining


def test_all_or_nothing_leaves_nothing():
    matrix = torch.tensor([[True] * 5, [False] * 5])
    assert unseen(matrix) == type(unseen(matrix))(0, 0, 0.0, 0.0, 0.0, 0.0)


def test_unseen_refuses_one_run():
    with pytest.raises(ValueError, match="at least 2"):
        unseen(torch.ones(3, 1, dtype=torch.bool))


# --- the tool that records very many --------------------------------------------------------


def test_the_recorded_ends_are_those_of_one_batch(monkeypatch):
    x, y = digits(3).tensors()
    f, ball = zoo.load_or_train("digits-small-natural", progress=False), Linf(0.2)
    whole = record_restarts.ends(f, x[:1], y[:1], 7, ball, runs=30, steps=10)
    monkeypatch.setattr(record_restarts, "BATCH", 8)
    losses, classes = record_restarts.ends(f, x[:1], y[:1], 7, ball, runs=30, steps=10)
    assert torch.allclose(losses, whole[0], rtol=1e-4) and torch.equal(classes, whole[1])
    assert losses.unique().numel() > 20 and not (classes == y[0]).any()
    start = cross_entropy(predict(f, ball.sample(x[:1], Keyed((0, 7), torch.zeros(1).long()))), y[:1])
    assert float(losses[0]) > float(start)


def test_the_recorded_numbers_and_histogram():
    losses = torch.cat([torch.linspace(1, 2, 80), torch.tensor([5.0])])
    classes = torch.tensor([3] * 80 + [4])
    numbers, picture = record_restarts.summary(losses, classes)
    assert numbers["low"] == 1 and numbers["high"] == 5 and numbers["classes"] == 2
    assert numbers["p_high"] < 1e-3 < 0.05 < numbers["p_low"]
    assert numbers["mean"] == pytest.approx(float(losses.mean()))
    assert sum(picture["counts"][3]) == 80 and picture["counts"][4][-1] == 1
