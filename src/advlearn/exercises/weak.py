"""Checkers for the exercises of chapter 6 that draw from, and attack, many weak features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from advlearn.exercises.report import Report, Unusable, ask, examine
from advlearn.tensors import generator

Sample = tuple[Tensor, Tensor]
Sampler = Callable[[int, float, float, int, Generator], Sample]

# --- draw -------------------------------------------------------------------------------------

P, ETA, D, N = 0.85, 0.4, 3, 60_000


def _far(values: Tensor, mean: float) -> bool:
    """Is the mean of these draws five standard errors away from what it should be?"""
    error = float(values.std()) / math.sqrt(len(values))
    return abs(float(values.mean()) - mean) > 5 * error + 1e-9


class _Draws:
    """One large sample of the reader's, asked for several properties."""

    def __init__(self, sample: Sampler) -> None:
        self.sample = sample
        self.kept: Sample | None = None

    def drawn(self) -> Sample:
        if self.kept is None:
            x, y = self.sample(N, P, ETA, D, generator(62))
            if x.shape != (N, D + 1) or y.shape != (N,):
                raise Unusable(f"shapes {tuple(x.shape)} and {tuple(y.shape)}, wanted (n, d + 1) and "
                               f"(n,), here ({N}, {D + 1}) and ({N},)")  # fmt: skip
            if not {x.dtype, y.dtype} == {torch.float64}:
                raise Unusable(f"{x.dtype} and {y.dtype}, wanted float64")
            if not (y.abs() == 1).all():
                raise Unusable(f"labels {y.unique()[:3].tolist()}, wanted −1 and 1")
            self.kept = x, y
        return self.kept

    def labels(self) -> str | None:
        y = self.drawn()[1]
        share = float((y > 0).double().mean())
        return f"{share:.1%} of the labels are 1, it is ½" if _far(y, 0.0) else None

    def first(self) -> str | None:
        x, y = self.drawn()
        if not (x[:, 0].abs() == 1).all():
            return "x₁ is y or −y, nothing else"
        for sign in (1, -1):
            agree = (x[:, 0] == y)[y == sign].double()
            if abs(float(agree.mean()) - P) > 5 * math.sqrt(P * (1 - P) / len(agree)):
                if not _far(agree, 1 - P):
                    return "x₁ = y has probability p: yours has 1 − p"
                if not _far(agree, P + (1 - P) / 2):
                    return "x₁ is −y otherwise; a coin for the rest is right half of the time"
                return f"x₁ = y in {float(agree.mean()):.1%} where y = {sign}, p is {P:.0%}"
        return None

    def weak(self) -> str | None:
        x, y = self.drawn()
        votes = y[:, None] * x[:, 1:]
        for j, vote in enumerate(votes.T):
            if _far(vote, ETA):
                if not _far(vote, (2 * P - 1) * ETA):
                    return "the weak features follow x₁: their mean is ηy"
                if not _far(vote, 0.0):
                    return "the weak features know nothing of y: their mean is ηy"
                return f"feature {j + 2}: y x has the mean {float(vote.mean()):.3f}, η is {ETA}"
            spread = (vote - ETA).square()
            if _far(spread, 1.0):
                if not _far(spread, 1 / D):
                    return "each has the variance 1; it is their average that has 1/d"
                return f"feature {j + 2} has the variance {float(spread.mean()):.3f}, wanted is 1"
        return None

    def independent(self) -> str | None:
        x, y = self.drawn()
        noise = x[:, 1:] - ETA * y[:, None]
        for j in range(D):
            if _far(noise[:, j] * x[:, 0] * y, 0.0):
                return "the noise and whether x₁ = y come from the same draw"
            if _far(noise[:, j] * y, 0.0):
                return "the noise and y come from the same draw"
            if any(_far(noise[:, j] * noise[:, i], 0.0) for i in range(j)):
                return "all weak features share one noise: draw one number for each"
        if _far(noise[1:, 0] * noise[:-1, 0], 0.0):
            return "neighbouring examples share their noise: draw one number for each"
        return None

    def stream(self) -> str | None:
        before = torch.get_rng_state()
        a, again, other = (self.sample(50, P, ETA, D, generator(s)) for s in (1, 1, 2))
        if not torch.equal(before, torch.get_rng_state()):
            return "draws from the global random state: pass `generator=gen`"
        if not (torch.equal(a[0], again[0]) and torch.equal(a[1], again[1])):
            return "two generators with one seed give two samples"
        return "every generator gives the same sample" if torch.equal(a[0], other[0]) else None


def check_draw(sample: Sampler) -> Report:
    """Try `sample(n, p, eta, d, gen) -> (x, y)`, x (n, d + 1) and y (n,) = ±1, both float64."""
    draws = _Draws(sample)
    return examine(sample, [
        ("both labels are equally frequent", draws.labels),
        ("x₁ is right with probability p, whatever y is", draws.first),
        ("weak features have the mean ηy and the variance 1", draws.weak),
        ("all noise is independent", draws.independent),
        ("everything comes from the generator", draws.stream),
    ])  # fmt: skip


# --- turn the weak features -------------------------------------------------------------------

Turn = Callable[[Tensor, Tensor, float], Tensor]


def twins(n: int, d: int, p: float, eta: float, seed: int = 63) -> Sample:
    """A sample in which every noise occurs with both labels: (2n, d + 1), (2n,).

    So what holds of the distribution with y turned holds of the sample, exactly.
    """
    gen = generator(seed)
    noise = torch.randn(n, d, generator=gen, dtype=torch.float64)
    right = torch.where(torch.rand(n, 1, generator=gen) < p, 1.0, -1.0).double()
    x = torch.cat([torch.cat([y * right, y * eta + noise], 1) for y in (1, -1)])
    return x, torch.cat([torch.ones(n), -torch.ones(n)]).double()


def turned(x: Tensor, y: Tensor, eta: float, *, size: float = 2.0, sign: float = -1.0,
           first: float = 0.0) -> Tensor:  # fmt: skip
    """x − 2ηy in all features but the first; the options plant mistakes."""
    step = sign * size * eta * y[:, None].expand_as(x)
    return x + step * torch.cat([x.new_full((1,), first), x.new_ones(x.shape[1] - 1)])


_TURN_MISTAKES: dict[str, Turn] = {
    "nothing moves": lambda x, y, eta: x,
    "wrong sign: the weak features are moved towards y": lambda x, y, eta: turned(
        x, y, eta, sign=1.0),
    "moved by η the weak features have the mean 0: nobody can read y from them, and wanted is that "
    "they say −y": lambda x, y, eta: turned(x, y, eta, size=1.0),
    "all examples move the same way: the way depends on y": lambda x, y, eta: turned(
        x, torch.ones_like(y), eta),
    "x₁ moves as well: leave it": lambda x, y, eta: turned(x, y, eta, first=1.0),
    "each feature moves against its own sign: it is y that says where":
        lambda x, y, eta: torch.cat([x[:, :1], x[:, 1:] - 2 * eta * x[:, 1:].sign()], 1),
    "x₁ says where each example goes, and x₁ is not always y": lambda x, y, eta: turned(
        x, x[:, 0], eta),
    "clamped to [0, 1]: these features are no pixels": lambda x, y, eta: torch.cat(
        [x[:, :1], turned(x, y, eta)[:, 1:].clamp(0, 1)], 1),
    "a mirror, −x: its law is right, but a feature far from 0 moves by more than 2η":
        lambda x, y, eta: torch.cat([x[:, :1], -x[:, 1:]], 1),
}  # fmt: skip


def _readers(d: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Classifiers that see the weak features only, (n, d) -> (n,), by all kinds of rules."""
    gen = generator(64)
    w, v = (torch.randn(d, k, generator=gen, dtype=torch.float64) for k in (1, 20))
    return {"the average": lambda z: z.mean(1), "the median": lambda z: z.median(1).values,
            "the largest": lambda z: z.amax(1) - 1.5, "the first": lambda z: z[:, 0] + 0.3,
            "random weights": lambda z: (z @ w)[:, 0],
            "a random network": lambda z: (z @ v).relu().sum(1) - 30}  # fmt: skip


class _Turned:
    """What the reader makes of the twins."""

    def __init__(self, turn: Turn, eta: float = 0.3) -> None:
        self.turn, self.eta = turn, eta
        self.x, self.y = twins(400, 9, 0.9, eta)

    def moved(self) -> Tensor:
        out = ask(self.turn, self.x, self.y, self.eta)
        if not isinstance(out, Tensor) or out.shape != self.x.shape:
            got = getattr(out, "shape", type(out).__name__)
            raise Unusable(f"returns {got}, wanted {tuple(self.x.shape)}")
        return out

    def named(self, problem: str) -> str:
        out = self.moved()
        return next((message for message, wrong in _TURN_MISTAKES.items() if torch.allclose(
            out, wrong(self.x, self.y, self.eta), atol=1e-9)), problem)  # fmt: skip

    def ball(self) -> str | None:
        far, eps = float((self.moved() - self.x).abs().max()), 2 * self.eta
        return None if far <= eps + 1e-9 else self.named(f"moves by {far:.2f}, 2η is {eps:g}")

    def first(self) -> str | None:
        same = torch.equal(self.moved()[:, 0], self.x[:, 0])
        return None if same else self.named("x₁ moves: leave it")

    def law(self) -> str | None:
        z = self.moved()
        for j in range(1, z.shape[1]):
            for sign in (1, -1):
                mine, other = z[self.y == sign, j], self.x[self.y == -sign, j]
                if not torch.allclose(mine.sort().values, other.sort().values, atol=1e-9):
                    a, b = (
                        f"{float(v.mean()):+.3f} and {float(v.std()):.3f}" for v in (mine, other)
                    )
                    return self.named(f"feature {j + 1} where y = {sign} has mean and standard "
                                      f"deviation {a}; where y = {-sign} it had {b}")  # fmt: skip
        return None

    def readers(self) -> str | None:
        z = self.moved()
        for name, reader in _readers(z.shape[1] - 1).items():
            before, after = (float(((reader(v[:, 1:]) > 0) == (self.y > 0)).double().mean())
                             for v in (self.x, z))  # fmt: skip
            if abs(before + after - 1) > 1e-9:
                return self.named(f"{name}: {before:.1%} right before and {after:.1%} after")
        return None


def check_turn(turn: Turn) -> Report:
    """Try `turn(x, y, eta) -> x_adv`: within 2η of x, and the weak features speak for −y.

    x (n, d + 1), float64; y = ±1. The sample holds every noise with both labels, so the law of the
    weak features given y must become that given −y exactly, and the accuracy of every classifier
    that sees them alone 1 minus what it was.
    """
    trial = _Turned(turn)
    return examine(turn, [
        ("stays within 2η", trial.ball), ("leaves x₁ alone", trial.first),
        ("the weak features of y have the law of −y", trial.law),
        ("the accuracy of every classifier of weak features becomes 1 − accuracy", trial.readers),
    ])  # fmt: skip
