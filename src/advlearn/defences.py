"""Defences that only hide the gradient: wrappers of a network, none of which makes it robust.

They are here to be found out, by `evaluation.audit` and by the reader. Obfuscated gradients:
Athalye, Carlini & Wagner, arXiv:1802.00420.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn.models import Classifier


class Saturated(nn.Module):
    """All logits times a large `scale`: the same answers, and a softmax that is exactly 0 or 1.

    The cross-entropy of a right answer is then exactly 0 in float32, and so is its gradient.
    Defensive distillation (Papernot et al., arXiv:1511.04508) has this effect.
    """

    def __init__(self, model: Classifier, scale: float = 1000.0) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


class Quantised(nn.Module):
    """Every pixel rounded to one of `levels` grey levels: the derivative is 0 almost everywhere.

    Reduced bit depth (Xu et al., arXiv:1704.01155) and thermometer codes work like this.

    Raises:
        ValueError: fewer than 2 levels.
    """

    def __init__(self, model: Classifier, levels: int = 8) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"Quantised: levels={levels}, it must be 2 or more")
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * (self.levels - 1)).round() / (self.levels - 1))


class RandomResized(nn.Module):
    """Every image shrunk to a random size and put down at a random place, anew at every call.

    The idea of Xie et al., arXiv:1711.01991, with images of 8 bits, as image libraries return them:
    two calls on the same image differ, and the rounding leaves no gradient.

    Args:
        model: the network.
        low: smallest size, as a share of the image's own, in (0, 1].
        levels: grey levels of the resized image; None leaves out the rounding.
        seed: of the draws, which come from a generator of the wrapper's own.

    Raises:
        ValueError: `low` or `levels` out of range.
    """

    def __init__(
        self, model: Classifier, low: float = 0.75, levels: int | None = 256, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 < low <= 1:
            raise ValueError(f"RandomResized: low={low}, allowed are numbers in (0, 1]")
        self.model = model if levels is None else Quantised(model, levels)
        self.low, self.draws = low, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        scale, *shift = torch.rand(3, len(x), generator=self.draws).to(x)
        scale = self.low + (1 - self.low) * scale
        # In coordinates of [-1, 1], pixel p of the result shows pixel (p - c) / scale of the image.
        center = (2 * torch.stack(shift, 1) - 1) * (1 - scale)[:, None]
        matrix = torch.eye(2, 3).to(x) / scale[:, None, None]
        matrix[:, :, 2] = -center / scale[:, None]
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return self.model(F.grid_sample(x, grid, align_corners=False))
