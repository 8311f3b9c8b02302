"""Networks: `nn.Module`s from images (N, C, H, W) in [0, 1] to logits (N, K).

All are plain `nn.Sequential`s that end in a linear layer. Weights are drawn from the explicit
`seed`; the global random state is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Classifier = Callable[[Tensor], Tensor]
MNIST_SHAPE = (1, 28, 28)
CIFAR_SHAPE = (3, 32, 32)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs too.
        yield


class Normalize(nn.Module):
    """(x − mean) / std per channel, inside the network, so that ε keeps its meaning in pixels."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def linear(
    shape: Sequence[int] = MNIST_SHAPE, classes: int = 10, *, seed: int = 0
) -> nn.Sequential:
    """Softmax regression: logits = W x + b. `shape` is (C, H, W)."""
    return mlp(shape, (), classes, seed=seed)


def mlp(
    shape: Sequence[int] = MNIST_SHAPE,
    hidden: Sequence[int] = (200,),
    classes: int = 10,
    *,
    seed: int = 0,
) -> nn.Sequential:
    """Fully connected ReLU network with the given hidden widths. `shape` is (C, H, W)."""
    sizes = [shape[0] * shape[1] * shape[2], *hidden]
    with _drawn_from(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in zip(sizes, hidden, strict=False):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def small_conv(
    shape: Sequence[int] = MNIST_SHAPE, width: float = 1, classes: int = 10, *, seed: int = 0
) -> nn.Sequential:
    """Two strided 4×4 convolutions (16 and 32 filters) and FC 100, times `width`.

    The MNIST network of fast adversarial training (Wong, Rice & Kolter, arXiv:2001.03994);
    about ten times cheaper than the network of Madry et al. `shape` is (C, H, W).
    """
    channels, height, breadth = shape
    a, b, c = (round(n * width) for n in (16, 32, 100))
    with _drawn_from(seed):
        return nn.Sequential(
            nn.Conv2d(channels, a, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(a, b, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(b * (height // 4) * (breadth // 4), c), nn.ReLU(), nn.Linear(c, classes),
        )  # fmt: skip


def madry_mnist(
    shape: Sequence[int] = MNIST_SHAPE, width: int = 16, classes: int = 10, *, seed: int = 0
) -> nn.Sequential:
    """The MNIST network of Madry et al. (arXiv:1706.06083) at a `width` of its capacity figure.

    Two 5×5 convolutions, each with 2×2 max pooling, and a hidden layer: (2, 4, 64) at width 1,
    doubled up to (32, 64, 1024) at width 16, the network of the paper's Table 1.
    """
    channels, height, breadth = shape
    a, b, c = 2 * width, 4 * width, 64 * width
    with _drawn_from(seed):
        return nn.Sequential(
            nn.Conv2d(channels, a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(b * (height // 4) * (breadth // 4), c), nn.ReLU(), nn.Linear(c, classes),
        )  # fmt: skip


def five_conv(
    shape: Sequence[int] = CIFAR_SHAPE, width: int = 32, classes: int = 10, *, seed: int = 0
) -> nn.Sequential:
    """Five 3×3 convolutions with batch norm, of width w, 2w, 2w, 3w, 3w: small, for CIFAR-10.

    2×2 max pooling after the first, second and fourth, the mean over all places after the fifth,
    so that the representation has 3w numbers. `shape` is (C, H, W), H and W 8 or more. The weights
    lie channels-last, which on a CPU makes training 1.4 times as fast.
    """
    sizes = [shape[0], width, 2 * width, 2 * width, 3 * width, 3 * width]
    with _drawn_from(seed):
        layers: list[nn.Module] = [Normalize([0.5] * shape[0], [0.25] * shape[0])]
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out),
                       nn.ReLU()]  # fmt: skip
            layers += [nn.MaxPool2d(2)] if i in (0, 1, 3) else []
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(3 * width, classes))  # fmt: skip
    return model.to(memory_format=torch.channels_last)


ARCHITECTURES = {"linear": linear, "mlp": mlp, "small_conv": small_conv,
                 "madry_mnist": madry_mnist, "five_conv": five_conv}  # fmt: skip


def build(spec: Mapping[str, object]) -> nn.Sequential:
    """A network from a manifest entry such as {"name": "small_conv", "width": 1}.

    Raises:
        ValueError: the name is not one of `ARCHITECTURES`.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in ARCHITECTURES:
        raise ValueError(f"build: name={name!r}, allowed are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](**options)


def features(model: nn.Sequential, *, rectified: bool = True) -> nn.Sequential:
    """The network without its last linear layer: (N, C, H, W) -> (N, F). Weights are shared.

    Args:
        model: an `nn.Sequential` that ends in a linear layer.
        rectified: False leaves out the ReLU of the representation, so that a unit at 0 still has a
            slope (for the same reason Engstrom et al., arXiv:1906.00945, give it a false one).

    Raises:
        ValueError: `model` is of another form.
    """
    if not isinstance(model, nn.Sequential) or not isinstance(model[-1], nn.Linear):
        raise ValueError("features: model must be an nn.Sequential that ends in an nn.Linear")
    layers = list(model[:-1])
    if not rectified:
        last = len(layers) - 1
        while last >= 0 and isinstance(layers[last], (nn.Flatten, nn.AdaptiveAvgPool2d)):
            last -= 1
        if last >= 0 and isinstance(layers[last], nn.ReLU):
            del layers[last]
    return nn.Sequential(*layers)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


class _Fast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        # clone and not contiguous: that leaves a single channel's strides, and convolutions follow
        # the strides. The weights keep their layout.
        x = x.clone(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=_has_bf16(x.device)):
            return self.model(x).float()


def fast(model: nn.Module) -> nn.Module:
    """The same network with a faster forward and backward pass, for use inside attacks.

    Images with the channel as the innermost dimension, and bfloat16 where the processor or GPU
    computes in it. Weights are shared, and read at every call. Its logits are rounded (two to
    three digits): attack `fast(f)`, judge `f`, as
    `worst_case(f, x, y, threat, [on(fast(f), attack)])` does.
    """
    return _Fast(model)
