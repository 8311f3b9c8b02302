"""Checkers for the exercises of chapter 4 on agreement that misleads, and on a control for angles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from advlearn.attacks import Attack, pgd, toward
from advlearn.evaluation import predict
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import generator
from advlearn.threats import Linf

# --- a thousand runs that agree, and are wrong ------------------------------------------------

SHAPE, CLASSES, RUNS, SET = (1, 4, 4), 3, 1_000, Linf(0.3)
_WALK = partial(pgd, steps=40, step_size=SET.eps / 10)


class Decoy(nn.Module):
    """The reader's function as a network: images (N, 1, 4, 4) -> logits (N, 3)."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        out = self.logits(z)
        if not isinstance(out, Tensor) or out.shape != (len(z), CLASSES):
            raise Unusable(f"returns {getattr(out, 'shape', type(out).__name__)}, wanted three "
                           "logits per image, (N, 3)")  # fmt: skip
        if not out.isfinite().all():
            raise Unusable("some logits are not finite")
        return out


@dataclass(frozen=True)
class _Case:
    """A grey image of class 0 and a thousand starts around it."""

    f: Decoy
    x: Tensor
    y: Tensor
    start: Tensor

    def run(self, attack: Attack) -> Tensor:
        """Where the runs end: (N, 1, 4, 4)."""
        return attack(self.f, self.x, self.y, SET, start=self.start)

    def fooled(self, z: Tensor) -> float:
        """Share of images that f gets wrong."""
        return float((predict(self.f, z).argmax(1) != 0).double().mean())

    def loss(self, z: Tensor) -> Tensor:
        return cross_entropy(predict(self.f, z), self.y).double()

    def function(self) -> str | None:
        z = self.start[:64]
        with torch.no_grad():
            whole, again = self.f(z), self.f(z.clone())
            single = torch.cat([self.f(v[None]) for v in z])
        watched = self.f(z.clone().requires_grad_()).detach()
        if not (torch.equal(whole, again) and torch.allclose(whole, watched)):
            return "the logits of an image are not always the same: they depend on the image alone"
        alone = torch.allclose(whole, single, atol=1e-4)
        return None if alone else "an image's logits depend on the others in the batch"

    def slope(self) -> str | None:
        z, h = self.start[:64].double(), 1e-5
        d = torch.randn(z.shape, generator=generator(8), dtype=z.dtype)
        for k in range(CLASSES):
            told = (input_grad(lambda z, k=k: self.f(z)[:, k], z) * d).flatten(1).sum(1)
            with torch.no_grad():
                change = (self.f(z + h * d)[:, k] - self.f(z - h * d)[:, k]) / (2 * h)
            if ((change - told).abs() > 1e-2 * (1 + change.abs())).double().mean() > 0.05:
                return f"autograd's slope of logit {k} is not its slope: no detach, no rounding"
        return None

    def agrees(self) -> str | None:
        if self.fooled(self.x[:1]):
            return "the grey image itself is classified wrong: class 0 must lead there"
        g = input_grad(lambda z: cross_entropy(self.f(z), self.y), self.start)
        flat = float((g.flatten(1).abs().amax(1) == 0).double().mean())
        if flat:
            return (f"the gradient is 0 at {100 * flat:.0f} % of the starts: runs that cannot move "
                    "agree about nothing")  # fmt: skip
        z = self.run(_WALK)
        if share := self.fooled(z):
            return (f"{round(RUNS * share)} of {RUNS:,} runs fool it: the hill that draws them "
                    "must end below the fence")  # fmt: skip
        before, after = self.loss(self.start), self.loss(z)
        if not (after > before).all():
            return f"{int((after <= before).sum())} runs do not end higher than they start"
        spread = float(after.std() / after.mean())
        return None if spread < 1e-3 else (
            f"the losses spread by {100 * spread:.1f} % of their mean: more than one hill, or 40 "
            "steps of ε/10 do not reach its top")  # fmt: skip

    def reached(self) -> str | None:
        shares = [self.fooled(self.run(toward(k, _WALK))) for k in range(1, CLASSES)]
        return None if max(shares) >= 0.99 else (
            f"sent to the likeliest wrong class {100 * shares[0]:.0f} % of the runs fool it, to "
            f"the other one {100 * shares[1]:.0f} %: from the usual starts that class must have a "
            "slope that leads over the fence")  # fmt: skip


def check_decoy(logits: Callable[[Tensor], Tensor]) -> Report:
    """Try `logits(z)`, images (N, 1, 4, 4) -> (N, 3), on which a thousand runs agree and are wrong.

    Around the grey image, class 0, with ℓ∞ and ε = 0.3: untargeted PGD (40 steps of ε/10) must end
    at the same loss from 1,000 random starts and fool nothing, without zero gradients; the same
    PGD sent to one of the other classes must fool it from the same starts.
    """
    x = torch.full((RUNS, *SHAPE), 0.5)
    case = _Case(Decoy(logits), x, torch.zeros(RUNS).long(), SET.sample(x, generator(6)))
    return examine(logits, [
        ("is a function of the image", case.function),
        ("has the slopes that it shows", case.slope),
        ("a thousand runs agree that class 0 is safe", case.agrees),
        ("runs that are sent to a class show that it is not", case.reached),
    ])  # fmt: skip


# --- the angle of two random starts -----------------------------------------------------------


def _moments(x: Tensor, eps: float, kind: str = "clipped") -> tuple[Tensor, Tensor]:
    """Mean and mean square of a pixel's random change, by summing over a fine grid: like x.

    `kind` names a mistake: "free" forgets the box, "low" its upper end, "cut" draws from the
    clipped interval.
    """
    u = torch.linspace(-1, 1, 4_002, dtype=torch.float64)[:-1] + 1 / 4_001
    low, high = -x[..., None], 1 - x[..., None]
    if kind == "cut":
        low, high = low.clamp(min=-eps), high.clamp(max=eps)
        d = (low + high) / 2 + (high - low) / 2 * u
    else:
        d = eps * u if kind == "free" else torch.maximum(eps * u, low)
        d = torch.minimum(d, high) if kind == "clipped" else d
    d = d.expand(*x.shape, -1)
    return d.mean(-1), d.square().mean(-1)


def start_angle(x: Tensor, eps: float, kind: str = "clipped") -> Tensor:
    """The angle between two random starts, seen from the image, for many pixels: (N, d) -> (N,)."""
    first, second = _moments(x, eps, kind)
    return torch.rad2deg(torch.arccos((first.square().sum(1) / second.sum(1)).clamp(-1, 1)))


def _wrong_angles(x: Tensor, eps: float) -> dict[str, Tensor]:
    """What a mistake would return, by its message."""
    first, second = _moments(x, eps)
    product, square = first.square().sum(1), second.sum(1)
    variance = (second - first.square()).sum(1)

    def angle(cosine: Tensor) -> Tensor:
        return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))

    return {
        "90° for every image: the box gives the starts a common part": torch.full_like(square, 90),
        "the upper end of the box is missing: a white pixel can only fall":
            start_angle(x, eps, "low"),
        "that is for starts drawn from the clipped interval: the book's are drawn from [−ε, ε] and "
        "then clipped": start_angle(x, eps, "cut"),
        "the variance stands in place of the mean square": angle(product / variance),
        "in radians: wanted are degrees": torch.deg2rad(angle(product / square)),
        "that is the cosine": product / square,
        "the mean of the pixels' own ratios: sum over the pixels first":
            angle((first.square() / second).mean(1)),
        "that is the angle between a start and the mean start": angle((product / square).sqrt()),
        "one angle for the whole batch": angle(product.sum() / square.sum()).expand(len(x)),
        "seen from the mean start: wanted is the view from the image": angle(0 * square),
    }  # fmt: skip


def check_start_angle(angle: Callable[[Tensor, float], Tensor]) -> Report:
    r"""Try `angle(x, eps) -> degrees`, images (N, d) -> (N,), for random starts of the ℓ∞ ball.

    $$\cos = \frac{\sum_i (E\delta_i)^2}{\sum_i E\delta_i^2}, \qquad
      \delta_i = \mathrm{clip}(x_i + u_i, 0, 1) - x_i, \quad u_i \sim U[-\varepsilon, \varepsilon]$$

    The limit of many pixels. Held against sums over a fine grid of u.
    """
    gen = generator(7)
    noise = torch.rand(6, 40, generator=gen, dtype=torch.float64)
    grey = 0.4 + 0.2 * noise
    edge = torch.cat([0.05 * noise[:3], 1 - 0.05 * noise[3:]])
    ink = torch.where(noise < 0.7, 0, 2 * noise - 1)
    ink[0], ink[1] = 0, 1

    def run(x: Tensor, eps: float) -> Tensor:
        told = angle(x.clone(), eps)
        if not isinstance(told, Tensor) or told.shape != x.shape[:1]:
            raise Unusable(f"returns {getattr(told, 'shape', type(told).__name__)}, wanted one "
                           "angle per image, (N,)")  # fmt: skip
        return told.double()

    def explains(x: Tensor, *radii: float) -> str | None:
        for eps in radii:
            told, truth = run(x, eps), start_angle(x, eps)
            if torch.allclose(told, truth, atol=0.01):
                continue
            for message, wrong in _wrong_angles(x, eps).items():
                if torch.allclose(told, wrong, atol=0.01):
                    return message
            i = int((told - truth).abs().nan_to_num(torch.inf).argmax())
            return f"ε = {eps:g}, image {i}: {told[i]:.2f}°, it is {truth[i]:.2f}°"
        return None

    def untouched() -> str | None:
        x = ink.clone()
        angle(x, 0.3)
        return None if torch.equal(x, ink) else "the images were edited in place"

    return examine(angle, [
        ("leaves the images as they are", untouched),
        ("pixels that the box does not touch", lambda: explains(grey, 0.1, 0.4)),
        ("pixels near black, and near white", lambda: explains(edge, 0.1, 0.3)),
        ("black, white and grey pixels", lambda: explains(ink, 0.1, 0.3, 0.5)),
        ("a set so large that both ends of the box cut", lambda: explains(ink, 0.8)),
    ])  # fmt: skip
