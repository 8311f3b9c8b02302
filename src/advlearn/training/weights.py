"""Copies of weights: averaged, the best so far, lent to the network for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, detached from those of the network."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@contextmanager
def lent(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside: the network with `weights` (its own if there are none). After: as before."""
    own = copied(model) if weights else {}
    try:
        if weights:
            model.load_state_dict(weights)
        yield
    finally:
        if weights:
            model.load_state_dict(own)


@torch.no_grad()
def average_in(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    r"""One step of the exponential moving average of the weights, in place.

    $$\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \qquad
      d = \min(\text{decay},\ 1 - 1 / (\text{step} + 1))$$

    So it begins as the mean of all weights so far, without a trace of the random ones (Tarvainen &
    Valpola, arXiv:1703.01780). `step` counts from 0. Counters in buffers are copied.
    """
    keep = min(decay, 1 - 1 / (step + 1))
    for name, value in model.state_dict().items():
        if name in average and value.is_floating_point():
            average[name].lerp_(value, 1 - keep)
        else:
            average[name] = value.clone()
