"""Objectives: what is minimised over the weights, (model, x, y, state) -> (losses (N,), state)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn.attacks.combine import Attack, name_of
from advlearn.attacks.gradient import fgsm, pgd
from advlearn.gradients import squared_gradient
from advlearn.losses import cross_entropy, kl_divergence
from advlearn.tensors import frozen, normal
from advlearn.threats import Threat
from advlearn.training.state import Objective, State, describe


def natural() -> Objective:
    """Empirical risk: the cross-entropy of the images as they are."""

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        return F.cross_entropy(model(x), y, reduction="none"), state

    objective.description = "natural"
    return objective


def adversarial(
    threat: Threat, attack: Attack, *,
    step_size: float | None = None, ramp: float = 0.0, resume: bool = False,
) -> Objective:  # fmt: skip
    r"""Adversarial risk: the cross-entropy of the images that `attack` finds from a random start.

    $$\min_\theta\ \mathbb{E}\,\max_{z \in S(x)} L(f_\theta(z), y)$$

    Madry et al., arXiv:1706.06083.

    Args:
        threat: the set S at full size.
        attack: any attack; it sees the network in eval mode.
        step_size: passed to the attack and ramped with ε; None if the attack takes none.
        ramp: share of the training over which ε and step size grow linearly from 0.
        resume: start every image where its attack of the epoch before ended, in the first epoch
            at the image; one step per epoch then goes a long way. Zheng et al., arXiv:1912.11969.
            Takes as much memory as the data in float32.
    """

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        smaller, options = _ramped(threat, step_size, ramp, state)
        center = smaller.center(x)
        if resume:
            start = smaller.project(center + state.memory.get("moved", 0), x)
        else:
            start = smaller.sample(x, state.keys)
        z = attack(_bare(model), x, y, smaller, start=start, **options)
        if resume:
            state = replace(state, memory={"moved": z - center})
        return F.cross_entropy(model(smaller.render(z, x)), y, reduction="none"), state

    objective.description = (f"adversarial({threat}, {_described(attack)}, {step_size=}, {ramp=}"
                             f"{', resume=True' if resume else ''})")  # fmt: skip
    return objective


def fgsm_training(
    threat: Threat, *, random_start: bool = True, ramp: float = 0.0
) -> Objective:
    r"""Adversarial risk with a single gradient step, the cheapest inner maximum.

    $$z = \Pi_{S(x)}\bigl(z^0 + \alpha\,\mathrm{sign}\,\nabla_z L(f(z^0), y)\bigr)$$

    From a random point $z^0$ of S(x) with α = 1.25 ε: Wong, Rice & Kolter, arXiv:2001.03994.
    Without random start, from $z^0 = x$ with α = ε: Goodfellow et al., arXiv:1412.6572. Both can
    overfit catastrophically, which `watch` sees. `threat` and `ramp` as in `adversarial`.
    """
    if not random_start:
        return adversarial(threat, fgsm, ramp=ramp)
    return adversarial(threat, partial(pgd, steps=1), step_size=1.25 * threat.eps, ramp=ramp)


def free(threat: Threat, *, step_size: float | None = None, ramp: float = 0.0) -> Objective:
    r"""Adversarial training at the cost of natural training; use it with `fit(..., replays=m)`.

    Every batch is used m times, and the one backward pass of a step gives both gradients:

    $$\theta \leftarrow \theta - \tau\,\nabla_\theta L(f_\theta(x + \delta), y), \qquad
      \delta \leftarrow \Pi\bigl(\delta + \alpha\,\mathrm{sign}\,\nabla_\delta
      L(f_\theta(x + \delta), y)\bigr)$$

    Shafahi et al., arXiv:1904.12843. The i-th image of the next batch begins with the δ at which
    the i-th of this one ended. With 1 / m of the epochs it costs what natural training does.
    Published code clips δ to the ball alone; here x + δ is projected to ball and box.

    Args:
        threat: the set S at full size.
        step_size: α in pixel units; default ε, as published.
        ramp: share of the training over which ε and α grow linearly from 0.
    """
    alpha = threat.eps if step_size is None else step_size

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        smaller, options = _ramped(threat, alpha, ramp, state)
        z = smaller.project(x + state.carry.get("delta", torch.zeros_like(x)), x).requires_grad_()
        # This form of the loss, since its gradient is the attack's too.
        losses = cross_entropy(model(smaller.render(z, x)), y)

        def after() -> dict[str, Tensor]:
            with torch.no_grad():
                step = options["step_size"] * smaller.ascend(z.grad, z, x)
                return {"delta": smaller.project(z + step, x) - x}

        return losses, replace(state, after=after)

    objective.description = f"free({threat}, step_size={alpha}, {ramp=})"
    return objective


def trades(
    threat: Threat, attack: Attack, beta: float = 6.0, *,
    step_size: float | None = None, ramp: float = 0.0,
) -> Objective:  # fmt: skip
    r"""Natural risk, and β times how far the prediction can be moved.

    $$\min_\theta\ \mathbb{E}\bigl[L(f(x), y)
      + \beta \max_{z \in S(x)} \mathrm{KL}(f(x)\,\|\,f(z))\bigr]$$

    TRADES, Zhang et al., arXiv:1901.08573: the attack maximises the KL divergence without looking
    at the label, from x + 0.001 · N(0, 1), since at x itself the divergence has no slope.

    Args:
        threat, step_size, ramp: as in `adversarial`.
        attack: one that accepts `loss`, such as `pgd`; a loss bound earlier is replaced.
        beta: β, published 1 (MNIST) and 6 (CIFAR-10).
    """

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        bare, (smaller, options) = _bare(model), _ramped(threat, step_size, ramp, state)
        with frozen(bare), torch.no_grad():
            target = bare(x)
        start = smaller.project(x + 0.001 * normal(x, state.keys), x)
        z = attack(bare, x, target, smaller, start=start, loss=kl_divergence, **options)
        logits = model(x)
        moved = kl_divergence(model(smaller.render(z, x)), logits)
        return F.cross_entropy(logits, y, reduction="none") + beta * moved, state

    objective.description = (f"trades({threat}, {_described(attack)}, {beta=}, "
                             f"{step_size=}, {ramp=})")  # fmt: skip
    return objective


def gradient_regularised(lam: float) -> Objective:
    r"""Natural risk, and λ times the squared length of the loss's gradient in the image.

    $$\min_\theta\ \mathbb{E}\bigl[L(f(x), y) + \lambda \|\nabla_x L(f(x), y)\|_2^2\bigr]$$

    Ross & Doshi-Velez, arXiv:1711.09404. The gradient of a gradient: double backpropagation.
    """

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        x = x.detach().requires_grad_()
        losses = F.cross_entropy(model(x), y, reduction="none")
        return losses + lam * squared_gradient(losses, x), state

    objective.description = f"gradient_regularised({lam=})"
    return objective


def mixture(share: float, a: Objective, b: Objective) -> Objective:
    r"""`share` of objective `a` and the rest of `b`: $\tilde L = s\,L_a + (1 - s)\,L_b$.

    Natural and adversarial loss, half and half: Goodfellow et al., arXiv:1412.6572.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"mixture: share={share}, it must be in [0, 1]")

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        first, state = a(model, x, y, state)
        second, state = b(model, x, y, state)
        return share * first + (1 - share) * second, state

    objective.description = f"mixture({share}, {describe(a)}, {describe(b)})"
    return objective


def _ramped(
    threat: Threat, step_size: float | None, ramp: float, state: State
) -> tuple[Threat, dict[str, float]]:
    """Threat and options of the attack at this point of the training."""
    scale = min(1.0, state.progress / ramp) if ramp else 1.0
    return threat.scaled(scale), {} if step_size is None else {"step_size": scale * step_size}


def _bare(model: nn.Module) -> nn.Module:
    """The network without its wrapper: the inner maximum needs no averaging of gradients."""
    return getattr(model, "module", model)


def _described(attack: Attack) -> str:
    # Names in place of functions, whose addresses would differ in the process that resumes.
    bound = {k: name_of(v) if callable(v) else v for k, v in getattr(attack, "keywords", {}).items()}
    return f"{name_of(attack)} {bound}"
