"""`check_steepest` and `check_tie`: where a step against a maximiser's gradient goes up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from advlearn.exercises.report import Report, Unusable, examine
from advlearn.gradients import input_grad
from advlearn.tensors import generator

TOL = 1e-6
Losses = Sequence[Callable[[Tensor], Tensor]]


def _affine(rows: Tensor) -> Tensor:
    """Weights (k,), of sum 1 and perhaps negative, of the shortest point of an affine hull."""
    k = len(rows)
    system = torch.ones(k + 1, k + 1, dtype=rows.dtype)
    system[:k, :k], system[k, k] = rows @ rows.T, 0
    one = torch.zeros(k + 1, dtype=rows.dtype)
    one[k] = 1
    return (torch.linalg.pinv(system, hermitian=True) @ one)[:k]


def shortest(gradients: Tensor) -> Tensor:
    """The point of smallest norm of the convex hull of a few gradients: (m, d) -> (d,).

    It is the shortest point of the affine hull of some of them, with weights that are not
    negative (Carathéodory): all subsets are tried, so m should be small.
    """
    m, best = len(gradients), None
    for k in range(1, m + 1):
        for chosen in combinations(range(m), k):
            rows = gradients[list(chosen)]
            weights = _affine(rows)
            if (weights >= -1e-9).all():
                point = weights.clamp(min=0) @ rows
                best = point if best is None or point.norm() < best.norm() else best
    return best


def _hulls() -> dict[str, Tensor]:
    """Name -> gradients (m, d)."""
    gen = generator(4)
    random = [torch.randn(m, 6, generator=gen, dtype=torch.float64) + 0.4 for m in (2, 3, 4, 5)]
    corner = [[1.0, 0.2, 0.0], [3.0, 1.0, 0.0]]  # The nearest point is the first gradient.
    triangle = [[1.0, 1.0, 0.5], [-1.0, 1.0, 0.5], [0.0, -1.0, 0.5]]  # Inside the triangle.
    around = [[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]]  # 0 is inside.
    twice = [[1.0, 2.0], [1.0, 2.0]]
    shown = {"a corner": corner, "a triangle": triangle, "0 inside": around, "equal": twice}
    return {**{f"{len(g)} random": g for g in random},
            **{name: torch.tensor(g, dtype=torch.float64) for name, g in shown.items()}}  # fmt: skip


def _wrong(g: Tensor) -> dict[str, Tensor]:
    """What a mistake would return, by its message."""
    unit = g / g.norm(dim=1, keepdim=True).clamp(min=1e-30)
    pairs = [shortest(g[list(pair)]) for pair in combinations(range(len(g)), 2)]
    clipped = _affine(g).clamp(min=0)
    return {
        "the mean of the gradients: it is in the hull, but not its shortest point": g.mean(0),
        "the sum of the gradients is not in the hull: weights add up to 1": g.sum(0),
        "the shortest of the gradients: mixtures of them can be shorter":
            g[g.norm(dim=1).argmin()],
        "the longest of the gradients": g[g.norm(dim=1).argmax()],
        "negative weights: that is the shortest point of the whole line or plane": _affine(g) @ g,
        "negative weights were cut off and the rest scaled: that is another point":
            clipped / clipped.sum() @ g,
        "the gradients were scaled to norm 1 first: their lengths count": shortest(unit),
        "only pairs are mixed: with three gradients or more the point can lie inside":
            min(pairs, key=lambda v: float(v.norm())),
        "minus the shortest point: that is the direction to step in, return the point itself":
            -shortest(g),
    }  # fmt: skip


def check_steepest(steepest: Callable[[Tensor], Tensor]) -> Report:
    r"""Try `steepest(gradients) -> v`, (m, d) -> (d,), the shortest point of the convex hull.

    $$v = \arg\min_{c \in C} \|c\|, \qquad c^\top v \ge \|v\|^2 \text{ for all } c \in C$$
    """
    hulls = _hulls()

    def run(name: str) -> Tensor:
        v = steepest(hulls[name].clone())
        if not isinstance(v, Tensor) or v.shape != hulls[name][0].shape:
            got = getattr(v, "shape", type(v).__name__)
            raise Unusable(f"returns {got}, wanted one vector, (d,)")
        if not v.isfinite().all():
            raise Unusable(f"not finite for {name} gradients: 0 / 0 where gradients are equal?")
        return v

    def explains(names: Sequence[str]) -> str | None:
        """The first mistake that gives every wrong result."""
        bad = [name for name in names if (run(name) - shortest(hulls[name])).norm() > TOL]
        if not bad:
            return None
        for message in _wrong(hulls[bad[0]]):
            if all((run(name) - _wrong(hulls[name])[message]).norm() < TOL for name in bad):
                return message
        v, g = run(bad[0]), hulls[bad[0]]
        worst = float((g @ v).min())
        if worst < float(v @ v) - TOL:
            return (f"{bad[0]}: a gradient has the product {worst:.3f} with v, less than "
                    f"‖v‖² = {float(v @ v):.3f}: going towards it makes v shorter")  # fmt: skip
        return f"{bad[0]}: v is not in the hull"

    def untouched() -> str | None:
        g = hulls["3 random"].clone()
        steepest(g)
        return None if torch.equal(g, hulls["3 random"]) else "the gradients were edited in place"

    def descends() -> str | None:
        for name, g in hulls.items():
            v = run(name)
            if float((g @ -v).max()) > -float(v @ v) + TOL:
                return f"{name}: along −v some gradient's loss falls more slowly than ‖v‖²"
        return None

    def of(*names: str) -> Callable[[], str | None]:
        return lambda: explains(names)

    return examine(steepest, [
        ("leaves the gradients as they are", untouched),
        ("two gradients", of("2 random", "a corner", "equal")),
        ("more gradients", of("3 random", "4 random", "5 random", "a triangle")),
        ("0, where there is no descent direction", of("0 inside")),
        ("c·v ≥ ‖v‖² for every gradient c", descends),
    ])  # fmt: skip


# --- the tie ----------------------------------------------------------------------------------


def pixel_losses(pixel: float, deltas: Sequence[float], classes: tuple[int, ...] = (0,)) -> Losses:
    """One loss of two weights per change δ (and label) of a pixel; logits (0, θ₁ d, θ₂ d).

    d = pixel + δ − 1/2, as in the chapter, where the pixel is 1/2. θ (..., 2) -> (...).
    """

    def loss(delta: float, label: int) -> Callable[[Tensor], Tensor]:
        def of(theta: Tensor) -> Tensor:
            logits = F.pad(theta, (1, 0)) * (pixel + delta - 0.5)
            return logits.logsumexp(-1) - logits[..., label]

        return of

    return [loss(delta, label) for delta in deltas for label in classes]


FAMILIES = {
    "the chapter's pixel": pixel_losses(0.5, (0.3, -0.3)),
    "a brighter pixel": pixel_losses(0.58, (0.3, -0.3)),
    "a pixel with five changes": pixel_losses(0.45, (-0.3, -0.15, 0.0, 0.15, 0.3)),
    "a shifted bowl and its mirror image": [
        lambda t: (t - torch.tensor([1.2, 0.3]).to(t)).square().sum(-1),
        lambda t: (t + torch.tensor([1.2, 0.3]).to(t)).square().sum(-1) + 0.4 * t[..., 0],
    ],
}  # fmt: skip


def _at(losses: Losses, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Values (m,) and gradients (m, 2)."""
    values = torch.stack([loss(theta) for loss in losses])
    return values, torch.stack([input_grad(loss, theta) for loss in losses])


def tie_problem(losses: Losses, theta: Tensor, box: float) -> str | None:
    """What keeps θ from being a tie at which both steps go up; None if nothing does."""
    if theta.abs().max() > box:
        return f"θ = {theta.tolist()} is outside [−{box:g}, {box:g}]²"
    values, gradients = _at(losses, theta)
    two = values.topk(2)
    if float(two.values[0] - two.values[1]) > 1e-9:
        near = (values - two.values[0]).abs().sort().values
        below = values.sort().values.diff().min() < 1e-9
        if below:
            return ("two losses are equal, but a third is larger: the maximisers are those "
                    "with the largest loss")  # fmt: skip
        return f"there is one maximiser: the next loss is smaller by {float(near[1]):.1e}"
    first, second = gradients[two.indices]
    if first.norm() < 1e-6 or second.norm() < 1e-6:
        return "a maximiser's gradient is 0: there is no step to speak of"
    product = float(first @ second)
    if product >= -1e-6:
        return (f"the losses tie, but their gradients have the product {product:+.3f}: "
                "a step against either of them lowers both")  # fmt: skip
    for g in (first, second):
        step = 1e-4 * theta.new_ones(1) * g / g.norm()
        if torch.stack([loss(theta - step) for loss in losses]).max() <= two.values[0]:
            return "a step of 0.0001 against a maximiser's gradient does not raise the maximum"
    return None


def check_tie(find_tie: Callable[[Losses, float], Tensor]) -> Report:
    """Try `find_tie(losses, box) -> theta` on families of losses of two weights.

    Wanted is θ in [−box, box]², float64, at which two maximisers tie and a step against the
    gradient of either raises the maximum (Latorre et al., ICLR 2023).
    """

    def tries(losses: Losses) -> Callable[[], str | None]:
        def test() -> str | None:
            theta = find_tie(losses, 3.0)
            if not isinstance(theta, Tensor) or theta.shape != (2,):
                raise Unusable(f"returns {getattr(theta, 'shape', type(theta).__name__)}, "
                               "wanted two weights, (2,)")  # fmt: skip
            if theta.dtype != torch.float64:
                raise Unusable(f"returns {theta.dtype}: a tie needs float64")
            return tie_problem(losses, theta.detach(), 3.0)

        return test

    return examine(find_tie, [(name, tries(losses)) for name, losses in FAMILIES.items()])
