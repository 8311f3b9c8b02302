"""Checker for the exercise of chapter 7 on a control: two networks, the same test images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from advlearn.exercises.report import Report, Unusable, ask, examine
from advlearn.tensors import generator

Z = 1.959964


def interval(a: Tensor, b: Tensor, z: float = Z) -> tuple[float, float, float]:
    """Mean difference and its 95 % interval from the differences of single images."""
    d = a.double() - b.double()
    half = z * float(d.std()) / math.sqrt(len(d))
    return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half


def _widened(half: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor], tuple]:
    def answer(a: Tensor, b: Tensor) -> tuple[float, float, float]:
        a, b = a.double(), b.double()
        mean, width = float((a - b).mean()), half(a, b)
        return mean, mean - width, mean + width

    return answer


def _independent(a: Tensor, b: Tensor) -> float:
    return Z * math.sqrt(float(a.var() + b.var()) / len(a))


_MISTAKES: dict[str, Callable[[Tensor, Tensor], tuple]] = {
    "that treats the networks as if each had images of its own: take differences image by image":
        _widened(_independent),
    "1.64 leaves 5 % on each side: 95 % needs 1.96": lambda a, b: interval(a, b, 1.644854),
    "one standard error is 68 %: 95 % needs 1.96": lambda a, b: interval(a, b, 1.0),
    "the spread of single images: divide by √n": _widened(
        lambda a, b: Z * float((a - b).std())),
    "divide by √n, not by n": _widened(lambda a, b: Z * float((a - b).std()) / len(a)),
    "that is the interval of the first accuracy, around the difference": _widened(
        lambda a, b: Z * float(a.std()) / math.sqrt(len(a))),
    "the two standard errors are added": _widened(
        lambda a, b: Z * float(a.std() + b.std()) / math.sqrt(len(a))),
    "control minus relabelled: wanted is the first minus the second":
        lambda a, b: interval(b, a),
    "those are percent: wanted are shares": lambda a, b: tuple(100 * v for v in interval(a, b)),
}  # fmt: skip


def answers_of(
    n: int, seed: int, first: float, second: float, both: float
) -> tuple[Tensor, Tensor]:
    """Who is right on which image, bool (n,), (n,); a share `both` of the images is easy for both."""
    gen = generator(seed)
    easy = torch.rand(n, generator=gen) < both
    a, b = (easy | (torch.rand(n, generator=gen) < p) for p in (first, second))
    return a, b


def check_paired(paired: Callable[[Tensor, Tensor], tuple[float, float, float]]) -> Report:
    """Try `paired(a, b)`: the difference of two accuracies with its 95 % interval.

    a, b: bool (N,), which of the same N images each network classifies correctly. Wanted are
    three shares: difference a − b, lower and upper end; the ends to 3 % of the width.
    """
    given = [answers_of(1000, 1, 0.3, 0.1, 0.2), answers_of(1000, 2, 0.1, 0.1, 0.6),
             answers_of(400, 3, 0.2, 0.4, 0.0), tuple(t.flip(0) for t in answers_of(2000, 4, 0.5, 0.3, 0.4))]  # fmt: skip
    told: list[tuple[float, ...]] = []

    def asked() -> list[tuple[float, ...]]:
        if not told:
            for a, b in given:
                answer = ask(paired, a, b)
                if not isinstance(answer, (tuple, list)) or len(answer) != 3:
                    raise Unusable("wanted are three numbers: difference, lower and upper end")
                told.append(tuple(float(v) for v in answer))
        return told

    def near(answer: tuple, wanted: tuple) -> bool:
        slack = 0.03 * abs(wanted[2] - wanted[1])
        return all(abs(v - w) <= s
                   for v, w, s in zip(answer, wanted, (1e-6, slack, slack), strict=True))  # fmt: skip

    def right(which: slice) -> Callable[[], str | None]:
        def test() -> str | None:
            wanted = [interval(a, b) for a, b in given]
            pairs = list(zip(asked(), wanted, strict=True))
            if all(near((w[:1] + t[1:]) if which.start else (t[:1] + w[1:]), w) for t, w in pairs):
                return None
            for message, mistake in _MISTAKES.items():
                if all(near(t, mistake(*g)) for t, g in zip(told, given, strict=True)):
                    return message
            return f"{told[0][which]}, wanted {wanted[0][which]}"

        return test

    return examine(paired, [("the difference", right(slice(0, 1))),
                            ("the 95 % interval", right(slice(1, 3)))])  # fmt: skip
