"""What robustness costs on real images: one network per cell, by ε, number of images and objective.

The experiments of Tsipras et al., arXiv:1805.12152 (accuracy against the ε trained for, and against
the number of training images), of TRADES (arXiv:1901.08573: β as a dial) and of robust overfitting
(Rice et al., arXiv:2002.11569), at a size that two cores reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import nn

from advlearn import data, models
from advlearn.attacks import Attack, pgd
from advlearn.data import Dataset
from advlearn.evaluation import worst_case
from advlearn.threats import Linf, Threat
from advlearn.training import Objective, adversarial, fit, held_out, natural, trades
from advlearn.training.loop import Schedule

JUDGED = {"digits": (0.05, 0.2), "mnist": (0.1, 0.3), "cifar10": (2 / 255, 8 / 255)}
HELD_OUT = {"digits": 200, "mnist": 5000, "cifar10": 5000}  # The last training images.
TRAININGS = ("natural", "pgd", "trades")
RAMP, STEPS = 0.3, 5  # As in chapter 5: share of the training with a growing ε; steps of ε / 3.


def cell(
    training: str,
    eps: float,
    images: int,
    steps: int,
    seed: int,
    *,
    beta: float = 6.0,
    dataset: str = "mnist",
    n: int = 1000,
    batch_size: int = 64,
    network: nn.Module | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """Train one `models.small_conv` and measure it.

    Args:
        training: one of `TRAININGS`.
        eps: ε trained for (ℓ∞, pixel units); nothing for "natural".
        images: how many training images, the same ones for every training of a seed.
        steps: of the weights, about: whole epochs, so that every number of images gets as much
            computation.
        seed: of weights, subset, order and starts.
        beta: of "trades".
        dataset: a key of `JUDGED`.
        n: test images.
        batch_size: at most; no more than there are images.
        network: trained in place of a `small_conv` from random weights.
        device: where to train.
        progress: show a bar.

    Returns:
        "natural": accuracy on test images; "pgd_low", "pgd_high": under PGD-40 (one random start,
        steps of ε / 15) at the two ε of `JUDGED`; "train": on (at most n) training images under
        PGD-40 at the ε trained for.

    Raises:
        ValueError: unknown training or data set; more images than there are.
    """
    chosen = images_of(dataset, images, seed, device)
    epochs = max(1, round(steps / max(1, images // batch_size)))
    test = data.load(dataset, "test", device).subset(n, seed)
    if network is None:
        network = models.small_conv(chosen.shape, seed=seed)
    fit(network.to(device), chosen, objective(training, eps, beta), epochs=epochs,
        batch_size=min(batch_size, images), seed=seed, progress=progress)  # fmt: skip
    network.eval()
    low, high = (robust(network, test, ball, seed) for ball in JUDGED[dataset])
    own = robust(network, chosen.subset(n), eps if training != "natural" else 0.0, seed)
    return {"natural": low["natural"], "pgd_low": low["pgd"], "pgd_high": high["pgd"],
            "train": own["pgd"]}  # fmt: skip


def images_of(dataset: str, images: int, seed: int, device: str | torch.device = "cpu") -> Dataset:
    """Training images, none of those held out for choosing.

    Raises:
        ValueError: unknown data set; more images than there are.
    """
    if dataset not in JUDGED:
        raise ValueError(f"tradeoff: dataset={dataset!r}, allowed are {', '.join(JUDGED)}")
    whole = data.load(dataset, "train", device).split_off(HELD_OUT[dataset])[0]
    if not 1 <= images <= len(whole):
        raise ValueError(f"tradeoff: images={images}, allowed are 1 to {len(whole)}")
    return whole.subset(images, seed)


def objective(training: str, eps: float, beta: float = 6.0) -> Objective:
    """What a training of this name minimises.

    Raises:
        ValueError: unknown name.
    """
    if training not in TRAININGS:
        raise ValueError(f"tradeoff: training={training!r}, allowed are {', '.join(TRAININGS)}")
    if training == "natural":
        return natural()
    walk, options = partial(pgd, steps=STEPS), {"step_size": eps / 3, "ramp": RAMP}
    if training == "trades":
        return trades(Linf(eps), walk, beta, **options)
    return adversarial(Linf(eps), walk, **options)


def robust(f: nn.Module, images: Dataset, eps: float, seed: int = 0) -> dict[str, float]:
    """Accuracy on the images, "natural", and under PGD-40 with steps of ε / 15, "pgd"."""
    x, y = images.tensors()
    attacks = [partial(pgd, steps=40, step_size=eps / 15)] if eps else []
    result = worst_case(f, x, y, Linf(eps), attacks, seed=seed, index=images.index)
    return {"natural": result.clean_accuracy, "pgd": result.accuracy}


def overfit(
    images: int,
    epochs: int,
    seed: int,
    *,
    dataset: str = "mnist",
    architecture: Mapping[str, object] | None = None,
    threat: Threat | None = None,
    steps: int = STEPS,
    ramp: float = RAMP,
    n: int = 500,
    batch_size: int = 64,
    schedule: Schedule | None = None,
    precision: str = "32-true",
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[list[dict[str, float]], Mapping[str, nn.Module]]:
    """PGD training on few images for long: robust overfitting, Rice et al., arXiv:2002.11569.

    Args:
        images, epochs, seed, dataset, batch_size, device, progress: as in `cell`.
        architecture: for `models.build`, without shape and seed; default a `small_conv`.
        threat: trained for; default ℓ∞ with the larger ε of `JUDGED`.
        steps: of the training's PGD, each of size 5 ε / (3 steps).
        ramp: share of the training with a growing ε.
        n: held-out images, judged after every epoch, and training images judged beside them.
        schedule, precision: of `training.fit`. With less than "32-true" the attacks after each
            epoch take their gradients in `models.fast`, too.

    Returns:
        A row for every epoch: "loss" (training), "clean" and "robust" on the n held-out training
        images, "seen" (accuracy on n of those trained on), the last two under PGD-10 of ε / 4; and
        the networks "best" (the epoch with the highest "robust" once ε has its full size, the
        first of equals) and "last".
    """
    chosen = images_of(dataset, images, seed, device)
    threat = Linf(JUDGED[dataset][1]) if threat is None else threat
    spec = {**(architecture or {"name": "small_conv"}), "shape": chosen.shape, "seed": seed}
    network = models.build(spec).to(device)
    kept = data.load(dataset, "train", device).split_off(HELD_OUT[dataset])[1].subset(n, seed)
    judge = partial(pgd, steps=10, step_size=threat.eps / 4)
    if precision != "32-true":
        judge = _with_fast(judge)
    keep = _Best(kept, chosen.subset(n), threat, judge, first=int(ramp * epochs) + 1)
    walk, step_size = partial(pgd, steps=steps), 5 * threat.eps / (3 * steps)
    history = fit(network, chosen, adversarial(threat, walk, step_size=step_size, ramp=ramp),
                  epochs=epochs, batch_size=min(batch_size, images), schedule=schedule,
                  validate=keep, seed=seed, precision=precision, progress=progress)  # fmt: skip
    return history.rows, {"best": keep.best, "last": network.eval()}


def _with_fast(attack: Attack) -> Attack:
    """The same attack with `models.fast` of the network; the verdict stays that of the network."""
    return lambda f, x, y, threat, **options: attack(models.fast(f), x, y, threat, **options)


class _Best:
    """A validation that keeps the network of the best epoch from the `first` on."""

    def __init__(
        self, kept: Dataset, seen: Dataset, threat: Threat, walk: Attack, first: int
    ) -> None:
        self.data, self.first, self.epoch = kept, first, 0
        self.validate, self.on_seen = held_out(kept, threat, walk), held_out(seen, threat, walk)
        self.score, self.best = -1.0, None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.epoch += 1
        row = self.validate(model)
        if self.epoch >= self.first and row["robust"] > self.score:
            self.score, self.best = row["robust"], deepcopy(model).eval()
        return row | {"seen": self.on_seen(model)["robust"]}
