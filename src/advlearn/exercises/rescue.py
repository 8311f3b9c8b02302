"""Checkers for the exercises of chapter 5 that train: schedules of ε, networks of few units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from advlearn import balls, capacity, models, training
from advlearn.attacks import pgd
from advlearn.data import Dataset
from advlearn.exercises.plane import Network, minimum, value
from advlearn.exercises.report import Finding, Report, Unusable, examine
from advlearn.threats import Linf
from advlearn.training.state import State

# --- a schedule of ε --------------------------------------------------------------------------

UNITS, CONSTANT, MARGIN = 8, math.log(10), 0.05
FULL = 0.7  # From this share of the training on, ε has its full size.
Schedule = Callable[[float], float]


def scheduled(schedule: Schedule, threat: Linf, steps: int = 5) -> training.Objective:
    """Adversarial training whose ε and step size are `schedule(progress)` times their full size."""

    def objective(
        model: nn.Module, x: Tensor, y: Tensor, state: State
    ) -> tuple[Tensor, State]:
        factor = float(schedule(state.progress))
        smaller, walk = threat.scaled(factor), partial(pgd, steps=steps)
        part = training.adversarial(smaller, walk, step_size=smaller.eps / 3)
        return part(model, x, y, state)

    return objective


class _Rescue:
    """Narrow networks, trained at once and with the reader's schedule."""

    def __init__(self, schedule: Schedule, images: Dataset, threat: Linf, epochs: int,
                 seeds: Sequence[int]) -> None:  # fmt: skip
        self.schedule, self.images, self.threat = schedule, images, threat
        self.epochs, self.seeds, self.measured = epochs, seeds, ""
        self.usable = False

    def loss(self, schedule: Schedule, seed: int) -> float:
        """Of the training images under PGD-20 at full ε, after the training."""
        f = models.mlp(self.images.shape, (UNITS,), seed=seed).to(self.images.images.device)
        training.fit(f, self.images, scheduled(schedule, self.threat), epochs=self.epochs,
                     batch_size=32, lr=1e-2, seed=seed, progress=False)  # fmt: skip
        walk = partial(pgd, steps=20, step_size=self.threat.eps / 8)
        return capacity.mean_loss(f.eval(), self.images, self.threat, walk, seed)

    def numbers(self) -> str | None:
        at = torch.linspace(0, 1, 401)[:-1].tolist()
        factors = [self.schedule(p) for p in at]
        if any(v is None for v in factors):
            raise Unusable("returns None, wanted the factor of ε, a number from 0 to 1")
        factors = [float(v) for v in factors]
        if factors != [float(self.schedule(p)) for p in at]:
            return "the factor is not always the same: it depends on the progress alone"
        low, high = min(factors), max(factors)
        if not 0 <= low <= high <= 1:
            return f"factors from {low:g} to {high:g}, allowed are 0 to 1"
        late = [v for p, v in zip(at, factors, strict=True) if p >= FULL]
        if min(late) < 1:
            hint = ": return the factor, not ε" if high <= self.threat.eps else ""
            return (f"a factor of {min(late):g} after {100 * FULL:.0f} % of the training: the last "
                    f"{100 - 100 * FULL:.0f} % meet the full attack{hint}")  # fmt: skip
        self.usable = True
        return None

    def rescued(self) -> str | None:
        if not self.usable:
            raise Unusable("cannot be judged: see above")
        yours = [self.loss(self.schedule, seed) for seed in self.seeds]
        plain = [self.loss(lambda progress: 1.0, seed) for seed in self.seeds]

        def said(losses: Sequence[float]) -> str:
            return ", ".join(f"{v:.3f}" for v in losses)

        self.measured = (f"adversarial loss with your schedule {said(yours)}; at full ε from the "
                         f"first step {said(plain)}; a constant answer {CONSTANT:.3f}")  # fmt: skip
        stuck = sum(v > CONSTANT - MARGIN for v in yours)
        if not stuck:
            return None
        share = 1 - sum(float(self.schedule(p / 200)) for p in range(200)) / 200
        return f"{stuck} of {len(yours)} trainings end at the constant's loss" + (
            ": ε is small for too short a time" if share < 0.15 else
            ": before ε is large, it must have been small and not 0, and then grow slowly")


def check_ramp(
    schedule: Schedule, images: Dataset, threat: Linf, *, epochs: int, seeds: Sequence[int] = (0, 1)
) -> Report:
    """Try `schedule(progress) -> factor of ε` on networks that collapse at full ε.

    They have one hidden layer of eight units. The check does the training, so that every schedule
    has the same number of steps and gradients.

    Args:
        schedule: the reader's function, of the share of the training that is done.
        images: training images.
        threat: at full size, which the last 30 % of the training must have.
        epochs: of batches of 32.
        seeds: of weights, order and starts; every one must end below the constant's loss.
    """
    rescue = _Rescue(schedule, images, threat, epochs, seeds)
    report = examine(schedule, [
        ("factors of ε, and the full attack at the end", rescue.numbers),
        ("no network collapses", rescue.rescued),
    ])  # fmt: skip
    *others, last = report.findings
    return Report(report.subject, (*others, Finding(last.claim, last.problem, rescue.measured)))


# --- few units --------------------------------------------------------------------------------

EPS = 0.08
Keeper = Callable[[Tensor, Tensor, float, int, int], Network]


def _as_network(crowd: balls.Crowd, k: int = 0) -> Network:
    """Network k of a crowd with one hidden layer, for the plane's own coordinates."""
    (w, v), (b, c) = ([p[k].detach().double() for p in ps] for ps in (crowd.weights, crowd.biases))
    return [2 * w, v], [b - w.sum(1), c]


def _whole(network: Network, x: Tensor, y: Tensor) -> list[bool]:
    """Whether each ball has the right sign everywhere, exactly."""
    (w, v), (b, c) = network
    found = []
    for center, sign in zip(x, y, strict=True):
        found.append(minimum(([w, sign * v], [b, sign * c]), center, EPS)[0] > 0)
    return found


class _Contest:
    """The reader's networks and those of the chapter's training, on the same scenes."""

    def __init__(self, keep: Keeper, units: int, scenes: Sequence[int], steps: int) -> None:
        self.keep, self.units, self.steps = keep, units, steps
        self.scenes = {seed: balls.scene(16, EPS, seed) for seed in scenes}
        self.found: dict[int, Network] = {}
        self.measured = ""

    def form(self) -> str | None:
        for seed, (x, y) in self.scenes.items():
            given = x.clone()
            network = self.keep(given, y.clone(), EPS, self.units, self.steps)
            if not torch.equal(given, x):
                return "the points were changed"
            try:
                (w, v), (b, c) = network
                shapes = [tuple(p.shape) for p in (w, v, b, c)]
            except (TypeError, ValueError):
                raise Unusable("wanted are ([W₁, W₂], [b₁, b₂]), one hidden layer") from None
            h = shapes[0][0] if shapes[0] else 0
            if shapes != [(h, 2), (1, h), (h,), (1,)]:
                raise Unusable(f"shapes {shapes}, wanted (h, 2), (1, h), (h,), (1,)")
            if h > self.units:
                return f"{h} hidden units, allowed are {self.units}"
            network = [p.detach().double() for p in (w, v)], [p.detach().double() for p in (b, c)]
            if not all(p.isfinite().all() for ps in network for p in ps):
                return "weights that are not finite"
            self.found[seed] = network
        return None

    def points(self) -> str | None:
        if len(self.found) < len(self.scenes):
            raise Unusable("cannot be judged: see above")
        right = [int((value(self.found[s], x) * y > 0).sum()) for s, (x, y) in self.scenes.items()]
        return None if min(right) > 12 else (
            f"only {min(right)} of 16 points themselves are right in one scene: a sign, or the "
            "coordinates? The network is asked at the points as they are")  # fmt: skip

    def better(self) -> str | None:
        if len(self.found) < len(self.scenes):
            raise Unusable("cannot be judged: see above")
        yours = {s: sum(_whole(self.found[s], x, y)) for s, (x, y) in self.scenes.items()}
        theirs = {}
        for s, (x, y) in self.scenes.items():
            crowd = balls.Crowd([(self.units,)], [0])
            balls.train(crowd, x, y, EPS, steps=self.steps)
            theirs[s] = sum(_whole(_as_network(crowd), x, y))
        whole, rival = (sum(v == 16 for v in kept.values()) for kept in (yours, theirs))
        self.measured = (f"balls kept in {len(yours)} scenes: yours "
                         f"{', '.join(map(str, yours.values()))}, one training of the chapter "
                         f"{', '.join(map(str, theirs.values()))}")  # fmt: skip
        return None if whole > rival else (
            f"{whole} scenes are kept whole, the chapter's training keeps {rival}: more are needed")


def check_keeper(
    keep: Keeper, *, units: int = 6, scenes: Sequence[int] = (1, 2, 3, 4), steps: int = 1000
) -> Report:
    """Try `keep(points, signs, eps, units, steps) -> ([W1, W2], [b1, b2])`, few units, whole balls.

    A scene counts if all 16 balls of radius 0.08 are kept, which is decided exactly. More scenes
    must be kept than by a single one of the chapter's trainings with as many units.

    Args:
        keep: the reader's function; f(p) = W2 ReLU(W1 p + b1) + b2, float32 or float64.
        units: the most that are allowed.
        scenes: seeds of `balls.scene`.
        steps: of the chapter's training; told to the reader's function, which need not care.
    """
    contest = _Contest(keep, units, scenes, steps)
    report = examine(keep, [
        (f"one hidden layer of at most {units} units", contest.form),
        ("the points are right", contest.points),
        ("keeps more scenes whole than a single training", contest.better),
    ])  # fmt: skip
    *others, last = report.findings
    return Report(report.subject, (*others, Finding(last.claim, last.problem, contest.measured)))
