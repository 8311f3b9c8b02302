"""Checker for the exercise of chapter 6 on early stopping without a look at the test images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from statistics import fmean, stdev

import torch
from torch import Tensor

from advlearn.exercises.report import Finding, Report, Unusable, examine
from advlearn.tensors import generator

EPOCHS, IMAGES = 60, 1_000


class Run:
    """A simulated training with robust overfitting; its true accuracies are known.

    After the learning rate falls, the robust accuracy rises for a few epochs and then declines,
    if the run overfits; natural and training accuracy keep rising. `validation` and `test` are
    measured on 1,000 images each, under attack. Half of their sampling variance belongs to the
    images and stays, half is drawn in every epoch.

    Attributes:
        epochs: checkpoints, 0, …, epochs − 1.
        truth: robust accuracy on all images there could be, (epochs,). A rule must not use it.
        tested: the epochs at which the test images were asked.
    """

    def __init__(self, seed: int, overfits: bool = True) -> None:
        gen = generator(seed)
        a, b, c, d = torch.rand(4, generator=gen, dtype=torch.float64).tolist()
        epoch = torch.arange(EPOCHS, dtype=torch.float64)
        drop = 25 + int(12 * a)
        later = (epoch - drop).clamp(min=0)
        slow = 1 - torch.exp(-(epoch + 1) / (6 + 4 * b))
        jump, fall = 1 - torch.exp(-later / 1.5), 1 - torch.exp(-later / 9)
        rise = 0.02 * later / EPOCHS if not overfits else -(0.05 + 0.06 * d) * fall
        self.epochs = EPOCHS
        self.truth = (0.38 + 0.06 * c) * slow + 0.06 * jump + rise
        self.tested: list[int] = []
        self._natural = self._measured(0.68 * slow + 0.1 * jump + 0.02 * fall, gen)
        self._training = self._measured(0.45 * slow + 0.08 * jump + 0.3 * fall, gen)
        self._validation = self._measured(self.truth, gen)
        self._test = self._measured(self.truth, gen)

    def _measured(self, share: Tensor, gen: torch.Generator) -> list[float]:
        own = torch.randn(1, generator=gen, dtype=torch.float64)
        drawn = torch.randn(len(share), generator=gen, dtype=torch.float64)
        noise = (share * (1 - share) / IMAGES).sqrt() * (own + drawn) / math.sqrt(2)
        return ((share + noise) * IMAGES).round().div(IMAGES).tolist()

    def _of(self, values: Sequence[float], epoch: int) -> float:
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch={epoch}, allowed are 0 to {self.epochs - 1}")
        return values[epoch]

    def natural(self, epoch: int) -> float:
        """Natural accuracy on held-out training images."""
        return self._of(self._natural, epoch)

    def training(self, epoch: int) -> float:
        """Robust accuracy on the images that are trained on."""
        return self._of(self._training, epoch)

    def validation(self, epoch: int) -> float:
        """Robust accuracy on held-out training images."""
        return self._of(self._validation, epoch)

    def test(self, epoch: int) -> float:
        """Robust accuracy on the test images. Remembered: they may be asked once."""
        self.tested.append(epoch)
        return self._of(self._test, epoch)


def overfitting_runs(n: int, overfits: bool = True, seed: int = 0) -> list[Run]:
    """n simulated trainings."""
    return [Run(1_000 * seed + k, overfits) for k in range(n)]


Stop = Callable[[Run], tuple[int, float]]


def _best(values: Callable[[int], float], epochs: int) -> int:
    return max(range(epochs), key=values)


def _first_fall(run: Run) -> int:
    """Patience 1."""
    falls = (e for e in range(run.epochs - 1) if run.validation(e + 1) < run.validation(e))
    return next(falls, run.epochs - 1)


_CHOICES: dict[str, Callable[[Run], int]] = {
    "the last checkpoint: that is no early stopping": lambda run: run.epochs - 1,
    "the best natural accuracy: it rises while the robust one falls":
        lambda run: _best(run.natural, run.epochs),
    "the best robust accuracy on the images that are trained on: these the network learns by heart":
        lambda run: _best(run.training, run.epochs),
    "the first fall of the validation accuracy is noise, 1,000 images are few": _first_fall,
    "the lowest validation accuracy": lambda run: _best(lambda e: -run.validation(e), run.epochs),
}  # fmt: skip


class _Trial:
    """What a rule answers on many runs."""

    def __init__(self, stop: Stop, n: int) -> None:
        self.stop = stop
        self.runs = {True: overfitting_runs(n, True), False: overfitting_runs(n, False, seed=1)}
        self.kept: dict[bool, list[tuple[int, float]]] = {}

    def answers(self, overfits: bool) -> list[tuple[int, float]]:
        if overfits not in self.kept:
            self.kept[overfits] = [self._answer(run) for run in self.runs[overfits]]
        return self.kept[overfits]

    def _answer(self, run: Run) -> tuple[int, float]:
        run.tested.clear()
        try:
            epoch, number = self.stop(run)
        except (TypeError, ValueError) as error:
            if "unpack" in str(error) or "iterable" in str(error):
                raise Unusable("wanted are two: the epoch and the accuracy to report") from None
            raise
        number = number.item() if isinstance(number, Tensor) else number
        if int(epoch) != epoch or not 0 <= epoch < run.epochs:
            raise Unusable(f"epoch {epoch}, there are 0 to {run.epochs - 1}")
        if not isinstance(number, Real) or not 0 <= number <= 1:
            raise Unusable(f"reports {number!r}, wanted a share between 0 and 1")
        return int(epoch), float(number)

    def blind(self) -> str | None:
        self.answers(True)
        for run, (epoch, _) in zip(self.runs[True], self.answers(True), strict=True):
            if len(run.tested) > 1:
                return (f"the test images are asked {len(run.tested)} times: whoever looks at "
                        "several checkpoints has chosen with them; ask once, after choosing")  # fmt: skip
            if run.tested and run.tested != [epoch]:
                return f"keeps epoch {epoch} and asks the test images at epoch {run.tested[0]}"
        return None

    def regret(self, overfits: bool, allowed: float) -> Callable[[], str | None]:
        def test() -> str | None:
            runs, answers = self.runs[overfits], self.answers(overfits)
            lost = fmean(float(r.truth.max() - r.truth[e]) for r, (e, _) in
                         zip(runs, answers, strict=True))  # fmt: skip
            if lost <= allowed:
                return None
            for message, rule in _CHOICES.items():
                if all(rule(run) == e for run, (e, _) in zip(runs, answers, strict=True)):
                    return message
            return (f"loses {100 * lost:.1f} points against the best checkpoint, averaged over "
                    f"{len(runs)} runs; {100 * allowed:.1f} are allowed")  # fmt: skip

        return test

    def gap(self) -> tuple[float, float]:
        """Reported minus true accuracy: mean over the runs and its standard error."""
        gaps = [number - float(run.truth[e]) for run, (e, number) in
                zip(self.runs[True], self.answers(True), strict=True)]  # fmt: skip
        return fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))

    def honest(self) -> str | None:
        runs, answers = self.runs[True], self.answers(True)
        mean, error = self.gap()
        if abs(mean) <= max(4 * error, 0.003):
            return None
        for name, values in (("validation", "_validation"), ("training", "_training"),
                             ("natural", "_natural")):  # fmt: skip
            if all(getattr(r, values)[e] == number for r, (e, number) in
                   zip(runs, answers, strict=True)):  # fmt: skip
                return (f"reports the {name} accuracy, on average {100 * mean:+.1f} points from the "
                        "truth" + (": it was chosen for being large; images that chose cannot judge"
                                   if name == "validation" else ""))  # fmt: skip
        return f"the reported accuracy is {100 * mean:+.1f} points from the truth on average"


def check_stop(stop: Stop, n: int = 300) -> Report:
    """Try `stop(run) -> (epoch, accuracy)`: which checkpoint to keep, and what to report of it.

    On simulated runs, whose truth is known: close to the best checkpoint on average, where the run
    overfits and where it does not; the test images asked at most once, at the kept checkpoint; the
    reported accuracy right on average.

    Args:
        stop: the reader's rule; it may ask a `Run` for everything but `truth`.
        n: runs of each kind.
    """
    trial = _Trial(stop, n)
    report = examine(stop, [
        ("the test images are not looked at to choose", trial.blind),
        ("keeps a good checkpoint of a run that overfits", trial.regret(True, 0.01)),
        ("and of one that does not", trial.regret(False, 0.01)),
        ("reports what is true on average", trial.honest),
    ])  # fmt: skip
    if not report:
        return report
    *others, last = report.findings
    mean, error = trial.gap()
    remark = f"reported minus true: {100 * mean:+.2f} ± {200 * error:.2f} points over {n} runs"
    return Report(report.subject, (*others, Finding(last.claim, "", remark)))
