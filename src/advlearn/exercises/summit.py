"""`check_summit`: how high an attack climbs with a fixed number of gradients, beside restarts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from advlearn.attacks import pgd
from advlearn.evaluation import paired, predict
from advlearn.exercises.report import Finding, Report, Unusable, examine
from advlearn.exercises.watched import Watched
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed, generator
from advlearn.threats import Threat

GRADIENTS, STEPS, MARK = 360, 40, 1.05
Highest = Callable[[nn.Module, Tensor, Tensor, Threat, int, torch.Generator], Tensor]


def restarts(f: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The highest loss of nine runs of PGD-40 from random starts, 360 gradients: (N,)."""
    rows, size = torch.arange(len(y), device=y.device), 2.5 * threat.eps / STEPS
    ends = [pgd(f, x, y, threat, steps=STEPS, step_size=size,
                start=threat.sample(x, Keyed((30, r), rows))) for r in range(GRADIENTS // STEPS)]
    return torch.stack([cross_entropy(predict(f, z), y) for z in ends]).amax(0)


class _Contest:
    """The reader's search on one network, and equal restarts."""

    def __init__(self, highest: Highest, f: nn.Module, x: Tensor, y: Tensor,
                 threat: Threat) -> None:  # fmt: skip
        self.highest, self.f, self.x, self.y, self.threat = highest, f, x, y, threat
        self.watched, self.before = Watched(f), [p.clone() for p in f.parameters()]
        self.z: Tensor | None = None
        self.measured = ""

    def in_set(self) -> str | None:
        z = self.highest(self.watched, self.x.clone(), self.y, self.threat, GRADIENTS, generator(4))
        if not isinstance(z, Tensor) or z.shape != self.x.shape:
            raise Unusable(f"returns {getattr(z, 'shape', type(z).__name__)}, wanted one image of "
                           "the set for each, the shape of x")  # fmt: skip
        if not self.threat.contains(z, self.x).all():
            return f"the result leaves the set ({self.threat}, pixels in [0, 1])"
        self.z = z.detach()
        kept = all(torch.equal(a, b) and b.grad is None
                   for a, b in zip(self.before, self.f.parameters(), strict=True))  # fmt: skip
        return None if kept and not any(m.training for m in self.f.modules()) else "f was changed"

    def in_budget(self) -> str | None:
        for what, used, allowed in (("gradients", self.watched.gradients, GRADIENTS),
                                    ("forward passes", self.watched.images, 2 * GRADIENTS)):  # fmt: skip
            if used > allowed * len(self.x):
                return f"{used / len(self.x):.1f} {what} per image, allowed are {allowed}"
        return None

    def higher(self) -> str | None:
        if self.z is None:
            raise Unusable("cannot be judged: no result in the set")
        ratio = cross_entropy(predict(self.f, self.z), self.y) / restarts(
            self.f, self.x, self.y, self.threat)  # fmt: skip
        up, down = ratio > MARK, ratio < 1 / MARK
        gain, low, high = (100 * v for v in paired(up, down))
        self.measured = (
            f"over 5 % higher on {int(up.sum())}, lower on {int(down.sum())} of {len(ratio)} images: "
            f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]; largest ratio {float(ratio.max()):.2f}; "
            f"{self.watched.gradients / len(ratio):.1f} gradients per image")  # fmt: skip
        return None if low > 0 else "the gain's interval does not lie above 0"


def check_summit(
    highest: Highest, networks: Mapping[str, nn.Module], x: Tensor, y: Tensor, threat: Threat
) -> Report:
    """Does `highest(f, x, y, threat, gradients, gen) -> z` find other hills than restarts do?

    The rival is the highest of nine runs of PGD-40 from random starts, 360 gradients per image.
    An image counts for the reader where the loss at z is more than 5 % above the rival's, and
    against where it is as much below: the 95 % interval of the difference, paired by image, must
    lie above 0. (Twice as many forward passes are allowed.)

    Args:
        highest: the reader's function.
        networks: name -> network; the first is demanded, the others are measured only.
        x, y, threat: where to climb.
    """
    contests = {name: _Contest(highest, f, x, y, threat) for name, f in networks.items()}
    (name, first), *others = contests.items()
    report = examine(highest, [
        ("stays in the set, and leaves f as it is", first.in_set),
        (f"at most {GRADIENTS} gradients and {2 * GRADIENTS} forward passes per image",
         first.in_budget),
        (f"finds higher hills than restarts do, {name} network", first.higher),
    ])  # fmt: skip
    *findings, last = report.findings
    remarks = [first.measured]
    for other, contest in others if report else ():
        contest.in_set()
        over = contest.in_budget() or contest.higher() and ""
        remarks.append(f"{other} network (not demanded): {over or contest.measured}")
    text = "; ".join(filter(None, remarks))
    return Report(report.subject, (*findings, Finding(last.claim, last.problem, text)))
