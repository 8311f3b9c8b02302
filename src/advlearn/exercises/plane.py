"""Checkers for the exercises of chapter 5 in the plane: lines, squares and small ReLU networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from advlearn import balls
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.tensors import generator

# --- a line -----------------------------------------------------------------------------------


def gaps(x: Tensor, y: Tensor, pairs: bool = True, axes: bool = True) -> tuple[Tensor, Tensor]:
    """Candidate directions w (m, 2), of both signs, and the gap min w·x₊ − max w·x₋ of each, (m,).

    On each of the four edges of ‖w‖₁ = 1 the gap is concave and linear in pieces, so it is largest
    at a corner of the diamond or where two points of one kind are level.
    """
    along = (x[:, None] - x).flatten(0, 1)
    w = torch.stack([-along[:, 1], along[:, 0]], 1) if pairs else x[:0]
    w = torch.cat([w, torch.eye(2, dtype=x.dtype)]) if axes else w
    w = w[w.abs().amax(1) > 1e-12]
    w = torch.cat([w, -w])
    values = w @ x.T
    high = values.masked_fill(y < 0, math.inf).amin(1)
    return w, high - values.masked_fill(y > 0, -math.inf).amax(1)


def line_eps(x: Tensor, y: Tensor) -> float:
    """The largest radius at which some line still separates the balls; 0 if none does at all."""
    w, gap = gaps(x, y)
    return max(0.0, float((gap / w.abs().sum(1)).max()) / 2)


def _between(x: Tensor, y: Tensor) -> Tensor:
    """ℓ∞ distances of the points of one kind to those of the other."""
    return (x[y > 0][:, None] - x[y < 0]).abs().amax(2)


_LINE_MISTAKES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "that is the whole gap: both balls grow, each has half of it": lambda x, y: 2 * line_eps(x, y),
    "that is the ℓ2 margin: a square reaches ε ‖w‖₁ in the direction w, a disc ε ‖w‖₂":
        lambda x, y: max(0.0, float((gaps(x, y)[1] / gaps(x, y)[0].norm(dim=1)).max()) / 2),
    "w was divided by its largest entry: what a square reaches is ε times the sum of both":
        lambda x, y: max(0.0, float((gaps(x, y)[1] / gaps(x, y)[0].abs().amax(1)).max()) / 2),
    "half the distance of the nearest two points: balls that do not touch need not have a line "
    "between them": lambda x, y: float(_between(x, y).min()) / 2,
    "only level and upright lines were tried": lambda x, y: max(0.0, float(
        (gaps(x, y, pairs=False)[1]).max()) / 2),
    "the lines along two points are not all: those at 45°, w = (1, 0) and (0, 1), can be better":
        lambda x, y: max(0.0, float((lambda w, g: g / w.abs().sum(1))(
            *gaps(x, y, axes=False)).max()) / 2),
    "where no line separates the points, ε = 0": lambda x, y: float(
        (lambda w, g: g / w.abs().sum(1))(*gaps(x, y)).max()) / 2,
}  # fmt: skip


def _point_sets() -> dict[str, tuple[Tensor, Tensor]]:
    gen = generator(3)

    def cut(n: int, w: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Uniform points with a gap of 0.2 along a line through the centre."""
        normal, kept = torch.tensor(w, dtype=torch.float64), []
        while len(kept) < n:
            p = torch.rand(2, generator=gen, dtype=torch.float64)
            if abs(float((p - 0.5) @ normal)) > 0.1:
                kept.append(p)
        x = torch.stack(kept)
        return x, torch.where((x - 0.5) @ normal > 0, 1.0, -1.0).double()

    two = torch.tensor([[0.2, 0.3], [0.8, 0.7]]).double()
    crossed = torch.tensor([[0.1, 0.1], [0.9, 0.9], [0.1, 0.9], [0.9, 0.1]]).double()
    return {"two points": (two, torch.tensor([-1.0, 1.0]).double()),
            "two points, changed over": (two, torch.tensor([1.0, -1.0]).double()),
            "a steep line": cut(9, (1.0, -0.3)), "a flat line": cut(12, (0.2, 1.0)),
            "a rising line": cut(14, (-0.8, 0.7)),
            "a sixteen-point scene": balls.scene(16, 0.08, 4),
            "crossed": (crossed, torch.tensor([1.0, 1.0, -1.0, -1.0]).double()),
            "mixed": (torch.rand(12, 2, generator=gen).double(),
                      torch.tensor([1.0, -1.0] * 6).double())}  # fmt: skip


def check_line(largest_eps: Callable[[Tensor, Tensor], float]) -> Report:
    """Try `largest_eps(x, y)`: up to which ε a line separates the ℓ∞ balls around points.

    Points (n, 2), float64, and y = ±1, (n,). Wanted to 0.000001; 0 if no line separates the points.
    """
    sets = _point_sets()

    def told(name: str) -> float:
        x, y = sets[name]
        given = x.clone()
        eps = float(largest_eps(given, y.clone()))
        if not torch.equal(given, x):
            raise Unusable("the points were changed")
        return eps

    def explains(*names: str) -> Callable[[], str | None]:
        def test() -> str | None:
            bad = [name for name in names if not abs(told(name) - line_eps(*sets[name])) < 1e-6]
            if not bad:
                return None
            for message, wrong in _LINE_MISTAKES.items():
                if all(abs(told(name) - wrong(*sets[name])) < 1e-6 for name in sets):
                    return message
            name, (x, y) = bad[0], sets[bad[0]]
            eps, found = told(name), told(name) - line_eps(*sets[bad[0]])
            if not eps >= 0:
                return f"{name}: ε = {eps}, it is not negative"
            if found > 0:
                return f"{name}: at your ε = {eps:.6f} no line separates the balls"
            between = eps - found / 2
            held = balls.line_separates(x, y, between)
            return f"{name}: you say {eps:.6f}, and at ε = {between:.6f} " + (
                "a line still separates the balls" if held else "it does not either")

        return test

    return examine(largest_eps, [
        ("two points", explains("two points", "two points, changed over")),
        ("points that a line separates",
         explains("a steep line", "a flat line", "a rising line", "a sixteen-point scene")),
        ("points that none separates", explains("crossed", "mixed")),
    ])  # fmt: skip


# --- a whole ball -----------------------------------------------------------------------------

Network = tuple[list[Tensor], list[Tensor]]


def value(network: Network, points: Tensor) -> Tensor:
    """f of points (P, 2) -> (P,)."""
    h = points
    for i, (w, b) in enumerate(zip(*network, strict=True)):
        h = (h.relu() if i else h) @ w.T + b
    return h[:, 0]


def minimum(network: Network, center: Tensor, eps: float) -> tuple[float, Tensor]:
    """The exact minimum of a network with one hidden layer on a square, and where it is.

    f is linear between the lines on which units switch, so it is smallest where two of these
    lines, or one and an edge, meet, or at a corner.
    """
    w, b = network[0][0], network[1][0]
    edges = torch.eye(2, dtype=w.dtype).repeat(2, 1)
    offset = torch.cat([eps - center, -eps - center])
    lines, at = torch.cat([w, edges]), torch.cat([b, offset])
    i, j = torch.triu_indices(len(lines), len(lines), 1)
    det = lines[i, 0] * lines[j, 1] - lines[i, 1] * lines[j, 0]
    meet = det.abs() > 1e-12
    i, j, det = i[meet], j[meet], det[meet]
    points = torch.stack([lines[i, 1] * at[j] - lines[j, 1] * at[i],
                          lines[j, 0] * at[i] - lines[i, 0] * at[j]], 1) / det[:, None]  # fmt: skip
    points = points[(points - center).abs().amax(1) <= eps * (1 + 1e-9)]
    values = value(network, points)
    return float(values.min()), points[values.argmin()]


def _random(seed: int, units: int, bias: float) -> Network:
    gen = generator(seed)
    w, v = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((units, 2), (1, units)))
    middle = torch.rand(units, 2, generator=gen, dtype=torch.float64)
    return [3 * w, v / units**0.5], [-3 * (w * middle).sum(1), torch.tensor([bias]).double()]


def _strip(level: float, signs: tuple[float, float], center: Tensor, eps: float) -> Network:
    """1, but on a strip across one corner of the square it falls to `level`.

    The strip is so narrow that a million random points would probably miss what is below 0.
    """
    depth, half = 5e-4, 2.5e-5
    side = torch.tensor(signs, dtype=torch.float64)
    normal = torch.tensor([0.8, 0.6], dtype=torch.float64) * side
    at = depth - normal @ (center + eps * side)
    slope = (1 - level) / half
    out = torch.tensor([[-slope, 2 * slope, -slope]], dtype=torch.float64)
    shift = at + torch.tensor([half, 0.0, -half], dtype=torch.float64)
    return [normal.repeat(3, 1), out], [shift, torch.ones(1).double()]


def _deeper(network: Network) -> Network:
    """The same function with a second hidden layer, which passes every unit on, 1.5 times."""
    (w, v), (b, c) = network
    middle = 1.5 * torch.eye(len(w), dtype=w.dtype)
    return [w, middle, v / 1.5], [b, torch.zeros_like(b), c]


@torch.no_grad()
def _problems() -> dict[str, tuple[Network, Network, Tensor, float]]:
    """Name -> the network that is given, the same with one hidden layer, a centre and ε."""
    found: dict[str, tuple[Network, Network, Tensor, float]] = {}
    middle = torch.tensor([0.55, 0.47], dtype=torch.float64)
    corner = _random(0, 1, 0.0)
    corner[0][0][:], corner[1][0][:] = torch.tensor([[1.0, 1.0]]).double(), -1.02 - 0.17
    corner[0][1][:], corner[1][1][:] = -10.0, 0.2  # Below 0 in the last bit of a corner.
    found["a corner"] = (corner, corner, middle, 0.1)
    for i, signs in enumerate([(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0)]):
        found[f"a strip, #{i + 1}"] = (n := _strip(-0.3, signs, middle, 0.1), n, middle, 0.1)
    found["a strip above 0"] = (n := _strip(0.1, (-1.0, -1.0), middle, 0.1), n, middle, 0.1)
    seed, counts = 0, {"whole": 0, "cut": 0}
    while min(counts.values()) < 6:
        seed += 1
        network, eps = _random(seed, 10, 0.6), (0.05, 0.1, 0.2)[seed % 3]
        center = torch.rand(2, generator=generator(seed), dtype=torch.float64)
        low = minimum(network, center, eps)[0]
        kind = "whole" if 0.03 < low < 0.5 else "cut" if -0.3 < low < -1e-3 else ""
        if kind and counts[kind] < 6 and value(network, center[None]) > 0:
            counts[kind] += 1
            given = _deeper(network) if counts[kind] > 4 else network
            found[f"{kind}, #{counts[kind]}"] = (given, network, center, eps)
    return found


def check_whole(whole: Callable[[list[Tensor], list[Tensor], Tensor, float], bool]) -> Report:
    """Try `whole(weights, biases, center, eps)`: is the network positive on the whole square?

    Weights (out, in) and biases (out,) of each layer, float64, ReLU between the layers, one output.
    Wanted is False if f ≤ 0 anywhere in [center − eps, center + eps]², and True if f ≥ 0.03
    everywhere. In between either answer is accepted.
    """
    problems = _problems()

    def told(name: str) -> bool:
        (weights, biases), _, center, eps = problems[name]
        copies = [w.clone() for w in weights], [b.clone() for b in biases]
        answer = whole(*copies, center.clone(), eps)
        if answer is None:
            raise Unusable("returns None, wanted True or False")
        return bool(answer)

    def sound(*names: str) -> Callable[[], str | None]:
        return lambda: next(filter(None, map(lies, names)), None)

    def complete(*names: str) -> Callable[[], str | None]:
        return lambda: next(filter(None, map(gives_up, names)), None)

    def lies(name: str) -> str | None:
        _, plain, center, eps = problems[name]
        low, where = minimum(plain, center, eps)
        return (f"{name}: you say True, but f({where[0]:.4f}, {where[1]:.4f}) = {low:.4f}, in the "
                f"square of {center.tolist()} and ε = {eps}{_hint(name)}"
                if told(name) else None)  # fmt: skip

    def gives_up(name: str) -> str | None:
        return None if told(name) else (
            f"{name}: you say False, but f ≥ {minimum(*problems[name][1:])[0]:.3f} on the whole "
            "square: cut it where the bounds do not decide")

    cut = [name for name in problems if name.startswith("cut")]
    kept = [name for name in problems if name.startswith("whole")]
    strips = [name for name in problems if name.startswith("a strip, #")]
    return examine(whole, [
        ("never says whole of a square that is cut", sound(*cut[:4])),
        ("nor where a corner alone is lost", sound("a corner")),
        ("nor where a narrow strip is lost", sound(*strips)),
        ("nor for two hidden layers", sound(*cut[4:])),
        ("proves squares that are whole", complete(*kept[:4])),
        ("a strip that stays above 0", complete("a strip above 0")),
        ("two hidden layers", complete(*kept[4:])),
    ])  # fmt: skip


def _hint(name: str) -> str:
    if name == "a corner":
        return ": the corners belong to the ball"
    return ": points that are tried may all miss it, bounds may not" if "strip" in name else ""
