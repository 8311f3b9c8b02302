"""Auto-PGD: projected gradient ascent that chooses its own step size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advlearn.gradients import Oracle, grad_and_output, input_grad
from advlearn.losses import Loss, cross_entropy
from advlearn.models import Classifier
from advlearn.tensors import frozen, per_example
from advlearn.threats import Threat


def apgd(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: Loss = cross_entropy,
    steps: int = 100,
    rho: float = 0.75,
    momentum: float = 0.75,
    start: Tensor | None = None,
    grad: Oracle = input_grad,
) -> Tensor:
    r"""PGD with momentum, restarts from the best point and a step size that is halved on demand.

    $$\tilde z = \Pi(z^k + \eta\,\mathrm{ascend}(\nabla)), \qquad
    z^{k+1} = \Pi\bigl(z^k + \alpha(\tilde z - z^k) + (1 - \alpha)(z^k - z^{k-1})\bigr)$$

    The step size η starts at 2ε. At the checkpoints $w_j$ it is halved, and the search goes back to
    the best point so far, for every example of which

    1. the loss rose in fewer than ρ of the steps since the last checkpoint, or
    2. the best loss has not risen since the last checkpoint, and η was not halved there.

    Croce & Hein, arXiv:2003.01690, Algorithm 1. Per step one forward and one backward pass.

    Args:
        f: classifier, images (N, C, H, W) in [0, 1] -> logits (N, K).
        x, y: images and true labels (N,).
        threat: an `Linf` or `L2` ball.
        loss: (logits, y) -> (N,), maximised.
        steps: number of gradient steps; the checkpoints are `checkpoints(steps)`.
        rho: ρ of condition 1.
        momentum: α, the weight of the new step against the last one.
        start: first iterate, (N, C, H, W) in S(x); None starts at x.
        grad: gradient oracle (objective, z) -> gradient.

    Returns:
        The iterate of the largest loss among those with a wrong prediction, or among all where no
        prediction was wrong: (N, C, H, W), detached. `x` and `f` are left as they were.

    Raises:
        ValueError: another threat. For ℓ1 a step of fixed sparsity stalls, and the method is another
            one (arXiv:2103.01208).
    """
    if getattr(threat, "p", None) not in (2, math.inf):
        raise ValueError(f"apgd: threat={threat}, allowed are Linf and L2")


    def look(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, loss and error at z."""
        g, logits = grad_and_output(lambda z: f(threat.render(z, x)), lambda o: loss(o, y), z, grad)
        return g, loss(logits, y), logits.argmax(1) != y

    z = before = threat.center(x) if start is None else start
    eta, alpha, marks, last = 2 * threat._radius(x), 1.0, checkpoints(steps), 0
    with frozen(f), torch.no_grad():
        g, value, wrong = look(z)
        best = (z, g, value)
        found = (z, torch.where(wrong, value, -math.inf))
        rises, halved, reached = torch.zeros_like(value), torch.zeros_like(wrong), value
        for k in range(1, steps + 1):
            step = threat.project(z + per_example(eta, z) * threat.ascend(g, z, x), x)
            moved = z + alpha * (step - z) + (1 - alpha) * (z - before)
            before, z, alpha = z, threat.project(moved, x), momentum
            risen, (g, value, wrong) = value, look(z)
            rises += value > risen
            best = _choose(value > best[-1], (z, g, value), best)
            found = _choose(wrong & (value > found[-1]), (z, value), found)
            if k in marks:
                stuck = ~halved & (best[-1] <= reached)
                halved = (rises < rho * (k - last)) | stuck
                eta = torch.where(halved, eta / 2, eta)
                z, g, value = _choose(halved, best, (z, g, value))
                rises, reached, last = torch.zeros_like(rises), best[-1], k
    return _choose(found[-1] > -math.inf, found[:1], best[:1])[0]


def checkpoints(steps: int) -> list[int]:
    r"""The steps after which the step size is judged: $w_j = \lceil p_j \cdot \text{steps} \rceil$.

    $p_1 = 0.22$, and the gaps shrink by 0.03 down to 0.06: 22, 41, 57, 70, 80, 87, 93, 99 of 100.
    """
    percent, gap, marks = 0, 22, []
    while percent + gap <= 100:
        percent, gap = percent + gap, max(gap - 3, 6)
        marks.append(-(-percent * steps // 100))  # In integers: 0.22 + 0.19 is more than 0.41.
    return sorted(set(marks))


def _choose(mask: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensor by tensor: the new one in the rows of the mask (N,), the old one elsewhere."""
    return tuple(torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)
                 for a, b in zip(new, old, strict=True))  # fmt: skip
