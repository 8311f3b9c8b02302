"""Checkers for the exercises of chapter 2 on restarts and on an attack better than PGD-40."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advlearn import models
from advlearn.attacks import Attack, pgd
from advlearn.evaluation import paired, predict
from advlearn.exercises.report import Finding, Report, Unusable, examine
from advlearn.exercises.watched import Watched
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed, generator
from advlearn.threats import Linf, Threat

RUNS = 5
# Pixels are logits / 5, label 0. Right and sure; barely right; wrong, with a smaller cross-entropy
# than barely right; surely wrong.
_PIXELS = {"R": (0.9, 0.1, 0.1), "B": (0.52, 0.5, 0.5), "W": (0.5, 0.6, 0.0), "X": (0.0, 1.0, 0.0)}
# One image per entry: the image itself, then what each run of the attack makes of it.
_IMAGES = ("R RRRRR", "R RRRRR", "R WRRRR", "R RRRRX", "R RWBRR", "R BWWWB", "R XXXXX", "W RRRRR",
           "X XRXRX", "R BBBBB", "R RXXRR", "R RBRBR")  # fmt: skip


class _Planted:
    """An attack whose every result is known beforehand, and a network to judge it.

    Attributes:
        stands: the right verdicts, (N,).
        runs: how often it was run on each image.
        starts: the starts that it was given, per image.
    """

    def __init__(self) -> None:
        pictures = torch.tensor([[_PIXELS[c] for c in text.replace(" ", "")] for text in _IMAGES])
        n = len(_IMAGES)
        self.x = pictures[:, 0].view(n, 3, 1, 1) - 1e-3 * torch.arange(n).view(n, 1, 1, 1) / n
        self.x.clamp_(0, 1)
        self.made, self.y = pictures[:, 1:].view(n, RUNS, 3, 1, 1), torch.zeros(n).long()
        self.f = models.linear((3, 1, 1), 3).eval()
        self.f[1].weight.data, self.f[1].bias.data = 5 * torch.eye(3), torch.zeros(3)
        logits = predict(self.f, self.made.flatten(0, 1)).view(n, RUNS, 3)
        self.fooled = logits.argmax(2) != 0
        self.loss = cross_entropy(logits.flatten(0, 1), self.y.repeat_interleave(RUNS)).view(n, -1)
        self.right = predict(self.f, self.x).argmax(1) == 0
        self.stands = self.right & ~self.fooled.any(1)
        self.runs, self.starts = [0] * n, [[] for _ in range(n)]

    def __call__(self, f: nn.Module, x: Tensor, y: Tensor, threat: Threat, *,
                 start: Tensor | None = None) -> Tensor:  # fmt: skip
        z = x.clone()
        for row, image in enumerate(x):
            i = int((self.x - image).flatten(1).abs().amax(1).argmin())
            z[row] = self.made[i, min(self.runs[i], RUNS - 1)]
            self.runs[i] += 1
            self.starts[i].append(None if start is None else start[row].clone())
        return z

    def wrong_rules(self) -> dict[str, Tensor]:
        """Message -> the verdicts of a wrong rule: does the image stand?"""
        largest = self.fooled.gather(1, self.loss.argmax(1, keepdim=True))[:, 0]
        return {
            "the run with the largest loss decides: a right answer can have the larger one":
                self.right & ~largest,
            "the last run overwrites the ones before": self.right & ~self.fooled[:, -1],
            "only the first run counts": self.right & ~self.fooled[:, 0],
            "the majority of the runs decides: the attacker needs one":
                self.right & (self.fooled.double().mean(1) < 0.5),
            "an image falls only if all runs fool it: the attacker needs one":
                self.right & ~self.fooled.all(1),
            "images that f gets wrong without any attack are counted as standing":
                ~self.fooled.any(1),
            "true and false are exchanged: true is for images that stand":
                ~self.stands,
        }  # fmt: skip


Surviving = Callable[[nn.Module, Tensor, Tensor, Threat, Attack, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class _Restarts:
    """The properties of a count of restarts."""

    surviving: Surviving

    def run(self, planted: _Planted, rows: slice = slice(None)) -> Tensor:
        x, y = planted.x[rows].clone(), planted.y[rows]
        stands = self.surviving(planted.f, x, y, Linf(1.0), planted, RUNS, generator(3))
        if not isinstance(stands, Tensor) or stands.shape != y.shape:
            got = getattr(stands, "shape", type(stands).__name__)
            raise Unusable(f"returns {got}, wanted one verdict per image, bool (N,)")
        if stands.dtype != torch.bool:
            raise Unusable(f"returns {stands.dtype}: each image stands or has fallen, no mean")
        return stands

    def counts(self) -> str | None:
        planted = _Planted()
        self.run(planted)
        runs = sorted({planted.runs[i] for i in planted.stands.nonzero()[:, 0].tolist()})
        return None if runs == [RUNS] else (
            f"images that stand are attacked {' or '.join(map(str, runs))} times, n = {RUNS}")

    def starts(self) -> str | None:
        planted = _Planted()
        self.run(planted)
        for image, given in zip(planted.x, planted.starts, strict=True):
            if any(start is None for start in given):
                return "start=None: every run starts at x, draw threat.sample(x, gen)"
            if any(torch.equal(start, image) for start in given):
                return "a run starts at x itself: draw threat.sample(x, gen)"
            if any(torch.equal(a, b) for a, b in zip(given, given[1:], strict=False)):
                return "all runs have the same start: draw inside the loop, from one generator"
        return None

    def rule(self) -> str | None:
        planted = _Planted()
        stands, truth = self.run(planted), planted.stands
        if torch.equal(stands, truth):
            return None
        for message, wrong in planted.wrong_rules().items():
            if torch.equal(stands, wrong):
                return message
        i = int((stands != truth).nonzero()[0])
        return f"image {i} {'stands' if truth[i] else 'has fallen'}, and you say the opposite"

    def alone(self) -> str | None:
        planted, together = _Planted(), self.run(_Planted())
        single = [self.run(planted, slice(i, i + 1)) for i in range(len(together))]
        return None if torch.equal(torch.cat(single), together) else (
            "an image's verdict depends on the others in the batch")


def check_restarts(surviving: Surviving) -> Report:
    """Try `surviving(f, x, y, threat, attack, n, gen) -> stands`, bool (N,).

    True where f is right on the image and after each of n runs of the attack, every run from its
    own random start. The attack and its verdicts are planted.
    """
    case = _Restarts(surviving)
    return examine(surviving, [
        ("runs the attack n times on what stands", case.counts),
        ("every run has its own random start", case.starts),
        ("an image falls if one run fools f, or f is wrong without any", case.rule),
        ("treats every image by itself", case.alone),
    ])  # fmt: skip


# --- better than PGD-40 -----------------------------------------------------------------------

GRADIENTS, FORWARDS, STARTS = 40, 80, 3


class _Contest:
    """The reader's attack and PGD-40 on the same images from the same random starts."""

    def __init__(self, attack: Attack, f: nn.Module, x: Tensor, y: Tensor, threat: Threat,
                 index: Tensor | None) -> None:  # fmt: skip
        self.attack, self.f, self.x, self.y, self.threat = attack, f, x, y, threat
        index = torch.arange(len(y), device=y.device) if index is None else index
        self.starts = [threat.sample(x, Keyed((20, i), index)) for i in range(STARTS)]
        self.x_before, self.before = x.clone(), [p.clone() for p in f.parameters()]
        self.watched, self.outcomes, self.measured = Watched(f), [], ""

    def in_set(self) -> str | None:
        for start in self.starts:
            z = self.attack(self.watched, self.x, self.y, self.threat, start=start.clone())
            if not isinstance(z, Tensor) or z.shape != self.x.shape:
                raise Unusable("the result is not a tensor of the shape of x")
            self.outcomes.append(z.detach())
        return None if self.inside() else f"the result leaves the set ({self.threat}, pixels in [0, 1])"

    def inside(self) -> bool:
        return all(bool(self.threat.contains(z, self.x_before).all()) for z in self.outcomes)

    def untouched(self) -> str | None:
        kept = all(torch.equal(a, b) and b.grad is None
                   for a, b in zip(self.before, self.f.parameters(), strict=True))  # fmt: skip
        kept = kept and not any(m.training for m in self.f.modules())
        return None if kept and torch.equal(self.x, self.x_before) else "x or f was changed"

    def spent(self) -> tuple[float, float]:
        """Gradients and forward passes per image and run."""
        runs = STARTS * len(self.x)
        return self.watched.gradients / runs, self.watched.images / runs

    def in_budget(self) -> str | None:
        for what, used, allowed in zip(("gradients", "forward passes"), self.spent(),
                                       (GRADIENTS, FORWARDS), strict=True):  # fmt: skip
            if used > allowed:
                return f"{used:.1f} {what} per image, allowed are {allowed}"
        return None

    def right(self, results: list[Tensor]) -> Tensor:
        """Share of the starts after which f is right, (N,)."""
        verdicts = [predict(self.f, z).argmax(1) == self.y for z in results]
        return torch.stack(verdicts).double().mean(0)

    def better(self) -> str | None:
        if len(self.outcomes) < STARTS or not self.inside():
            raise Unusable("cannot be judged: no result in the set")
        step = 2.5 * self.threat.eps / GRADIENTS
        plain = self.right([pgd(self.f, self.x_before, self.y, self.threat, steps=GRADIENTS,
                                step_size=step, start=start) for start in self.starts])
        yours = self.right(self.outcomes)
        gain, low, high = (100 * v for v in paired(plain, yours))
        gradients, forwards = self.spent()
        self.measured = (
            f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]; right after PGD-{GRADIENTS} "
            f"{100 * float(plain.mean()):.1f} %, after yours {100 * float(yours.mean()):.1f} %; "
            f"{gradients:.1f} gradients and {forwards:.1f} forward passes per image")
        return None if low > 0 else "the gain's interval does not lie above 0"


def check_stronger(
    attack: Attack, f: nn.Module, x: Tensor, y: Tensor, threat: Threat, index: Tensor | None = None
) -> Report:
    """Does `attack(f, x, y, threat, *, start) -> z` leave f less than PGD-40 does?

    PGD-40 is on the cross-entropy, with steps of 2.5 ε / 40 (Madry et al., arXiv:1706.06083, §5).
    Both get the same three random starts; an image's score is the share of starts after which f
    is right. The comparison is paired by image: the 95 % interval of the difference must lie above
    0. Allowed are 40 gradients and 80 forward passes per image, on average over the batch; a
    gradient needs one forward pass itself.
    """
    contest = _Contest(attack, f, x, y, threat, index)
    report = examine(attack, [
        ("stays in the set", contest.in_set), ("leaves x and f as they are", contest.untouched),
        (f"at most {GRADIENTS} gradients and {FORWARDS} forward passes per image",
         contest.in_budget),
        (f"leaves less than PGD-{GRADIENTS} does", contest.better),
    ])  # fmt: skip
    *others, last = report.findings
    return Report(report.subject, (*others, Finding(last.claim, last.problem, contest.measured)))
