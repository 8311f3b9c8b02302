"""Losses an attack maximises: (logits (N, K), labels (N,)) -> (N,), larger = better for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _true_and_others(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z_y, (N,), and all logits with z_y masked by −inf (they may all be negative), (N, K)."""
    return logits.gather(1, y[:, None])[:, 0], logits.scatter(1, y[:, None], -torch.inf)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    r"""The training loss, in a form whose gradient survives rounding. (N, K), (N,) -> (N,).

    $$-\log p_y = \log\bigl(1 + \textstyle\sum_{k \ne y} e^{z_k - z_y}\bigr)$$

    `F.cross_entropy` computes p_y − 1, which in float32 is exactly 0 once the margin is above
    ln 2²⁴ = 16.6 logits, while the gradient's other entries are not: attacks then take wrong
    signs. Chapter 1 measures it. This form lasts until e^−margin underflows, near 100.
    """
    true, others = _true_and_others(logits, y)
    return F.softplus(others.logsumexp(1) - true, threshold=40)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max over i ≠ y of z_i, minus z_y: positive exactly when the prediction is wrong.

    Carlini & Wagner 2017, arXiv:1608.04644. (N, K), (N,) -> (N,).
    """
    true, others = _true_and_others(logits, y)
    return others.amax(1) - true


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    r"""How far the prediction is from a reference: $\mathrm{KL}(p\,\|\,q) = \sum_k p_k \log(p_k / q_k)$.

    q is the softmax of `logits`, p that of `reference`; gradients flow into both. Inner loss of
    TRADES (arXiv:1901.08573), with the logits of the unperturbed image where other losses take
    labels. (N, K), (N, K) -> (N,).
    """
    p, q = reference.log_softmax(1), logits.log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def cw(kappa: float) -> Loss:
    """The margin loss that stops at confidence κ: −max(κ − margin, 0).

    The form of Madry et al. (κ = 50 is their CW+). Returns a loss (N, K), (N,) -> (N,).
    """

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return -F.relu(kappa - margin(logits, y))

    return loss


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: margin / (z_(1) − z_(3)), unchanged by scaling the logits.

    Croce & Hein 2020, arXiv:2003.01690. (N, K), (N,) -> (N,); needs K ≥ 3 classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"dlr: {logits.shape[1]} classes, it needs at least 3 (the ratio divides "
                         "by the gap between the largest and the third largest logit)")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def gap(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t − z_y: 0 where target and true class tie. (N, K), (N,), (N,) -> (N,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""`dlr` for one wrong class: $(z_t - z_y) / (z_{(1)} - (z_{(3)} + z_{(4)}) / 2)$.

    Croce & Hein 2020, arXiv:2003.01690. (N, K), (N,), (N,) -> (N,); needs K ≥ 4 classes.
    """
    if logits.shape[1] < 4:
        raise ValueError(f"dlr_targeted: {logits.shape[1]} classes, it needs at least 4 (the ratio "
                         "divides by the gap between the largest and the third and fourth largest)")
    top = logits.topk(4, dim=1).values
    return gap(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    r"""How near a representation is to another, for an attacker who wants it near; at most 0.

    $$-\|R(z) - R(x)\|_2 \,/\, \|R(x)\|_2$$

    R(x) is `target`, with the representation of an image where other losses take labels. Engstrom
    et al., arXiv:1906.00945; the loss by which Ilyas et al., arXiv:1905.02175, make their robust
    and non-robust training sets. (N, F), (N, F) -> (N,).

    Raises:
        ValueError: two shapes, or other than (N, F).
    """
    if features.shape != target.shape or features.ndim != 2:
        raise ValueError(f"feature_distance: features {tuple(features.shape)}, target "
                         f"{tuple(target.shape)}, both must be (N, F)")
    tiny = torch.finfo(target.dtype).tiny ** 0.5  # A representation of zeros has no length.
    length = torch.linalg.vector_norm(target, dim=1).clamp(min=tiny)
    return -torch.linalg.vector_norm(features - target, dim=1) / length


def activation(features: Tensor, unit: Tensor) -> Tensor:
    """One unit of the representation, to be made large. (N, F), (N,) -> (N,).

    Units stand where other losses take labels. Engstrom et al., arXiv:1906.00945.
    """
    return features.gather(1, unit[:, None])[:, 0]
