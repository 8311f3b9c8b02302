"""What the judge and the training refuse at their entrance, and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor


def check_examples(x: Tensor, y: Tensor) -> None:
    """Images (N, C, H, W) of a floating type in [0, 1] and int64 labels (N,), or ValueError."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: {type(value).__name__}, it must be a torch.Tensor")
    if not x.is_floating_point():
        raise ValueError(f"x: type {x.dtype}, allowed are floating types with values in [0, 1] "
                         "(Dataset.tensors() converts uint8 images)")
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}, it must be (N, C, H, W) with N of 1 or more")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"y: type {y.dtype} and shape {tuple(y.shape)}, it must be int64 and "
                         f"({len(x)},)")
    if x.device != y.device:
        raise ValueError(f"x is on {x.device} and y on {y.device}")
    outside = ~((x >= 0) & (x <= 1)).flatten(1).all(1)  # NaN is outside too.
    if outside.any():
        i = int(outside.nonzero()[0])
        low, high = float(x[i].min()), float(x[i].max())
        raise ValueError(f"x: image {i} has values from {low:g} to {high:g}, pixel units are "
                         "[0, 1]" + (", divide by 255?" if high > 2 else ""))


def check_logits(logits: Tensor, y: Tensor) -> None:
    """Finite logits (N, K) and labels in 0 … K−1, or ValueError with the first offending index."""
    if logits.ndim != 2 or len(logits) != len(y):
        raise ValueError(f"f: returned shape {tuple(logits.shape)}, it must be ({len(y)}, K)")
    bad = ~logits.isfinite().all(1)
    if bad.any():
        raise ValueError(f"f: logits of image {int(bad.nonzero()[0])} are not finite")
    check_labels(y, logits.shape[1])


def check_labels(y: Tensor, classes: int) -> None:
    """Labels in 0 … classes − 1, or ValueError with the first offending index."""
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"y: label {int(y[i])} at index {i}, allowed are 0 to {classes - 1}")
