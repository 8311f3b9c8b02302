"""Checkers of projections: onto ℓ2 ball ∩ box, and onto the intersection of convex sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advlearn.exercises.report import Report, Unusable, examine
from advlearn.tensors import generator
from advlearn.threats import L2

Projection = Callable[[Tensor], Tensor]
RADII = (0.3, 1.0, 3.0)


def _points(n: int = 32, d: int = 20) -> tuple[Tensor, Tensor]:
    """Points v and images x, (n, d), float64; a third of the pixels is 0 or 1."""
    gen = generator(7)
    x = torch.rand(n, d, generator=gen, dtype=torch.float64)
    x = torch.where(torch.rand(n, d, generator=gen) < 0.3, x.round(), x)
    far = torch.rand(n, 1, generator=gen, dtype=torch.float64) * 1.5
    return x + far * torch.randn(n, d, generator=gen, dtype=torch.float64), x


def _length(d: Tensor) -> Tensor:
    return d.norm(dim=1, keepdim=True)


def _to_ball(v: Tensor, x: Tensor, eps: float) -> Tensor:
    return x + (v - x) * (eps / _length(v - x).clamp(min=1e-30)).clamp(max=1)


@dataclass(frozen=True)
class _Case:
    """The properties of a projection onto ball and box."""

    project: Callable[[Tensor, Tensor, float], Tensor]
    v: Tensor
    x: Tensor

    def run(self, eps: float, rows: slice = slice(None)) -> Tensor:
        p = self.project(self.v[rows].clone(), self.x[rows].clone(), eps)
        if not isinstance(p, Tensor) or p.shape != self.v[rows].shape:
            raise Unusable(f"returns {getattr(p, 'shape', type(p).__name__)}, wanted (N, d)")
        return p

    def feasible(self) -> str | None:
        for eps in RADII:
            p = self.run(eps)
            if not p.isfinite().all():
                return "some entries are not finite"
            if p.min() < -1e-6 or p.max() > 1 + 1e-6:
                return f"pixels from {p.min():.2f} to {p.max():.2f}: the box is missing"
            if (far := float(_length(p - self.x).max())) > eps * (1 + 1e-6):
                return f"‖p − x‖₂ reaches {far / eps:.2f} ε"
        return None

    def stays(self) -> str | None:
        edge = L2(1.0).project(self.v, self.x)
        for points in (self.x + 0.5 * (edge - self.x), edge):
            moved = float((self.project(points.clone(), self.x, 1.0) - points).abs().max())
            if moved > 1e-6:
                return (f"a point of the set moves by {moved:.2g}: it is its own nearest point, "
                        "so scale down and never up")  # fmt: skip
        at_x = self.project(self.x.clone(), self.x, 1.0)
        return None if torch.allclose(at_x, self.x, atol=1e-6) else "v = x does not give x: 0 / 0?"

    def nearest(self) -> str | None:
        found = (_not_nearest(self.run(eps), self.v, self.x, eps) for eps in RADII)
        return next(filter(None, found), None)

    def alone(self) -> str | None:
        apart = torch.cat([self.run(1.0, slice(i, i + 1)) for i in range(len(self.v))])
        return None if torch.allclose(self.run(1.0), apart, atol=1e-6) else (
            "an image's projection depends on the others: one norm, one multiplier per image")

    def untouched(self) -> str | None:
        now = self.v.clone(), self.x.clone()
        self.project(*now, 1.0)
        kept = torch.equal(now[0], self.v) and torch.equal(now[1], self.x)
        return None if kept else "v or x was edited in place"

    def zero(self) -> str | None:
        at_x = torch.allclose(self.run(0.0), self.x, atol=1e-6)
        return None if at_x else "ε = 0 leaves only x itself"


def check_l2_projection(project: Callable[[Tensor, Tensor, float], Tensor]) -> Report:
    r"""Try `project(v, x, eps) -> p`, the nearest point to v of the ℓ2 ball around x cut by [0, 1].

    All of shape (N, d). A point p of a convex set S is the nearest one exactly when
    $\langle v - p, u - p\rangle \le 0$ for every u in S: tried for many u, among them the best.
    """
    case = _Case(project, *_points())
    return examine(project, [
        ("p is in the ball and in [0, 1]", case.feasible),
        ("leaves points of the set alone", case.stays),
        ("no feasible u is nearer: ⟨v − p, u − p⟩ ≤ 0", case.nearest),
        ("treats every image by itself", case.alone),
        ("leaves v and x as they are", case.untouched),
        ("ε = 0 gives x", case.zero),
    ])  # fmt: skip


def _not_nearest(p: Tensor, v: Tensor, x: Tensor, eps: float) -> str | None:
    """Which mistake gives p, or a witness u against it; None if p is the nearest point."""
    best = L2(eps).project(v, x)
    others = L2(eps).sample(x.repeat(50, 1), generator(8)).view(50, *x.shape)
    product = ((v - p) * (torch.cat([others, best[None]]) - p)).sum(2).amax(0)
    if (product <= 1e-6 * _length(v - p)[:, 0]).all():
        return None
    clipped, scaled = v.clamp(0, 1), _to_ball(v, x, eps)
    whole = x + (v - x) * min(1, eps / float((v - x).norm()))
    for message, wrong in {
        "that is clipping after scaling: the clipped pixels leave length unused":
            scaled.clamp(0, 1),
        "that is scaling after clipping: it also shortens the pixels that were not too long":
            _to_ball(clipped, x, eps),
        "one norm for the whole batch: each image has its own": whole.clamp(0, 1),
        "that is the ℓ∞ ball's projection, then scaled": _to_ball(
            (x + (v - x).clamp(-eps, eps)).clamp(0, 1), x, eps),
        "every point is moved to the sphere, also those inside":
            (x + (v - x) * eps / _length(v - x)).clamp(0, 1),
        "returns x for every point outside": x,
    }.items():  # fmt: skip
        if torch.allclose(p, wrong, atol=1e-6):
            return message
    worst = int(product.argmax())
    excess = float((_length(v - p) / _length(v - best) - 1).max())
    return (f"image {worst} has a feasible u with ⟨v − p, u − p⟩ = {float(product[worst]):.2g}; "
            f"p is up to {100 * excess:.2g} % farther from v than the nearest point")  # fmt: skip


# --- Dykstra's algorithm ----------------------------------------------------------------------


def nearest_point(v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    """Dykstra's algorithm: the nearest point to v of the intersection, (N, d)."""
    p, corrections = v, [torch.zeros_like(v) for _ in projections]
    for _ in range(rounds):
        for i, project in enumerate(projections):
            wanted = p + corrections[i]
            p = project(wanted)
            corrections[i] = wanted - p
    return p


def _alternating(v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    for _ in range(rounds):
        for project in projections:
            v = project(v)
    return v


def _mean(v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    for _ in range(rounds):
        v = torch.stack([project(v) for project in projections]).mean(0)
    return v


def _one_memory(v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    p, correction = v, torch.zeros_like(v)
    for _ in range(rounds):
        for project in projections:
            wanted = p + correction
            p = project(wanted)
            correction = wanted - p
    return p


def _last_shift_only(v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    p, corrections = v, [torch.zeros_like(v) for _ in projections]
    for _ in range(rounds):
        for i, project in enumerate(projections):
            before = p
            p = project(p + corrections[i])
            corrections[i] = before - p
    return p


def _wrong_sign(v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    p, corrections = v, [torch.zeros_like(v) for _ in projections]
    for _ in range(rounds):
        for i, project in enumerate(projections):
            wanted = p - corrections[i]
            p = project(wanted)
            corrections[i] = wanted - p
    return p


_MISTAKES = {
    "that is plain alternation: each set needs the memory of what its last projection cut off":
        _alternating,
    "one memory for all sets: each set has its own": _one_memory,
    "the memory is p + memory − projection, all of what was cut off, not p − projection":
        _last_shift_only,
    "the memory is subtracted: give back what was cut off before projecting again": _wrong_sign,
    "that is the mean of the projections: one set after the other": _mean,
}  # fmt: skip

_NAMES = ("the ball, the box", "the box, the ball", "the box, the ball, equal mean")


def _problems(eps: float) -> dict[str, tuple[list[Projection], Tensor]]:
    """Name -> projections onto sets whose intersection is not empty, and the nearest point."""
    v, x = _points()

    def ball(u: Tensor) -> Tensor:
        return _to_ball(u, x, eps)

    def box(u: Tensor) -> Tensor:
        return u.clamp(0, 1)

    def equal_mean(u: Tensor) -> Tensor:
        return u - (u - x).mean(1, keepdim=True)

    sets = ([ball, box], [box, ball], [box, ball, equal_mean])
    nearest = (L2(eps).project(v, x),) * 2 + (nearest_point(v, sets[2], 1000),)
    return {name: pair for name, *pair in zip(_NAMES, sets, nearest, strict=True)}


Dykstra = Callable[[Tensor, Sequence[Projection], int], Tensor]


def _run(dykstra: Dykstra, v: Tensor, projections: Sequence[Projection], rounds: int) -> Tensor:
    p = dykstra(v.clone(), projections, rounds)
    if not isinstance(p, Tensor) or p.shape != v.shape:
        raise Unusable(f"returns {getattr(p, 'shape', type(p).__name__)}, wanted (N, d)")
    return p


def _not_reached(dykstra: Dykstra, projections: list[Projection], nearest: Tensor) -> str | None:
    """Which mistake keeps the algorithm from the nearest point."""
    v, _ = _points()
    p = _run(dykstra, v, projections, 300)
    if torch.allclose(p, nearest, atol=1e-4):
        return None
    for message, mistake in _MISTAKES.items():
        if torch.allclose(p, mistake(v, projections, 300), atol=1e-5, equal_nan=True):
            return message
    apart = max(float((project(p) - p).abs().max()) for project in projections)
    excess = float((_length(v - p) / _length(v - nearest) - 1).max())
    return f"after 300 rounds p is up to {apart:.2g} outside a set" if apart > 1e-3 else (
        f"p is in all sets, but up to {100 * excess:.2g} % farther from v than need be")


def _miscounted(dykstra: Dykstra, projections: list[Projection]) -> str | None:
    counts = [0] * len(projections)

    def counted(i: int) -> Projection:
        def count(u: Tensor) -> Tensor:
            counts[i] += 1
            return projections[i](u)

        return count

    _run(dykstra, _points()[0], [counted(i) for i in range(len(projections))], 7)
    return None if set(counts) == {7} else (
        f"in 7 rounds the projections are called {counts} times, each is wanted 7 times")


def check_dykstra(dykstra: Dykstra) -> Report:
    """Try `dykstra(v, projections, rounds) -> p`, the nearest point of an intersection.

    Boyle & Dykstra 1986. `projections` are functions (N, d) -> (N, d), each onto one convex set;
    one round calls every one of them once.
    """
    v, _ = _points()
    problems = _problems(1.0)
    ball = problems[_NAMES[0]][0][0]

    def one_set() -> str | None:
        right = torch.allclose(_run(dykstra, v, [ball], 5), ball(v), atol=1e-6)
        return None if right else "with one set the answer is that set's projection"

    def untouched() -> str | None:
        given = v.clone()
        dykstra(given, problems[_NAMES[0]][0], 3)
        return None if torch.equal(given, v) else "v was edited in place"

    return examine(dykstra, [
        ("with one set it is that set's projection", one_set),
        *((f"reaches the nearest point: {name}", partial(_not_reached, dykstra, *problem))
          for name, problem in problems.items()),
        ("a round calls every projection once",
         partial(_miscounted, dykstra, problems[_NAMES[2]][0])),
        ("leaves v as it is", untouched),
    ])  # fmt: skip
