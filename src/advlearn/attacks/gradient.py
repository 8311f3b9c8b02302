"""Gradient attacks. One loop; everything else is a choice of loss, step, norm and start."""

from __future__ import annotations

import torch
from torch import Tensor

from advlearn.gradients import Oracle, input_grad
from advlearn.losses import Loss, cross_entropy, margin
from advlearn.models import Classifier
from advlearn.tensors import frozen, norms, per_example
from advlearn.threats import Threat


def pgd(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: Loss = cross_entropy,
    steps: int = 40,
    step_size: float | Tensor,
    momentum: float = 0.0,
    start: Tensor | None = None,
    grad: Oracle = input_grad,
) -> Tensor:
    r"""Projected gradient ascent on the loss over the threat's set.

    $$z^{t+1} = \Pi_{S(x)}\bigl(z^t + \alpha\,\mathrm{ascend}(\nabla_z L(f(z^t), y))\bigr)$$

    Madry et al., arXiv:1706.06083. With `momentum` μ the direction is taken from
    $g^{t+1} = \mu g^t + \nabla / \|\nabla\|_1$ (Dong et al., arXiv:1710.06081).

    Args:
        f: classifier, images (N, C, H, W) in [0, 1] -> logits (N, K).
        x, y: images and true labels (N,).
        threat: the set S(x), its projection and its steepest ascent.
        loss: (logits, y) -> (N,), maximised.
        steps: number of gradient steps, each one forward and one backward pass.
        step_size: α in pixel units, measured in the threat's norm; a number or (N,).
        momentum: μ, 0 for plain PGD.
        start: first iterate, (N, C, H, W) in S(x); None starts at x.
        grad: gradient oracle (objective, z) -> gradient.

    Returns:
        The last iterate z, (N, C, H, W), detached. `x` and `f` are left as they were.
    """
    z = threat.center(x) if start is None else start
    step_size, velocity = per_example(step_size, x), 0
    with frozen(f), torch.no_grad():
        for _ in range(steps):
            g = grad(lambda z: loss(f(threat.render(z, x)), y), z)
            if momentum:
                scale = norms(g, 1).clamp(min=torch.finfo(g.dtype).tiny)
                g = velocity = momentum * velocity + g / per_example(scale, g)
            z = threat.project(z + step_size * threat.ascend(g, z, x), x)
    return z


def fgsm(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: Loss = cross_entropy,
    start: Tensor | None = None,
    grad: Oracle = input_grad,
) -> Tensor:
    r"""The fast gradient sign method: one step of size ε from the image itself.

    $$z = \Pi_{[0,1]}\bigl(x + \varepsilon\,\mathrm{sign}\,\nabla_x L(f(x), y)\bigr)$$

    Goodfellow et al., arXiv:1412.6572; with an ℓ2 or ℓ1 threat, the steepest step of that norm.
    `start` is accepted, as of every attack, and ignored. Shapes as in `pgd`.
    """
    return pgd(f, x, y, threat, loss=loss, steps=1, step_size=threat.eps, grad=grad)


def cw_inf(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int = 40,
    step_size: float | Tensor,
    momentum: float = 0.0,
    start: Tensor | None = None,
    grad: Oracle = input_grad,
) -> Tensor:
    """PGD on the margin loss of Carlini & Wagner (arXiv:1608.04644). Arguments as in `pgd`."""
    return pgd(f, x, y, threat, loss=margin, steps=steps, step_size=step_size,
               momentum=momentum, start=start, grad=grad)
