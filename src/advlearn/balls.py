"""Points in the plane and the ℓ∞ balls around them: small ReLU networks that must keep them apart.

The picture in front of the capacity experiments of Madry et al., arXiv:1706.06083, made exact:
whether a network gives a whole ball the right sign is decided by proof.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn.tensors import generator, uniform


def scene(n: int = 16, eps: float = 0.08, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random points that a line separates, with balls that do not touch each other.

    Uniform in the unit square, drawn one after the other; one that is closer than 2.5 ε (ℓ∞) to an
    earlier point, or closer than 0.01 (ℓ2) to the rising diagonal, is drawn again.

    Returns:
        Points (n, 2), float64, and their side of the diagonal, ±1, (n,).

    Raises:
        ValueError: there is no room for n such balls.
    """
    gen, chosen = generator(seed), torch.empty(0, 2, dtype=torch.float64)
    for _ in range(100_000):
        if len(chosen) == n:
            return chosen, torch.where(chosen[:, 1] > chosen[:, 0], 1.0, -1.0).double()
        p = uniform(chosen.new_empty(1, 2), gen)
        free = (chosen - p).abs().amax(1) >= 2.5 * eps
        if free.all() and (p[0, 1] - p[0, 0]).abs() >= 0.014:
            chosen = torch.cat([chosen, p])
    raise ValueError(f"scene: n={n} balls with eps={eps} do not fit into the unit square")


def line_separates(x: Tensor, y: Tensor, eps: float = 0.0) -> bool:
    """Whether a straight line has all balls of one sign on one side: (n, 2), (n,) -> an answer.

    If some line separates two sets of squares, it can be moved until it goes through two of their
    corners and still has none on the wrong side. So it is enough to try all pairs of corners.
    """
    corners = (x[:, None] + offsets(eps, 2).to(x)).flatten(0, 1)
    signs = y.repeat_interleave(4)
    along = corners[:, None] - corners
    normal = torch.stack([-along[..., 1], along[..., 0]], -1)
    side = torch.einsum("pqi,rpi->pqr", normal, corners[:, None] - corners) * signs
    tried = normal.abs().amax(2) > 1e-9
    return bool(((side >= -1e-12).all(2) & tried).any())


class Crowd(nn.Module):
    """Many fully connected ReLU networks from the plane to one number, side by side.

    Layer l of all of them is one tensor (K, out, in), as wide as the widest network needs. The
    other units have weights of exactly 0, and stay so: nothing reaches them, and no gradient does.

    Args:
        hidden: the hidden widths of each of the K networks, all of one depth.
        seeds: of their weights, one each.

    Raises:
        ValueError: no network, different depths, or not as many seeds as networks.
    """

    def __init__(self, hidden: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        super().__init__()
        depths = {len(widths) for widths in hidden}
        if len(depths) != 1 or len(seeds) != len(hidden):
            raise ValueError(f"Crowd: {len(hidden)} networks of depths {sorted(depths)} with "
                             f"{len(seeds)} seeds; allowed are one depth and a seed for each")
        self.sizes = [(2, *widths, 1) for widths in hidden]
        wide = [max(size) for size in zip(*self.sizes, strict=True)]
        shapes = list(zip(wide[1:], wide[:-1], strict=True))
        self.weights = nn.ParameterList(torch.zeros(len(hidden), *s) for s in shapes)
        self.biases = nn.ParameterList(torch.zeros(len(hidden), s[0]) for s in shapes)
        for k, (size, seed) in enumerate(zip(self.sizes, seeds, strict=True)):
            gen = generator(seed)
            for w, b, n_in, n_out in zip(self.weights, self.biases, size, size[1:], strict=False):
                draw = torch.randn(n_out, n_in, generator=gen) * (2 / n_in) ** 0.5
                w.data[k, :n_out, :n_in] = draw
                if w is self.weights[0]:  # Every unit's kink goes through the square.
                    middle = torch.rand(n_out, 2, generator=gen)
                    b.data[k, :n_out] = -(draw * (2 * middle - 1)).sum(1)

    @property
    def parameters_each(self) -> list[int]:
        """Weights and biases of each network."""
        return [sum((i + 1) * o for i, o in zip(s, s[1:], strict=False)) for s in self.sizes]

    def forward(self, points: Tensor) -> Tensor:
        """(P, 2), or (K, P, 2) for other points for each network -> (K, P)."""
        h = (2 * points - 1).expand(len(self.sizes), *points.shape[-2:])
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b[:, None], h if i == 0 else h.relu(), w.mT)
        return h[..., 0]


def offsets(eps: float, grid: int) -> Tensor:
    """A grid × grid of points of the ball around 0, its corners among them: (grid², 2)."""
    axis = torch.linspace(-eps, eps, grid) if grid > 1 else torch.zeros(1)
    return torch.cartesian_prod(axis, axis)


def train(
    crowd: Crowd, x: Tensor, y: Tensor, eps: float, *, steps: int = 2000, lr: float = 0.02,
    grid: int = 5,
) -> None:  # fmt: skip
    """Minimise, for each network apart, the mean over points of the largest loss in their balls.

    The inner maximum is the largest of `grid`² points of the ball; ε = 0 is ordinary training.
    Adam, with a rate that falls linearly to 0. The networks do not touch each other.
    """
    x, y = x.to(crowd.weights[0]), y.to(crowd.weights[0])
    moves = offsets(eps, grid if eps else 1).to(x)
    around = (x[:, None] + moves).flatten(0, 1)
    optimizer = torch.optim.Adam(crowd.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        with torch.no_grad():  # The worst point of every ball; the gradient is taken there.
            margins = crowd(around).view(-1, len(x), len(moves)) * y[:, None]
        worst = x + moves[margins.argmin(2)]
        optimizer.zero_grad()
        F.softplus(-y * crowd(worst)).mean(1).sum().backward()
        optimizer.step()


def kept(crowd: Crowd, x: Tensor, y: Tensor, eps: float, *, depth: int = 10) -> Tensor:
    """Whether each network has the right sign on the whole of each ball, proved: bool (K, n).

    Interval bounds of the network decide a box, or it is cut into four; a centre with the wrong
    sign refutes its ball. A box that is still open after `depth` cuts (its side is ε / 2^depth by
    then) counts as lost. Float64; ε = 0 asks for the points alone.
    """
    weights = [w.double() for w in crowd.weights]
    biases = [b.double() for b in crowd.biases]
    k, n = len(crowd.sizes), len(x)
    lost = torch.zeros(k * n, dtype=torch.bool)
    ball = torch.arange(k * n)  # Which network and ball a box belongs to: k · n + i.
    center, sign, half = x.double().repeat(k, 1), y.double().repeat(k), eps
    for cut in range(depth + 1):
        low, value = _bounds(weights, biases, ball // n, center, half, sign)
        lost[ball[value <= 0]] = True
        open_ = (low <= 0) & ~lost[ball]
        ball, center, sign = ball[open_], center[open_], sign[open_]
        if not len(ball) or cut == depth:
            break
        half = half / 2
        quarters = offsets(half, 2).double()
        ball, sign = ball.repeat_interleave(4), sign.repeat_interleave(4)
        center = (center[:, None] + quarters).flatten(0, 1)
    lost[ball] = True
    return ~lost.view(k, n)


def _bounds(
    weights: Sequence[Tensor], biases: Sequence[Tensor], network: Tensor, center: Tensor,
    half: float, sign: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lower bound of sign · f on boxes (R, 2), and its value at their centres, each (R,)."""
    value = middle = 2 * center - 1
    radius = torch.full_like(middle, 2 * half)
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        w, b = w[network], b[network]
        if i:
            low, high = (middle - radius).relu(), (middle + radius).relu()
            middle, radius, value = (low + high) / 2, (high - low) / 2, value.relu()
        middle, value = (torch.einsum("roi,ri->ro", w, v) + b for v in (middle, value))
        radius = torch.einsum("roi,ri->ro", w.abs(), radius)
    return (sign[:, None] * middle - radius)[:, 0], sign * value[:, 0]
