"""Attacks that only ask for predictions: no gradients, and nothing that masks them helps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from advlearn.losses import Loss, margin
from advlearn.models import Classifier
from advlearn.tensors import Keyed, frozen, key_of, norms, per_example, uniform
from advlearn.threats import Threat

# Where the area of the square is halved, in a search of 10,000 queries: the list of the authors' code.
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: Loss = margin,
    queries: int = 1000,
    p_init: float = 0.8,
    seed: int = 0,
    start: Tensor | None = None,
) -> Tensor:
    r"""The Square Attack: random search with squares that shrink.

    Step i changes the perturbation on a random square that covers the share $p_i$ of the image, and
    keeps the change where the loss rises or the prediction becomes wrong. For ℓ∞ the square takes
    x ± ε, one random sign per channel; for ℓ2 it receives a bump of two halves and the perturbation
    that a second square gives up. A fooled example is not queried again.

    Andriushchenko et al., arXiv:1912.00049. A square can lie at every edge of the image; in the
    authors' code it never reaches the last row and the last column.

    Args:
        f: classifier, images (N, C, H, W) in [0, 1] -> logits (N, K). Only called, never
            differentiated.
        x, y: images and true labels (N,).
        threat: an `Linf` or `L2` ball.
        loss: (logits, y) -> (N,), maximised until the prediction is wrong.
        queries: images shown to the network per example, at most; the first is the start.
        p_init: p at the first step, in (0, 1]; halved along the published schedule, which is
            stretched to the number of queries.
        seed: of the squares.
        start: (N, C, H, W). The search has its own first point, stripes or tiles; from `start` (from
            `x` where it is None) come only the random numbers: its bits are the example's key. So
            every restart searches elsewhere, and the batch changes nothing.

    Returns:
        The best point of the search, (N, C, H, W). `x` and `f` are left as they were.

    Raises:
        ValueError: another threat.
    """
    kind = getattr(threat, "p", None)
    if kind not in (2, math.inf):
        raise ValueError(f"square: threat={threat}, allowed are Linf and L2")
    first, move = (_stripes, _paint) if kind == math.inf else (_tiles, _shift)
    key = key_of(x if start is None else start)
    with frozen(f), torch.no_grad():
        z = first(x, threat, Keyed((seed, 0), key))
        logits = f(z)
        best, wrong = loss(logits, y), logits.argmax(1) != y
        for i in range(queries - 1):
            rows = (~wrong).nonzero()[:, 0]
            if not len(rows):
                break
            side = math.sqrt(covered(i, queries, p_init) * x[0, 0].numel())
            random = Keyed((seed, i + 1), key[rows])
            new = move(z[rows], x[rows], threat.take(rows), side, random)
            # The network sees the examples that stand; the loss, which may know a target of each
            # example, sees the whole batch.
            logits = logits.index_put((rows,), f(new))
            value, wrong = loss(logits, y), logits.argmax(1) != y
            kept = ((value > best) | wrong)[rows]
            best = torch.maximum(best, value)
            z[rows[kept]] = new[kept]
    return z


def covered(i: int, queries: int, p_init: float = 0.8) -> float:
    """Share of the image that the square of step i = 0, 1, … covers."""
    return p_init / 2 ** sum(10_000 * i // queries > t for t in HALVED_AT)


def _signs(u: Tensor) -> Tensor:
    return (u - 0.5).sign()


def _window(u: Tensor, side: int, x: Tensor) -> Tensor:
    """Flat positions of a random square in each image: u (N, 2) in (0, 1) -> (N, C, side²)."""
    n, channels, height, width = x.shape
    room = torch.tensor([height - side + 1, width - side + 1], device=x.device)
    top, left = (u * room).long().clamp(max=room - 1).view(n, 2, 1, 1).unbind(1)
    step = torch.arange(side, device=x.device)
    flat = (top + step[:, None]) * width + left + step
    return flat.view(n, 1, -1).expand(-1, channels, -1)


# --- ℓ∞ ---------------------------------------------------------------------------------------


def _stripes(x: Tensor, threat: Threat, random: Keyed) -> Tensor:
    """Every column of every channel at x + ε or at x − ε."""
    return threat.project(x + per_example(threat.eps, x) * _signs(uniform(x[:, :, :1], random)), x)


def _paint(z: Tensor, x: Tensor, threat: Threat, side: float, random: Keyed) -> Tensor:
    """±2ε on the square, one sign per channel: after the projection ±ε."""
    n, channels = x.shape[:2]
    u = uniform(x.new_empty(n, 2 + channels), random)
    window = _window(u[:, :2], _fit(round(side), x, 1), x)
    colour = 2 * per_example(threat.eps, x[:, :, 0]) * _signs(u[:, 2:, None])
    step = torch.zeros_like(x).flatten(2).scatter(2, window, colour.expand_as(window))
    return threat.project(z + step.view_as(x), x)


def _fit(side: int, x: Tensor, least: int) -> int:
    return min(max(side, least), *x.shape[2:])


# --- ℓ2 ---------------------------------------------------------------------------------------


def _bump(height: int, width: int, x: Tensor) -> Tensor:
    r"""Unit vector that falls with the distance from the middle: $\sum_{k > \mathrm{dist}} 1/k^2$."""
    i, j = (torch.arange(n, device=x.device).sub(n // 2).abs() for n in (height, width))
    distance = torch.maximum(i[:, None], j)
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=x.dtype, device=x.device) ** -2
    value = terms.flip(0).cumsum(0).flip(0)[distance]
    return value / value.norm()


def _two_bumps(side: int, turned: Tensor, x: Tensor) -> Tensor:
    """η: one half up, the other down, of unit length; turned by 90° where told. (…, side, side)."""
    half = side // 2
    parts = [_bump(half, side, x)] if half else []
    eta = torch.cat([*parts, -_bump(side - half, side, x)])
    return torch.where(turned[..., None, None], eta.T, eta) / eta.norm()


def _scaled(d: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """x + d at length ε, clipped to the box, which only shortens it."""
    scale = threat.eps / norms(d, 2).clamp(min=torch.finfo(d.dtype).tiny)
    return (x + per_example(scale, x) * d).clamp(0, 1)


def _tiles(x: Tensor, threat: Threat, random: Keyed) -> Tensor:
    """Five by five tiles, each ±η in every channel."""
    n, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    u = uniform(x.new_empty(n, 1 + channels, down, across), random)
    eta = _two_bumps(side, u[:, :1] < 0.5, x) * _signs(u[:, 1:, ..., None, None])
    tiled = eta.transpose(3, 4).reshape(n, channels, down * side, across * side)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    margins = (left, width - across * side - left, top, height - down * side - top)
    return _scaled(F.pad(tiled, margins), x, threat)


def _shift(z: Tensor, x: Tensor, threat: Threat, side: float, random: Keyed) -> Tensor:
    """Square 2 gives its length, and what the box has cut off, to ±η on square 1."""
    n, channels = x.shape[:2]
    side, tiny = _fit(round(side) | 1, x, 3), torch.finfo(x.dtype).tiny
    u = uniform(x.new_empty(n, 5 + channels), random)
    d = (z - x).flatten(2)
    one, two = _window(u[:, :2], side, x), _window(u[:, 2:4], side, x)

    def length(v: Tensor) -> Tensor:
        return v.norm(dim=2, keepdim=True)

    eta = _two_bumps(side, u[:, 4] < 0.5, x).flatten(1)[:, None] * _signs(u[:, 5:, None])
    old = d.gather(2, one)
    new = eta + old / length(old).clamp(min=tiny)
    rest = d.scatter(2, one, 0).scatter(2, two, 0)
    unused = (per_example(threat.eps, d) ** 2 - length(d.flatten(1)[:, None]) ** 2).clamp(min=0)
    available = (length(d) ** 2 - length(rest) ** 2 + unused / channels).clamp(min=0).sqrt()
    new = new / length(new).clamp(min=tiny) * available
    return _scaled(rest.scatter(2, one, new).view_as(x), x, threat)
