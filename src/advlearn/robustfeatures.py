"""The experiments of chapter 7: train in the standard way on some training set, and look what came.

Ilyas et al., arXiv:1905.02175. The training sets are made in `relabelled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from advlearn import models, training
from advlearn.attacks import Attack, pgd
from advlearn.data import Dataset
from advlearn.evaluation import Result, interval, predict, worst_case
from advlearn.threats import Threat

# The package's networks, for transfer: a name of the plot -> what `models.build` takes.
ARCHITECTURES: dict[str, dict[str, object]] = {
    "linear": {"name": "linear"},
    "MLP": {"name": "mlp"},
    "small conv": {"name": "small_conv"},
    "pooled conv, width 1": {"name": "madry_mnist", "width": 1},
    "pooled conv, width 4": {"name": "madry_mnist", "width": 4},
    "five conv": {"name": "five_conv", "width": 8},
}


def trained(
    data: Dataset, architecture: Mapping[str, object], *, seed: int = 0, epochs: int = 10,
    batch_size: int = 128, lr: float = 2e-3, precision: str = "32-true", progress: bool = False,
) -> nn.Sequential:  # fmt: skip
    """A network after standard training on `data`, in eval mode: no attack, no augmentation.

    Args:
        data: any training set, such as those of `relabelled`.
        architecture: for `models.build`; the shape is that of the data.
        seed: of weights and order.
        epochs, batch_size, lr, precision: of `training.fit`.
        progress: show a bar.
    """
    spec = {**architecture, "shape": data.shape, "classes": len(data.classes), "seed": seed}
    model = models.build(spec).to(data.images.device)
    training.fit(model, data, training.natural(), epochs=epochs, batch_size=batch_size, lr=lr,
                 seed=seed, precision=precision, progress=progress)  # fmt: skip
    return model.eval()


def agreement(f: nn.Module, test: Dataset) -> dict[str, object]:
    """How often a network says the true class y, and how often y + 1, of test images.

    Returns:
        "true", "next": shares of the test images; "true_interval", "next_interval": their 95 %
        intervals; "n": number of images. On D_det, y is what its non-robust features say and y + 1
        what its robust ones do.
    """
    answers = predict(f, test.tensors()[0]).argmax(1)
    found: dict[str, object] = {"n": len(test)}
    for name, label in {"true": test.labels,
                        "next": (test.labels + 1) % len(test.classes)}.items():  # fmt: skip
        hits = int((answers == label).sum())
        found |= {name: hits / len(test), f"{name}_interval": interval(hits, len(test))}
    return found


def robustness(
    f: nn.Module, test: Dataset, threats: Mapping[str, Threat], steps: int = 40, seed: int = 0
) -> dict[str, Result]:
    """Accuracy under PGD for each threat: `steps` of size 2.5 ε / steps from one random start."""
    x, y = test.tensors()
    return {name: worst_case(f, x, y, threat,
                             [partial(pgd, steps=steps, step_size=2.5 * threat.eps / steps)],
                             seed=seed, index=test.index)
            for name, threat in threats.items()}  # fmt: skip


def transfer(
    source: nn.Module, f: nn.Module, test: Dataset, threat: Threat, attack: Attack, seed: int = 0
) -> dict[str, float]:
    """How often images that `attack` makes on `source` fool another network.

    Only images count that both networks classify correctly, and on which the attack fools its own
    network: what is asked is whether a success carries over.

    Returns:
        "success": the share of those images on which `f` is fooled too; "low", "high": its 95 %
        interval; "n": how many they are; "clean": accuracy of `f` on all of `test`.
    """
    x, y = test.tensors()
    found = worst_case(source, x, y, threat, [attack], seed=seed, index=test.index)
    right = predict(f, x).argmax(1) == y
    rows = right & (found.fooled_by == 0)
    fooled = int((predict(f, found.x_adv[rows]).argmax(1) != y[rows]).sum()) if rows.any() else 0
    n = int(rows.sum())
    low, high = interval(fooled, n) if n else (0.0, 1.0)
    return {"success": fooled / max(n, 1), "low": low, "high": high, "n": n,
            "clean": float(right.double().mean())}  # fmt: skip


def scatter(
    source: nn.Module, original: Dataset, relabelled: Mapping[str, Dataset], test: Dataset,
    threat: Threat, attack: Attack, *,
    architectures: Mapping[str, Mapping[str, object]] = ARCHITECTURES,
    seed: int = 0, epochs: int = 10, batch_size: int = 128, precision: str = "32-true",
    progress: bool = False,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """For each architecture: how well it learns the source's non-robust features, and transfer.

    Each is trained in the standard way on `original`, where attacks of `source` are tried on it, and
    on every set of `relabelled` (made with `source`), whose accuracy on the true test set says how
    much of the source's non-robust features it picks up.

    Args:
        relabelled: name -> training set, e.g. {"D_det": ...}.
        The rest as of `trained` and `transfer`.

    Returns:
        architecture -> `transfer`'s values, and "NAME_true", "NAME_next" of `agreement`.
    """
    options = {"seed": seed, "epochs": epochs, "batch_size": batch_size, "precision": precision,
               "progress": progress}  # fmt: skip
    rows = {}
    for name, architecture in architectures.items():
        victim = trained(original, architecture, **options)
        rows[name] = transfer(source, victim, test, threat, attack, seed)
        for which, data in relabelled.items():
            said = agreement(trained(data, architecture, **options), test)
            rows[name] |= {f"{which}_{key}": said[key] for key in ("true", "next")}
    return rows
