r"""Checkers for the exercises of chapter 6 on one robust feature and many weak ones, in closed form.

The distribution of Tsipras et al., arXiv:1805.12152: y = ±1, each with ½; x₁ = y with probability
p, else −y; x₂, …, x_{d+1} ~ N(ηy, 1), independent given y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from advlearn.exercises.cases import Cases
from advlearn.exercises.report import Report, examine
from advlearn.tensors import generator

NORMAL = NormalDist()

# --- the exact accuracy of a linear classifier ------------------------------------------------


def _beyond(mean: float, noise: float) -> float:
    """P(mean + noise · z > 0); without noise a step."""
    return NORMAL.cdf(mean / noise) if noise > 0 else float(mean > 0)


def exact(
    w: Tensor,
    p: float,
    eta: float,
    eps: float,
    *,
    reach: Callable[[Tensor], Tensor] = lambda w: w.abs().sum(),
    noise: Callable[[Tensor], Tensor] = lambda w: w[1:].norm(),
    pull: Callable[[Tensor], Tensor] = lambda w: w[1:].sum(),
    agree: Callable[[float], float] = lambda p: p,
) -> float:
    """P(y w·x > ε ‖w‖₁); the options plant mistakes."""
    mean, spread = float(eta * pull(w) - eps * reach(w)), float(noise(w))
    first, p = float(w[0]), agree(p)
    return p * _beyond(mean + first, spread) + (1 - p) * _beyond(mean - first, spread)


def _smeared(w: Tensor, p: float, eta: float, eps: float) -> float:
    """The first feature taken for a Gaussian one of the same mean and variance."""
    mean = float((2 * p - 1) * w[0] + eta * w[1:].sum() - eps * w.abs().sum())
    return _beyond(mean, float((w[1:].square().sum() + 4 * p * (1 - p) * w[0] ** 2).sqrt()))


def _option(**options: Callable) -> Callable[..., float]:
    return lambda *arguments: exact(*arguments, **options)


_EXACT_MISTAKES: dict[str, Callable[..., float]] = {
    "the attacker is missing: that is the standard accuracy":
        lambda w, p, eta, eps: exact(w, p, eta, 0.0),
    "the attacker helps: y w·x falls by ε‖w‖₁": lambda w, p, eta, eps: exact(w, p, eta, -eps),
    "that is the error: wanted is the accuracy": lambda *a: 1 - exact(*a),
    "w·x moves by at most ε‖w‖₁ in the ℓ∞ ball; ε‖w‖₂ belongs to ℓ2": _option(
        reach=lambda w: w.norm()),
    "the attacker moves x₁ as well: ε|w₁| is missing": _option(reach=lambda w: w[1:].abs().sum()),
    "the attacker moves the weak features as well, not x₁ alone": _option(reach=lambda w: w[0].abs()),
    "the attacker moves every feature against its own weight: Σ|w|, not Σw": _option(
        reach=lambda w: w.sum()),
    "w·x moves by ε times the sum of all |w|, not by ε": _option(reach=lambda w: w.new_ones(())),
    "the noise of Σ w_j x_j has the standard deviation ‖(w₂, …)‖₂, not 1": _option(
        noise=lambda w: w.new_ones(())),
    "standard deviations of independent noise do not add up, variances do": _option(
        noise=lambda w: w[1:].abs().sum()),
    "divided by the variance: take its root": _option(noise=lambda w: w[1:].square().sum()),
    "x₁ has no Gaussian noise: w₁ does not belong to its norm": _option(noise=lambda w: w.norm()),
    "a weak feature with a negative weight votes against y: ηΣw, not ηΣ|w|": _option(
        pull=lambda w: w[1:].abs().sum()),
    "η is the mean of every weak feature, not of their sum": _option(pull=lambda w: w.new_ones(())),
    "p and 1 − p are exchanged": _option(agree=lambda p: 1 - p),
    "x₁ = −y is forgotten: it happens with probability 1 − p": _option(agree=lambda p: 1.0),
    "x₁ is no Gaussian feature: it has two values, each with an accuracy of its own": _smeared,
}  # fmt: skip


def _classifiers() -> dict[str, tuple]:
    """Name -> (w, p, η, ε)."""

    def w(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    gen = generator(61)
    average = torch.cat([w(0.0), torch.full((100,), 0.01, dtype=torch.float64)])
    random = torch.randn(21, generator=gen, dtype=torch.float64) + 0.5
    mixed = torch.cat([w(0.6), torch.full((40,), 0.05, dtype=torch.float64)])
    return {
        "x₁ alone": (w(2.0, 0.0, 0.0), 0.9, 0.3, 0.4),
        "x₁ alone, ε > 1": (w(1.0, 0.0, 0.0), 0.9, 0.3, 1.1),
        "minus x₁": (w(-1.0, 0.0), 0.8, 0.3, 0.2),
        "the average of 100 weak features, no attack": (average, 0.9, 0.25, 0.0),
        "the average of 100 weak features": (average, 0.9, 0.25, 0.2),
        "the average of 100 weak features, ε = 2η": (average, 0.9, 0.25, 0.5),
        "a mixture": (mixed, 0.8, 0.4, 0.15),
        "a mixture, no attack": (mixed, 0.8, 0.4, 0.0),
        "weights of both signs": (random, 0.7, 0.6, 0.1),
        "a large x₁": (w(3.0, 0.4, -0.1), 0.7, 0.5, 0.3),
    }


def check_exact(robust_accuracy: Callable[[Tensor, float, float, float], float]) -> Report:
    """Try `robust_accuracy(w, p, eta, eps)`: P(y w·x > ε‖w‖₁) for x of the distribution, exactly.

    w (d + 1,), float64, any signs; the classifier is sign(w·x), ℓ∞, no box; a margin of 0 is an
    error. Wanted to 1e-7.
    """
    cases = Cases(robust_accuracy, exact, _EXACT_MISTAKES, _classifiers())
    names = list(cases.arguments)
    return examine(robust_accuracy, [
        ("without an attack", cases.right(names[3], names[7])),
        ("the weak features alone", cases.right(*names[4:6])),
        ("mixtures, and weights of both signs", cases.right(names[6], *names[8:])),
        ("x₁ alone, where nothing is Gaussian", cases.right(*names[:3])),
    ])  # fmt: skip


# --- the best bound ---------------------------------------------------------------------------


def ceiling(delta: float, p: float) -> float:
    """max pA + (1 − p)B over 0 ≤ A, B ≤ 1 with (1 − p)A + pB ≤ δ."""
    a = min(1.0, delta / (1 - p))
    b = min(1.0, max(0.0, delta - (1 - p)) / p)
    return p * a + (1 - p) * b


_CEILING_MISTAKES: dict[str, Callable[..., float]] = {
    "p/(1−p)·δ is right for small δ and passes 1 for large ones: at most how often is f = y where "
    "x₁ = y?": lambda delta, p: p / (1 - p) * delta,
    "cut at 1: it is smaller than 1 until δ = 1": lambda delta, p: min(1.0, p / (1 - p) * delta),
    "cut at p: once A is 1, more δ still buys some B": lambda delta, p: min(
        p, p / (1 - p) * delta),
    "that is for the attacker's worst use of δ, (1−p)/p·δ: errors where x₁ ≠ y are cheaper":
        lambda delta, p: (1 - p) / p * delta,
    "1 − that: wanted is the accuracy that is left": lambda delta, p: 1 - ceiling(delta, p),
    "δ is the standard error, not the accuracy": lambda delta, p: ceiling(1 - delta, p),
}  # fmt: skip


def check_ceiling(ceiling_: Callable[[float, float], float]) -> Report:
    """Try `ceiling(delta, p)`: the best upper bound of the accuracy after the weak features turned.

    Over all η, d and classifiers of standard error at most δ, for ½ ≤ p < 1, to 1e-7.
    """
    grid = {f"δ = {delta:g}, p = {p:g}": (delta, p) for p in (0.5, 0.6, 0.8, 0.95)
            for delta in (0.0, 0.01, 0.05, 0.15, 0.4, 0.7, 0.99, 1.0)}  # fmt: skip
    cases = Cases(ceiling_, ceiling, _CEILING_MISTAKES, grid)
    small = [n for n, (delta, p) in grid.items() if delta <= 1 - p]
    return examine(ceiling_, [
        ("small δ", cases.right(*small)),
        ("large δ", cases.right(*(n for n in grid if n not in small))),
    ])  # fmt: skip


# --- where the weak features are dropped ------------------------------------------------------


def mixture(p: float, eta: float, d: float, eps: float) -> float | None:
    """The weight of x₁ beside an average of weak features at a local maximum; None: there is none."""
    m = eta - eps
    odds = math.log(p * (1 - eps) / ((1 - p) * (1 + eps)))
    room = m * m - 2 * eps * odds / d
    if m <= 0 or room < 0:
        return None
    return max(0.0, odds / d / (m + math.sqrt(room)))  # Below 0 the other sign would be better.


def accuracy(c: float, p: float, eta: float, d: float, eps: float) -> float:
    """Of sign(c x₁ + mean of the weak features), under attack."""
    m, root = eta - eps, math.sqrt(d)
    return (p * NORMAL.cdf(root * (m + c * (1 - eps)))
            + (1 - p) * NORMAL.cdf(root * (m - c * (1 + eps))))  # fmt: skip


def _until(holds: Callable[[float], bool], high: float) -> float:
    """Where a condition that holds at 0 ceases to."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def critical(p: float, eta: float, d: float) -> float:
    """The smallest ε at which no linear classifier beats x₁ alone."""

    def better(eps: float) -> bool:
        c = mixture(p, eta, d, eps)
        return c is not None and accuracy(c, p, eta, d, eps) > p

    return _until(better, eta)


def _kept_weights(p: float, eta: float, d: float) -> float:
    c = math.log(p / (1 - p)) / (2 * d * eta)
    return _until(lambda eps: accuracy(c, p, eta, d, eps) > p, eta)


_CRITICAL_MISTAKES: dict[str, Callable[..., float]] = {
    "2η turns the weak features around; they are useless before that": lambda p, eta, d: 2 * eta,
    "at η their mean is 0; for d → ∞ that is the answer, and for a classifier whose x₁ the attacker "
    "cannot weaken; a linear one lets go earlier": lambda p, eta, d: eta,
    "that compares x₁ alone with the weak features alone: a mixture holds out longer":
        lambda p, eta, d: eta - NORMAL.inv_cdf(p) / math.sqrt(d),
    "until there the mixture is a local maximum: x₁ alone may be higher":
        lambda p, eta, d: _until(lambda eps: mixture(p, eta, d, eps) is not None, eta),
    "the average of d weak features has the variance 1/d, not 1": lambda p, eta, d:
        critical(p, eta, 1),
    "the weights that are best without an attack: under attack others are better, they change with "
    "ε": _kept_weights,
}  # fmt: skip


def check_critical(critical_eps: Callable[[float, float, int], float]) -> Report:
    """Try `critical_eps(p, eta, d)`: the ε from which on no linear classifier beats x₁ alone.

    By the exact robust accuracy of sign(w·x) over all w, ℓ∞, for p > ½ and η < 1; to 1e-6.
    """
    problems = {f"p = {p:g}, η = {eta:g}, d = {d:,}": (p, eta, d) for p, eta, d in (
        (0.95, 0.1, 10_000), (0.9, 0.05, 10_000), (0.95, 0.3, 100), (0.8, 0.3, 100), (0.9, 0.4, 16),
        (0.7, 0.5, 9), (0.55, 0.5, 30), (0.52, 0.8, 10))}  # fmt: skip
    cases = Cases(critical_eps, critical, _CRITICAL_MISTAKES, problems, tol=1e-6)
    names = list(problems)
    return examine(critical_eps, [
        ("many weak features", cases.right(*names[:2])),
        ("fewer", cases.right(*names[2:6])),
        ("x₁ is hardly worth its weight", cases.right(*names[6:])),
    ])  # fmt: skip
