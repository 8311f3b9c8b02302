"""Combinators: new attacks from old ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from advlearn.losses import Loss, TargetedLoss, cross_entropy
from advlearn.models import Classifier
from advlearn.tensors import frozen
from advlearn.threats import Threat


class Attack(Protocol):
    """attack(f, x, y, threat, *, start) -> z; everything else is bound with functools.partial."""

    def __call__(
        self, f: Classifier, x: Tensor, y: Tensor, threat: Threat, *, start: Tensor | None
    ) -> Tensor: ...


def _named(attack: Attack, name: str) -> Attack:
    attack.__name__ = attack.__qualname__ = name
    return attack


def name_of(attack: Attack) -> str:
    """A readable name: the function's own, also inside functools.partial."""
    while hasattr(attack, "func"):
        attack = attack.func
    return getattr(attack, "__name__", type(attack).__name__)


def on(source: Classifier, attack: Attack) -> Attack:
    """Attack `source` in place of the judge's network: transfer, surrogates, `models.fast`."""

    def transferred(f, x, y, threat, *, start=None, **options):
        return attack(source, x, y, threat, start=start, **options)

    return _named(transferred, f"{name_of(attack)} on source")


def toward(
    k: int, attack: Attack, loss: Loss = cross_entropy, *, between: TargetedLoss | None = None
) -> Attack:
    """Aim at the k-th most likely wrong class: minimise `loss` for that class instead.

    Args:
        k: 1 for the most likely wrong class of the unperturbed image, up to K − 1.
        attack: one that accepts `loss`, such as `pgd`; a loss bound earlier is replaced. It gets
            the true labels, and calls the loss with the logits of the whole batch.
        loss: (logits, target) -> (N,); the attack maximises its negative.
        between: (logits, y, target) -> (N,), maximised in its place: `dlr_targeted`, a loss that
            knows the true class as well.

    Raises:
        ValueError: `k` is not in 1 … K − 1.
    """

    def targeted(f, x, y, threat, *, start=None, **options):
        with frozen(f), torch.no_grad():
            logits = f(threat.render(threat.center(x), x))
        if not 1 <= k < logits.shape[1]:
            raise ValueError(f"toward: k={k}, allowed are 1 to {logits.shape[1] - 1} "
                             f"for {logits.shape[1]} classes")
        others = logits.scatter(1, y[:, None], -torch.inf)
        target = others.topk(k, dim=1).indices[:, k - 1]

        def aim(logits: Tensor, y: Tensor) -> Tensor:
            return between(logits, y, target) if between else -loss(logits, target)

        return attack(f, x, y, threat, start=start, **options, loss=aim)

    return _named(targeted, f"{name_of(attack)} toward {k}")


def from_center(attack: Attack) -> Attack:
    """Start at the image itself and ignore the random start."""

    def centered(f, x, y, threat, *, start=None, **options):
        return attack(f, x, y, threat, start=None, **options)

    return _named(centered, f"{name_of(attack)} from center")
