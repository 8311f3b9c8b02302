"""The page of red flags: what to ask of any claim that a network is robust.

An attack that fails shows either a robust network or a bad attack. Each question here is one that
a robust network answers easily and a network that hides its gradients does not (Athalye, Carlini &
Wagner, arXiv:1802.00420; Carlini et al., arXiv:1902.06705).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from advlearn.attacks import Attack, on, pgd, square
from advlearn.checks import check_examples, check_logits
from advlearn.evaluation.judge import Result, interval, paired, predict, worst_case
from advlearn.gradients import averaged, input_grad
from advlearn.losses import cross_entropy, margin
from advlearn.models import Classifier
from advlearn.tensors import Keyed, frozen, norms
from advlearn.threats import Threat

# The largest share that a flag forgives. The paper's own network loses 3.9 points from PGD-40 to
# PGD-100 with 20 restarts (93.2 to 89.3), and hides no gradient.
TOLERANCE = 0.05
VOTES = 11  # Predictions per verdict of a network that is random.


@dataclass(frozen=True)
class Flag:
    """One red flag.

    Attributes:
        name: what would be wrong.
        raised: whether it is.
        measured: what was measured, with its interval.
        meaning: one sentence on what it means.
    """

    name: str
    raised: bool
    measured: str
    meaning: str


@dataclass(frozen=True, eq=False)
class Audit:
    """What `audit` found.

    Attributes:
        flags: all of them, raised or not.
        claimed: accuracy under plain PGD: 40 steps on the cross-entropy, one random start.
        correct: bool, (N,): right on the image and after every attack of the audit.
        threat: as given.
        seconds: wall-clock time.
    """

    flags: tuple[Flag, ...]
    claimed: Result
    correct: Tensor
    threat: Threat
    seconds: float

    @property
    def raised(self) -> tuple[str, ...]:
        """Names of the raised flags."""
        return tuple(flag.name for flag in self.flags if flag.raised)

    @property
    def accuracy(self) -> float:
        """Share of images that every attack of the audit left correct: at most this is true."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `accuracy`."""
        return interval(int(self.correct.sum()), len(self.correct))

    def rows(self) -> list[list[str]]:
        """One row per flag: the flag or a dash, its name, what was measured."""
        return [["⚑" if f.raised else "–", f.name, f.measured] for f in self.flags]

    def __repr__(self) -> str:
        lines = [f"{self.threat}, {len(self.correct)} images: plain PGD leaves "
                 f"{_percent(self.claimed.accuracy, self.claimed.interval)}, "
                 f"all attacks together {_percent(self.accuracy, self.interval)}"]
        for flag in self.flags:
            lines.append(f"{'⚑' if flag.raised else '–'} {flag.name}: {flag.measured}")
            lines += [f"    {flag.meaning}"] if flag.raised else []
        return "\n".join(lines)


def audit(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    source: Classifier | None = None,
    queries: int = 1000,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Audit:
    """Ask seven questions of a network that is claimed to be robust.

    Is its verdict the same twice? Has it gradients? Do noise, another loss, more steps and
    restarts, or a black-box attack fool images that plain PGD left standing? Does anything survive
    when every image is allowed? No raised flag is no proof of robustness; a raised one means that
    the accuracy under plain PGD is not to be believed.

    Args:
        f: classifier, (N, C, H, W) -> (N, K). A random one is judged by the majority of 11 calls.
        x, y: images in [0, 1] and labels (N,); a few hundred drawn at random will do.
        threat: what the attacker may do.
        source: another network, to attack in place of `f` (transfer); None leaves that out.
        queries: of the Square attack, which uses no gradient (ℓ∞ and ℓ2 only).
        seed, index, batch_size: as in `worst_case`.
        progress: show bars.

    Raises:
        ValueError: as `worst_case`; a threat with one ε per example.
    """
    began = time.perf_counter()
    check_examples(x, y)
    if isinstance(threat.eps, Tensor) and threat.eps.ndim:
        raise ValueError("audit: one ε per example, allowed is one number for all")
    logits = predict(f, x, batch_size)
    check_logits(logits, y)
    repeat = _repeats(f, x, logits, batch_size)
    flat = _zero_gradients(f, x, y, threat, seed, index, batch_size)
    random = repeat.raised
    judge = partial(worst_case, f, x, y, seed=seed, index=index, batch_size=batch_size,
                    votes=VOTES if random else 1, progress=progress)  # fmt: skip

    claimed = judge(threat, {"PGD-40": _steps(threat, 40)})
    averaging = random and not flat.raised  # The mean of zeros is zero.
    grad = averaged(input_grad, 4) if averaging else input_grad
    noise = judge(threat, {f"noise #{i + 1}": _noise for i in range(20)})
    other = judge(threat, {"margin": _steps(threat, 40, loss=margin)})
    more = judge(threat, {f"PGD-100 #{i + 1}": _steps(threat, 100, grad=grad) for i in range(5)})
    box = replace(threat, eps=_whole_box(threat, x))
    anything = judge(box, {"PGD-100": _steps(box, 100)})
    blind = judge(threat, _black_box(threat, source, queries))
    white = claimed.correct & other.correct & more.correct
    flags = (
        repeat, flat,
        _beaten("noise beats the attack", claimed.correct, noise, "20 random points",
                "An attack that random points outdo is not following the loss."),
        _beaten("another loss beats the attack", claimed.correct, other, "the margin loss",
                "The cross-entropy's gradient is lost, often because the logits are large."),
        _beaten("more steps and restarts go on winning", claimed.correct, more,
                "100 steps, 5 restarts",
                "The attack had not converged: its accuracy says how long it ran."),
        _survivors(anything),
        _beaten("a black-box attack beats the gradient", white, blind,
                _each(white, blind),
                "Whoever sees less must not find more: the gradient points the wrong way."),
    )  # fmt: skip
    correct = white & noise.correct & blind.correct
    return Audit(flags, claimed, correct, threat, time.perf_counter() - began)


# --- attacks ---------------------------------------------------------------------------------


def _steps(threat: Threat, steps: int, **options: object) -> Attack:
    """PGD with the step size 2.5 ε / steps."""
    return partial(pgd, steps=steps, step_size=2.5 * threat.eps / steps, **options)


def _noise(f: Classifier, x: Tensor, y: Tensor, threat: Threat, *, start: Tensor) -> Tensor:
    """Not an attack: a random point of the set."""
    return start


def _black_box(threat: Threat, source: Classifier | None, queries: int) -> Mapping[str, Attack]:
    found: dict[str, Attack] = {}
    if source is not None:
        found["transfer"] = on(source, _steps(threat, 40))
    if threat.p > 1:
        found[f"Square ({queries} queries)"] = partial(square, queries=queries)
    return found


def _whole_box(threat: Threat, x: Tensor) -> float:
    """The radius at which every image is allowed: the diagonal of the box in the threat's norm."""
    return x[0].numel() ** (1 / threat.p)


# --- questions -------------------------------------------------------------------------------


def _repeats(f: Classifier, x: Tensor, logits: Tensor, batch_size: int) -> Flag:
    again = predict(f, x, batch_size)
    differ = (again - logits).abs().amax(1) > 1e-3 * logits.abs().amax()
    share = float(differ.double().mean())
    return Flag("the verdict does not repeat", bool(differ.any()),
                f"logits differ between two calls: {100 * share:.0f} %",
                "A random network turns every retry into another lottery ticket: judge it by "
                "votes, and attack its mean.")  # fmt: skip


def _zero_gradients(f: Classifier, x: Tensor, y: Tensor, threat: Threat, seed: int,
                    index: Tensor | None, batch_size: int) -> Flag:  # fmt: skip
    index = torch.arange(len(y), device=y.device) if index is None else index
    start = threat.sample(x, Keyed((seed, 0), index))
    zero = []
    with frozen(f):
        for z, labels in zip(start.split(batch_size), y.split(batch_size), strict=True):
            g = input_grad(lambda z, labels=labels: cross_entropy(f(z), labels), z)
            zero.append(norms(g, math.inf) == 0)
    zeros = torch.cat(zero)
    share, limits = float(zeros.double().mean()), interval(int(zeros.sum()), len(zeros))
    return Flag("gradients are zero", limits[0] > TOLERANCE,
                f"exactly 0 at a random point: {_percent(share, limits)} of the images",
                "There is nothing to ascend: the loss is flat, rounded or not differentiable.")


def _beaten(name: str, before: Tensor, by: Result, what: str, meaning: str) -> Flag:
    """Raised where `by` fools more of what stood `before` than the tolerance."""
    share, low, high = paired(before, before & by.correct)
    return Flag(name, low > TOLERANCE,
                f"{what}: {_percent(share, (max(0, low), high))} more images fall", meaning)


def _survivors(anything: Result) -> Flag:
    return Flag("images survive the whole box", anything.interval[0] > TOLERANCE,
                f"ε = {float(anything.threat.eps):.3g}, 100 steps: "
                f"{_percent(anything.accuracy, anything.interval)} are left",
                "Every image is allowed, those of other classes too: what is left measures the "
                "attack's failure.")  # fmt: skip


def _each(before: Tensor, by: Result) -> str:
    """How many images each attack fooled of those that the ones before it had left."""
    counts = [int((before & (by.fooled_by == i)).sum()) for i in range(len(by.names))]
    found = [f"{name} {count}" for name, count in zip(by.names, counts, strict=True)]
    return " images, then ".join(found) or "no black-box attack for this threat"


def _percent(value: float, limits: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % [{100 * limits[0]:.1f}, {100 * limits[1]:.1f}]"
