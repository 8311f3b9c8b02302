"""Checkers for the exercises of chapter 5 on what the numbers of trainings prove."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from advlearn import data
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.tensors import generator

# --- convict an optimiser ---------------------------------------------------------------------

CONSTANT = math.log(10)  # The loss of ten equal probabilities, whatever is done to the image.
Run = Mapping[str, object]


def _tables() -> dict[str, list[Run]]:
    """Name -> finished trainings."""

    def run(width: int, low: float, high: float, images: str = "A") -> Run:
        return {"width": width, "images": images, "low": low, "high": high}

    gen, random = generator(5), []
    for _ in range(12):
        low, gap = torch.rand(2, generator=gen, dtype=torch.float64).tolist()
        width = 2 ** int(torch.randint(0, 5, (1,), generator=gen))
        random.append(run(width, 3 * low, 3 * low + 1.5 * gap, "AB"[len(random) % 2]))
    return {
        "a single run": [run(1, 1.2, 1.5)],
        "a run worse than the constant": [run(4, 2.7, 3.0)],
        "the smaller network is better": [run(2, 1.6, 1.8), run(1, 0.9, 1.1)],
        "the larger network is better": [run(1, 1.6, 1.8), run(2, 0.9, 1.1)],
        "two of one width": [run(2, 1.6, 1.8), run(2, 0.9, 1.1)],
        "the bounds overlap": [run(2, 1.6, 1.8), run(1, 0.9, 1.7)],
        "the bounds overlap more": [run(2, 1.6, 1.8), run(1, 0.9, 1.9)],
        "other images": [run(2, 1.6, 1.8, "A"), run(1, 0.9, 1.1, "B")],
        "twelve runs": random,
        "no run": [],
    }


def convicted(runs: Sequence[Run], *, accused: str = "low", witness: str = "high",
              may: Callable[[int, int], bool] = lambda own, other: other <= own,
              constant: bool = True, images: bool = True, cut: bool = True) -> list[float]:  # fmt: skip
    """By how much each optimiser is convicted at least; the options plant mistakes."""
    found = []
    for own in runs:
        others = [other[witness] for other in runs if may(own["width"], other["width"])
                  and (not images or other["images"] == own["images"])]  # fmt: skip
        part = own[accused] - min([*others, *[CONSTANT] * constant], default=own[accused])
        found.append(max(0.0, part) if cut else part)
    return found


_CONVICT_MISTAKES: dict[str, dict[str, object]] = {
    "the better network's risk was taken from its attack: that is a lower bound, a stronger attack "
    "may find more; only an upper bound testifies": {"witness": "low"},
    "the accused network's upper bound was taken: its risk may be smaller, only its lower bound is "
    "certain": {"accused": "high"},
    "both bounds are on the wrong side": {"accused": "high", "witness": "low"},
    "larger networks testify too: they can do what this one may not be able to":
        {"may": lambda own, other: True},
    "only larger networks testify: it is the smaller ones whose functions this one can compute":
        {"may": lambda own, other: other >= own},
    "a network of the same width does not testify: it may": {"may": lambda own, other: other < own},
    "only networks of the same width testify: smaller ones may too":
        {"may": lambda own, other: other == own},
    "the constant answer is forgotten: every width can give it, and its risk is log 10":
        {"constant": False},
    "runs on other images testify: that is another risk": {"images": False},
    "negative parts: where nothing is proved, at least 0 is": {"cut": False},
}  # fmt: skip


def check_convict(convict: Callable[[Sequence[Run]], Sequence[float]]) -> Report:
    """Try `convict(runs)`: for each run, by how much its optimiser has failed at least.

    A run has a "width", "images" on which its adversarial risk was bounded, and the bounds: "low",
    by an attack, and "high", by a proof.
    """
    tables = _tables()

    def told(name: str) -> list[float]:
        runs = [dict(run) for run in tables[name]]
        answer = [float(v) for v in convict(runs)]
        if runs != tables[name]:
            raise Unusable("the runs were changed")
        if len(answer) != len(runs):
            raise Unusable(f"returns {len(answer)} numbers for {len(runs)} runs")
        return answer

    def near(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(abs(u - v) < 1e-9 for u, v in zip(a, b, strict=True))

    def explains(*names: str) -> Callable[[], str | None]:
        def test() -> str | None:
            bad = [name for name in names if not near(told(name), convicted(tables[name]))]
            if not bad:
                return None
            for message, options in _CONVICT_MISTAKES.items():
                if all(near(told(name), convicted(tables[name], **options)) for name in tables):
                    return message
            runs, right, answer = tables[bad[0]], convicted(tables[bad[0]]), told(bad[0])
            i = next(i for i, (a, b) in enumerate(zip(answer, right, strict=True)) if abs(a - b) > 1e-9)
            return f"{bad[0]}: {runs[i]} is convicted of {right[i]:.3f}, you say {answer[i]:.3f}"

        return test

    return examine(convict, [
        ("one run alone", explains("no run", "a single run", "a run worse than the constant")),
        ("who may testify", explains("the smaller network is better", "two of one width",
                                     "the larger network is better", "other images")),
        ("bounds that overlap", explains("the bounds overlap", "the bounds overlap more")),
        ("twelve runs", explains("twelve runs")),
    ])  # fmt: skip


# --- when a constant is the best answer -------------------------------------------------------


def slopes(x: Tensor, y: Tensor, eps: float, weights: str = "classes", box: bool = True) -> Tensor:
    """The slopes of the risk at the best constant, of both signs: (n, d), (n,) -> (2, d)."""
    rows = y[:, None]
    share = torch.where(rows > 0, 0.5 / (rows > 0).sum(), 0.5 / (rows < 0).sum())
    share = share if weights == "classes" else torch.full_like(share, 1 / len(y))

    def room(direction: Tensor) -> Tensor:
        whole = torch.where(direction > 0, 1 - x, x)
        return whole.clamp(max=eps) if box else torch.full_like(x, eps)

    return torch.stack([((room((-s * rows).expand_as(x)) - s * rows * x) * share).sum(0)
                        for s in (1, -1)])  # fmt: skip


def _smallest(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    if holds(low):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def break_even(x: Tensor, y: Tensor) -> float:
    """The smallest ε for which a constant is the best linear answer."""
    return _smallest(lambda eps: bool((slopes(x, y, eps) >= -1e-12).all()))


def _means(x: Tensor, y: Tensor) -> Tensor:
    return (x[y > 0].mean(0) - x[y < 0].mean(0)).abs()


_BREAK_EVEN_MISTAKES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "the images' box is forgotten: a pixel near 0 or 1 cannot be moved by ε in both directions":
        lambda x, y: float(_means(x, y).max() / 2),
    "the attacker moves both classes, each by ε, and the box counts": lambda x, y: float(
        _means(x, y).max()),
    "the frequencies of the classes count only in b: weigh both classes alike": lambda x, y:
        _smallest(lambda eps: bool((slopes(x, y, eps, weights="raw") >= -1e-12).all())),
    "weights may be positive or negative: there are two slopes for each pixel": lambda x, y:
        _smallest(lambda eps: bool((slopes(x, y, eps)[0] >= -1e-12).all())),
    "one pixel that resists is enough to beat a constant: all of them must be undone, not one":
        lambda x, y: _smallest(lambda eps: bool((slopes(x, y, eps) >= -1e-12).all(0).any())),
    "slopes were averaged over pixels: the classifier chooses its pixel": lambda x, y:
        _smallest(lambda eps: float(slopes(x, y, eps).amin(0).mean()) >= -1e-12),
}  # fmt: skip


def _two_classes() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> images (n, d) in [0, 1], float64, and y = ±1."""
    gen = generator(6)

    def drawn(n: int, d: int, shift: float, low: float = 0.0, high: float = 1.0) -> tuple:
        y = torch.where(torch.rand(n, generator=gen) < 0.3, 1.0, -1.0).double()
        x = torch.rand(n, d, generator=gen, dtype=torch.float64)
        x = (x + shift * y[:, None] * torch.linspace(-1, 1, d).double()).clamp(low, high)
        return x, y

    grey = torch.tensor([[0.7], [0.5], [0.6], [0.3]], dtype=torch.float64)
    dark = torch.tensor([[0.0, 0.5], [0.1, 0.5], [0.9, 0.5], [1.0, 0.5], [1.0, 0.5]]).double()
    sides = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    digits = {}
    for a, b in pairwise((1, 8, 3)):
        x, y = data.load("digits", "train").only(a, b).tensors()
        digits[f"the digits {a} and {b}"] = (
            x.double().flatten(1), torch.where(y == a, 1.0, -1.0).double())  # fmt: skip
    return {"a grey pixel": (grey, sides), "a dark pixel, three against two":
            (dark, torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]).double()),
            "grey images": drawn(60, 5, 0.1, 0.35, 0.65), "uneven classes": drawn(80, 6, 0.15),
            "equal classes": (torch.cat([x := drawn(20, 4, 0.0)[0], x]),
                              torch.tensor([1.0] * 20 + [-1.0] * 20).double()),
            **digits}  # fmt: skip


def check_break_even(smallest_eps: Callable[[Tensor, Tensor], float]) -> Report:
    """Try `smallest_eps(x, y)`: from which ε on a constant is the best linear answer.

    Images (n, d) in [0, 1], float64; y = ±1, (n,), not equally frequent. Wanted is ε to 0.00001,
    for the logistic loss, the ℓ∞ ball and the images' box.
    """
    cases = _two_classes()

    def told(name: str) -> float:
        x, y = cases[name]
        given = x.clone()
        answer = float(smallest_eps(given, y.clone()))
        if not torch.equal(given, x):
            raise Unusable("the images were changed")
        if not 0 <= answer <= 1:
            raise Unusable(f"{name}: ε = {answer}, it is between 0 and 1")
        return answer

    def explains(*names: str) -> Callable[[], str | None]:
        def test() -> str | None:
            right = {name: break_even(*cases[name]) for name in names}
            bad = [name for name in names if abs(told(name) - right[name]) > 1e-5]
            if not bad:
                return None
            for message, wrong in _BREAK_EVEN_MISTAKES.items():
                if all(abs(told(name) - wrong(*cases[name])) < 1e-5 for name in cases):
                    return message
            name = bad[0]
            worst = float(slopes(*cases[name], told(name)).min())
            return f"{name}: at your ε = {told(name):.5f} the smallest slope is {worst:+.5f}" + (
                ", a smaller ε is enough" if worst >= 0 else ", and the risk still falls")

        return test

    return examine(smallest_eps, [
        ("classes that are equal", explains("equal classes")),
        ("far from the box", explains("a grey pixel", "grey images")),
        ("in the box, with uneven classes",
         explains("a dark pixel, three against two", "uneven classes")),
        ("digits", explains(*(name for name in cases if "digits" in name))),
    ])  # fmt: skip
