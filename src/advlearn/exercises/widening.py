"""`check_widen`: a larger network that computes what a smaller one does, and can still learn."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn import models
from advlearn.exercises.report import Report, examine
from advlearn.tensors import generator

Widen = Callable[[nn.Sequential, nn.Sequential], object]
Run = Callable[[str], tuple[nn.Sequential, nn.Sequential]]  # A pair of networks, widened.


def _pairs() -> dict[str, tuple[nn.Sequential, nn.Sequential]]:
    """Name -> a network and a wider one with other weights, both float64."""
    flat, image = (1, 4, 4), (1, 8, 8)
    pairs = {
        "one hidden layer": (models.mlp(flat, (5,), 3, seed=1), models.mlp(flat, (9,), 3, seed=2)),
        "two hidden layers": (
            models.mlp(flat, (5, 4), 3, seed=3), models.mlp(flat, (7, 9), 3, seed=4)),
        "only the second is wider": (
            models.mlp(flat, (5, 4), 3, seed=5), models.mlp(flat, (5, 8), 3, seed=6)),
        "convolutions": (
            models.madry_mnist(image, 1, seed=7), models.madry_mnist(image, 2, seed=8)),
        "convolutions, three times as wide": (
            models.madry_mnist(image, 1, seed=9), models.madry_mnist(image, 3, seed=10)),
    }  # fmt: skip
    return {name: (small.double(), large.double()) for name, (small, large) in pairs.items()}


def _layers(f: nn.Sequential) -> list[nn.Module]:
    return [m for m in f if isinstance(m, (nn.Linear, nn.Conv2d))]


def _images(f: nn.Sequential) -> Tensor:
    shape = (1, 8, 8) if isinstance(f[0], nn.Conv2d) else (1, 4, 4)
    return torch.rand(64, *shape, generator=generator(11), dtype=torch.float64)


def _heard(layer: nn.Module, units: int, grad: bool = False) -> Tensor:
    """What a layer does with each unit of the layer before: (units, ...).

    Behind a Flatten a unit is a block of columns.
    """
    w = layer.weight.grad if grad else layer.weight.detach()
    return w.reshape(len(w), units, -1).movedim(1, 0).flatten(1)


def _told(layer: nn.Module, grad: bool = False) -> Tensor:
    """The weights into each unit, and its bias: (units, ...)."""
    w, b = layer.weight, layer.bias
    w, b = (w.grad, b.grad) if grad else (w.detach(), b.detach())
    return torch.cat([w.flatten(1), b[:, None]], 1)


def _why(small: nn.Sequential, large: nn.Sequential) -> str:
    """What in the weights makes the functions differ."""
    layers = list(zip(_layers(small), _layers(large), strict=True))
    for k, (old, new) in enumerate(layers):
        rows, columns = old.weight.shape[:2]
        copied = _told(new)[rows:]
        own = _told(new)[:rows]
        if k + 1 < len(layers) and len(copied) and all((own == row).all(1).any() for row in copied):
            return ("new units are copies of old ones, and who listens to both hears the same "
                    "twice: share the outgoing weight among them")  # fmt: skip
        if not torch.equal(new.weight[:rows, :columns], old.weight):
            return f"layer {k + 1}: the leading block of its weights is not the small network's"
        if not torch.equal(new.bias[:rows], old.bias):
            return f"layer {k + 1}: the biases are not the small network's"
        if bool((new.weight[:rows, columns:] != 0).any()):
            return (f"layer {k + 1}: its old units listen to new ones: what they hear from those "
                    "has the weight 0")  # fmt: skip
    return "the leading blocks are right, and yet the functions differ"


def check_widen(widen: Widen) -> Report:
    """Try `widen(small, large)`, which writes small's function into the larger network, in place.

    Both are `nn.Sequential`s of the same kinds of layers. The new units must be able to learn: a
    gradient reaches them, and no two units are equal for ever.
    """

    def run(name: str) -> tuple[nn.Sequential, nn.Sequential]:
        small, large = _pairs()[name]
        widen(small, large)
        return small, large

    def equal(*names: str) -> Callable[[], str | None]:
        def test() -> str | None:
            for name in names:
                small, large = run(name)
                x = _images(small)
                with torch.no_grad():
                    gap = float((small(x) - large(x)).abs().max())
                if not gap < 1e-9:
                    return f"{name}: logits differ by {gap:.2g}; {_why(small, large)}"
            return None

        return test

    return examine(widen, [
        ("the same function, fully connected",
         equal("one hidden layer", "two hidden layers", "only the second is wider")),
        ("the same function, convolutions",
         equal("convolutions", "convolutions, three times as wide")),
        ("leaves the small network alone", lambda: _untouched(run)),
        ("a gradient reaches the new units", lambda: _reached(run)),
        ("no two units stay equal", lambda: _twins(run)),
    ])  # fmt: skip


def _untouched(run: Run) -> str | None:
    for name, (fresh, _) in _pairs().items():
        small, large = run(name)
        kept = zip(fresh.parameters(), small.parameters(), strict=True)
        if not all(torch.equal(a, b) for a, b in kept):
            return "the small network was changed"
        before = [p.detach().clone() for p in small.parameters()]
        with torch.no_grad():
            for p in large.parameters():
                p.add_(1)
        kept = zip(before, small.parameters(), strict=True)
        if not all(torch.equal(a, b) for a, b in kept):
            return "the networks share memory: training the large one would change the small one"
    return None


def _reached(run: Run) -> str | None:
    for name in _pairs():
        small, large = run(name)
        x = _images(small)
        large.requires_grad_(True).zero_grad()
        logits = large(x)
        F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1]).backward()
        layers = _layers(large)
        for k, (old, new, after) in enumerate(zip(_layers(small), layers, layers[1:], strict=False)):
            units = len(new.weight)
            slope = torch.cat([_told(new, grad=True), _heard(after, units, grad=True)], 1)
            fresh = slope[len(old.weight) :].abs().amax(1) > 0
            if len(fresh) and not fresh.any():  # Some ReLUs may be off for all of the images.
                return (f"{name}: none of the {len(fresh)} new units of layer {k + 1} gets a "
                        "gradient, neither in the weights into it nor out of it: ReLU(0) = 0, and "
                        "its slope at 0 is 0. They are off for ever")  # fmt: skip
    return None


def _twins(run: Run) -> str | None:
    for name in _pairs():
        layers = _layers(run(name)[1])
        for k, (layer, after) in enumerate(pairwise(layers)):
            both = torch.cat([_told(layer), _heard(after, len(layer.weight))], 1)
            if len(both.unique(dim=0)) < len(both):
                return (f"{name}: layer {k + 1} has units with equal weights in and out; they get "
                        "equal gradients, and stay one unit for ever")  # fmt: skip
    return None
