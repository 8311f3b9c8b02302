"""What is measured after every epoch, on held-out training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from advlearn.attacks.combine import Attack
from advlearn.attacks.gradient import fgsm, pgd
from advlearn.data import Dataset
from advlearn.evaluation import predict, worst_case
from advlearn.threats import Threat

Validation = Callable[[nn.Module], dict[str, float]]
RISE, FALL = 0.02, 0.2  # Of `overfitted`.


@dataclass
class History:
    """One row per epoch: mean training loss and what the validations returned."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, key: str) -> list[float]:
        return [row[key] for row in self.rows]


def held_out(
    data: Dataset, threat: Threat | None = None, attack: Attack | None = None
) -> Validation:
    """A validation for `fit`: clean accuracy on `data`, and accuracy under `attack` if given."""
    x, y = data.tensors()

    def validate(model: nn.Module) -> dict[str, float]:
        if threat is None or attack is None:
            return {"clean": float((predict(model, x).argmax(1) == y).double().mean())}
        result = worst_case(model, x, y, threat, [attack], index=data.index)
        return {"clean": result.clean_accuracy, "robust": result.accuracy}

    validate.data = data
    return validate


def watch(data: Dataset, threat: Threat, steps: int = 10) -> Validation:
    """A validation for `fit` that sees catastrophic overfitting: accuracy under FGSM and PGD.

    Args:
        data: a few hundred held-out training images.
        threat: at full size.
        steps: of PGD, each of size 2.5 ε / steps, from a random start.

    `fit` warns when `overfitted` says so.
    """
    x, y = data.tensors()
    attacks = {"fgsm": fgsm, "pgd": partial(pgd, steps=steps, step_size=2.5 * threat.eps / steps)}

    def validate(model: nn.Module) -> dict[str, float]:
        return {name: worst_case(model, x, y, threat, [attack], index=data.index).accuracy
                for name, attack in attacks.items()}  # fmt: skip

    validate.data = data
    return validate


def overfitted(rows: Sequence[Mapping[str, float]]) -> str | None:
    """What has happened if the last row shows catastrophic overfitting, else None.

    The rule: since the epoch with the highest accuracy under PGD, that accuracy has fallen by 20
    points or more while accuracy under FGSM has risen by 2 or more. The network then does well
    against the step it is trained on, and not against several smaller ones (Wong et al.,
    arXiv:2001.03994; Andriushchenko & Flammarion, arXiv:2007.02617). The rule asks for a fall
    from a height: a network that was never robust sets nothing off.
    """
    watched = [row for row in rows if {"fgsm", "pgd"} <= row.keys()]
    if not watched:
        return None
    best, last = max(watched, key=lambda row: row["pgd"]), watched[-1]
    if last["fgsm"] - best["fgsm"] < RISE or best["pgd"] - last["pgd"] < FALL:
        return None
    return (f"catastrophic overfitting: from epoch {best['epoch']} to {last['epoch']} accuracy "
            f"under PGD fell from {100 * best['pgd']:.1f} to {100 * last['pgd']:.1f} %, while "
            f"under FGSM it rose from {100 * best['fgsm']:.1f} to {100 * last['fgsm']:.1f} %")


def check_held_out(validations: Sequence[Validation], data: Dataset) -> None:
    """Refuse to choose weights by nothing, on test images, or on images that are trained on."""
    if not validations:
        raise ValueError("best_by: there is no `validate` to choose by")
    for chosen in [v.data for v in validations if hasattr(v, "data")]:
        if chosen.name == data.name and chosen.split != data.split:
            raise ValueError(f"best_by: the validation uses {chosen.split} images of {data.name}; "
                             "weights are chosen on held-out training images (Dataset.split_off)")
        shared = set(chosen.index.tolist()) & set(data.index.tolist())
        if chosen.name == data.name and shared:
            raise ValueError(f"best_by: {len(shared)} of the {len(chosen)} validation images are "
                             "trained on; hold some out (Dataset.split_off)")
