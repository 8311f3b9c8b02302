"""What networks look at: input gradients and inverted representations, measured.

Tsipras et al., arXiv:1805.12152 (gradients of robust networks); Engstrom et al., arXiv:1906.00945
(representations read backwards).
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from advlearn.attacks import invert
from advlearn.evaluation import predict
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy, feature_distance
from advlearn.models import features
from advlearn.tensors import norms


def gradients(f: nn.Module, x: Tensor, y: Tensor, batch_size: int = 250) -> Tensor:
    """The loss's gradient at each image, divided by its own length: float64, the shape of `x`.

    In double precision: in float32 the gradient of a sure answer rounds off to nothing.
    """
    exact = deepcopy(f).double()
    g = torch.cat([input_grad(lambda z: cross_entropy(exact(z), labels), images)  # noqa: B023
                   for images, labels in zip(x.double().split(batch_size), y.split(batch_size),
                                             strict=True)])  # fmt: skip
    return unit(g)


def unit(d: Tensor) -> Tensor:
    """Every example divided by its ℓ2 length."""
    return d / norms(d, 2).view(-1, *[1] * (d.ndim - 1))


def smoothness(g: Tensor) -> tuple[Tensor, Tensor]:
    """How far neighbouring pixels agree, along rows and along columns.

    Args:
        g: pictures of length 1, (N, C, H, W).

    Returns:
        Each picture's inner product with itself moved by one pixel, (N,) along rows and (N,) along
        columns: 1 for a smooth one, 0 for speckles, −1 for a checkerboard.
    """
    return ((g[..., :-1] * g[..., 1:]).flatten(1).sum(1),
            (g[:, :, :-1] * g[:, :, 1:]).flatten(1).sum(1))  # fmt: skip


def way_out(x: Tensor, y: Tensor, pool: Tensor, labels: Tensor) -> Tensor:
    """The direction from each image to the nearest image of another class in a pool.

    Args:
        x, y: images (N, C, H, W) and their classes.
        pool, labels: images (M, C, H, W) to look in, and their classes.

    Returns:
        Differences of ℓ2 length 1, float64, the shape of `x`.

    Raises:
        ValueError: an image has no other class in the pool.
    """
    apart = torch.cdist(x.flatten(1), pool.flatten(1))
    apart[y[:, None] == labels] = torch.inf
    nearest, found = apart.min(1)
    if nearest.isinf().any():
        raise ValueError(f"way_out: image {int(nearest.isinf().nonzero()[0])} of class "
                         f"{int(y[nearest.isinf()][0])}: the pool has no other class")
    return unit((pool[found] - x).double())


def cosines(g: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine with each image's own direction, and with another's as a control: (N,), signed."""
    return tuple((g.flatten(1) * w.flatten(1)).sum(1) for w in (way, way.roll(1, 0)))


def read_back(
    f: nn.Sequential, target: Tensor, start: Tensor, *, steps: int, step_size: float, rectified: bool
) -> tuple[Tensor, dict[str, float]]:
    """Invert the representation of `target` from `start`, and measure how near the walk came.

    Args:
        The arguments of `attacks.invert`.

    Returns:
        The images, and means over them before and after the walk: "distance_before", "distance"
        of the representations, relative to the target's; "off_before", "off": ℓ2 distance from
        the target's pixels; "moved": ℓ2 distance from the start.
    """
    z = invert(f, target, start, steps=steps, step_size=step_size, rectified=rectified)
    R = features(f, rectified=rectified)
    goal, found = predict(R, target), {"moved": float(norms(z - start, 2).mean())}
    for when, images in {"_before": start, "": z}.items():
        found["distance" + when] = float(-feature_distance(predict(R, images), goal).mean())
        found["off" + when] = float(norms(images - target, 2).mean())
    return z, found
