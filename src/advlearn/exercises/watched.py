"""A network that counts what an attack asks of it, and remembers where."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Watched(nn.Module):
    """`f` with counters. The network inside is reached by `frozen`, as in every wrapper.

    Args:
        f: the network.
        keep: remember the points of all gradients.

    Attributes:
        calls: forward passes, of whatever batch.
        images: images in all forward passes.
        gradients: images in all backward passes; each is one gradient of one image.
        points: where the gradients were taken, one tensor (N, C, H, W) per backward pass.
    """

    def __init__(self, f: nn.Module, keep: bool = False) -> None:
        super().__init__()
        self.f, self.keep = f, keep
        self.calls = self.images = self.gradients = 0
        self.points: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.images = self.calls + 1, self.images + len(x)
        logits = self.f(x)
        if logits.requires_grad:
            logits.register_hook(self._counter(x))
        return logits

    def _counter(self, x: Tensor) -> Callable[[Tensor], None]:
        at = x.detach().clone() if self.keep else x[:0]
        n = len(x)

        def count(gradient: Tensor) -> None:
            self.gradients += n
            if self.keep:
                self.points.append(at)

        return count


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; different shapes are different."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
