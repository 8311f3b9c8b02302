"""The checkers of chapter 4's exercises accept what is right and name every planted mistake."""

import math
from functools import partial

import pytest
import torch
from scipy import stats

from advlearn import models, zoo
from advlearn.attacks import pgd, toward
from advlearn.data import load
from advlearn.evaluation import expected_accuracy, interval, predict, unseen
from advlearn.exercises import (
    agreement,
    check_choices,
    check_decoy,
    check_excluded,
    check_fence,
    check_forecast,
    check_start_angle,
    check_summit,
    equal_restarts,
    fence,
    shares,
)
from advlearn.losses import cross_entropy
from advlearn.tensors import generator, norms
from advlearn.threats import Linf


def stub(*args, **kwargs):
    raise NotImplementedError


def named(check, wrong, message):
    report = check(wrong)
    assert not report and message in str(report), report


# --- what agreement excludes --------------------------------------------------------------------


def by_beta(hits, n, confidence):
    """Clopper and Pearson by quantiles of a beta distribution."""
    return 1.0 if hits == n else float(stats.beta.ppf(confidence, hits + 1, n - hits))


def by_binomials(hits, n, confidence):
    """Plain binomial coefficients, as floats."""
    return by_beta(hits, n, confidence) * float(math.comb(n, hits)) / float(math.comb(n, hits))


def without_the_end(hits, n, confidence):
    return by_beta(hits, n, confidence) if hits < n else 0.999


def wald(hits, n, confidence):
    p = hits / n
    return p + float(stats.norm.ppf(confidence)) * (p * (1 - p) / n) ** 0.5


LIMITS = {
    "is the estimate, and the truth is larger": lambda k, n, c: k / n,
    "3 / n is the rule": lambda k, n, c: 3 / n,
    "log(1/α) / n is the bound": lambda k, n, c: -math.log(1 - c) / n,
    "the normal approximation": wald,
    "Wilson's interval": lambda k, n, c: interval(k, n)[1],
    "α / 2 is for an interval": lambda k, n, c: by_beta(k, n, 1 - (1 - c) / 2),
    "α and 1 − α are exchanged": lambda k, n, c: by_beta(k, n, 1 - c),
    "it is P(at most hits)": lambda k, n, c: by_beta(k - 1, n, c) if k else 0.0,
    "the lower limit": lambda k, n, c: by_beta(k - 1, n, 1 - c) if k else 0.0,
    "in percent": lambda k, n, c: 100 * by_beta(k, n, c),
    "what is not excluded, 1 − p": lambda k, n, c: 1 - by_beta(k, n, c),
    "at most 3 hits have a probability of": lambda k, n, c: by_beta(k, n, c) * (1 + k / 50),
    "OverflowError": by_binomials,
    "is no share": lambda k, n, c: by_beta(k, n, c) if n < 10_000 else math.nan,
    "hits alone exclude no chance": without_the_end,
    "wanted a number": lambda k, n, c: (0.0, by_beta(k, n, c)),
}  # fmt: skip


@pytest.mark.parametrize("right", [by_beta, lambda *a: torch.tensor(by_beta(*a)).double(),
                                   lambda *a: shares.limit(a[0], a[1], 1 - a[2])])  # fmt: skip
def test_exact_limits_pass(right):
    assert check_excluded(right), check_excluded(right)


@pytest.mark.parametrize("message", LIMITS)
def test_a_wrong_limit_is_named(message):
    named(check_excluded, LIMITS[message], message)


def test_the_limit_covers_the_share_above_the_jth_end_of_any_distribution():
    """Ends with ties: the statement to be proved holds, and would not for a smaller limit."""
    n, j, c, times = 30, 3, 0.9, 4_000
    ends = (8 * torch.rand(times, n, generator=generator(0)) ** 3).floor()
    values = torch.arange(8.0)
    above = 1 - ((values + 1) / 8) ** (1 / 3)  # P(V > v) for v = 0 … 7.
    third = ends.sort(descending=True).values[:, j - 1].long()
    holds = (above[third] <= shares.limit(j - 1, n, 1 - c)).double().mean()
    assert holds >= c - 0.01
    smooth = torch.rand(times, n, generator=generator(1)).sort(descending=True).values[:, j - 1]
    assert float((1 - smooth <= shares.limit(j - 1, n, 1 - c)).double().mean()) == pytest.approx(
        c, abs=0.02)  # fmt: skip


# --- any r of R runs ----------------------------------------------------------------------------


def by_gamma(fooled):
    """The same with logarithms of factorials."""
    runs = fooled.shape[1]
    left = (runs - fooled.sum(1, keepdim=True)).double()
    r = torch.arange(1, runs + 1, dtype=torch.float64)

    def choose(n, r):
        return torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma((n - r).clamp(min=0) + 1)

    logs = choose(left, r) - choose(torch.tensor(float(runs)).double(), r)
    return torch.where(r <= left, logs.exp(), 0).mean(0)


def of_zero(fooled):
    """0 where it should be nothing: 0 choices of 0."""
    curve = expected_accuracy(fooled)
    return curve.masked_fill(torch.arange(1, len(curve) + 1) > 1_000, torch.nan)


def edits(fooled):
    curve = expected_accuracy(fooled)
    fooled.logical_not_()
    return curve


def share(fooled):
    return fooled.double().mean(1, keepdim=True)


def r_of(fooled):
    return torch.arange(1, fooled.shape[1] + 1, dtype=torch.float64)


CURVES = {
    "the runs in the order of the table": lambda v: (~v).cumprod(1).double().mean(0),
    "draws with replacement": lambda v: ((1 - share(v)) ** r_of(v)).mean(0),
    "the mean of k comes last": lambda v: (1 - share(v).mean()) ** r_of(v),
    "r begins at 0": lambda v: torch.cat([torch.ones(1).double(), expected_accuracy(v)])[:-1],
    "the share that has fallen": lambda v: 1 - expected_accuracy(v),
    "only if all r runs fool it": lambda v: 1 - expected_accuracy(~v),
    "the number of images": lambda v: len(v) * expected_accuracy(v),
    "the accuracy under all runs, for every r": lambda v: (~v.any(1)).double().mean().expand(
        v.shape[1]),
    "nan for 1001 of 5000 runs": of_zero,
    "wanted float64": lambda v: expected_accuracy(v).float(),
    "wanted one accuracy for each": lambda v: expected_accuracy(v)[:, None],
    "edited in place": edits,
    "it is 0.": lambda v: expected_accuracy(v[1:]),
    "another order give another curve": lambda v: (expected_accuracy(v)
                                                   + (~v).cumprod(1).double().mean(0)) / 2,
}  # fmt: skip


@pytest.mark.parametrize("right", [expected_accuracy, by_gamma])
def test_the_mean_over_choices_passes(right):
    assert check_choices(right), check_choices(right)


@pytest.mark.parametrize("message", CURVES)
def test_a_wrong_curve_is_named(message):
    named(check_choices, CURVES[message], message)


# --- agreed, and wrong --------------------------------------------------------------------------


def mean_change(z):
    return ((z - 0.5) / 0.3).flatten(1).mean(1)


def hidden(z, fence=-1.0, slope=1.0, way=0.9, first=0.0):
    """A decoy that ends at `fence`, and a hill with a small slope before its steep end."""
    s = mean_change(z)
    hill = torch.maximum(slope * s - 10, 50 * (s - way))
    return torch.stack([0 * s + first, fence - 2 - 2 * s, hill], 1)


def by_corner(z):
    """The same in other words: distances to two opposite corners, the classes exchanged."""
    low = (z - 0.2).flatten(1).mean(1) / 0.6
    hill = 20 * torch.relu(10 * low - 9) - 9 + low
    return torch.stack([torch.zeros_like(low), hill, -1 - 4 * low], 1)


def needle(z):
    """The chapter's range: nobody finds its summit, whoever is sent."""
    u = (z - 0.5).flatten(1) / 0.3
    ground = u.abs().mean(1) - 3
    top = 5 * (1 - u.abs().amax(1) / 0.05)
    return torch.stack([0 * ground, torch.maximum(ground, top), 0 * ground - 20], 1)


def two_summits(z):
    s = mean_change(z)
    return torch.stack([0 * s, -3 - 2 * s, -2.8 + 1.7 * s - 30 * torch.relu(s - 0.97)], 1)


def remembers():
    calls = []

    def logits(z):
        calls.append(1)
        return hidden(z) + 1e-3 * len(calls)

    return logits


DECOYS = {
    "wanted three logits": lambda z: hidden(z)[:, :2],
    "not finite": lambda z: hidden(z) / 0 * 0,
    "not always the same": remembers(),
    "depend on the others in the batch": lambda z: hidden(z) + (z.mean() - 0.5),
    "autograd's slope of logit 1": lambda z: torch.stack(
        [hidden(z)[:, 0], hidden(z.detach())[:, 1] + 0 * mean_change(z), hidden(z)[:, 2]], 1),
    "the grey image itself": partial(hidden, first=-9.0),
    "the gradient is 0 at 100 % of the starts": lambda z: hidden(z).clamp(min=-0.9),
    "runs fool it: the hill that draws them": partial(hidden, fence=0.5),
    "runs do not end higher": lambda z: hidden(z) * torch.tensor([1.0, 0.0, 0.0])
    + torch.stack([-(mean_change(z) * 40).sin(), 0 * mean_change(z) - 3, 0 * mean_change(z) - 9], 1),
    "more than one hill": two_summits,
    "must have a slope that leads over": partial(hidden, way=1.2),
    "0 % of the runs fool it": needle,
}  # fmt: skip


@pytest.mark.parametrize("right", [hidden, partial(hidden, slope=0.3), by_corner])
def test_a_decoy_passes(right):
    assert check_decoy(right), check_decoy(right)


@pytest.mark.parametrize("message", DECOYS)
def test_a_wrong_decoy_is_named(message):
    named(check_decoy, DECOYS[message], message)


# --- the angle of two random starts -------------------------------------------------------------


def moments(x, eps, lower=True, upper=True):
    """E δ and E δ² of clipped uniform changes, in closed form."""
    low = x.clamp(max=eps) if lower else torch.full_like(x, eps)
    high = (1 - x).clamp(max=eps) if upper else torch.full_like(x, eps)
    mean = ((eps - low) ** 2 - (eps - high) ** 2) / (4 * eps)
    square = (low**3 + high**3) / 3 + (eps - low) * low**2 + (eps - high) * high**2
    return mean, square / (2 * eps)


def degrees(cosine):
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))


def closed(x, eps, **kind):
    mean, square = moments(x, eps, **kind)
    return degrees(mean.square().sum(1) / square.sum(1))


def from_cut(x, eps):
    low, high = (x - eps).clamp(min=0) - x, (x + eps).clamp(max=1) - x
    mean = (low + high) / 2
    square = (low**2 + low * high + high**2) / 3
    return degrees(mean.square().sum(1) / square.sum(1))


def with_variance(x, eps):
    mean, square = moments(x, eps)
    return degrees(mean.square().sum(1) / (square - mean**2).sum(1))


def pixelwise(x, eps):
    mean, square = moments(x, eps)
    return degrees((mean**2 / square).mean(1))


def to_mean(x, eps):
    mean, square = moments(x, eps)
    return degrees((mean.square().sum(1) / square.sum(1)).sqrt())


def batchwise(x, eps):
    mean, square = moments(x, eps)
    return degrees(mean.square().sum() / square.sum()).expand(len(x))


def clamps(x, eps):
    told = closed(x, eps)
    x.clamp_(max=0.5)
    return told


ANGLES = {
    "90° for every image": lambda x, eps: torch.full((len(x),), 90.0),
    "the upper end of the box": partial(closed, upper=False),
    "drawn from the clipped interval": from_cut,
    "the variance stands": with_variance,
    "in radians": lambda x, eps: torch.deg2rad(closed(x, eps)),
    "that is the cosine": lambda x, eps: closed(x, eps).deg2rad().cos(),
    "the pixels' own ratios": pixelwise,
    "between a start and the mean start": to_mean,
    "one angle for the whole batch": batchwise,
    "wanted one angle per image": lambda x, eps: closed(x, eps)[:, None],
    "edited in place": clamps,
    "°, it is": lambda x, eps: closed(x, eps) + (eps > 0.2),
}  # fmt: skip


def test_the_angle_passes():
    assert check_start_angle(closed), check_start_angle(closed)
    sums = partial(agreement.start_angle)
    assert check_start_angle(sums), check_start_angle(sums)


@pytest.mark.parametrize("message", ANGLES)
def test_a_wrong_angle_is_named(message):
    named(check_start_angle, ANGLES[message], message)


def test_random_starts_are_seen_at_this_angle():
    """Starts as the book draws them, 784 pixels: the limit is near."""
    ink = torch.rand(784, generator=generator(0))
    image = torch.where(ink < 0.75, 0, ink).view(1, 1, 28, 28)
    d = (Linf(0.3).sample(image.expand(100, -1, -1, -1), generator(1)) - image).flatten(1)
    d = d / norms(d, 2)[:, None]
    i, j = torch.triu_indices(100, 100, 1)
    measured = degrees((d @ d.T)[i, j]).mean()
    assert float(closed(image.flatten(1).double(), 0.3)) == pytest.approx(float(measured), abs=0.3)
    black = closed(torch.zeros(1, 784).double(), 0.1)
    assert float(black.deg2rad().cos()) == pytest.approx(3 / 8)


# --- where to restart ---------------------------------------------------------------------------


def by_spread(run, n, budget, first=4, width=20, wrong=None):
    """Four runs each, then those whose mean is the fewest standard deviations behind."""
    count, total, squares = torch.zeros(3, n)
    stands = torch.ones(n, dtype=torch.bool)
    while budget > 0 and stands.any():
        few = (count < first) & stands
        if few.any():
            rows = few.nonzero()[:, 0][:budget]
        else:
            near = total / count / ((squares - total**2 / count) / (count - 1)).clamp(min=1e-9).sqrt()
            rows = near.masked_fill(~stands, -torch.inf).argsort(descending=True)
            rows = rows[: min(width, budget, int(stands.sum()))]
        ends = run(rows)
        count[rows], total[rows] = count[rows] + 1, total[rows] + ends
        squares[rows] += ends**2
        stands[rows] &= ends <= 0
        budget -= len(rows)
    return stands if wrong is None else wrong(stands)


def near_only(run, n, budget):
    """Equal restarts on what is at most 5 behind."""
    best = run(torch.arange(n))
    budget -= n
    while budget and ((best <= 0) & (best > -5)).any():
        rows = ((best <= 0) & (best > -5)).nonzero()[:, 0][:budget]
        best[rows] = torch.maximum(best[rows], run(rows))
        budget -= len(rows)
    return best <= 0


def greedy(run, n, budget):
    """The twenty nearest, whatever they do."""
    best = run(torch.arange(n))
    budget -= n
    while budget and (best <= 0).any():
        rows = best.masked_fill(best > 0, -torch.inf).topk(min(20, budget, int((best <= 0).sum())))
        best[rows.indices] = torch.maximum(best[rows.indices], run(rows.indices))
        budget -= len(rows.indices)
    return best <= 0


def everyone(run, n, budget):
    best = torch.full((n,), -torch.inf)
    for _ in range(budget // n):
        best = torch.maximum(best, run(torch.arange(n)))
    return best <= 0


def overdraws(run, n, budget):
    stands = by_spread(run, n, budget)
    run(stands.nonzero()[:, 0])
    return stands


def last_run(run, n, budget):
    best = run(torch.arange(n))
    stands = best <= 0
    for _ in range(budget // n - 1):
        stands = run(torch.arange(n)) <= 0
    return stands


SPENDS = {
    "with an interval from +0.0": equal_restarts,
    "the runs go to images close to the fence": greedy,
    "cannot fall twice": everyone,
    "runs are not made": lambda run, n, budget: by_spread(run, n, budget // 2),
    "the budget counts runs on single images": overdraws,
    "true and false are exchanged": partial(by_spread, wrong=torch.logical_not),
    "wanted one verdict per image": partial(by_spread, wrong=lambda v: v.double()),
    "you say, with runs that ended at": last_run,
    "each at most once": lambda run, n, budget: run(torch.zeros(2, dtype=torch.int64)),
}  # fmt: skip


@pytest.mark.parametrize("right", [by_spread, near_only])
def test_spending_where_it_is_undecided_passes(right):
    assert check_fence(right), check_fence(right)


@pytest.mark.parametrize("message", SPENDS)
def test_a_wrong_scheme_is_named(message):
    named(check_fence, SPENDS[message], message)


def test_runs_may_be_asked_for_by_a_mask():
    table = fence.Range(*fence._far_and_near(), 0)
    mask = torch.zeros(fence.IMAGES, dtype=torch.bool)
    mask[[3, 5]] = True
    assert torch.equal(table(mask), table.margins[[3, 5], 0])
    assert torch.equal(table(torch.tensor([5])), table.margins[[5], 1])


# --- what the next runs will bring --------------------------------------------------------------


def counts(fooled):
    return torch.bincount(fooled.sum(1), minlength=fooled.shape[1] + 1).double()


def toulmin(fooled, more, until=None, sign=-1):
    runs = fooled.shape[1]
    k = torch.arange(1, (until or runs // 2) + 1)
    return float(sign * ((sign * more / runs) ** k * counts(fooled)[k]).sum())


def by_chao(fooled, more):
    u, runs = unseen(fooled, resamples=2), fooled.shape[1]
    rare = u.once / (runs * u.remaining + u.once) if u.once else 0
    return u.remaining * (1 - (1 - rare) ** more)


def second_half(fooled, more):
    half = fooled.shape[1] // 2
    return 2 * more / fooled.shape[1] * float(
        (fooled[:, half:].any(1) & ~fooled[:, :half].any(1)).sum())  # fmt: skip


FORECASTS = {
    "f₁ M / R is the upper bound": lambda v, m: float(counts(v)[1]) * m / v.shape[1],
    "that is for endless runs": lambda v, m: unseen(v, resamples=2).remaining,
    "terms of large k do not vanish": partial(toulmin, until=fence.R),
    "all terms have the same sign": partial(toulmin, until=fence.R, sign=1),
    "what the second half of the runs brought": second_half,
    "a share of the images": lambda v, m: float(counts(v)[1]) * m / v.shape[1] / len(v),
    "0: some have fallen once": lambda v, m: 0,
    "many of them will never fall": lambda v, m: float((~v.any(1)).sum()),
    "another order give another forecast": lambda v, m: (toulmin(v, m) + second_half(v, m)) / 2,
    "wanted a finite number": lambda v, m: math.nan,
    "your error is": lambda v, m: 3 * toulmin(v, m),
    "for images that fell always or never": lambda v, m: 0.1 * len(v),
}  # fmt: skip


@pytest.mark.parametrize("right", [toulmin, by_chao, partial(toulmin, until=8)])
def test_a_forecast_passes(right):
    assert check_forecast(right), check_forecast(right)


@pytest.mark.parametrize("message", FORECASTS)
def test_a_wrong_forecast_is_named(message):
    named(check_forecast, FORECASTS[message], message)


# --- higher than all of them --------------------------------------------------------------------


@pytest.fixture(scope="module")
def climb():
    """check_summit on sixty digits and the natural network."""
    test = load("digits", "test").subset(60)
    networks = {"natural": zoo.load_or_train("digits-small-natural", progress=False)}
    return lambda highest, **more: check_summit(highest, networks | more, *test.tensors(), Linf(0.2))


def sent(f, x, y, threat, gradients, gen, factor=1.0):
    """Forty gradients to each class, the last of them untargeted and short."""
    best, height = x, torch.full((len(x),), -torch.inf)
    for k in range(1, 10):
        z = threat.sample(x, gen)
        for attack, steps, size in ((toward(k, pgd), 20, 1 / 8), (pgd, 10, 1 / 8),
                                    (pgd, 6, 1 / 20), (pgd, round(4 * factor), 1 / 60)):  # fmt: skip
            z = attack(f, x, y, threat, steps=steps, step_size=size * threat.eps, start=z)
        loss = cross_entropy(predict(f, z), y)
        best = torch.where((loss > height).view(-1, 1, 1, 1), z, best)
        height = torch.maximum(height, loss)
    return best


def free(f, x, y, threat, gradients, gen, last=1 / 16):
    best, height = x, torch.full((len(x),), -torch.inf)
    for _ in range(9):
        z = threat.sample(x, gen)
        for size in (1 / 16, 1 / 16, 1 / 16, last):
            z = pgd(f, x, y, threat, steps=10, step_size=size * threat.eps, start=z)
        loss = cross_entropy(predict(f, z), y)
        best = torch.where((loss > height).view(-1, 1, 1, 1), z, best)
        height = torch.maximum(height, loss)
    return best


def looks(f, x, y, threat, gradients, gen):
    for _ in range(2 * gradients):
        predict(f, x)
    return sent(f, x, y, threat, gradients, gen)


def trains(f, *args):
    z = sent(f, *args)
    f.train()
    return z


SUMMITS = {
    "allowed are 360": partial(sent, factor=2),
    "forward passes per image, allowed are 720": looks,
    "leaves the set": lambda f, x, *args: sent(f, x, *args) + 0.1,
    "wanted one image of the set": lambda *args: sent(*args)[:3],
    "does not lie above 0": free,
    "f was changed": trains,
}  # fmt: skip


def test_targets_find_other_hills(climb):
    report = climb(sent, untrained=models.small_conv((1, 8, 8), seed=1).eval())
    assert report and "360.0 gradients per image" in str(report), report
    assert "untrained network (not demanded): over 5 % higher" in str(report)


@pytest.mark.parametrize("message", SUMMITS)
def test_a_wrong_search_is_named(climb, message):
    named(climb, SUMMITS[message], message)


# --- stubs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_excluded, check_choices, check_decoy, check_start_angle,
                                   check_fence, check_forecast, "climb"], 
                         ids=lambda check: getattr(check, "__name__", check))  # fmt: skip
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check, climb):
    report = (climb if check == "climb" else check)(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)
