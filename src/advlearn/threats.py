r"""Threat models: what the adversary may do to an image.

A threat model is the set $S(x) = \{z : \|z - x\|_p \le \varepsilon\} \cap [0, 1]^d$: a norm ball
around the image, cut by the pixel box. The variable `z` of an attack is the perturbed image.
Attacks know nothing of norms; they call

* `center(x)`, `sample(x, gen)`: where to start,
* `ascend(g, z, x)`: the steepest feasible direction of unit norm,
* `project(z, x)`: the nearest point of the set,
* `render(z, x)`: the image to classify, `contains(z, x)`: the judge's test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from advlearn.tensors import Keyed, normal, norms, per_example, uniform


@dataclass(frozen=True)
class NormBall:
    """A norm ball around the image, intersected with the pixel box [0, 1].

    Args:
        eps: radius in pixel units ([0, 1] is the whole range), a number or one per example, (N,).

    Raises:
        ValueError: `eps` is negative, not finite or (for ℓ∞) larger than 1.
    """

    eps: float | Tensor
    p: ClassVar[float]
    symbol: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.eps, Tensor):
            if self.eps.ndim > 1:
                raise ValueError(f"{type(self).__name__}: eps has shape {tuple(self.eps.shape)}, "
                                 "allowed are a number or one value per example, shape (N,)")
            if self.eps.is_cuda:  # Checking would wait for the GPU at every training step.
                return
            worst = float(self.eps.min() if self.eps.min() < 0 else self.eps.max())
        elif not isinstance(self.eps, Real):
            raise ValueError(f"{type(self).__name__}: eps={self.eps!r} is "
                             f"{type(self.eps).__name__}, allowed are a number or a tensor")
        else:
            worst = float(self.eps)
        name = f"{type(self).__name__}(eps={worst:g})"
        if not 0 <= worst < math.inf:
            raise ValueError(f"{name}: eps must be a finite number, 0 or larger")
        if self.p == math.inf and worst > 1:
            raise ValueError(f"{name}: eps is outside [0, 1], pixel units are [0, 1], "
                             f"did you mean {worst:g}/255?")

    def __str__(self) -> str:
        eps = f"{self.eps:.4g}" if not isinstance(self.eps, Tensor) or self.eps.ndim == 0 else "…"
        return f"{self.symbol}, ε = {eps}"

    def take(self, rows: Tensor) -> NormBall:
        """The same threat for a selection of examples (rows: int64 or bool, shape (M,))."""
        if isinstance(self.eps, Tensor) and self.eps.ndim == 1:
            return replace(self, eps=self.eps[rows.to(self.eps.device)])
        return self

    def scaled(self, factor: float) -> NormBall:
        """The same threat with radius `factor * eps`, for ramps and sweeps."""
        return replace(self, eps=factor * self.eps)

    def center(self, x: Tensor) -> Tensor:
        """The unperturbed point."""
        return x

    def render(self, z: Tensor, x: Tensor) -> Tensor:
        """The image that the network sees: here `z` itself."""
        return z

    def contains(self, z: Tensor, x: Tensor, tol: float = 1e-5) -> Tensor:
        """Which examples lie in the set, up to rounding: bool, shape (N,). NaN is outside."""
        flat = z.flatten(1)
        in_box = ((flat >= -tol) & (flat <= 1 + tol)).all(1)
        distance = norms(z.double() - x.double(), self.p)
        # Each pixel of an exact projection is rounded by half a unit in its last place.
        rounding = flat.shape[1] ** (1 / self.p) * torch.finfo(x.dtype).eps / 4
        return in_box & (distance <= self._radius(distance) * (1 + tol) + tol + rounding)

    def _radius(self, x: Tensor) -> Tensor:
        """ε of every example, (N,), in the type of `x` and on its device, without waiting."""
        return x.new_zeros(len(x)) + (self.eps.to(x) if isinstance(self.eps, Tensor) else self.eps)

    def _free(self, g: Tensor, z: Tensor) -> Tensor:
        """`g` without the coordinates that stand at the box and would leave it."""
        return g.masked_fill(((z <= 0) & (g < 0)) | ((z >= 1) & (g > 0)), 0)


class Linf(NormBall):
    r"""Every pixel changes by at most ε: $\|z - x\|_\infty \le \varepsilon$, $z \in [0, 1]^d$."""

    p, symbol = math.inf, "ℓ∞"

    def sample(self, x: Tensor, gen: torch.Generator | Keyed) -> Tensor:
        """Uniform in the ball, then clipped to the box, as in Madry et al. (arXiv:1706.06083)."""
        return self.project(x + per_example(self.eps, x) * (2 * uniform(x, gen) - 1), x)

    def ascend(self, g: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """The sign of the gradient; the projection stops what stands at the box."""
        return g.sign()

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        """Clip every coordinate to its interval: exact, since ball and box are both boxes."""
        eps = per_example(self.eps, x)
        return torch.clamp(z, (x - eps).clamp_(min=0), (x + eps).clamp_(max=1))


class L2(NormBall):
    r"""Euclidean length at most ε: $\|z - x\|_2 \le \varepsilon$, $z \in [0, 1]^d$."""

    p, symbol = 2, "ℓ2"

    def sample(self, x: Tensor, gen: torch.Generator | Keyed) -> Tensor:
        """Uniform in the ball (a direction, and a radius with density ~ r^(d-1)), then projected."""
        direction = normal(x, gen)
        u = uniform(x.flatten(1)[:, :1], gen, stream=2)[:, 0]
        radius = self._radius(x) * u ** (1 / x[0].numel())
        return self.project(x + per_example(radius / norms(direction, 2), x) * direction, x)

    def ascend(self, g: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """The gradient over the coordinates that can move, divided by its length."""
        g, tiny = self._free(g, z), torch.finfo(g.dtype).tiny
        g = g / per_example(norms(g, math.inf).clamp(min=tiny), g)  # Else tiny squares vanish.
        return g / per_example(norms(g, 2).clamp(min=tiny), g)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        r"""The nearest point of ball ∩ box, exactly (clipping after scaling is not it).

        The optimality conditions give $\delta(s) = \mathrm{clip}(s\,v, -x, 1 - x)$ for
        $v = z - x$ and the one $s \in [0, 1]$ with $\|\delta(s)\|_2 = \varepsilon$ (or $s = 1$ when
        the clipped point is in the ball already).
        """
        v, low, high = (z - x).flatten(1), -x.flatten(1), 1 - x.flatten(1)

        def excess(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            sv = s[:, None] * v
            d = torch.clamp(sv, low, high)
            length = norms(d, 2)
            inner = (d * v).masked_fill_(d != sv, 0).sum(1)  # Clipped coordinates do not move.
            return d, length - eps, inner / length

        eps = self._radius(x)
        d = _solve(excess, eps, v, increasing=True)
        d = d * (eps > 0)[:, None]  # Where squares vanish, a length of 0 is not yet a zero.
        return (x + d.view_as(x)).clamp_(0, 1)


class L1(NormBall):
    r"""Total change at most ε: $\|z - x\|_1 \le \varepsilon$, $z \in [0, 1]^d$."""

    p, symbol = 1, "ℓ1"

    def sample(self, x: Tensor, gen: torch.Generator | Keyed) -> Tensor:
        """Uniform in the ball (exponential spacings with random signs), then projected."""
        size = -torch.log1p(-uniform(x, gen))
        spare = -torch.log1p(-uniform(x.flatten(1)[:, :1], gen, stream=2))[:, 0]
        sign = (uniform(x, gen, stream=3) - 0.5).sign()
        scale = self._radius(x) / (norms(size, 1) + spare)
        return self.project(x + per_example(scale, x) * size * sign, x)

    def ascend(self, g: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """One coordinate, the largest gradient among those that can move."""
        flat = self._free(g, z).flatten(1)
        best = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, best, flat.gather(1, best).sign()).view_as(g)

    def project(self, z: Tensor, x: Tensor) -> Tensor:
        r"""The nearest point of ball ∩ box, exactly.

        The optimality conditions give soft thresholding, then clipping:
        $\delta(\lambda) = \mathrm{sign}(v)\,\mathrm{clip}(|v| - \lambda, 0, \text{room})$ for
        $v = z - x$ and the one $\lambda \ge 0$ with $\|\delta(\lambda)\|_1 = \varepsilon$
        (Croce & Hein 2021, arXiv:2103.01208).
        """
        v = (z - x).flatten(1)
        room = torch.where(v > 0, 1 - x.flatten(1), x.flatten(1))
        size, top = v.abs(), v.abs().amax(1)

        def excess(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            over = size - (s * top)[:, None]
            d = torch.minimum(over.clamp(min=0), room)
            moving = ((over > 0) & (over < room)).sum(1)
            return d, d.sum(1) - eps, -moving * top

        eps = self._radius(x)
        d = _solve(excess, eps, v, increasing=False)
        return (x + (v.sign() * d).view_as(x)).clamp_(0, 1)


def _solve(
    excess: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    eps: Tensor,
    v: Tensor,
    *,
    increasing: bool,
) -> Tensor:
    """The point d(s) whose norm is ε, by Newton's method kept inside a bracket [0, 1].

    `excess(s)` returns d(s), the amount by which its norm exceeds ε, and the slope of that in s.
    Rows whose clipped point (s = 1 if increasing, else s = 0) is inside already are left there.
    A row that is solved stands still, so that no row depends on the others. On the CPU the loop
    ends when every row is solved; on a GPU asking would make it wait.
    """
    limits = torch.finfo(v.dtype)
    s = torch.full_like(v[:, 0], float(increasing))
    low, high = torch.zeros_like(s), torch.ones_like(s)
    d, value, slope = excess(s)
    inside = value <= 0
    done = inside | (eps == 0)
    for _ in range(60 if v.dtype == torch.float64 else 30):
        if not v.is_cuda and bool(done.all()):
            break
        above = (value > 0) == increasing  # Is the root to the left of s?
        low, high = torch.where(above, low, s), torch.where(above, s, high)
        newton = s - value / slope
        done = done | ((newton - s).abs() <= 2 * limits.eps * s)
        newton = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        s = torch.where(done, s, newton)
        d, value, slope = excess(s)
        done = done | (value.abs() <= 64 * limits.eps * eps)
    scale = (eps / (value + eps).clamp(min=limits.tiny)).clamp(max=2)  # The last bits.
    return d * torch.where(inside, 1, scale)[:, None]


Threat = NormBall  # The only kind so far; rotations and patches will be others.
