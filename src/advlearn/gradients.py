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


def averaged(oracle: Oracle, n: int) -> Oracle:
    """The mean of `n` gradients, for networks that are random: expectation over transformation.

    Athalye et al., arXiv:1707.07397: the gradient of the expected loss is the expected gradient.

    Raises:
        ValueError: `n` is not 1 or more.
    """
    if n < 1:
        raise ValueError(f"averaged: n={n}, it must be 1 or more")

    def mean(objective: Objective, z: Tensor) -> Tensor:
        return sum(oracle(objective, z) for _ in range(n)) / n

    return mean


def squared_gradient(losses: Tensor, z: Tensor) -> Tensor:
    """Squared Euclidean length of each example's gradient, itself differentiable.

    Args:
        losses: (N,), computed from `z`; example i's from `z[i]` alone.
        z: (N, ...), requires a gradient.

    Returns:
        (N,), with the graph for another backward pass (double backpropagation).
    """
    (g,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
    return g.flatten(1).square().sum(1)


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
