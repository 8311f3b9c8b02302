"""Gradient oracles: (objective, z) -> dz, where objective(z) is one value per example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
Oracle = Callable[[Objective, Tensor], Tensor]


def input_grad(objective: Objective, z: Tensor) -> Tensor:
    """The gradient of each example's objective with respect to its own input.

    The examples do not interact, so one backward pass of the sum gives all gradients.

    Args:
        objective: z (N, ...) -> (N,).
        z: where to differentiate, (N, ...); not changed.

    Returns:
        The gradients, the shape of `z`, detached.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(objective(z).sum(), z)[0]


def grad_and_output(
    forward: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    z: Tensor,
    grad: Oracle = input_grad,
) -> tuple[Tensor, Tensor]:
    """The gradient of loss(forward(z)), and forward(z), detached.

    An oracle that asks once, at z itself, gives both in one pass; after any other, `forward` is
    called once more.
    """
    seen = []

    def objective(z: Tensor) -> Tensor:
        seen.append(forward(z))
        return loss(seen[-1])

    g = grad(objective, z)
    return g, seen[0].detach() if len(seen) == 1 else forward(z)
