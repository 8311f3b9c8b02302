r"""Checker for the exercise of chapter 7 on a hard ball: max over ‖δ‖₂ ≤ ε of (v + δ)ᵀA(v + δ).

Convex, so that the maximum lies on the sphere. δ is best exactly if ‖δ‖ = ε and A(v + δ) = λδ with
a λ not below the largest eigenvalue of A: Moré and Sorensen, Computing a trust region step, SIAM
Journal on Scientific and Statistical Computing 4 (1983).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from advlearn.exercises.gauss import problem
from advlearn.exercises.report import Report, Unusable, ask, examine
from advlearn.tensors import generator

Problem = tuple[Tensor, Tensor, float]
Shift = Callable[[Tensor, Tensor, float], Tensor]
TOL = 1e-6


def halved(short: Callable[[float], bool], low: float, high: float) -> float:
    """Where `short` turns from false at `low` to true at `high`, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if short(middle) else (middle, high)
    return high


def worst(
    a: Tensor, v: Tensor, eps: float, *, pull: Callable[[Tensor], Tensor] = lambda values: values,
    complete: bool = True,
) -> Tensor:  # fmt: skip
    """The best δ, (d,); the options plant mistakes: `pull` is A on the right side."""
    values, vectors = torch.linalg.eigh(a)
    b = pull(values) * (vectors.T @ v)
    below = values[-1] - values  # How far the eigenvalues lie below the largest one.

    def step(t: float) -> Tensor:  # For λ = largest eigenvalue + t.
        return torch.where(b == 0, 0.0, b / (t + below))

    delta = step(halved(lambda t: bool(step(t).norm() < eps), 0.0, float(b.norm()) / eps))
    if complete:  # The hard case: even at t = 0 the step is short.
        rest = max(eps**2 - float(delta[:-1] @ delta[:-1]), 0.0) ** 0.5
        delta[-1] = rest if delta[-1] >= 0 else -rest
    return vectors @ delta


def least(a: Tensor, v: Tensor, eps: float) -> Tensor:
    """The δ of the ball that makes the square smallest."""
    if v.norm() <= eps:
        return -v
    eye, b = torch.eye(len(v), dtype=v.dtype), a @ v

    def step(t: float) -> Tensor:
        return -torch.linalg.solve(a + t * eye, b)

    return step(halved(lambda t: bool(step(t).norm() < eps), 0.0, float(b.norm()) / eps))


def value(a: Tensor, v: Tensor, delta: Tensor) -> Tensor:
    """(v + δ)ᵀA(v + δ) for one δ or for rows of them."""
    return ((v + delta) @ a * (v + delta)).sum(-1)


def climbed(a: Tensor, v: Tensor, eps: float) -> float:
    """The best of random points of the ball, and of 20 climbs by projected gradient."""
    gen = generator(80)
    delta = torch.randn(500, len(v), generator=gen, dtype=v.dtype)
    delta = eps * delta / delta.norm(dim=1, keepdim=True)
    best = value(a, v, delta * torch.rand(500, 1, generator=gen, dtype=v.dtype)).max()
    delta = delta[:20]
    for _ in range(300):  # A step so long that only its direction counts: it never goes down.
        delta = (v + delta) @ a
        delta = eps * delta / delta.norm(dim=1, keepdim=True)
    return float(torch.maximum(best, value(a, v, delta).max()))


def _top(sign: int) -> Shift:
    def shift(a: Tensor, v: Tensor, eps: float) -> Tensor:
        top = torch.linalg.eigh(a)[1][:, -1]
        return sign * eps * top * torch.where(top @ v < 0, -1.0, 1.0)

    return shift


_MISTAKES: dict[str, Shift] = {
    "that goes straight away from the mean, along v: A counts": lambda a, v, eps: eps * v / v.norm(),
    "one step along A v from δ = 0: at the end A(v + δ) is parallel to δ": lambda a, v, eps:
        eps * (a @ v) / (a @ v).norm(),
    "that is the top eigenvector alone: v counts too": _top(1),
    "that is the top eigenvector alone, and against v": _top(-1),
    "the sign: −δ is the best": lambda a, v, eps: -worst(a, v, eps),
    "that δ makes the square smallest: wanted is the largest": least,
    "(λI − A)⁻¹v: the right side is A v": lambda a, v, eps: worst(a, v, eps, pull=torch.ones_like),
    "A and its inverse are exchanged": lambda a, v, eps: worst(torch.linalg.inv(a), v, eps),
    "that is v + δ: wanted is δ": lambda a, v, eps: v + worst(a, v, eps),
    "‖δ‖ = ε, not ‖δ‖² = ε": lambda a, v, eps: worst(a, v, eps**0.5),
}  # fmt: skip

HARD = ("the hard case: v has nothing along the top eigenvectors, and λ is the largest eigenvalue; "
        "what δ lacks to the length ε goes along such an eigenvector")  # fmt: skip


@cache
def _problems() -> dict[str, dict[str, Problem]]:
    """Ordinary ones, and those of the hard case: A, v, ε."""
    easy = {f"ε = {eps}": (*problem(seed)[::-1], eps)
            for seed, eps in ((40, 0.05), (41, 0.5), (42, 2.0), (43, 30.0))}  # fmt: skip
    a, one = torch.tensor([3.0, 1.0, 0.5, 0.2]).double().diag(), torch.ones(1, dtype=torch.float64)
    v = torch.tensor([0.0, 1.0, -1.0, 0.5]).double()
    easy |= {"one dimension": (2 * one[None], -0.4 * one, 0.7),
             "v orthogonal to the top eigenvector, a small ball": (a, v, 0.3)}  # fmt: skip
    v5, s5 = problem(44)
    top = torch.linalg.eigh(s5)[1][:, -1]
    twice = torch.tensor([2.0, 2.0, 0.5]).double().diag()
    hard = {"v orthogonal to the top eigenvector, a large ball": (a, v, 3.0),
            "the same with correlations": (s5, v5 - (top @ v5) * top, 20.0),
            "the largest eigenvalue twice": (twice, torch.tensor([0.0, 0.0, 1.0]).double(), 2.0),
            "v = 0": (s5, 0 * v5, 1.0)}  # fmt: skip
    return {"easy": easy, "hard": hard}


class _Asked:
    """The reader's δ for one family of problems, asked once."""

    def __init__(self, shift: Shift, given: Mapping[str, Problem]) -> None:
        self.shift, self.given, self.told = shift, given, {}

    def answers(self) -> dict[str, Tensor]:
        for name, (a, v, eps) in self.given.items():
            if name not in self.told:
                delta = ask(self.shift, a, v, eps)
                if not isinstance(delta, Tensor) or delta.shape != v.shape:
                    raise Unusable("wanted is a δ of the shape of v")
                if delta.dtype != torch.float64:
                    raise Unusable(f"{delta.dtype}, wanted float64")
                self.told[name] = delta.detach()
        return self.told

    def named(self, fallback: str) -> str:
        for message, mistake in _MISTAKES.items():
            if all(torch.allclose(d, mistake(*self.given[n]), rtol=1e-6, atol=1e-8)
                   for n, d in self.told.items() if len(d) > 1):  # fmt: skip
                return message
        return fallback

    def on_sphere(self) -> str | None:
        for name, delta in self.answers().items():
            eps, size = self.given[name][2], float(delta.norm())
            if not size <= eps * (1 + TOL):
                return self.named(f"{name}: ‖δ‖ = {size:.4g}: that is outside the ball of radius {eps}")
            if size < eps * (1 - TOL):
                return self.named(f"{name}: ‖δ‖ = {size:.4g} lies inside the ball of radius {eps}: the "
                                  "square is convex, its maximum lies on the sphere")  # fmt: skip
        return None

    def unbeaten(self) -> str | None:
        for name, delta in self.answers().items():
            a, v, eps = self.given[name]
            mine, best = float(value(a, v, delta)), climbed(a, v, eps)
            if not mine >= best * (1 - TOL):
                return self.named(f"{name}: δ reaches {mine:.5g}, a climb from a random start {best:.5g}")
        return None

    def certified(self) -> str | None:
        for name, delta in self.answers().items():
            a, v, _ = self.given[name]
            pulled, values = a @ (v + delta), torch.linalg.eigvalsh(a)
            lam = float(delta @ pulled / (delta @ delta))
            if not (pulled - lam * delta).norm() <= TOL * pulled.norm():
                return self.named(f"{name}: A(v + δ) is not parallel to δ: δ can be turned uphill")
            if lam < values[-1] * (1 - TOL):
                what = "a saddle, or a lower hill" if lam > values[0] else "the lowest point of the sphere"
                return self.named(f"{name}: A(v + δ) = λδ with λ = {lam:.4g}, below the largest "
                                  f"eigenvalue {values[-1]:.4g}: that is {what}")  # fmt: skip
        return None


def check_worst_shift(worst_shift: Shift) -> Report:
    """Try `worst_shift(a, v, eps)`: the δ, ‖δ‖₂ ≤ ε, with the largest (v + δ)ᵀA(v + δ).

    A (d, d) symmetric, positive definite, v (d,), ε > 0, all float64. Wanted is a δ on the sphere
    that no random point and no climb beats, with A(v + δ) = λδ and λ not below the largest
    eigenvalue of A; in the hard case, where v has nothing along the top eigenvectors, too.
    """
    easy, hard = (_Asked(worst_shift, given) for given in _problems().values())

    def same() -> str | None:
        problem = hard.on_sphere() or hard.unbeaten() or hard.certified()
        sound = not (easy.on_sphere() or easy.unbeaten() or easy.certified())
        return HARD if problem and sound else problem

    return examine(worst_shift, [
        ("δ lies on the sphere", easy.on_sphere),
        ("no random point and no climb is higher", easy.unbeaten),
        ("A(v + δ) = λδ, and λ is at least the largest eigenvalue", easy.certified),
        ("all that where v has nothing along the top eigenvectors", same),
    ])  # fmt: skip
