"""Checkers for the exercises of chapter 4 on where to restart, and on what restarts will bring."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real

import torch
from torch import Tensor

from advlearn.evaluation import unseen
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.tensors import generator

# --- where to restart -------------------------------------------------------------------------

IMAGES, BUDGET, DRAWS = 200, 2_000, 20
Run = Callable[[Tensor], Tensor]
Spend = Callable[[Run, int, int], Tensor]


def _far_and_near() -> tuple[Tensor, Tensor]:
    """Most images far from the fence, on either side; thirty in reach of it."""
    centre = torch.cat([torch.linspace(-15, -6, 120), torch.linspace(3, 12, 50),
                        torch.linspace(-3, -1.5, 30)])  # fmt: skip
    return centre, torch.ones(IMAGES)


def _near_and_sure() -> tuple[Tensor, Tensor]:
    """Forty images end close below the fence, always there; forty far below, but widely spread."""
    centre = torch.cat([torch.full((80,), -12.0), torch.full((40,), 5.0),
                        torch.full((40,), -0.5), torch.full((40,), -4.0)])  # fmt: skip
    return centre, torch.cat([torch.ones(120), torch.full((40,), 0.02), torch.full((40,), 2.0)])


class Range:
    """An attack whose margins are planted. Run r of image i ends where it ends, whoever asks.

    Attributes:
        margins: (IMAGES, BUDGET): centre + width · noise.
        runs: how often each image was attacked.
        wasted: runs on images that had fallen.
    """

    def __init__(self, centre: Tensor, width: Tensor, seed: int) -> None:
        noise = torch.randn(IMAGES, BUDGET, generator=generator(seed))
        rows = torch.randperm(IMAGES, generator=generator(seed))
        self.margins = (centre[:, None] + width[:, None] * noise)[rows]
        self.runs = torch.zeros(IMAGES, dtype=torch.long)
        self.fell = torch.zeros(IMAGES, dtype=torch.bool)
        self.wasted = 0

    def __call__(self, rows: Tensor) -> Tensor:
        """One more run on each of these images: margins at the ends, positive where it fools."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool and rows.shape == (IMAGES,):
            rows = rows.nonzero()[:, 0]
        if rows.dtype != torch.int64 or rows.ndim != 1 or len(rows.unique()) < len(rows):
            raise Unusable("run(rows) wants the numbers of the images, int64, each at most once")
        if int(self.runs.sum()) + len(rows) > BUDGET:
            raise Unusable(f"more than {BUDGET:,} runs: the budget counts runs on single images")
        self.wasted += int(self.fell[rows].sum())
        ends = self.margins[rows, self.runs[rows]]
        self.runs[rows] += 1
        self.fell[rows] |= ends > 0
        return ends


def equal_restarts(run: Run, n: int, budget: int) -> Tensor:
    """One run after another on every image that still stands, while the budget lasts."""
    stands = torch.ones(n, dtype=torch.bool)
    while budget and stands.any():
        rows = stands.nonzero()[:, 0][:budget]
        stands[rows[run(rows) > 0]] = False
        budget -= len(rows)
    return stands


class _Contest:
    """A scheme and equal restarts on the same planted margins, paired by draw.

    Attributes:
        gain, low, high: images more, with their 95 % interval.
        tables: what the scheme was played on.
    """

    def __init__(self, spend: Spend, family: Callable[[], tuple[Tensor, Tensor]]) -> None:
        gains, self.tables = [], [Range(*family(), seed) for seed in range(DRAWS)]
        for seed, table in enumerate(self.tables):
            rival = Range(*family(), seed)
            _judge(spend(table, IMAGES, BUDGET), table)
            equal_restarts(rival, IMAGES, BUDGET)
            gains.append(float(table.fell.sum() - rival.fell.sum()))
        d = torch.tensor(gains, dtype=torch.float64)
        half = 2.093 * float(d.std()) / math.sqrt(DRAWS)  # Student's t, 19 degrees of freedom.
        self.gain = float(d.mean())
        self.low, self.high = self.gain - half, self.gain + half


def _judge(stands: Tensor, table: Range) -> None:
    if not isinstance(stands, Tensor) or stands.shape != (IMAGES,) or stands.dtype != torch.bool:
        got = getattr(stands, "dtype", type(stands).__name__)
        raise Unusable(f"returns {got}, wanted one verdict per image, bool (n,)")
    if torch.equal(stands, table.fell):
        raise Unusable("true and false are exchanged: true is for images that stand")
    if not torch.equal(stands, ~table.fell):
        i = int((stands == table.fell).nonzero()[0])
        made = table.margins[i, : table.runs[i]]
        raise Unusable(f"image {i} {'stands' if stands[i] else 'has fallen'}, you say, with runs "
                       f"that ended at {', '.join(f'{m:.1f}' for m in made[:5].tolist())}")  # fmt: skip


def check_fence(spend: Spend) -> Report:
    """Try `spend(run, n, budget) -> stands`, bool (n,): where do `budget` runs fool most images?

    `run(rows)` makes one more run of an attack on each of these images and returns the margins at
    the ends, positive where the network is fooled. Held against equal restarts on all that still
    stand, over 20 draws of planted margins, paired by draw: better where most images are far from
    the fence, and not worse (significantly) where those that come nearest to it never cross.
    """

    def thrift() -> str | None:
        table = _Contest(spend, _far_and_near).tables[0]
        if table.wasted:
            return (f"{table.wasted} runs on images that have fallen already: they cannot fall "
                    "twice")  # fmt: skip
        unspent = BUDGET - int(table.runs.sum())
        return None if unspent <= BUDGET / 20 else f"{unspent:,} of {BUDGET:,} runs are not made"

    def better() -> str | None:
        found = _Contest(spend, _far_and_near)
        if found.low > 0:
            return None
        lost = sum(float(t.runs[t.margins.mean(1) < -5].sum()) for t in found.tables) / DRAWS
        return (f"{found.gain:+.1f} images against equal restarts, with an interval from "
                f"{found.low:+.1f}: {lost:.0f} of {BUDGET:,} runs go to images far behind the "
                "fence")  # fmt: skip

    def no_worse() -> str | None:
        found = _Contest(spend, _near_and_sure)
        return None if found.high >= 0 else (
            f"{found.gain:+.1f} images against equal restarts: the runs go to images close to the "
            "fence that end at the same height every time; undecided is who spreads across it")

    return examine(spend, [
        ("spends the budget, and nothing on the fallen", thrift),
        ("better where most images are far from the fence", better),
        ("no worse where the nearest are the surest", no_worse),
    ])  # fmt: skip


# --- what the next runs will bring ------------------------------------------------------------

R, TABLES, AHEAD = 40, 60, (10, 40)
_NEVER, _ALWAYS = torch.zeros(300), torch.ones(200)
FAMILIES: Mapping[str, Tensor] = {
    "chances of every size": torch.cat([_NEVER, _ALWAYS, torch.logspace(-3, -0.5, 900)]),
    "rare ones, all alike": torch.cat([_NEVER, _ALWAYS, torch.full((400,), 0.02)]),
    "two kinds": torch.cat([_NEVER, _ALWAYS, torch.full((600,), 0.01), torch.full((200,), 0.3)]),
}
_SURE = torch.cat([_NEVER, _ALWAYS])


def draw(chances: Tensor, seed: int) -> Tensor:
    """Which run fools which image: bool (N, R)."""
    return torch.rand(len(chances), R, generator=generator(seed)) < chances[:, None]


def _wrong_forecasts(fooled: Tensor, more: int) -> dict[str, float]:
    """What a mistake would return, by its message."""
    runs, t = fooled.shape[1], more / fooled.shape[1]
    counts = torch.bincount(fooled.sum(1), minlength=runs + 1).double()
    k = torch.arange(1, runs + 1, dtype=torch.float64)
    known, standing = unseen(fooled, resamples=2), float(counts[0])
    later = fooled[:, runs // 2 :].any(1) & ~fooled[:, : runs // 2].any(1)
    return {
        "f₁ M / R is the upper bound: every further run finds less than the one before":
            known.next_run * more,
        "that is for endless runs: M plays no part": known.remaining,
        "terms of large k do not vanish for M = R: images that fall in nearly every run are no rare "
        "ones": float((-((-t) ** k) * counts[1:]).sum()),
        "all terms have the same sign: they alternate": float((t**k * counts[1:]).sum()),
        "that is what the second half of the runs brought: the next ones bring less":
            float(later.sum()) * 2 * t,
        "a share of the images: wanted is their number": known.next_run * more / len(fooled),
        "0: some have fallen once, so others will": 0.0,
        "all that stand: many of them will never fall": standing,
    }  # fmt: skip


Forecast = Callable[[Tensor, int], float]


def _told(forecast: Forecast, fooled: Tensor, more: int) -> float:
    told = forecast(fooled.clone(), more)
    if isinstance(told, Tensor) and told.numel() == 1:
        told = float(told)
    if not isinstance(told, Real) or not math.isfinite(told):
        raise Unusable(f"returns {told!r}, wanted a finite number of images")
    return float(told)


def _named(fooled: Tensor, more: int, told: float, truth: float) -> str:
    """Which mistake gives this forecast?"""
    for message, wrong in _wrong_forecasts(fooled, more).items():
        if abs(told - wrong) <= 1e-6 * max(1, abs(wrong)):
            return message
    return f"forecast {told:.1f}, on average {truth:.1f} come"


def _close(forecast: Forecast, chances: Tensor, more: int) -> str | None:
    """Closer than Good's bound, and than 0?"""
    errors = []
    for seed in range(TABLES):
        fooled = draw(chances, seed)
        truth = float((1 - (1 - chances[~fooled.any(1)]) ** more).sum())
        told = _told(forecast, fooled, more)
        errors.append((told - truth, unseen(fooled, resamples=2).next_run * more - truth, truth))
    table = torch.tensor(errors)
    yours, good, none = table.square().mean(0).sqrt().tolist()
    return None if yours < min(good, none) else (
        f"{more} further runs: your error is {yours:.1f} images ({float(table[:, 0].mean()):+.1f} "
        f"on average), that of Good's bound {good:.1f}, that of no forecast {none:.1f}; "
        + _named(fooled, more, told, truth))


def check_forecast(forecast: Forecast) -> Report:
    """Try `forecast(fooled, more) -> number` of new images that `more` further runs will fool.

    `fooled` is bool (N, R), and `more` at most R. On planted chances the forecasts must come
    closer to what further runs bring on average (root mean square over 60 tables) than both
    Good's bound f₁ · more / R and no forecast at all.
    """

    def nothing() -> str | None:
        fooled = draw(_SURE, 0)
        for more in AHEAD:
            if abs(told := _told(forecast, fooled, more)) > 1:
                return (f"{told:.1f} for images that fell always or never: "
                        + _named(fooled, more, told, 0))  # fmt: skip
        return None

    def order() -> str | None:
        fooled = draw(FAMILIES["two kinds"], 1)
        mixed = fooled[:, torch.randperm(R, generator=generator(2))]
        same = abs(_told(forecast, fooled, 10) - _told(forecast, mixed, 10)) < 1e-6
        return None if same else "the runs in another order give another forecast"

    def close(chances: Tensor) -> str | None:
        return next(filter(None, (_close(forecast, chances, more) for more in AHEAD)), None)

    return examine(forecast, [
        ("expects nothing where all is decided", nothing),
        ("does not depend on the order of the runs", order),
        *((name, lambda chances=chances: close(chances)) for name, chances in FAMILIES.items()),
    ])  # fmt: skip
