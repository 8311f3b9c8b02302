"""Checkers for the exercise of chapter 7 on a control for D_rand, and on what may be said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from advlearn import data, relabelled, zoo
from advlearn.attacks import pgd
from advlearn.evaluation import predict
from advlearn.exercises.report import Finding, Report, Unusable, ask, examine
from advlearn.losses import cross_entropy
from advlearn.models import mlp
from advlearn.tensors import generator, norms
from advlearn.threats import L2

Control = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
N, SLACK = 600, 0.03
Scene = tuple[Tensor, Tensor, Tensor]  # x, x_adv, t


def stored(x: Tensor) -> Tensor:
    """As 8 bits keep it."""
    return (255 * x).round().clamp(0, 255) / 255


@cache
def grey() -> Scene:
    """Grey images that the box does not touch, moved by 0.3 to 0.8 in a direction of their label."""
    gen = generator(81)
    x = stored(0.4 + 0.2 * torch.rand(N, 1, 8, 8, generator=gen))
    t = torch.randint(10, (N,), generator=gen)
    patterns, own = (F.normalize(torch.randn(n, 64, generator=gen)) for n in (10, N))
    way = F.normalize(patterns[t] + 0.75 * own).view_as(x)
    length = 0.3 + 0.5 * torch.rand(N, 1, 1, 1, generator=gen)
    return x, stored(x + length * way), t


@cache
def relabelled_digits() -> Scene:
    """D_rand of the natural network for digits, ε from 0.7 to 1.3."""
    few = data.load("digits", "train").subset(N, 0)
    x, t = few.tensors()[0], relabelled.random_targets(few)
    eps = 0.7 + 0.6 * torch.rand(N, generator=generator(82))
    z = pgd(zoo.load_or_train("digits-small-natural", progress=False), x, t, L2(eps), steps=10,
            step_size=0.25, loss=lambda logits, t: -cross_entropy(logits, t))  # fmt: skip
    return x, stored(z), t


def learned_from(z: Tensor, t: Tensor, seed: int = 0) -> float:
    """Accuracy on the digits' test images after standard training on (z, t) and nothing else."""
    f = mlp((1, 8, 8), (64,), 10, seed=seed)
    gen, speed = generator(83 + seed), [torch.zeros_like(p) for p in f.parameters()]
    for _ in range(25):
        for rows in torch.randperm(len(t), generator=gen).split(50):
            slopes = torch.autograd.grad(F.cross_entropy(f(z[rows]), t[rows]), list(f.parameters()))
            with torch.no_grad():  # By hand: an optimiser's import would take longer than this.
                for p, v, g in zip(f.parameters(), speed, slopes, strict=True):
                    p -= 0.1 * v.mul_(0.9).add_(g)
    x, y = data.load("digits", "test").tensors()
    return float((predict(f, x).argmax(1) == y).double().mean())


@cache
def _after_attack() -> float:
    return learned_from(*relabelled_digits()[1:])


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a.flatten(1)) @ F.normalize(b.flatten(1)).T


class _Built:
    """The reader's control of one scene, built once."""

    def __init__(self, control: Control, scene: Callable[[], Scene]) -> None:
        self.control, self.scene, self.made = control, scene, None

    def ask(self, seed: int = 84) -> tuple[Tensor, Tensor]:
        given = self.scene()
        answer = ask(self.control, *given, generator(seed))
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise Unusable("wanted are two tensors: images and labels")
        z, labels = answer
        if not isinstance(z, Tensor) or z.shape != given[0].shape or not z.isfinite().all():
            raise Unusable("the images must be finite, with the shape of x")
        if not isinstance(labels, Tensor) or labels.shape != given[2].shape:
            raise Unusable("the labels must have the shape of t")
        return z.detach(), labels

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, x_adv, t, and the reader's z and labels."""
        if self.made is None:
            self.made = self.ask()
        return *self.scene(), *self.made

    def labels(self) -> str | None:
        _, _, t, _, labels = self.all()
        if labels.equal(t):
            return None
        if labels.sort().values.equal(t.sort().values):
            return "the labels are shuffled: every image keeps the label that it has in D_rand"
        return "the labels are others than those of D_rand: only the perturbation may differ"

    def kept(self) -> str | None:
        z = self.all()[3]
        if z.min() < 0 or z.max() > 1:
            return f"pixels from {float(z.min()):.2f} to {float(z.max()):.2f}: the box is [0, 1]"
        if not ((255 * z - (255 * z).round()).abs() < 1e-3).all():
            return "pixels between the 256 grey values: D_rand is stored with 8 bits, so must this be"
        return None

    def length(self) -> str | None:
        x, x_adv, _, z, _ = self.all()
        wanted, found = norms(x_adv - x, 2), norms(z - x, 2)
        if ((found / wanted - 1).abs() < SLACK).all():
            return None
        if z.equal(x):
            return "the images are untouched: the perturbation is missing"
        lean = float((found / wanted).mean())
        for message, other in {
            "every perturbation has the average length: wanted is that of the image's own attack": wanted.mean(),
            "every perturbation has the greatest length: wanted is that of the image's own attack": wanted.max(),
        }.items():
            if (found / other - 1).abs().median() < SLACK / 3 and (wanted / other - 1).abs().median() > SLACK / 3:
                return message
        if ((norms(z - x, torch.inf) / norms(x_adv - x, torch.inf) - 1).abs() < SLACK).all():
            return "the largest pixel has the attack's size: wanted is the ℓ2 length"
        if lean < 1 - SLACK and ((z - x).abs() < 1e-6).flatten(1).float().mean() > 0.2:
            return (f"{lean:.0%} of the attack's length are left: clipping takes what leaves [0, 1], on "
                    "black pixels half; stretch the noise until the *clipped* one is as long")  # fmt: skip
        off = (found / wanted - 1).abs()
        return (f"the lengths, as stored, are off by {float(off.mean()):.0%} on average and by "
                f"{float(off.max()):.0%} at most")

    def direction(self) -> str | None:
        x, x_adv, t, z, _ = self.all()
        if z.equal(x_adv):
            return "those are the images of D_rand itself"
        others = _cosines(z - x, x_adv - x)
        own, (closest, whose) = others.diag(), others.max(1)
        if closest.median() > 0.9 and (whose != torch.arange(len(t))).all():
            if (t[whose] == t).float().mean() > 0.9:
                return "the attacks on other images with the same label: they point to it as well"
            return "the attacks on other images: what an attack wrote is no noise"
        if own.median() > 0.5:
            return "the perturbation still follows the attack on its image"
        if own.median() < -0.5:
            return "the attack turned around: that direction tells the label just as well"
        if not own.mean().abs() < 0.04:
            return f"the mean cosine with the attack is {float(own.mean()):+.2f}, of noise it is 0"
        return None

    def private(self) -> str | None:
        x, _, t, z, _ = self.all()
        pairs, alike = _cosines(z - x, z - x), t[:, None] == t
        within = float(pairs[alike & ~torch.eye(len(t), dtype=torch.bool)].mean())
        across = float(pairs[~alike].mean())
        if not self.direction():  # Else that is said already.
            if across > 0.9:
                return "every image gets the same noise: a network can learn it, draw it for each image"
            if within > 0.2 and across < 0.1:
                return "images of one label get the same noise: a network can learn what goes with what"
            if abs(across) > 0.05:
                return f"the noise of two images has the mean cosine {across:+.2f}: it has a direction"
        again, other = self.ask(), self.ask(85)
        if not again[0].equal(z) or other[0].equal(z):
            return "the noise is not drawn from `gen`"
        return None


def check_control(control: Control) -> Report:
    """Try `control(x, x_adv, t, gen)`: the control for D_rand = (x_adv, t), made from x.

    x, x_adv (N, C, H, W) in [0, 1], on the 256 grey values; t (N,). Returns images on the grey
    values and labels: the same labels, and instead of the attack noise from `gen`, image by image
    as long (ℓ2, to 3 %) as the attack. Tried on grey images with a planted attack, and on D_rand of
    the embedded digits, where two networks are trained, one on D_rand and one on the control.
    """
    plain, real = _Built(control, grey), _Built(control, relabelled_digits)
    said: list[str] = []

    def teaches_nothing() -> str | None:
        share, attack = learned_from(*real.all()[3:]), _after_attack()
        said.append(f"after D_rand {attack:.0%} of the test images are right, after your control {share:.0%}")
        if share < 0.15:
            return None
        return "the control teaches the true classes: it carries more than noise under wrong labels"

    report = examine(control, [
        ("the labels are those of D_rand", plain.labels),
        ("the pixels are 8-bit numbers in [0, 1]", lambda: plain.kept() or real.kept()),
        ("every perturbation is as long as its image's attack", plain.length),
        ("also on black and white pixels, on digits", real.length),
        ("its direction is not that of an attack", plain.direction),
        ("it is drawn from `gen`, anew for every image", plain.private),
        ("a network trained on it learns nothing about digits", teaches_nothing),
    ])  # fmt: skip
    if not said:
        return report
    *findings, last = report.findings
    return Report(report.subject, (*findings, Finding(last.claim, last.problem, said[0])))


# --- the verdict ------------------------------------------------------------------------------

Share = tuple[float, float, float]  # accuracy, lower and upper end of its interval


def effect(
    attack: Share, control: Share, margin: float, *,
    least: Callable[[Share, Share], float] = lambda a, b: a[1] - b[2],
    most: Callable[[Share, Share], float] = lambda a, b: a[2] - b[1],
    doubt: str = "undecided",
) -> str:  # fmt: skip
    """Is the difference above the margin whatever the truths are, or below? The options plant mistakes."""
    if least(attack, control) > margin:
        return "yes"
    return "no" if most(attack, control) <= margin else doubt


def _rule(**options: object) -> Callable[[Share, Share, float], str]:
    return lambda a, b, margin: effect(a, b, margin, **options)


_RULES: dict[str, Callable[[Share, Share, float], str]] = {
    "that compares two estimates: the intervals say how far off they may be": _rule(
        least=lambda a, b: a[0] - b[0], most=lambda a, b: a[0] - b[0]),
    "the control's interval is missing: its accuracy is an estimate, too": _rule(
        least=lambda a, b: a[1] - b[0], most=lambda a, b: a[2] - b[0]),
    "the interval after D_rand is missing: that accuracy is an estimate, too": _rule(
        least=lambda a, b: a[0] - b[2], most=lambda a, b: a[0] - b[1]),
    "not seen is not absent: where the intervals allow both, it is undecided": _rule(doubt="no"),
    "an interval that may lie above the margin is no proof: take the worst ends for `yes`": _rule(
        doubt="yes"),
    "it never says no: if even the best ends differ by less than the margin, there is no effect": _rule(
        most=lambda a, b: float("inf")),
    "the margin is missing": lambda a, b, margin: effect(a, b, 0.0),
    "a control that is better is no effect: the difference has a sign": _rule(
        least=lambda a, b: max(a[1] - b[2], b[1] - a[2]),
        most=lambda a, b: max(a[2] - b[1], b[2] - a[1])),
    "D_rand and the control are exchanged": lambda a, b, margin: effect(b, a, margin),
    "chance is no control: compare with the control": lambda a, b, margin: effect(
        a, (0.1, 0.1, 0.1), margin),
}  # fmt: skip


def _shares(seed: int) -> tuple[Share, Share, float]:
    low, middle, high, margin = torch.rand(4, 2, generator=generator(860 + seed), dtype=torch.float64)
    at, wide = 0.2 + 0.6 * middle, 0.15 * torch.maximum(low, high) + 0.01
    a, b = ((float(m), float(m - w), float(m + w / 2)) for m, w in zip(at, wide, strict=True))
    return a, b, float(margin[0]) / 4


def check_effect(effect_of: Callable[[Share, Share, float], str]) -> Report:
    """Try `effect(attack, control, margin)`: "yes", "no" or "undecided".

    attack, control: (accuracy, lower, upper) after training on D_rand and on its control. "yes" if
    the first is higher by more than the margin wherever in their intervals the truths lie, "no" if
    it is so nowhere, else "undecided".
    """
    fixed = {"far above": ((0.5, 0.45, 0.55), (0.06, 0.04, 0.08), 0.05),
             "the intervals overlap": ((0.12, 0.09, 0.15), (0.08, 0.06, 0.1), 0.0),
             "the same, closely": ((0.1, 0.09, 0.11), (0.1, 0.09, 0.11), 0.05),
             "above, by less than the margin": ((0.13, 0.12, 0.14), (0.1, 0.09, 0.11), 0.1),
             "the control is higher": ((0.06, 0.04, 0.08), (0.5, 0.45, 0.55), 0.05)}  # fmt: skip
    given = {**fixed, **{f"example {i}": _shares(i) for i in range(60)}}
    told: dict[str, str] = {}

    def ask() -> Mapping[str, str]:
        for name, arguments in given.items():
            if name not in told:
                answer = effect_of(*arguments)
                if answer not in ("yes", "no", "undecided"):
                    raise Unusable(f"{answer!r}: wanted is 'yes', 'no' or 'undecided'")
                told[name] = answer
        return told

    def right(wanted: str) -> str | None:
        bad = [n for n, answer in ask().items() if effect(*given[n]) == wanted != answer]
        if not bad:
            return None
        for message, rule in _RULES.items():
            if all(rule(*given[n]) == answer for n, answer in told.items()):
                return message
        return f"{bad[0]}, {given[bad[0]]}: {told[bad[0]]!r}"

    return examine(effect_of, [
        ("says yes where every pair of values agrees", lambda: right("yes")),
        ("says no where none does", lambda: right("no")),
        ("says undecided in between", lambda: right("undecided")),
    ])  # fmt: skip
