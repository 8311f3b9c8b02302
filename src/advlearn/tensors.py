"""Small tensor helpers: per-example broadcasting, norms, seeded randomness, frozen networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def per_example(v: float | Tensor, x: Tensor) -> float | Tensor:
    """Shape a number per example so that it broadcasts against a batch.

    Args:
        v: a number, a 0-dim tensor, or a tensor of shape (N,).
        x: the batch, shape (N, ...).

    Returns:
        `v` itself if it is a single number, else `v` with shape (N, 1, ..., 1).
    """
    if isinstance(v, Tensor) and v.ndim == 1:
        return v.to(x).view(-1, *[1] * (x.ndim - 1))
    return v


def norms(d: Tensor, p: float) -> Tensor:
    """The p-norm of every example: (N, ...) -> (N,). `p` is 1, 2 or `math.inf`."""
    flat = d.flatten(1)
    if p == 1:
        return flat.abs().sum(1)
    if p == math.inf:
        return flat.abs().amax(1)
    return torch.linalg.vector_norm(flat, p, dim=1)


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A seeded `torch.Generator` on `device`."""
    return torch.Generator(device).manual_seed(seed)


# Constants of the splitmix64 generator (Steele, Lea & Flood 2014), as signed 64-bit integers.
_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * _MIX1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@dataclass(frozen=True)
class Keyed:
    """Random numbers that depend on a seed and on the example, and on nothing else.

    Example `rows[i]` draws the same numbers whatever stands beside it in the batch, on whichever
    device and in whichever process: survivors of an attack keep their starts, and a different
    batch size changes nothing. Drawing twice from the same object gives the same numbers.

    Args:
        seed: an integer, or several (seed, restart, ...), each giving an independent stream.
        rows: index of every example in its data set, int64, shape (N,).
    """

    seed: int | Sequence[int]
    rows: Tensor

    def uniform(self, x: Tensor, stream: int = 0) -> Tensor:
        """Uniform numbers in (0, 1), like `x`; row i belongs to example `rows[i]`."""
        key = _mix(self.rows.to(x.device, torch.int64) + _GOLDEN)
        for part in (*([self.seed] if isinstance(self.seed, int) else self.seed), stream):
            key = _mix(key * _GOLDEN + part)
        coordinate = torch.arange(1, x[0].numel() + 1, device=x.device) * _GOLDEN
        bits = _mix(key[:, None] + coordinate)
        # 23 bits and the middle of the cell: never 0 or 1, also in float32.
        return (((bits >> 41) & 0x7FFFFF).to(x.dtype) + 0.5).div_(2**23).view(x.shape)


def key_of(x: Tensor) -> Tensor:
    """A key of every example for `Keyed`, from the bits of its values: (N, ...) -> int64 (N,)."""
    bits = x.flatten(1).float().view(torch.int32).long()
    return _mix(bits + torch.arange(1, bits.shape[1] + 1, device=x.device) * _GOLDEN).sum(1)


def uniform(x: Tensor, gen: torch.Generator | Keyed, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) with the shape, type and device of `x`.

    A generator moves on by itself; a `Keyed` source needs another `stream` for another draw.
    """
    if isinstance(gen, Keyed):
        return gen.uniform(x, stream)
    return torch.rand(x.shape, generator=gen, dtype=x.dtype, device=gen.device).to(x.device)


def normal(x: Tensor, gen: torch.Generator | Keyed) -> Tensor:
    """Standard normal numbers with the shape, type and device of `x`."""
    if isinstance(gen, Keyed):
        return torch.special.ndtri(gen.uniform(x, stream=1))
    return torch.randn(x.shape, generator=gen, dtype=x.dtype, device=gen.device).to(x.device)


@contextmanager
def frozen(f: object) -> Iterator[None]:
    """Inside: `f` in eval mode and its parameters without gradients. After: everything as before.

    Every submodule's own mode and every parameter's own flag come back, also after an error.
    Wrappers are `nn.Module`s, so the networks inside them are reached; a plain function has
    nothing to freeze.
    """
    modules = list(f.modules()) if isinstance(f, nn.Module) else []
    modes = [m.training for m in modules]
    parameters = [p for p in f.parameters() if p.requires_grad] if modules else []
    try:
        for m in modules:
            m.training = False
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode
        for p in parameters:
            p.requires_grad_(True)
