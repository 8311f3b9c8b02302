r"""Feature inversion: images with a given representation, or with one unit of it made large.

All of it is `pgd` on the representation R(x) = `models.features(model)(x)`: normalised ℓ2 steps in
a ball so large that only the pixel box bounds the image. Engstrom et al., arXiv:1906.00945; Ilyas
et al., arXiv:1905.02175.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advlearn.attacks.gradient import pgd
from advlearn.losses import activation, feature_distance
from advlearn.models import features
from advlearn.tensors import Keyed, frozen, normal
from advlearn.threats import L2, Threat

EVERYWHERE = L2(1000.0)  # No two images of ours are so far apart: the pixel box alone remains.


def noise(x: Tensor, gen: torch.Generator | Keyed) -> Tensor:
    """Grey noise to start from, with the shape of `x`: 0.5 + N(0, 1) / 20, in [0, 1]."""
    return (0.5 + normal(x, gen) / 20).clamp(0, 1)


def invert(
    model: nn.Sequential,
    target: Tensor,
    start: Tensor,
    *,
    threat: Threat = EVERYWHERE,
    steps: int = 200,
    step_size: float = 0.5,
    rectified: bool = True,
) -> Tensor:
    r"""Walk from `start` to an image that the network represents as `target`.

    $$\min_{z \in S(\text{start})} \frac{\|R(z) - R(x)\|_2}{\|R(x)\|_2}$$

    Args:
        model: network whose `features` are R.
        target: the images x, (N, C, H, W), or their representations R(x), (N, F).
        start: images to start from, (N, C, H, W) in [0, 1]: others, or `noise`.
        threat: how far from `start` the walk may go; by default to any image.
        steps: number of gradient steps.
        step_size: ℓ2 length of a step, in pixel units.
        rectified: as of `features`.

    Returns:
        z, (N, C, H, W), detached.

    Raises:
        ValueError: `target` and `start` do not belong together.
    """
    R = features(model, rectified=rectified)
    if target.ndim == 4:
        with frozen(R), torch.no_grad():
            target = R(target)
    if target.ndim != 2 or len(target) != len(start):
        raise ValueError(f"invert: target {tuple(target.shape)} for {len(start)} images to start "
                         "from, it must be as many images (N, C, H, W) or representations (N, F)")
    return pgd(R, start, target, threat, loss=feature_distance, steps=steps, step_size=step_size)


def interpolate(
    model: nn.Sequential,
    a: Tensor,
    b: Tensor,
    frames: int = 7,
    *,
    steps: int = 200,
    step_size: float = 0.5,
    rectified: bool = True,
) -> Tensor:
    r"""A walk from image a to the representation of image b, seen at equal distances.

    Frame i has the representation $(1 - \lambda_i) R(a) + \lambda_i R(b)$, with λ from 0 to 1;
    each is found from the one before it, by `invert`, and the first is a itself.

    Args:
        model, steps, step_size, rectified: as of `invert`, `steps` for every frame.
        a, b: images, (N, C, H, W).
        frames: how many, both ends included.

    Returns:
        (frames, N, C, H, W).

    Raises:
        ValueError: fewer than two frames, or images of two shapes.
    """
    if frames < 2 or a.shape != b.shape:
        raise ValueError(f"interpolate: frames={frames}, images {tuple(a.shape)} and "
                         f"{tuple(b.shape)}; allowed are 2 or more, and one shape")
    R = features(model, rectified=rectified)
    with frozen(R), torch.no_grad():
        first, last = R(a), R(b)
    walk = [a]
    for share in torch.linspace(0, 1, frames)[1:].tolist():
        target = torch.lerp(first, last, share)
        walk.append(invert(model, target, walk[-1], steps=steps, step_size=step_size,
                           rectified=rectified))  # fmt: skip
    return torch.stack(walk)


def excite(
    model: nn.Sequential,
    x: Tensor,
    unit: int | Tensor,
    *,
    threat: Threat = EVERYWHERE,
    steps: int = 100,
    step_size: float = 0.5,
    sign: int = 1,
) -> Tensor:
    r"""Make one unit of the representation large: $\max_{z \in S(x)} \pm R(z)_u$.

    From noise it shows what the unit looks for (feature visualisation), from an image it adds that
    to the image (manipulation). The unit is taken before its ReLU, where it has a slope.

    Args:
        model: network whose `features` are R.
        x: images to start from, (N, C, H, W) in [0, 1].
        unit: u, one for all or one per image, int64 (N,).
        threat, steps, step_size: as of `invert`.
        sign: 1 to make it large, −1 to make it small.

    Raises:
        ValueError: there is no such unit; `sign` is not 1 or −1.
    """
    R, width = features(model, rectified=False), model[-1].in_features
    unit = torch.as_tensor(unit, device=x.device).expand(len(x))
    if sign not in (1, -1) or not bool(((unit >= 0) & (unit < width)).all()):
        raise ValueError(f"excite: unit={unit.tolist()}, sign={sign}; allowed are units 0 to "
                         f"{width - 1}, and the signs 1 and -1")
    return pgd(R, x, unit, threat, loss=lambda v, u: sign * activation(v, u), steps=steps,
               step_size=step_size)  # fmt: skip
