"""Checkers for the exercises of chapter 4 on what runs exclude, and on any r of R runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from numbers import Real

import torch
from torch import Tensor

from advlearn.evaluation import expected_accuracy, interval
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.tensors import generator

# --- what agreement excludes ------------------------------------------------------------------

Case = tuple[int, int, float]
NONE = ((0, 1, 0.9), (0, 20, 0.95), (0, 1000, 0.95), (0, 50, 0.5))
SOME = ((3, 50, 0.95), (1, 1000, 0.99), (10, 200, 0.8))
ALL, MANY = ((7, 7, 0.95),), ((0, 100_000, 0.95), (3_000, 100_000, 0.95))


def tail(hits: int, n: int, p: float) -> float:
    """P(at most `hits` of n), every one with chance p; summed in logarithms, so n may be large."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or hits >= n else 0.0
    k = torch.arange(hits + 1, dtype=torch.float64)
    logs = (math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
            + k * math.log(p) + (n - k) * math.log1p(-p))  # fmt: skip
    return min(1.0, float(logs.logsumexp(0).exp()))


@cache
def limit(hits: int, n: int, alpha: float) -> float:
    """The p at which P(at most `hits` of n) = `alpha`; 1 where there is none."""
    low, high = 0.0, 1.0
    for _ in range(60 if hits < n else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(hits, n, middle) > alpha else (low, middle)
    return high


def _wrong_limits(hits: int, n: int, confidence: float) -> dict[str, float]:
    """What a mistake would return, by its message."""
    p, alpha = hits / n, 1 - confidence
    normal = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * confidence - 1)))
    return {
        "hits / n is the estimate, and the truth is larger about half of the time": p,
        "3 / n is the rule for no hit at 95 %, and for these only an approximation": 3 / n,
        "log(1/α) / n is the bound for no hit, a little too large": -math.log(alpha) / n,
        "the normal approximation: after no hit it excludes everything":
            p + normal * math.sqrt(p * (1 - p) / n),
        "Wilson's interval is an approximation, and has two ends": interval(hits, n)[1],
        "α / 2 is for an interval with two ends, here there is one": limit(hits, n, alpha / 2),
        "α and 1 − α are exchanged": limit(hits, n, confidence),
        "P(fewer than hits) = α: it is P(at most hits)":
            limit(hits - 1, n, alpha) if hits else 0.0,
        "that is the lower limit, from P(at least hits) = α":
            limit(hits - 1, n, confidence) if hits else 0.0,
        "in percent: wanted is a share between 0 and 1": 100 * limit(hits, n, alpha),
        "that is what is not excluded, 1 − p": 1 - limit(hits, n, alpha),
    }  # fmt: skip


def check_excluded(at_most: Callable[[int, int, float], float]) -> Report:
    r"""Try `at_most(hits, n, confidence) -> p`, the exact upper limit of a chance.

    $$P(\mathrm{Bin}(n, p) \le \text{hits}) = 1 - \text{confidence}$$

    Clopper & Pearson 1934; 1 for hits = n. Tried for up to 100,000 runs.
    """

    def run(case: Case) -> float:
        p = at_most(*case)
        if isinstance(p, Tensor) and p.numel() == 1:
            p = float(p)
        if not isinstance(p, Real):
            raise Unusable(f"returns {type(p).__name__}, wanted a number")
        return float(p)

    def off(case: Case, value: float, wanted: float) -> bool:
        return not abs(value - wanted) <= 1e-5 * wanted

    def right(cases: Sequence[Case]) -> str | None:
        told = {case: run(case) for case in cases}
        truth = {case: limit(*case[:2], 1 - case[2]) for case in cases}
        bad = [case for case in cases if off(case, told[case], truth[case])]
        if not bad:
            return None
        for message in _wrong_limits(*bad[0]):
            if not any(off(case, told[case], _wrong_limits(*case)[message]) for case in bad):
                return message
        (hits, n, confidence), p = bad[0], told[bad[0]]
        if hits == n:
            return f"{hits} of {n}: {p:g}, but hits alone exclude no chance, not even 1"
        if not 0 <= p <= 1:
            return f"{hits} of {n:,}: {p:g} is no share: is it computed with huge numbers?"
        return (f"{hits} of {n:,} at {confidence:g}: with your p = {p:.6g}, at most {hits} hits "
                f"have a probability of {tail(hits, n, p):.4g}, wanted {1 - confidence:.4g}")  # fmt: skip

    return examine(at_most, [
        ("no hit", lambda: right(NONE)), ("some hits", lambda: right(SOME)),
        ("nothing but hits excludes nothing", lambda: right(ALL)),
        ("100,000 runs", lambda: right(MANY)),
    ])  # fmt: skip


# --- any r of R runs --------------------------------------------------------------------------


def _table(images: int, runs: int) -> Tensor:
    """Which run fools which image, (N, R): some never, some always, most now and then.

    A hard image falls in late runs only, as after an unlucky draw, so that the order counts.
    """
    gen = generator(5)
    chances = torch.rand(images, generator=gen, dtype=torch.float64) ** 3
    fooled = torch.rand(images, runs, generator=gen, dtype=torch.float64) < chances[:, None]
    fooled[0], fooled[1] = False, True
    fooled[2] = torch.arange(runs) >= runs - 2
    return fooled


def _by_choices(fooled: Tensor) -> Tensor:
    """The mean over all choices of r runs, as the words say it: (R,)."""
    stands, runs = ~fooled, fooled.shape[1]
    return torch.stack([
        torch.stack([stands[:, list(c)].all(1).double().mean()
                     for c in combinations(range(runs), r)]).mean()
        for r in range(1, runs + 1)])  # fmt: skip


def _wrong_curves(fooled: Tensor) -> Mapping[str, Tensor]:
    """What a mistake would return, by its message."""
    n, runs = fooled.shape
    r = torch.arange(1, runs + 1, dtype=torch.float64)
    share, truth = fooled.double().mean(1, keepdim=True), expected_accuracy(fooled)
    k = fooled.sum(1, keepdim=True)
    fools = ((k - r + 1).clamp(min=0) / (runs - r + 1)).cumprod(1)
    return {
        "the runs in the order of the table: another order gives another curve":
            1 - fooled.cummax(1).values.double().mean(0),
        "(1 − k/R)^r draws with replacement, and is too large on average":
            ((1 - share) ** r).mean(0),
        "the mean of k comes last: images have different chances": (1 - share.mean()) ** r,
        "r begins at 0: the first entry belongs to one run":
            torch.cat([torch.ones(1, dtype=torch.float64), truth[:-1]]),
        "the share that has fallen: wanted is what stands": 1 - truth,
        "an image falls only if all r runs fool it: the attacker needs one": 1 - fools.mean(0),
        "the number of images: wanted is their share": n * truth,
        "the accuracy under all runs, for every r": truth[-1].expand(runs),
    }  # fmt: skip


def _explained(curve: Tensor, fooled: Tensor, truth: Tensor) -> str | None:
    """What is wrong with this curve, if anything."""
    if torch.allclose(curve, truth, atol=1e-8):
        return None
    for message, wrong in _wrong_curves(fooled).items():
        if torch.allclose(curve, wrong, atol=1e-8):
            return message
    if not curve.isfinite().all():
        at = int((~curve.isfinite()).nonzero()[0])
        return (f"{curve[at]} for {at + 1} of {len(curve)} runs: binomial coefficients are too "
                "large for floats, and 0 has no logarithm")  # fmt: skip
    at = int((curve - truth).abs().argmax())
    return f"{at + 1} of {len(curve)} runs: {curve[at]:.6f}, it is {truth[at]:.6f}"


def check_choices(after: Callable[[Tensor], Tensor]) -> Report:
    r"""Try `after(fooled) -> accuracies`, bool (N, R) -> float64 (R,).

    Entry r − 1 is the accuracy under r runs, averaged over all choices of r from the R columns:
    the mean over images of $\binom{R - k_i}{r} / \binom{R}{r}$. Tried for up to 5,000 runs.
    """
    few, many = _table(9, 6), _table(40, 5_000)

    def run(fooled: Tensor) -> Tensor:
        curve = after(fooled.clone())
        if not isinstance(curve, Tensor) or curve.shape != fooled.shape[1:]:
            got = getattr(curve, "shape", type(curve).__name__)
            raise Unusable(f"returns {got}, wanted one accuracy for each number of runs, (R,)")
        if curve.dtype != torch.float64:
            raise Unusable(f"returns {curve.dtype}, wanted float64")
        return curve

    def untouched() -> str | None:
        given = few.clone()
        after(given)
        return None if torch.equal(given, few) else "the table was edited in place"

    def order() -> str | None:
        mixed = few[:, torch.tensor([5, 2, 0, 4, 1, 3])]
        same = torch.allclose(run(few), run(mixed), atol=1e-8)
        return None if same else "the runs in another order give another curve"

    return examine(after, [
        ("leaves the table as it is", untouched),
        ("is the mean over all choices", lambda: _explained(run(few), few, _by_choices(few))),
        ("does not depend on the order of the runs", order),
        ("5,000 runs", lambda: _explained(run(many), many, expected_accuracy(many))),
    ])  # fmt: skip
