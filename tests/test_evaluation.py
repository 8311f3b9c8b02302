import json
import math
from functools import partial

import pytest
import torch
from helpers import Opposed, digits, mixed_network, same_state, state_of, uniform01
from scipy import stats
from torch import nn

from advlearn import models, zoo
from advlearn.attacks import fgsm, from_center, pgd
from advlearn.evaluation.judge import (
    MISTAKE,
    STANDS,
    accuracy,
    interval,
    paired,
    predict,
    worst_case,
)
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed
from advlearn.threats import L1, L2, Linf


def net():
    return zoo.load_or_train("digits-small-natural", progress=False)


def start_only(f, x, y, threat, *, start):
    return start


# --- intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize("k, n", [(0, 1), (0, 10), (1, 10), (7, 10), (10, 10), (9500, 10_000)])
def test_interval_is_wilsons(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = interval(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1


def test_interval_known_value_and_bad_arguments():
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    for k, n in ((1, 0), (-1, 10), (11, 10)):
        with pytest.raises(ValueError, match=rf"interval: {k} successes in {n} trials"):
            interval(k, n)


def test_paired():
    a = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    b = torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.bool)
    d = [0, 1, 0, 0, 0, 0, 1, 0]
    half = 1.959964 * math.sqrt(sum((v - 0.25) ** 2 for v in d) / 7 / 8)
    assert paired(a, b) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-6)
    assert paired(b, a) == pytest.approx((-0.25, -0.25 - half, -0.25 + half), abs=1e-6)
    assert paired(a, a) == (0, 0, 0)
    separate = 1.96 * math.sqrt(0.75 * 0.25 / 8 + 0.5 * 0.5 / 8)
    assert half < separate, "pairing removes what both share"
    for bad in ((a, b[:3]), (a[:1], b[:1]), (a[None], b[None])):
        with pytest.raises(ValueError, match="paired: shapes"):
            paired(*bad)


# --- accuracy and predict -------------------------------------------------------------------


def test_accuracy_counts():
    f, x = Opposed().float(), uniform01(10, 1, 4, 4, dtype=torch.float32)
    y = f(x).argmax(1)
    y[:3] = 2
    for batch_size in (1, 3, 256):
        assert accuracy(f, x, y, batch_size) == 0.7


def test_predict_is_eval_mode_full_precision_and_leaves_the_model():
    f = mixed_network().float()
    before = state_of(f)
    x = uniform01(6, 1, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = predict(f, x, 4)
    assert logits.dtype == torch.float32 and torch.allclose(logits, predict(f, x, 1), atol=1e-6)
    assert same_state(state_of(f), before) and not logits.requires_grad
    logits += 1  # an ordinary tensor, not one of inference mode


class Caches(nn.Module):
    """Builds something at its first call, as lazy layers and position codes do."""

    def __init__(self):
        super().__init__()
        self.head, self.codes = nn.Linear(4, 2), None

    def forward(self, x):
        if self.codes is None:
            self.codes = torch.ones(4)
        return self.head(x.flatten(1) * self.codes)


def test_a_network_that_caches_can_be_trained_after_a_prediction():
    f = Caches()
    predict(f, torch.zeros(2, 1, 2, 2))
    f(torch.ones(2, 1, 2, 2)).sum().backward()
    assert f.head.weight.grad is not None


# --- worst_case -----------------------------------------------------------------------------


def constant(value):
    return lambda f, x, y, threat, *, start: torch.full_like(x, value)


class ThreeClasses(nn.Module):
    """At 0.6 the prediction is wrong with a small loss; at 0.9 it is right with a larger loss.

    Logits (true, rival, others …): at 0.6 (0, 0.1, −9, −9); at 0.9 (0, −0.1, −0.1, −0.1).
    """

    def forward(self, x):
        v = x.flatten(1)[:, :1]
        start = torch.tensor([2.0, 0.0, 0.0, 0.0])
        near, far = torch.tensor([0.0, 0.1, -9.0, -9.0]), torch.tensor([0.0, -0.1, -0.1, -0.1])
        return torch.where(v < 0.55, start, torch.where(v < 0.75, near, far))


def keep_the_largest_loss(f, x, y, attacks, threat):
    """The mistake: judge only the restart with the largest loss of each example."""
    best, image = torch.full((len(x),), -math.inf), x.clone()
    for attack in attacks:
        z = attack(f, x, y, threat, start=None)
        loss = cross_entropy(f(z), y)
        better = loss > best
        best, image[better] = torch.where(better, loss, best), z[better]
    return float((f(image).argmax(1) == y).double().mean())


@pytest.mark.parametrize("order", [(0.6, 0.9), (0.9, 0.6)])
def test_restarts_count_wrong_predictions_and_not_losses(order):
    f, x, y = ThreeClasses(), torch.full((5, 1, 1, 1), 0.5), torch.zeros(5, dtype=torch.int64)
    attacks = [constant(v) for v in order]
    assert accuracy(f, x, y) == 1
    near, far = (cross_entropy(f(torch.full_like(x, v)), y)[0] for v in (0.6, 0.9))
    assert far > near, "the correct prediction has the larger loss"
    result = worst_case(f, x, y, Linf(0.5), attacks)
    assert result.accuracy == 0 and result.fooled_by.tolist() == [order.index(0.6)] * 5
    assert keep_the_largest_loss(f, x, y, attacks, Linf(0.5)) == 1, "the planted mistake sees nothing"


def test_later_restarts_do_not_overwrite_earlier_successes():
    f, x, y = ThreeClasses(), torch.full((3, 1, 1, 1), 0.5), torch.zeros(3, dtype=torch.int64)
    x[1] = 0.0
    seen = []

    def watching(f, x, y, threat, *, start):
        seen.append(x.flatten().tolist())
        return x

    def first_only(f, x, y, threat, *, start):
        return torch.where(x > 0.2, 0.6, x)

    result = worst_case(f, x, y, Linf(0.5), {"a": first_only, "b": watching})
    assert seen == [[0.0]], "only what still stands is attacked"
    assert result.fooled_by.tolist() == [0, STANDS, 0] and result.correct.tolist() == [False, True, False]
    assert result.trace == pytest.approx((1, 1 / 3, 1 / 3))


def test_result_fields():
    f, (x, y) = net(), digits(120).tensors()
    attacks = {"fgsm": fgsm, "pgd": partial(pgd, steps=5, step_size=0.03),
               "again": partial(pgd, steps=5, step_size=0.03)}  # fmt: skip
    result = worst_case(f, x, y, Linf(0.1), attacks, seed=3)
    clean = predict(f, x).argmax(1) == y
    assert result.n == 120 and result.names == ("fgsm", "pgd", "again") and result.seed == 3
    assert result.clean_accuracy == float(clean.double().mean()) == result.trace[0]
    assert result.accuracy == result.trace[-1] == float(result.correct.double().mean())
    assert len(result.trace) == 4 and all(a >= b for a, b in zip(result.trace, result.trace[1:], strict=False))
    assert result.interval == interval(int(result.correct.sum()), 120)
    assert result.seconds > 0 and result.threat == Linf(0.1)
    assert torch.equal(result.correct, result.fooled_by == STANDS)
    assert torch.equal(~clean, result.fooled_by == MISTAKE)
    assert torch.equal(result.x_adv[result.fooled_by < 0], x[result.fooled_by < 0])
    fooled = result.fooled_by >= 0
    assert 0 < fooled.sum() < 120 and (predict(f, result.x_adv).argmax(1) != y)[fooled].all()
    assert Linf(0.1).contains(result.x_adv, x).all()
    for i in range(3):
        standing = clean & ~((result.fooled_by >= 0) & (result.fooled_by <= i))
        assert result.trace[i + 1] == pytest.approx(float(standing.double().mean()))
    text = json.loads(json.dumps(result.to_dict()))
    assert text["accuracy"] == result.accuracy and text["threat"] == "ℓ∞, ε = 0.1"
    assert text["n"] == 120 and text["attacks"] == ["fgsm", "pgd", "again"] and text["seed"] == 3
    assert (text["low"], text["high"]) == result.interval
    assert "of 120 images survive 3 attacks (ℓ∞, ε = 0.1; clean" in repr(result)
    assert result == result and result != worst_case(f, x, y, Linf(0.1), attacks, seed=3)


@pytest.mark.parametrize("kind, eps", [(Linf, 0.1), (L2, 0.7), (L1, 2.0)])
def test_nothing_depends_on_batch_size_survivors_or_order(kind, eps):
    f, (x, y) = net().double(), digits(16).tensors()
    x, index = x.double(), torch.arange(16) * 7
    attack = partial(pgd, steps=3, step_size=eps / 4)
    whole = worst_case(f, x, y, kind(eps), [attack] * 2, index=index)
    for size in (1, 5):
        other = worst_case(f, x, y, kind(eps), [attack] * 2, index=index, batch_size=size)
        assert torch.equal(other.fooled_by, whole.fooled_by)
        assert torch.allclose(other.x_adv, whole.x_adv, atol=1e-9)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    other = worst_case(f, x[order], y[order], kind(eps), [attack] * 2, index=index[order])
    assert torch.equal(other.fooled_by, whole.fooled_by[order])
    assert not torch.equal(worst_case(f, x, y, kind(eps), [attack] * 2).x_adv, whole.x_adv)


def test_starts_depend_on_seed_position_and_index_alone():
    f, x = Opposed().float(), 0.3 + 0.4 * uniform01(12, 1, 4, 4, dtype=torch.float32)
    y = f(x).argmax(1)
    starts = []

    def record(f, x, y, threat, *, start):
        starts.append((x.clone(), start.clone()))
        return x

    threat, index = Linf(0.05), torch.arange(100, 112)
    worst_case(f, x, y, threat, [record, record], seed=5, index=index)
    (_, first), (_, second) = starts
    assert torch.equal(first, threat.sample(x, Keyed((5, 0), index)))
    assert torch.equal(second, threat.sample(x, Keyed((5, 1), index)))
    assert not torch.equal(first, second)

    def fool_even(f, x, y, threat, *, start):
        even = (torch.arange(len(x)) % 2 == 0).view(-1, 1, 1, 1)
        return torch.where(even, 1 - x, x)  # mirrored at 1/2: the other class

    starts.clear()
    worst_case(f, x, y, Linf(1.0), [fool_even, record], seed=5, index=index)
    (left, start), = starts
    assert torch.equal(left, x[1::2])
    assert torch.equal(start, Linf(1.0).sample(x, Keyed((5, 1), index))[1::2])


def test_more_attacks_never_leave_more():
    f, (x, y) = net(), digits(80).tensors()
    attack = partial(pgd, steps=4, step_size=0.03)
    one, four = (worst_case(f, x, y, Linf(0.08), [attack] * n) for n in (1, 4))
    assert one.trace == four.trace[:2] and four.accuracy <= one.accuracy
    assert (one.correct | ~four.correct).all()


def test_one_radius_per_example():
    f, (x, y) = net(), digits(50).tensors()
    eps = torch.linspace(0, 0.3, 50)
    result = worst_case(f, x, y, Linf(eps), [fgsm], batch_size=9)
    assert ((result.x_adv - x).abs().amax((1, 2, 3)) <= eps + 1e-6).all()
    assert result.fooled_by[0] in (STANDS, MISTAKE)
    alone = [int(worst_case(f, x[[i]], y[[i]], Linf(float(eps[i])), [fgsm]).fooled_by) for i in (10, 30, 49)]
    assert alone == result.fooled_by[[10, 30, 49]].tolist()


def test_arguments_and_network_are_left_alone():
    f = mixed_network()
    x, y = uniform01(20, 1, 8, 8), torch.arange(20) % 10
    before, copies = state_of(f), (x.clone(), y.clone())
    result = worst_case(f, x, y, L2(0.5), [fgsm, from_center(fgsm)])
    assert same_state(state_of(f), before) and all(map(torch.equal, (x, y), copies))
    assert result.x_adv.data_ptr() != x.data_ptr()


def test_no_example_left():
    f, x = Opposed().float(), uniform01(4, 1, 4, 4, dtype=torch.float32)
    result = worst_case(f, x, torch.full((4,), 2), Linf(0.1), [fgsm, fgsm])
    assert result.trace == (0, 0, 0) and result.fooled_by.tolist() == [MISTAKE] * 4
    assert worst_case(f, x, f(x).argmax(1), Linf(0.1), []).accuracy == 1


# --- what attacks may not do ----------------------------------------------------------------


def returns(change):
    def attack(f, x, y, threat, *, start):
        return change(x)

    return attack


def nan_at(i):
    def change(x):
        z = x.clone()
        z[i, 0, 0, 0] = math.nan
        return z

    return change


@pytest.mark.parametrize("change, message", [
    (lambda x: x + 0.2, r"attack 'bad': its output for image 2 leaves the set \(ℓ∞, ε = 0.1\)"),
    (lambda x: x - 0.2, "its output for image 2 leaves the set"),
    (nan_at(3), "attack 'bad': its output for image 6 is not finite"),
    (lambda x: x[:-1], r"attack 'bad' returned \(5, 1, 4, 4\), expected shape \(6, 1, 4, 4\)"),
    (lambda x: x[..., 0], r"returned \(6, 1, 4\), expected shape"),
    (lambda x: None, "attack 'bad' returned NoneType"),
])  # fmt: skip
def test_what_attacks_return_is_judged(change, message):
    f = Opposed().float()
    x = 0.3 + 0.4 * uniform01(8, 1, 4, 4, dtype=torch.float32)
    y = f(x).argmax(1)
    y[[0, 3]] = 2  # wrong already; row 2 of those that stand is image 4, row 3 is image 5 …
    standing = (f(x).argmax(1) == y).nonzero()[:, 0].tolist()
    message = message.replace("image 2", f"image {standing[0]}").replace("image 6", f"image {standing[3]}")
    with pytest.raises(ValueError, match=message):
        worst_case(f, x, y, Linf(0.1), {"bad": returns(change)})


def test_an_attack_cannot_move_the_judge():
    """Editing its own copies of x, y and ε in place must not make a cheat pass."""
    f = Opposed().float()
    x = 0.3 + 0.4 * uniform01(8, 1, 4, 4, dtype=torch.float32)
    y, eps = f(x).argmax(1), torch.full((8,), 0.01)

    def edits_x(f, x, y, threat, *, start):
        return x.copy_(1 - x)

    def edits_eps(f, x, y, threat, *, start):
        threat.eps.fill_(1)
        return 1 - x

    def edits_y(f, x, y, threat, *, start):
        y.fill_(2)
        return x

    for attack in (edits_x, edits_eps):
        with pytest.raises(ValueError, match="leaves the set"):
            worst_case(f, x, y, Linf(eps), [attack])
    assert worst_case(f, x, y, Linf(eps), [edits_y]).accuracy == 1
    assert torch.equal(eps, torch.full((8,), 0.01))


def test_other_float_types_and_rounding_are_accepted():
    f = Opposed().float()
    x = uniform01(8, 1, 4, 4, dtype=torch.float32)
    x[0] = 1
    y = f(x).argmax(1)

    def in_double(f, x, y, threat, *, start):
        return (x.double() + threat.eps).clamp(max=1 + 1e-7)

    result = worst_case(f, x, y, Linf(1.0), [in_double, in_double])
    assert result.x_adv.dtype == x.dtype and accuracy(f, result.x_adv, y) == result.accuracy
    assert result.accuracy < 1


def test_an_attack_that_leaves_train_mode_does_not_change_verdicts():
    f = mixed_network()
    f.eval()
    x = uniform01(30, 1, 8, 8)
    y = predict(f, x).argmax(1)

    def to_train(f, x, y, threat, *, start):
        f.train()
        return x

    assert worst_case(f, x, y, Linf(0.1), [to_train, to_train]).accuracy == 1


# --- random networks ------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, sigma):
        super().__init__()
        self.f, self.sigma, self.gen = Opposed(), sigma, torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.f(x + self.sigma * torch.randn(x.shape, generator=self.gen, dtype=x.dtype))


def test_random_networks_are_refused_or_judged_by_votes():
    f, x = Noisy(0.5), 0.3 + 0.4 * uniform01(200, 1, 4, 4)
    y = f.f(x).argmax(1)
    with pytest.raises(ValueError, match=r"two predictions of the same images differ.*votes=n"):
        worst_case(f, x, y, Linf(0.1), [start_only])
    lucky = partial(worst_case, f, x, y, Linf(0.0), [start_only] * 5)  # ε = 0 can fool nobody
    few, many = lucky(votes=3), lucky(votes=101)
    assert few.accuracy < many.accuracy and many.clean_accuracy > few.clean_accuracy
    assert worst_case(f.f, x, y, Linf(0.0), [start_only], votes=3).accuracy == 1


def test_one_function_attack_and_plain_functions_as_networks():
    f = models.linear((1, 4, 4), 3)
    x = uniform01(5, 1, 4, 4, dtype=torch.float32)
    y = f(x).argmax(1)
    result = worst_case(lambda x: f(x), x, y, Linf(0.3), (fgsm,))
    assert result.names == ("fgsm",) and result.accuracy <= 1
