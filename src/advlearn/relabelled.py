r"""Training sets that carry chosen features: Ilyas et al., arXiv:1905.02175.

* `toward(f, data, targets, ...)`: every image moved a little toward a wrong class, and labelled as
  that class. D_rand with `random_targets`, D_det with `next_class`: to a human all labels are wrong.
* `inverted(model, data, ...)`: every image replaced by one with the same representation, found from
  another image; labels stay. D_R through a robust network, D_NR through a natural one.
* `noisy` and `renamed`: the controls, random noise in place of the attack, and nothing.

Each returns a `Dataset` of uint8 images that `training.fit` takes like any other. With a folder the
images are kept there, with a recipe and its provenance, and an interrupted build resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from advlearn import parts
from advlearn.attacks.gradient import pgd
from advlearn.attacks.inversion import EVERYWHERE, invert, noise
from advlearn.checks import check_labels, check_logits
from advlearn.data import Dataset
from advlearn.evaluation import predict
from advlearn.losses import cross_entropy
from advlearn.parts import crc
from advlearn.progress import bar
from advlearn.tensors import Keyed, generator, normal, norms, per_example
from advlearn.threats import Threat

BATCH = 256  # Images attacked at once.


def random_targets(data: Dataset, seed: int = 0) -> Tensor:
    """A wrong class for every image, uniform over the K − 1 of them: the targets of D_rand, (N,).

    Never the right one, so that what a human sees in the images says less than nothing about the
    labels. Drawn by the image's index: a subset draws the same as the whole.
    """
    u = Keyed((seed, 7), data.index).uniform(data.labels.double()[:, None])[:, 0]
    return (data.labels + 1 + (u * (len(data.classes) - 1)).long()) % len(data.classes)


def next_class(data: Dataset) -> Tensor:
    """t = y + 1, and 0 after the last class: the targets of D_det, (N,)."""
    return (data.labels + 1) % len(data.classes)


def toward(
    f: nn.Module, data: Dataset, targets: Tensor, threat: Threat, *,
    steps: int = 20, step_size: float | None = None,
    folder: str | Path | None = None, progress: bool = False,
) -> Dataset:  # fmt: skip
    r"""Images moved toward a wrong class, with that class as their label: D_rand and D_det.

    $$x' = \arg\min_{z \in S(x)} L(f(z), t), \qquad \text{label } t$$

    Targeted PGD from the image itself; Ilyas et al. take ℓ2, ε = 0.5, 100 steps of 0.1.

    Args:
        f: network whose features are used, commonly a natural one.
        data: training images with their right labels.
        targets: t, int64 (N,), such as `random_targets(data)` or `next_class(data)`.
        threat: S(x).
        steps, step_size: of PGD; the size is 2.5 ε / steps by default.
        folder: where to keep the images; None keeps them in memory alone.
        progress: show a bar.

    Returns:
        uint8 images, labels t, the index of `data`. Rounding to uint8 moves an image by at most
        √d / 510, in ℓ2 about √d / 883.

    Raises:
        ValueError: a network that does not match the data, a target that is the label, a folder
            that holds something else.
    """
    _check_targets(data, targets)
    _check_network(f, data)
    size = 2.5 * _number(threat) / steps if step_size is None else step_size

    def make(rows: Tensor) -> Tensor:
        x = data.take(rows).tensors()[0]
        return pgd(f, x, targets[rows], threat.take(rows), steps=steps, step_size=size,
                   loss=lambda logits, t: -cross_entropy(logits, t))  # fmt: skip

    recipe = {"kind": "toward", "network": fingerprint(f), "norm": threat.symbol,
              "eps": _number(threat), "steps": steps, "step_size": size,
              "targets": crc(targets)}  # fmt: skip
    return _build(recipe, data, targets, make, folder, progress)


def inverted(
    model: nn.Sequential, data: Dataset, *, start: str = "image", threat: Threat = EVERYWHERE,
    steps: int = 200, step_size: float = 0.1, seed: int = 0,
    folder: str | Path | None = None, progress: bool = False,
) -> Dataset:  # fmt: skip
    r"""Images with the representation of the originals and nothing else of them: D_R and D_NR.

    $$x' = \arg\min_z \|R(z) - R(x)\|_2, \qquad \text{label } y$$

    from another image of `data`, drawn by `seed`, whatever its class. Through a robust network only
    the features that it uses can arrive in x' (D_R). Through a natural one x' looks like the image it
    started from and carries what the network sees in x (D_NR). Ilyas et al. take 1,000 steps of 0.1.

    Args:
        model: network whose `models.features` are R.
        data: training images with their labels.
        start: "image", or "noise" (see `attacks.inversion.noise`).
        threat: how far from its start an image may go; by default anywhere, as in the paper.
        steps, step_size: of `attacks.inversion.invert`.
        seed: of the starts.
        folder, progress: as of `toward`.

    Raises:
        ValueError: a network that does not match the data, fewer than two images, an unknown start,
            a folder that holds something else.
    """
    if start not in ("image", "noise") or len(data) < 2:
        raise ValueError(f"inverted: start={start!r} for {len(data)} images, allowed are 'image' "
                         "and 'noise', and 2 images or more")
    _check_network(model, data)
    order = torch.randperm(len(data), generator=generator(seed)).to(data.labels.device)
    other = torch.empty_like(order).scatter_(0, order, order.roll(1))  # Never the image itself.

    def make(rows: Tensor) -> Tensor:
        batch = data.take(rows)
        x = batch.tensors()[0]
        z = (data.take(other[rows]).tensors()[0] if start == "image"
             else noise(x, Keyed((seed, 8), batch.index)))  # fmt: skip
        return invert(model, x, z, threat=threat, steps=steps, step_size=step_size)

    recipe = {"kind": "inverted", "network": fingerprint(model), "start": start, "eps": _number(threat),
              "norm": threat.symbol, "steps": steps, "step_size": step_size, "seed": seed}  # fmt: skip
    return _build(recipe, data, data.labels, make, folder, progress)


def noisy(
    data: Dataset, targets: Tensor, threat: Threat, *, seed: int = 0,
    folder: str | Path | None = None,
) -> Dataset:  # fmt: skip
    """Control: noise as long as the attack, without its direction, and the same wrong labels.

    The projection of x + 4 ε d / ||d|| for Gaussian d. The box takes half of the noise of a black
    pixel; since four times as much is offered, what remains still has the length ε. Arguments and
    errors as of `toward`.
    """
    _check_targets(data, targets)

    def make(rows: Tensor) -> Tensor:
        batch, inside = data.take(rows), threat.take(rows)
        x = batch.tensors()[0]
        d = normal(x, Keyed((seed, 9), batch.index))
        return inside.project(x + per_example(4 * inside.eps / norms(d, threat.p), x) * d, x)

    recipe = {"kind": "noisy", "norm": threat.symbol, "eps": _number(threat), "seed": seed,
              "targets": crc(targets)}  # fmt: skip
    return _build(recipe, data, targets, make, folder, False)


def renamed(data: Dataset, targets: Tensor) -> Dataset:
    """Control: the images as they are, with the wrong labels. Errors as of `toward`."""
    _check_targets(data, targets)
    recipe = {"kind": "renamed", "targets": crc(targets)}
    return _build(recipe, data, targets, lambda rows: data.take(rows).tensors()[0], None, False)


def fingerprint(f: nn.Module) -> str:
    """Twelve hex digits of the SHA-256 of a network's layers and weights."""
    digest = hashlib.sha256(str(f).encode())
    for name, value in f.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- what all builders share ------------------------------------------------------------------


def _build(
    recipe: Mapping[str, object], data: Dataset, labels: Tensor,
    make: Callable[[Tensor], Tensor], folder: str | Path | None, progress: bool,
) -> Dataset:  # fmt: skip
    """Make the images part by part, round them to uint8, and keep each part that is finished."""
    recipe = {**recipe, "data": data.name, "split": data.split, "examples": len(data),
              "images": crc(data.images), "labels": crc(data.labels)}  # fmt: skip
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    result = replace(data, name=f"{data.name}, {recipe['kind']} {digest[:8]}", labels=labels)
    kept = None if folder is None else parts.claim(Path(folder), result, recipe, digest)
    images = torch.empty_like(data.images)
    every = torch.arange(len(data), device=data.labels.device).split(parts.SIZE)
    for i, rows in enumerate(bar(every, result.name, "part", progress)):
        done = None if kept is None else parts.get(kept, i)
        if done is None:
            x = torch.cat([make(few) for few in rows.split(BATCH)])
            images[rows] = (255 * x).round().clamp(0, 255).to(torch.uint8)
            if kept is not None:
                parts.put(kept, i, replace(result, images=images).take(rows))
        else:
            images[rows] = done["images"].to(images.device)
    return replace(result, images=images)


def _check_network(f: nn.Module, data: Dataset) -> None:
    x, y = data.take(torch.arange(min(2, len(data)), device=data.labels.device)).tensors()
    try:
        logits = predict(f, x)
    except RuntimeError as error:
        raise ValueError(f"the network does not take images {data.shape} of {data.name}: "
                         f"{error}") from error  # fmt: skip
    if logits.ndim == 2 and logits.shape[1] != len(data.classes):
        raise ValueError(f"the network tells {logits.shape[1]} classes apart, {data.name} has "
                         f"{len(data.classes)}")
    check_logits(logits, y)


def _check_targets(data: Dataset, targets: Tensor) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or (
            targets.shape != data.labels.shape):  # fmt: skip
        raise ValueError(f"targets: they must be int64, one per image, ({len(data)},)")
    check_labels(targets, len(data.classes))
    same = targets == data.labels
    if same.any():
        i = int(same.nonzero()[0])
        raise ValueError(f"targets: the target of image {i} is its label, {int(targets[i])}; an "
                         "image that is right already shows nothing")


def _number(threat: Threat) -> float:
    if isinstance(threat.eps, Tensor):
        raise ValueError(f"threat: {threat} has a radius per image, allowed is one number")
    return float(threat.eps)
