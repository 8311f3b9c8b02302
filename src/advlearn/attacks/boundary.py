"""FAB: walk along the decision boundary, towards the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advlearn.gradients import Oracle, grad_and_output, input_grad
from advlearn.losses import Loss, margin
from advlearn.models import Classifier
from advlearn.tensors import frozen, norms, per_example
from advlearn.threats import Threat


def fab(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    loss: Loss = margin,
    steps: int = 100,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    start: Tensor | None = None,
    grad: Oracle = input_grad,
) -> Tensor:
    r"""The fast adaptive boundary attack: the smallest perturbation that fools, whatever ε is.

    At $z^k$ the boundary is taken for the plane $L(z^k) + \langle\nabla L, z - z^k\rangle = 0$. With
    the shortest steps $d_k$ from $z^k$ and $d_x$ from $x$ to that plane, inside the pixel box,

    $$z^{k+1} = (1 - a)(z^k + \eta d_k) + a (x + \eta d_x), \qquad
    a = \min\Bigl(\frac{\|d_k\|}{\|d_k\| + \|d_x\|}, a_{max}\Bigr)$$

    and a point that fools is pulled towards the image: $z \leftarrow (1 - \beta) x + \beta z$.
    Croce & Hein, arXiv:1907.02044; with `toward(k, fab, between=...)` its targeted form.

    Args:
        f: classifier, images (N, C, H, W) in [0, 1] -> logits (N, K).
        x, y: images and true labels (N,).
        threat: an `Linf` or `L2` ball: its norm is made small, and at the end its radius counts.
        loss: (logits, y) -> (N,), 0 on the boundary and positive beyond, in units of the logits.
            (The paper takes the nearest of the K − 1 planes; the margin's is that of the most
            likely wrong class, with one backward pass in place of K.)
        steps: each two forward passes and one backward pass.
        alpha_max, eta, beta: $a_{max}$, η and β.
        start: first iterate, (N, C, H, W); None starts at x, as the paper does without restarts.
        grad: gradient oracle (objective, z) -> gradient.

    Returns:
        The nearest point found with a wrong prediction, projected on the threat's set: where it was
        within ε, it is that point. `x` where none was found. (N, C, H, W), detached.

    Raises:
        ValueError: another threat.
    """
    if getattr(threat, "p", None) not in (2, math.inf):
        raise ValueError(f"fab: threat={threat}, allowed are Linf and L2")
    z, nearest = threat.center(x) if start is None else start, threat.center(x)
    length = torch.full_like(x[:, 0, 0, 0], math.inf)

    def forward(z: Tensor) -> Tensor:
        return f(threat.render(z, x))

    with frozen(f), torch.no_grad():
        for _ in range(steps):
            g, logits = grad_and_output(forward, lambda logits: loss(logits, y), z, grad)
            missing = -loss(logits, y)
            from_z = _to_plane(z, g, missing, threat.p)
            from_x = _to_plane(x, g, missing + (g * (z - x)).flatten(1).sum(1), threat.p)
            near, far = norms(from_z, threat.p), norms(from_x, threat.p)
            a = per_example((near / (near + far).clamp(min=1e-12)).clamp(max=alpha_max), x)
            z = ((1 - a) * (z + eta * from_z) + a * (x + eta * from_x)).clamp(0, 1)
            distance, wrong = norms(z - x, threat.p), forward(z).argmax(1) != y
            closer = wrong & (distance < length)
            length = torch.where(closer, distance, length)
            nearest = torch.where(_rows(closer, x), z, nearest)
            z = torch.where(_rows(wrong, x), x + beta * (z - x), z)
    return threat.project(nearest, x)


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.ndim - 1))


def _to_plane(z: Tensor, w: Tensor, c: Tensor, p: float) -> Tensor:
    r"""The shortest d with ⟨w, d⟩ = c and z + d in the box; where none is that long, the longest.

    Each coordinate moves by $d_i = \pm\min(s a_i, \text{room}_i)$, with $a_i = 1$ for ℓ∞ and
    $a_i = |w_i|$ for ℓ2. ⟨w, d⟩ is concave in s, so Newton's method from s = 0 rises to the
    solution, and reaches it in as many steps as it meets walls.
    """
    w, low, high = w.flatten(1) * c.sign()[:, None], -z.flatten(1), 1 - z.flatten(1)
    size, room = w.abs(), torch.where(w > 0, high, -low)
    a = size if p == 2 else torch.ones_like(size)
    s, done, limits = torch.zeros_like(c), c == 0, torch.finfo(w.dtype)
    for _ in range(30):
        d = torch.minimum(s[:, None] * a, room)
        slope = (size * a).masked_fill_(d == room, 0).sum(1)
        step = (c.abs() - (size * d).sum(1)) / slope.clamp(min=limits.tiny)
        done = done | (step <= 4 * limits.eps * s) | (slope == 0)
        if not w.is_cuda and bool(done.all()):
            break
        s = torch.where(done, s, s + step)
    return (w.sign() * d).view_as(z)
