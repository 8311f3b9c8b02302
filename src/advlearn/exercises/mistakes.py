"""What the usual mistakes of an attack return, so that a checker can tell which one was made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.models import Classifier
from advlearn.tensors import norms
from advlearn.threats import L1, Threat


def gradient(f: Classifier, x: Tensor, y: Tensor, targeted: bool) -> Tensor:
    """Of what the attacker maximises, with respect to x: the loss of y, or minus it."""
    return (-1 if targeted else 1) * input_grad(lambda z: cross_entropy(f(z), y), x)


def step(f: Classifier, x: Tensor, y: Tensor, threat: Threat, targeted: bool) -> Tensor:
    """One right step of size ε from x."""
    return threat.project(x + threat.eps * threat.ascend(gradient(f, x, y, targeted), x, x), x)


def likely_mistakes(
    f: Classifier, x: Tensor, y: Tensor, threat: Threat, targeted: bool
) -> dict[str, Tensor]:
    """What the usual mistakes return on the linear network: message -> images."""
    eps, sign = threat.eps, -1 if targeted else 1
    g, best = gradient(f, x, y, targeted), step(f, x, y, threat, targeted)

    def along(direction: Tensor) -> Tensor:
        return threat.project(x + eps * threat.ascend(direction.expand_as(x), x, x), x)

    def slope(objective: Callable[[Tensor], Tensor]) -> Tensor:
        return along(sign * input_grad(lambda z: objective(f(z)), x))

    def labelled(labels: Tensor) -> Tensor:
        return step(f, x, labels, threat, targeted)

    rows = torch.arange(len(y))
    toward = "away from the target: the target's loss goes down, the sign is minus"
    return {
        "returns x unchanged: the step is missing": x,
        toward if targeted else "wrong sign: the loss goes down, the step is + ε": 2 * x - best,
        "the step is 255 times too small: ε is in units of [0, 1] already": x + (best - x) / 255,
        "the plain gradient times ε: its sign or its norm is missing": x + eps * g,
        "g / ‖g‖₂ is the ℓ2 step: for this norm it is another one": x + eps * g / size(g, 2),
        "g / ‖g‖₂ over the whole batch: one norm per image": x + eps * g / g.norm(),
        "g / max|g| moves one pixel by ε: for ℓ∞ take the sign of every one":
            x + eps * g / size(g, float("inf")),
        "one pixel moves: that is the ℓ1 step": L1(eps).project(x + eps * L1(eps).ascend(g, x, x), x),
        "pixels only become brighter: clamp x + δ to [0, 1], not δ": x + (best - x).clamp(min=0),
        "pixels stay between the batch's own min and max: the box is [0, 1]":
            best.clamp(x.min(), x.max()),
        "all images get the same δ: one gradient per image, no mean over the batch":
            along(g.mean(0, keepdim=True)),
        "the label is the network's own prediction: on mistakes this is not y":
            labelled(f(x).argmax(1)),
        "the loss of another label than y": labelled((y + 1) % 3),
        "the label is always 0: pass y to the loss": labelled(torch.zeros_like(y)),
        "up the logit of y: it is the loss that is to grow": slope(lambda o: o[rows, y]),
        "down the logit of y: the other classes' logits count too": slope(lambda o: -o[rows, y]),
        "the gradient of all logits, y plays no part": slope(lambda o: o.sum(1)),
    }  # fmt: skip


def size(g: Tensor, p: float) -> Tensor:
    """The p-norm of every example, shaped to divide g."""
    return norms(g, p).view(-1, 1, 1, 1)
