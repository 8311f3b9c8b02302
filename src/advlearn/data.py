"""Data sets: uint8 images on the device, float32 batches in [0, 1].

`load(name)` looks in `$ADVLEARN_DATA/<name>.npz`, then in the cache (`data/` of a clone, the
user's cache directory elsewhere), then downloads through torchvision and converts once.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advlearn import storage
from advlearn.tensors import generator

_DIGITS = tuple("0123456789")
CLASSES = {
    "digits": _DIGITS,
    "mnist": _DIGITS,
    "fashion_mnist": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                "truck"),
}  # fmt: skip
_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Images and labels of one split.

    Attributes:
        name, split: as given to `load`.
        images: uint8, (N, C, H, W).
        labels: int64, (N,).
        classes: the K class names.
        index: position of every example in the full split, int64, (N,): the key of its random
            starts, so that a subset draws the same numbers as the whole.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def take(self, rows: Tensor) -> Dataset:
        """The selected examples (int64 or bool)."""
        return replace(self, images=self.images[rows], labels=self.labels[rows],
                       index=self.index[rows])  # fmt: skip

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """The first `n` of a fixed permutation drawn from `seed` (all, if there are fewer).

        MNIST's test set is not in random order, so "the first 1,000 images" is not a sample.
        """
        order = torch.randperm(len(self), generator=generator(seed))[:n]
        return self.take(order.to(self.labels.device))

    def only(self, *labels: int) -> Dataset:
        """The examples of the given classes; labels keep their numbers."""
        return self.take(torch.isin(self.labels, torch.tensor(labels, device=self.labels.device)))

    def split_off(self, n: int) -> tuple[Dataset, Dataset]:
        """(all but the last n, the last n): training and held-out validation images."""
        if not 0 < n < len(self):
            raise ValueError(f"split_off: n={n}, allowed are 1 to {len(self) - 1}")
        rows = torch.arange(len(self), device=self.labels.device)
        return self.take(rows[:-n]), self.take(rows[-n:])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(x, y): float32 images in [0, 1], (N, C, H, W), and labels, (N,)."""
        return self.images.float() / 255, self.labels

    def batches(
        self, size: int, gen: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (x, y, index) in order, or shuffled by `gen`; the last may be smaller."""
        order = torch.arange(len(self)) if gen is None else torch.randperm(len(self), generator=gen)
        for rows in order.to(self.labels.device).split(size):
            batch = self.take(rows)
            yield *batch.tensors(), batch.index


def load(name: str, split: str = "test", device: str | torch.device = "cpu") -> Dataset:
    """A data set: "digits" (embedded, offline), "mnist", "fashion_mnist" or "cifar10".

    Args:
        name: the data set.
        split: "train" or "test".
        device: where the uint8 images stay.

    A damaged file in the cache is moved aside and fetched again; one in `$ADVLEARN_DATA` is
    refused.

    Raises:
        ValueError: unknown name or split, or a file that is not such a data set.
        FileNotFoundError: no file, and no network to fetch one.
    """
    if name not in CLASSES:
        raise ValueError(f"load: name={name!r}, allowed are {', '.join(CLASSES)}")
    if split not in ("train", "test"):
        raise ValueError(f"load: split={split!r}, allowed are 'train' and 'test'")
    path, classes = _find(name), len(CLASSES[name])
    try:
        images, labels = _read(path, split, classes)
    except ValueError:
        if path.parent != storage.cache():  # The reader's own file: refused, not touched.
            raise
        storage.move_aside(path)
        images, labels = _read(_download(name, path), split, classes)
    return Dataset(name, split, images.to(device), labels.to(device), CLASSES[name],
                   torch.arange(len(labels), device=device))  # fmt: skip


def _find(name: str) -> Path:
    if name == "digits":
        return Path(__file__).parent / "digits.npz"
    given = os.environ.get("ADVLEARN_DATA")
    cached = storage.cache() / f"{name}.npz"
    for path in ([Path(given).expanduser() / f"{name}.npz"] if given else []) + [cached]:
        if path.is_file():
            return path
    return _download(name, cached)


_DAMAGE = (AttributeError, OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError,
           zipfile.BadZipFile, zlib.error)  # fmt: skip


def _read(path: Path, split: str, classes: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file[f"x_{split}"], file[f"y_{split}"].reshape(-1)
    except PermissionError:
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is not a data set: {error}. Expected is an npz file with the arrays "
            f"{', '.join(_KEYS)}. Delete the file to fetch it again."
        ) from error
    layout = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not layout or len(images) != len(labels):
        raise ValueError(f"{path}: x_{split} has type {images.dtype} and shape {images.shape}, "
                         f"y_{split} has {len(labels)} labels; expected are uint8 images "
                         "(N, H, W) or (N, H, W, C) and N labels")
    wrong = ~np.isin(labels, np.arange(classes))
    if wrong.any():
        raise ValueError(f"{path}: y_{split} has label {labels[wrong][0]} at index "
                         f"{wrong.argmax()}, allowed are 0 to {classes - 1}")
    images = torch.from_numpy(images)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))


def _download(name: str, target: Path) -> Path:
    import torchvision.datasets

    source = getattr(torchvision.datasets, _TORCHVISION[name])
    root = target.parent / "torchvision"
    try:
        splits = [source(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises RuntimeError, URLError, OSError, ...
        raise FileNotFoundError(
            f"The data set {name!r} is not at hand. Looked for $ADVLEARN_DATA/{name}.npz "
            f"(ADVLEARN_DATA is {os.environ.get('ADVLEARN_DATA') or 'not set'}) and {target}; "
            f"the download through torchvision failed: {error}. By hand: put {name}.npz with the "
            f"uint8 arrays {', '.join(_KEYS)} (as Keras does) into one of these folders. "
            'Without any download, profile="smoke" runs on the embedded data set "digits".'
        ) from error
    arrays = {}
    for part, split in zip(("train", "test"), splits, strict=True):
        arrays[f"x_{part}"] = np.asarray(split.data, dtype=np.uint8)
        arrays[f"y_{part}"] = np.asarray(split.targets, dtype=np.uint8)
    with storage.atomic(target) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return target
