"""Checkers for the exercises of chapter 7 on relabelled adversarial images and feature inversion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from advlearn.attacks import pgd
from advlearn.exercises.report import Report, Unusable, ask, examine
from advlearn.losses import Loss, cross_entropy
from advlearn.models import features, mlp, small_conv
from advlearn.tensors import frozen, generator, norms
from advlearn.threats import L2, NormBall

CLASSES, SHAPE, N = 5, (1, 4, 4), 3000
EPS, STEPS, ALPHA = 0.5, 10, 0.1


def _state(f: nn.Module) -> tuple:
    return (f.training, {k: v.clone() for k, v in f.state_dict().items()},
            [(p.requires_grad, p.grad) for p in f.parameters()])  # fmt: skip


def _touched(f: nn.Module, before: tuple) -> str | None:
    training, weights, parameters = before
    if any(not v.equal(weights[k]) for k, v in f.state_dict().items()):
        return "the network's weights have been changed"
    if f.training != training:
        return "the network is left in another mode than it was"
    if any(p.grad is not g for p, (_, g) in zip(f.parameters(), parameters, strict=True)):
        return "the network's parameters have gradients: differentiate with respect to the image"
    if any(p.requires_grad != r for p, (r, _) in zip(f.parameters(), parameters, strict=True)):
        return "the network's parameters are left frozen"
    return None


def _loss(f: nn.Module, z: Tensor, y: Tensor, loss: Loss = cross_entropy) -> Tensor:
    with frozen(f), torch.no_grad():
        return loss(f(z), y)


# --- D_rand -----------------------------------------------------------------------------------


class _Built:
    """The reader's data set from a small network, built once."""

    def __init__(self, build: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.build, self.made = build, None
        self.f, self.threat = mlp(SHAPE, (20,), CLASSES, seed=3).train(), L2(EPS)
        gen = generator(71)
        self.x = torch.rand(N, *SHAPE, generator=gen)
        self.y = torch.randint(CLASSES, (N,), generator=gen)
        self.before = _state(self.f)

    def ask(self) -> tuple[Tensor, Tensor]:
        if self.made is None:
            x, y = self.x, self.y
            answer = ask(self.build, self.f, x, y, self.threat, classes=CLASSES, steps=STEPS,
                         step_size=ALPHA, gen=generator(72))  # fmt: skip
            if not isinstance(answer, (tuple, list)) or len(answer) != 2:
                raise Unusable("wanted are two tensors: images and labels")
            z, t = answer
            if not isinstance(z, Tensor) or z.shape != x.shape:
                raise Unusable("the images must have the shape of x")
            if not isinstance(t, Tensor) or t.shape != y.shape or t.dtype != torch.int64:
                raise Unusable("the labels must be int64, (N,)")
            if t.min() < 0 or t.max() >= CLASSES:
                raise Unusable(f"labels from {t.min()} to {t.max()}, there are {CLASSES} classes")
            self.made = z.detach(), t
        return self.made

    def targets(self) -> str | None:
        t = self.ask()[1]
        if t.equal(self.y):
            return "the labels are the original ones: the targets are the labels of the new set"
        offset = (t - self.y) % CLASSES
        if len(offset.unique()) == 1:
            return f"every target is y + {int(offset[0])}: that is D_det, here they are random"
        if (offset == 0).any():
            return f"{float((offset == 0).float().mean()):.0%} of the targets are the label itself"
        return None

    def spread(self) -> str | None:
        t, wanted = self.ask()[1], N / CLASSES / (CLASSES - 1)
        counts = torch.bincount(self.y * CLASSES + t, minlength=CLASSES**2).view(CLASSES, CLASSES)
        counts = counts[~torch.eye(CLASSES, dtype=torch.bool)]
        if not ((counts - wanted).abs() < 6 * wanted**0.5).all():
            return (f"not all other classes are equally likely: label and target meet {counts.min()} to "
                    f"{counts.max()} times, {wanted:.0f} are expected")  # fmt: skip
        first, again = self.drawn(5), self.drawn(5)
        if not first.equal(again) or first.equal(self.drawn(6)):
            return "the targets are not drawn from `gen`"
        if not first.equal(self.drawn(5, self.x.flip(0))):
            return "the targets follow the images: with other images of the same labels they change"
        return None

    def drawn(self, seed: int, x: Tensor | None = None) -> Tensor:
        """The targets of the first images, with a generator of this seed."""
        x, y = (self.x if x is None else x)[:99].clone(), self.y[:99].clone()
        return self.build(self.f, x, y, self.threat, classes=CLASSES, steps=1, step_size=ALPHA,
                          gen=generator(seed))[1]  # fmt: skip

    def inside(self) -> str | None:
        z = self.ask()[0]
        if not ((z >= -1e-5) & (z <= 1 + 1e-5)).all():
            return f"pixels from {float(z.min()):.2f} to {float(z.max()):.2f}: the box is [0, 1]"
        if not self.threat.contains(z, self.x).all():
            return (f"images moved by up to {float(norms(z - self.x, 2).max()):.2f}, ε = {EPS}: the "
                    "perturbation is not projected")  # fmt: skip
        return None

    def moved(self) -> str | None:
        z, t = self.ask()
        if z.equal(self.x):
            return "the images are untouched: the attack is missing"
        start, now = _loss(self.f, self.x, t), _loss(self.f, z, t)
        attack = _attack(self.f, self.x, self.threat)
        if torch.allclose(z, attack(self.y, 1), atol=1e-4):
            return "that attack leaves y for anywhere: it has to go towards the target"
        if torch.allclose(z, attack(self.y, -1), atol=1e-4):
            return "the images move towards their own label: pass the targets to the attack"
        if (now > start).float().mean() > 0.9:
            return "the images move away from the target: its loss is to fall, the sign is minus"
        best = _loss(self.f, attack(t, -1), t)
        gain = float((start - now).mean() / (start - best).mean())
        if gain < 0.9:
            return f"the target's loss falls by {gain:.0%} of what `pgd` reaches with these steps"
        return None


def _attack(f: nn.Module, x: Tensor, threat: NormBall) -> Callable[[Tensor, int], Tensor]:
    return lambda y, sign: pgd(f, x, y, threat, steps=STEPS, step_size=ALPHA,
                               loss=lambda logits, y: sign * cross_entropy(logits, y))  # fmt: skip


def check_relabel(relabel: Callable[..., tuple[Tensor, Tensor]]) -> Report:
    """Try `relabel(f, x, y, threat, *, classes, steps, step_size, gen)`: D_rand of f and (x, y).

    Returns x_adv (N, C, H, W) and the targets (N,), int64: uniform over the classes other than y,
    drawn from `gen`; x_adv inside the threat, moved towards the target as far as `pgd` gets.
    Ilyas et al., arXiv:1905.02175, §3.2.
    """
    built = _Built(relabel)

    def untouched() -> str | None:
        built.ask()
        return _touched(built.f, built.before)

    return examine(relabel, [
        ("the labels are targets, never the original label", built.targets),
        ("all others are equally likely, drawn from `gen`", built.spread),
        ("the images stay in the ball and in [0, 1]", built.inside),
        ("they move towards the target", built.moved),
        ("the network is left as it was", untouched),
    ])  # fmt: skip


# --- inversion --------------------------------------------------------------------------------


class _Inverted:
    """The reader's inversion of some images through one small network with random weights."""

    def __init__(self, invert: Callable[..., Tensor], f: nn.Module) -> None:
        self.invert, self.result, self.f = invert, None, f.train()
        gen = generator(73)
        self.x, self.start = (torch.rand(12, 1, 8, 8, generator=gen) for _ in range(2))
        self.before = _state(self.f)

    def ask(self) -> Tensor:
        if self.result is None:
            z = ask(self.invert, self.f, self.x, self.start, steps=400, step_size=0.03)
            if not isinstance(z, Tensor) or z.shape != self.start.shape:
                raise Unusable("the result must have the shape of start")
            self.result = z.detach()
        return self.result

    def distance(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return norms(features(self.f)(z) - features(self.f)(self.x), 2)

    def boxed(self) -> str | None:
        z = self.ask()
        if ((z >= 0) & (z <= 1)).all():
            return None
        return f"pixels from {float(z.min()):.2f} to {float(z.max()):.2f}: the box is [0, 1]"

    def close(self) -> str | None:
        z = self.ask()
        if torch.allclose(z, self.x, atol=1e-6):
            return "returns x itself: the image is to be found from the start, by its features"
        if torch.allclose(z, self.start, atol=1e-6):
            return "returns the start: nothing moved"
        ratio = self.distance(z) / self.distance(self.start)
        if ratio.mean() < 0.25:
            return None
        if ratio.mean() > 1:
            return "the features move away from those of x: minus the distance is maximised"
        with torch.no_grad():
            logits = norms(self.f(z) - self.f(self.x), 2) / norms(
                self.f(self.start) - self.f(self.x), 2
            )
        if logits.mean() < 0.25:
            return ("the logits agree, the features do not: take `models.features`, the network "
                    "without its last layer")  # fmt: skip
        return f"the mean distance is {float(ratio.mean()):.0%} of the start's, 25 % are allowed"


def check_invert(invert: Callable[..., Tensor]) -> Report:
    """Try `invert(model, x, start, *, steps, step_size)`: images with the features of x.

    Returns z like `start`, in [0, 1], whose features are on average at most 25 % as far (ℓ2) from
    those of x as the start's. Ilyas et al., arXiv:1905.02175, §3.1.
    """
    runs = [_Inverted(invert, f) for f in (mlp((1, 8, 8), (32,), CLASSES, seed=6),
                                           small_conv((1, 8, 8), 0.5, CLASSES, seed=5))]  # fmt: skip

    def untouched() -> str | None:
        for run in runs:
            run.ask()
        return next(filter(None, (_touched(run.f, run.before) for run in runs)), None)

    return examine(invert, [
        ("the images stay in [0, 1]", lambda: runs[0].boxed() or runs[1].boxed()),
        ("their features are those of x, through a fully connected network", runs[0].close),
        ("the same through a convolutional one", runs[1].close),
        ("the networks are left as they were", untouched),
    ])  # fmt: skip
