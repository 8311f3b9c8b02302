"""What runs of an attack from random starts say about the runs that were not made.

All of it is about *this* attack. A maximum that no start leads to is seen by none of these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advlearn.tensors import generator


def excluded(n: int, confidence: float = 0.95) -> float:
    r"""The largest share that an outcome can have which `n` independent runs never showed.

    $1 - (1 - c)^{1/n}$, exact; at 95 % close to $3 / n$. A share $p$ larger than this would have
    shown up with a probability of more than $c$.

    Raises:
        ValueError: `n` is not 1 or more, or `confidence` is not between 0 and 1.
    """
    if n < 1 or not 0 < confidence < 1:
        raise ValueError(f"excluded: n={n}, confidence={confidence}, allowed are n of 1 or more and "
                         "a confidence between 0 and 1")  # fmt: skip
    return 1 - (1 - confidence) ** (1 / n)


def largest_gap(values: Tensor, k: int = 50) -> float:
    r"""Does the largest value stand apart from the others? The p-value of a test.

    Null: above some level the values fall off like an exponential distribution. Then the
    normalised gaps $D_i = i\,(x_{(i)} - x_{(i+1)})$ between the largest values are independent and
    have one exponential distribution (Rényi 1953), and
    $P(D_1 / \overline{D_{2 \dots k}} > r) = (1 + r / (k - 1))^{-(k - 1)}$. A tail that falls
    the more steeply the nearer it comes to its end (increasing hazard rate) has a smaller $D_1$
    on average: then the test rejects less often than it says, and misses more.

    It asks about one run that stands alone. A group of runs far above the rest has no large $D_1$.

    Args:
        values: (N,). For the smallest value give `-values`.
        k: gaps that are used, from 2 to N − 1.

    Raises:
        ValueError: `k` is not from 2 to N − 1.
    """
    if not 2 <= k < len(values):
        raise ValueError(f"largest_gap: k={k}, allowed are 2 to {len(values) - 1} for "
                         f"{len(values)} values")  # fmt: skip
    top = values.double().sort(descending=True).values[: k + 1]
    gaps = torch.arange(1, k + 1, device=top.device) * (top[:-1] - top[1:])
    first, others = float(gaps[0]), float(gaps[1:].mean())
    if first == 0:
        return 1.0
    return (1 + first / (others * (k - 1))) ** -(k - 1) if others else 0.0


def expected_accuracy(fooled: Tensor) -> Tensor:
    r"""Accuracy under the worst of r runs, averaged over all choices of r from the runs made.

    Image i, fooled by $k_i$ of R runs, stands against r of them in
    $\binom{R - k_i}{r} / \binom{R}{r}$ of the choices. That is the unbiased estimate of its chance
    to stand against r new runs, and smoother than the accuracy in the order of the runs.

    Args:
        fooled: bool, (N, R): image i wrong after run r. True throughout where it is wrong unattacked.

    Returns:
        (R,), float64: the share for r = 1 … R; the last is the accuracy under all runs.
    """
    runs = fooled.shape[1]
    j = torch.arange(runs, device=fooled.device)
    kept = runs - fooled.sum(1, keepdim=True)
    return ((kept - j).clamp(min=0).double() / (runs - j)).cumprod(1).mean(0)


@dataclass(frozen=True)
class Unseen:
    """Images that would fall to further runs, estimated from those that fell rarely.

    Attributes:
        once, twice: images fooled by exactly one, exactly two of the runs.
        next_run: new images that one further run would fool, at most on average: `once` / R.
        remaining: lower bound, on average, for the images that infinitely many runs would add.
        low, high: 95 % interval of `remaining`, from drawing the images anew.
    """

    once: int
    twice: int
    next_run: float
    remaining: float
    low: float
    high: float


def unseen(fooled: Tensor, *, resamples: int = 1000, seed: int = 0) -> Unseen:
    r"""How many images would further runs of the same attack still fool?

    The problem of the unseen species: an image is a species, a run an expedition. Every run fools
    image i with its own chance $p_i$, and $f_1$, $f_2$ images were fooled by exactly one and two of
    R runs. Then $E[f_1] / R$ is the number of new images that the last of R runs brings on average,
    and the next brings no more (Good 1953). And
    $\frac{R - 1}{R} \frac{f_1 (f_1 - 1)}{2 (f_2 + 1)}$ estimates a lower bound of all that are left
    (Chao 1987). There is no upper bound: images with tiny $p_i$ leave no trace.

    Args:
        fooled: bool, (N, R), as in `expected_accuracy`.
        resamples, seed: of the bootstrap over images.

    Raises:
        ValueError: fewer than two runs.
    """
    if fooled.shape[1] < 2:
        raise ValueError(f"unseen: {fooled.shape[1]} run, at least 2 are needed")
    counts, runs = fooled.sum(1).cpu(), fooled.shape[1]
    rows = torch.randint(len(counts), (resamples, len(counts)), generator=generator(seed))
    drawn = _left(*((counts[rows] == k).sum(1) for k in (1, 2)), runs)
    once, twice = (int((counts == k).sum()) for k in (1, 2))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    left = float(_left(torch.tensor(once), torch.tensor(twice), runs))
    return Unseen(once, twice, once / runs, left, low, high)


def _left(once: Tensor, twice: Tensor, runs: int) -> Tensor:
    return (runs - 1) / runs * (once * (once - 1)).double() / (2 * (twice + 1))
