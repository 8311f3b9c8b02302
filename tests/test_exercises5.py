"""The checkers of chapter 5's exercises accept what is right and name every planted mistake."""

import math

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from advlearn import balls
from advlearn.data import load
from advlearn.exercises import (
    check_break_even,
    check_convict,
    check_keeper,
    check_line,
    check_ramp,
    check_whole,
    check_widen,
    conviction,
    plane,
    rescue,
)
from advlearn.tensors import generator
from advlearn.threats import Linf


def stub(*args, **kwargs):
    raise NotImplementedError


def named(check, wrong, message):
    report = check(wrong)
    assert not report and message in str(report), report


# --- widening -----------------------------------------------------------------------------------


def widened(right=0.0, block=True, bias=True, clear=False, into=None, touch=False):
    """The leading block, with one part replaced; `right` is what old units hear from new ones."""

    def widen(small, large):
        with torch.no_grad():
            for old, new in zip(small, large, strict=True):
                if not hasattr(old, "weight"):
                    continue
                rows, columns = old.weight.shape[:2]
                if clear:
                    new.weight.zero_()
                    new.bias.zero_()
                if block:
                    new.weight[:rows, :columns] = old.weight
                if right is not None:
                    new.weight[:rows, columns:] = right
                if into is not None:
                    new.weight[rows:] = into
                    new.bias[rows:] = into
                if bias:
                    new.bias[:rows] = old.bias
                if touch:
                    old.bias.add_(1)
                    new.bias[:rows] = old.bias

    return widen


def silent(small, large):
    """New units hear nothing, but are heard: still off for ever."""
    widened(into=0.0)(small, large)
    layers = [m for m in large if hasattr(m, "weight")]
    with torch.no_grad():
        layers[-1].weight[:, layers[-1].weight.shape[1] // 2 :] += 0.1


def shared(small, large):
    """The large network's leading block *is* the small network's memory, where shapes allow it."""
    widened()(small, large)
    for old, new in zip(small, large, strict=True):
        if hasattr(old, "weight") and old.weight.shape == new.weight.shape:
            new.weight = nn.Parameter(old.weight.detach())


def copies(share):
    """New units copy old ones; of what is heard from a unit, its copies get `share` (None: all)."""

    def widen(small, large):
        layers = [(a, b) for a, b in zip(small, large, strict=True) if hasattr(a, "weight")]
        source = torch.arange(layers[0][0].weight.shape[1])
        parts = torch.ones(len(source)).double()
        with torch.no_grad():
            for k, (old, new) in enumerate(layers):
                per = old.weight.shape[1] // int(source.max() + 1)  # A Flatten stands before it.
                columns = (source[:, None] * per + torch.arange(per)).flatten()
                heard = parts.repeat_interleave(per).view(1, -1, *[1] * (old.weight.ndim - 2))
                rows = torch.arange(len(new.weight)) % len(old.weight)
                new.weight.copy_((old.weight[:, columns] * heard)[rows])
                new.bias.copy_(old.bias[rows])
                source, n = rows, len(old.weight)
                parts = torch.ones(len(rows)).double()
                if share is not None and k + 1 < len(layers):
                    for unit in range(n):
                        same = (rows == unit).nonzero()[:, 0]
                        weights = share ** torch.arange(len(same)).double()
                        parts[same] = weights / weights.sum()

    return widen


WIDENINGS = {
    "the biases are not the small network's": widened(bias=False),
    "its old units listen to new ones": widened(right=None),
    "its old units listen to new": widened(right=0.01),
    "the leading block of its weights is not": widened(block=False),
    "layer 1 gets a gradient": widened(clear=True),
    "its slope at 0 is 0": silent,
    "the small network was changed": widened(touch=True),
    "the networks share memory": shared,
    "hears the same twice": copies(None),
    "stay one unit for ever": copies(1.0),
}  # fmt: skip


@pytest.mark.parametrize("right", [widened(), copies(0.4)], ids=["zeros", "unequal shares"])
def test_a_right_widening_passes(right):
    assert check_widen(right), check_widen(right)


@pytest.mark.parametrize("message", WIDENINGS)
def test_a_wrong_widening_is_named(message):
    named(check_widen, WIDENINGS[message], message)


# --- a line -------------------------------------------------------------------------------------


def by_programming(x, y):
    """max t with y (w·x + b) ≥ t and |w₁| + |w₂| ≤ 1, where w = p − q."""
    n = len(x)
    a = torch.zeros(n + 1, 6, dtype=torch.float64)
    a[:n, :2], a[:n, 2:4] = -y[:, None] * x, y[:, None] * x
    a[:n, 4], a[:n, 5], a[n, :4] = -y, 1, 1
    limits = torch.zeros(n + 1)
    limits[n] = 1
    bounds = [(0, None)] * 4 + [(None, None)] * 2
    return max(0.0, -linprog([0, 0, 0, 0, 0, -1], a.numpy(), limits.numpy(), bounds=bounds).fun)


def hard_margin(x, y):
    """The mistake of an SVM: the largest ℓ2 margin."""
    w, gap = plane.gaps(x, y)
    return max(0.0, float((gap / w.norm(dim=1)).max()) / 2)


def no_axes(x, y):
    w, gap = plane.gaps(x, y, axes=False)
    return max(0.0, float((gap / w.abs().sum(1)).max()) / 2)


def moves_points(x, y):
    eps = plane.line_eps(x, y)
    x.add_(1)
    return eps


LINES = {
    "that is the whole gap": lambda x, y: 2 * plane.line_eps(x, y),
    "that is the ℓ2 margin": hard_margin,
    "divided by its largest entry": plane._LINE_MISTAKES[
        "w was divided by its largest entry: what a square reaches is ε times the sum of both"],
    "half the distance of the nearest": lambda x, y: float(
        (x[y > 0][:, None] - x[y < 0]).abs().amax(2).min()) / 2,
    "only level and upright lines": lambda x, y: max(0.0, float(
        plane.gaps(x, y, pairs=False)[1].max()) / 2),
    "are not all": no_axes,
    "where no line separates the points": lambda x, y: float(
        (lambda w, g: g / w.abs().sum(1))(*plane.gaps(x, y)).max()) / 2,
    "it is not negative": lambda x, y: plane.line_eps(x, y) - 1,
    "at your ε =": lambda x, y: plane.line_eps(x, y) + 0.001,
    "a line still separates": lambda x, y: 0.9 * plane.line_eps(x, y),
    "the points were changed": moves_points,
}  # fmt: skip


def test_the_largest_eps_against_linear_programs():
    gen = generator(1)
    for k in range(30):
        x = torch.rand(8, 2, generator=gen, dtype=torch.float64)
        y = torch.where(x @ torch.randn(2, generator=gen).double() > 0.3, 1.0, -1.0).double()
        y[:2] = torch.tensor([1.0, -1.0])
        assert plane.line_eps(x, y) == pytest.approx(by_programming(x, y), abs=1e-9), k


def test_a_right_line_passes():
    for right in (plane.line_eps, by_programming):
        assert check_line(right), check_line(right)


@pytest.mark.parametrize("message", LINES)
def test_a_wrong_line_is_named(message):
    named(check_line, LINES[message], message)


# --- a whole ball -------------------------------------------------------------------------------


def branch(radius=None, relu=True, cuts=60, verdict=True, disc=False, middle_first=True):
    """Branch and bound with one part replaced."""

    def whole(weights, biases, center, eps):
        quarters = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).to(center)
        boxes, half = center[None], eps
        for _ in range(cuts):
            if not len(boxes):
                return True
            mid = value = boxes
            r = torch.full_like(boxes, half)
            for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
                if i:
                    low, high = mid - r, mid + r
                    low, high = (low.relu(), high.relu()) if relu else (low, high)
                    mid, r, value = (low + high) / 2, (high - low) / 2, value.relu()
                spread = w.abs() if radius is None else radius(w)
                mid, value, r = mid @ w.T + b, value @ w.T + b, r @ spread.T
            if middle_first and (value <= 0).any():
                return False
            half = half / 2
            open_ = boxes[(mid - r)[:, 0] <= 0]
            boxes = (open_[:, None] + half * quarters).flatten(0, 1)
            if disc:
                boxes = boxes[(boxes - center).norm(dim=1) <= eps]
        return verdict

    return whole


def sampled(n):
    def whole(weights, biases, center, eps):
        axis = torch.linspace(-eps, eps, n, dtype=torch.float64)
        points = center + torch.cartesian_prod(axis, axis) if n > 1 else center[None]
        return bool((plane.value((weights, biases), points) > 0).all())

    return whole


def depth_first(weights, biases, center, eps):
    """The same by single boxes, on a stack, and with linear pieces solved at their corners."""
    stack = [(center, eps)]
    while stack:
        c, half = stack.pop()
        mid, r = c, torch.full_like(c, half)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            if i:
                low, high = (mid - r).relu(), (mid + r).relu()
                mid, r = (low + high) / 2, (high - low) / 2
            mid, r = w @ mid + b, w.abs() @ r
        if float(mid - r) > 0:
            continue
        if float(plane.value((weights, biases), c[None])) <= 0:
            return False
        half /= 2
        stack += [(c + half * torch.tensor(s).to(c), half) for s in
                  ([1, 1], [1, -1], [-1, 1], [-1, -1])]
    return True


WHOLES = {
    "you say True, but f(": lambda *_: True,
    "you say False, but f ≥": lambda *_: False,
    "points that are tried may all miss it": sampled(101),
    "the corners belong to the ball": branch(disc=True),
    "cut, #1: you say True": sampled(1),
    "cut it where the bounds do not decide": branch(cuts=1, verdict=False),
    "in the square of": branch(radius=lambda w: w),
    "a corner: you say True": branch(cuts=4),
    "returns None": lambda *_: None,
}  # fmt: skip


def test_the_exact_minimum():
    """No point of a fine grid is below, and some point of it comes near."""
    for seed in range(20):
        network = plane._random(seed, 6, 0.4)
        center = torch.rand(2, generator=generator(seed), dtype=torch.float64)
        low, where = plane.minimum(network, center, 0.1)
        assert (where - center).abs().max() <= 0.1 + 1e-9
        axis = torch.linspace(-0.1, 0.1, 201, dtype=torch.float64)
        grid = plane.value(network, center + torch.cartesian_prod(axis, axis)).min()
        assert low <= grid + 1e-12 and grid - low < 0.02
        assert plane.value(plane._deeper(network), center[None]).allclose(
            plane.value(network, center[None]))


def test_the_problems_are_of_both_kinds_and_samples_miss_the_strips():
    lows = {name: plane.minimum(plain, center, eps)[0]
            for name, (_, plain, center, eps) in plane._problems().items()}
    assert all(low <= 0 or low >= 0.03 for low in lows.values())
    assert sum(low <= 0 for low in lows.values()) == 10 and len(lows) == 17
    _, plain, center, eps = plane._problems()["a strip, #1"]
    points = center + eps * (2 * torch.rand(100_000, 2, generator=generator(0)).double() - 1)
    assert plane.value(plain, points).min() > 0


@pytest.mark.parametrize("right", [branch(), depth_first], ids=["by levels", "by boxes"])
def test_a_right_proof_passes(right):
    assert check_whole(right), check_whole(right)


@pytest.mark.parametrize("message", WHOLES)
def test_a_wrong_proof_is_named(message):
    named(check_whole, WHOLES[message], message)


# --- conviction ---------------------------------------------------------------------------------


def with_option(**options):
    return lambda runs: conviction.convicted(runs, **options)


def by_sorting(runs):
    """Another way: from narrow to wide, with the best witness so far."""
    found = [0.0] * len(runs)
    for images in {run["images"] for run in runs}:
        for i, run in enumerate(runs):
            if run["images"] == images:
                known = sorted((r["width"], r["high"]) for r in runs if r["images"] == images)
                best = min([h for w, h in known if w <= run["width"]] + [math.log(10)])
                found[i] = max(run["low"] - best, 0)
    return found


def edits_runs(runs):
    answer = conviction.convicted(runs)
    for run in runs:
        run["low"] = 0
    return answer


CONVICTIONS = {
    "was taken from its attack": with_option(witness="low"),
    "the accused network's upper bound": with_option(accused="high"),
    "both bounds are on the wrong side": with_option(accused="high", witness="low"),
    "larger networks testify too": with_option(may=lambda own, other: True),
    "only larger networks testify": with_option(may=lambda own, other: other >= own),
    "of the same width does not testify": with_option(may=lambda own, other: other < own),
    "only networks of the same width": with_option(may=lambda own, other: other == own),
    "the constant answer is forgotten": with_option(constant=False),
    "runs on other images testify": with_option(images=False),
    "negative parts": with_option(cut=False),
    "is convicted of": lambda runs: [v / 2 for v in conviction.convicted(runs)],
    "the runs were changed": edits_runs,
    "numbers for": lambda runs: conviction.convicted(runs)[:1],
}  # fmt: skip


@pytest.mark.parametrize("right", [conviction.convicted, by_sorting], ids=["", "sorted"])
def test_a_right_judgement_passes(right):
    assert check_convict(right), check_convict(right)


@pytest.mark.parametrize("message", CONVICTIONS)
def test_a_wrong_judgement_is_named(message):
    named(check_convict, CONVICTIONS[message], message)


# --- where the constant begins ------------------------------------------------------------------


def by_bisection(x, y):
    """Written from the definition, image by image."""
    def least(eps):
        worst = math.inf
        for s in (1, -1):
            total = torch.zeros_like(x[0])
            for sign in (1, -1):
                mine = x[y == sign]
                moved = (mine - eps).clamp(min=0) if s * sign > 0 else (mine + eps).clamp(max=1)
                total -= s * sign * moved.mean(0)
            worst = min(worst, float(total.min()))
        return worst

    low, high = 0.0, 1.0
    if least(0.0) >= 0:
        return 0.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (low, middle) if least(middle) >= -1e-12 else (middle, high)
    return high


EVEN = dict(zip(
    ("the images' box is forgotten", "the attacker moves both classes", "weigh both classes alike",
     "there are two slopes", "all of them must be undone", "slopes were averaged over pixels"),
    conviction._BREAK_EVEN_MISTAKES.values(), strict=True)) | {
    ", a smaller ε is enough": lambda x, y: min(1.0, conviction.break_even(x, y) + 0.01),
    "and the risk still falls": lambda x, y: max(0.0, conviction.break_even(x, y) - 0.01),
    "it is between 0 and 1": lambda x, y: -1.0,
    "the images were changed": lambda x, y: float(x.zero_().sum()),
}  # fmt: skip


def test_below_the_break_even_an_optimiser_beats_the_best_constant_and_above_none_does():
    """On the exact adversarial risk, with uneven classes; the theorem's proof is not used."""
    x, y = conviction._two_classes()["uneven classes"]
    eps, p = conviction.break_even(x, y), float((y > 0).double().mean())
    constant = -p * math.log(p) - (1 - p) * math.log(1 - p)

    def lowest(eps):
        w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        b = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        optimizer, best = torch.optim.SGD([w, b], 0.02), math.inf
        for step in range(300):
            direction = -y[:, None] * (w.sign() + (w == 0) * torch.ones_like(w))
            room = torch.where(direction > 0, 1 - x, x).clamp(max=eps)
            margin = y * (x @ w + b) - (room * w.abs()).sum(1)
            if step == 0:  # w = 0 is a corner of the risk: leave it in the steepest direction.
                slopes = conviction.slopes(x, y, eps)
                start = torch.where(slopes[0] < slopes[1], 1.0, -1.0) * (
                    -slopes.amin(0)).clamp(min=0)
                w.data += 0.05 * (start if start.any() else torch.ones_like(w) / 10)
                continue
            risk = nn.functional.softplus(-margin).mean()
            best = min(best, risk.item())
            optimizer.zero_grad()
            risk.backward()
            optimizer.step()
        return best

    assert lowest(eps - 0.02) < constant - 1e-6
    assert lowest(eps + 1e-6) >= constant - 1e-12


def test_a_right_break_even_passes():
    for right in (conviction.break_even, by_bisection):
        assert check_break_even(right), check_break_even(right)


@pytest.mark.parametrize("message", EVEN)
def test_a_wrong_break_even_is_named(message):
    named(check_break_even, EVEN[message], message)


# --- trainings ----------------------------------------------------------------------------------

FEW = load("digits", "train").split_off(200)[0].subset(640)


def ramp(schedule, epochs=8):
    return check_ramp(schedule, FEW, Linf(0.25), epochs=epochs, seeds=(0,))


DRAWS = generator(0)
RAMPS = {
    "ε is small for too short a time": lambda p: 1.0,
    "it must have been small and not 0": lambda p: float(p >= 0.6),
    "meet the full attack: return the factor": lambda p: 0.25 * min(1, p / 0.5),
    "a factor of 0.7": lambda p: min(1, p),
    "allowed are 0 to 1": lambda p: 2 * p,
    "not always the same": lambda p: float(torch.rand(1, generator=DRAWS)),
    "returns None": lambda p: None,
}  # fmt: skip


@pytest.mark.parametrize("right", [lambda p: min(1, p / 0.6), lambda p: min(1, p / 0.65) ** 0.8],
                         ids=["a ramp", "a curve"])  # fmt: skip
def test_a_ramp_rescues(right):
    report = ramp(right)
    assert report and "a constant answer 2.303" in str(report), report


@pytest.mark.parametrize("message", RAMPS)
def test_a_wrong_ramp_is_named(message):
    named(ramp, RAMPS[message], message)


def test_the_training_of_a_schedule_is_that_of_the_package():
    """A linear ramp gives the losses of `training.adversarial(ramp=...)`."""
    from functools import partial

    from advlearn import models, training
    from advlearn.attacks import pgd

    threat, images = Linf(0.2), FEW.subset(96)
    walk = training.adversarial(threat, partial(pgd, steps=5), step_size=0.2 / 3, ramp=0.5)
    losses = []
    for objective in (walk, rescue.scheduled(lambda p: min(1, p / 0.5), threat)):
        f = models.mlp(images.shape, (8,), seed=0)
        losses.append(training.fit(f, images, objective, epochs=4, batch_size=32, lr=1e-2,
                                   progress=False)["loss"])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def crowd_of(copies, factor=1, units=None, change=lambda network: network, at=lambda x: x):
    """The best of some trainings."""

    def keep(points, signs, eps, allowed, steps):
        crowd = balls.Crowd([(units or allowed,)] * copies, list(range(copies)))
        balls.train(crowd, at(points), signs, eps, steps=factor * steps)
        best = int(balls.kept(crowd, at(points), signs, eps).sum(1).argmax())
        return change(rescue._as_network(crowd, best))

    return keep


def by_hand(points, signs, eps, units, steps):
    """Not a training: the same network from wherever, as numbers of another type."""
    (w, v), (b, c) = crowd_of(24, 4)(points, signs, eps, units, steps)
    order = torch.arange(len(w)).flip(0)
    return [(2 * w[order]).float(), v[:, order].float() / 2], [(2 * b[order]).float(), c.float()]


def moves_scene(points, *options):
    network = crowd_of(1)(points, *options)
    points.add_(1)
    return network


def keeper(keep):
    return check_keeper(keep, units=8, scenes=(1, 2), steps=150)


KEEPERS = {
    "hidden units, allowed are 8": crowd_of(1, units=9),
    "more are needed": crowd_of(1),
    "of 16 points themselves are right": crowd_of(
        1, change=lambda n: ([n[0][0], -n[0][1]], [n[1][0], -n[1][1]])),
    "shapes": crowd_of(1, change=lambda n: ([n[0][0], n[0][1].T], n[1])),
    "one hidden layer": crowd_of(1, change=lambda n: n[0]),
    "the points were changed": moves_scene,
    "not finite": crowd_of(1, change=lambda n: ([n[0][0] / 0, n[0][1]], n[1])),
}  # fmt: skip


def test_an_exact_minimum_agrees_with_branch_and_bound():
    x, y = balls.scene(16, rescue.EPS, 1)
    crowd = balls.Crowd([(6,)] * 4, range(4))
    balls.train(crowd, x, y, rescue.EPS, steps=200)
    proved = balls.kept(crowd, x, y, rescue.EPS)
    for k in range(4):
        exact = rescue._whole(rescue._as_network(crowd, k), x, y)
        assert exact == proved[k].tolist()
        points = rescue._as_network(crowd, k)
        assert torch.allclose(plane.value(points, x), crowd.double()(x)[k], atol=1e-6)
        crowd.float()
    assert 0 < proved.sum() < proved.numel()


@pytest.mark.parametrize("right", [crowd_of(12, 4), by_hand], ids=["restarts", "rewritten"])
def test_a_better_keeper_passes(right):
    assert keeper(right), keeper(right)


@pytest.mark.parametrize("message", KEEPERS)
def test_a_wrong_keeper_is_named(message):
    named(keeper, KEEPERS[message], message)


# --- stubs --------------------------------------------------------------------------------------

CHECKS = {"widen": check_widen, "line": check_line, "whole": check_whole, "convict": check_convict,
          "break even": check_break_even, "ramp": ramp, "keeper": keeper}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)
