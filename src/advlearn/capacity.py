"""One cell of the capacity table: a network of some width, one training, and what came out of it.

The experiment of Madry et al., arXiv:1706.06083 (the capacity figure, and Table 5's protocol), as
one function that a chapter calls for a few cells and a sweep for the whole grid.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from advlearn import data, models
from advlearn.attacks import Attack, fgsm, pgd
from advlearn.data import Dataset
from advlearn.evaluation import predict, worst_case
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed
from advlearn.threats import Linf, Threat
from advlearn.training import Objective, adversarial, fgsm_training, fit, natural

THREATS = {"digits": Linf(0.2), "mnist": Linf(0.3)}
TRAININGS = ("natural", "fgsm", "pgd")
RAMP = 0.3  # Share of a ramped training over which ε grows to its full size.
STEPS = 5  # Of the PGD inside a training, each of size ε / 3.


def cell(
    width: int,
    training: str,
    ramp: bool,
    seed: int,
    images: int,
    epochs: int,
    *,
    dataset: str = "mnist",
    n: int = 1000,
    batch_size: int | None = None,
    lr: float = 2e-3,
    network: nn.Module | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, object]:
    """Train one network and measure it: one cell of the capacity table.

    Args:
        width: of `models.madry_mnist`, 1 to 16 in the paper.
        training: "natural", "fgsm" (one step of ε from the image) or "pgd" (`STEPS` steps from a
            random point).
        ramp: whether ε grows over the first `RAMP` of the training; nothing for "natural".
        seed: of weights, subset, order and starts.
        images: how many training images (the data set's last ones are for choosing, and left out).
        epochs, lr: of `training.fit`.
        batch_size: of `training.fit`; None takes 128, and 32 for the few images of "digits".
        dataset: a key of `THREATS`, which gives ε.
        n: test images, and training images for the losses.
        network: trained in place of `madry_mnist(width)` from random weights, for other shapes and
            other starts.
        device: where to train.
        progress: show a bar.

    Returns:
        `measure`'s values, and "losses": the mean training loss of every epoch.

    Raises:
        ValueError: unknown training or data set.
    """
    threat, few = threat_of(dataset), dataset == "digits"
    whole = data.load(dataset, "train", device).split_off(200 if few else 5000)[0]
    chosen, test = whole.subset(images, seed), data.load(dataset, "test", device).subset(n, seed)
    if network is None:
        network = models.madry_mnist(whole.shape, width, seed=seed)
    history = fit(network.to(device), chosen, objective(training, threat, ramp), epochs=epochs,
                  batch_size=batch_size or (32 if few else 128), lr=lr, seed=seed,
                  progress=progress)  # fmt: skip
    values = measure(network.eval(), training, chosen.subset(n), test, threat, seed)
    return values | {"losses": history["loss"]}


def threat_of(dataset: str) -> Threat:
    """The ℓ∞ ball of a data set's capacity table.

    Raises:
        ValueError: there is no table of that data set.
    """
    if dataset not in THREATS:
        raise ValueError(f"capacity: dataset={dataset!r}, allowed are {', '.join(THREATS)}")
    return THREATS[dataset]


def objective(training: str, threat: Threat, ramp: bool = False) -> Objective:
    """What a training of this name minimises.

    Raises:
        ValueError: unknown name.
    """
    if training not in TRAININGS:
        raise ValueError(f"capacity: training={training!r}, allowed are {', '.join(TRAININGS)}")
    share = RAMP if ramp else 0.0
    if training == "natural":
        return natural()
    if training == "fgsm":
        return fgsm_training(threat, random_start=False, ramp=share)
    return adversarial(threat, partial(pgd, steps=STEPS), step_size=threat.eps / 3, ramp=share)


def measure(
    f: nn.Module, training: str, seen: Dataset, test: Dataset, threat: Threat, seed: int = 0
) -> dict[str, float]:
    """A trained network's accuracies and losses.

    Returns:
        "natural", "fgsm", "pgd": accuracy on test images as they are, under FGSM and under PGD-40
            (one random start, steps of ε / 30, as in the paper).
        "loss": mean cross-entropy of training images under the training's own attack at full ε:
            the paper's final training loss.
        "pgd_loss": the same under PGD-40, whatever the training was; the loss that minimax
            training is about.
        "top": share of test images that get the commonest answer, 1 for a constant network.
    """
    strong = partial(pgd, steps=40, step_size=threat.eps / 30)
    own = {"natural": None, "fgsm": fgsm,
           "pgd": partial(pgd, steps=STEPS, step_size=threat.eps / 3)}[training]  # fmt: skip
    x, y = test.tensors()
    judged = [worst_case(f, x, y, threat, [a], seed=seed, index=test.index) for a in (fgsm, strong)]
    answers = predict(f, x).argmax(1)
    return {
        "natural": judged[0].clean_accuracy, "fgsm": judged[0].accuracy, "pgd": judged[1].accuracy,
        "loss": mean_loss(f, seen, threat, own, seed),
        "pgd_loss": mean_loss(f, seen, threat, strong, seed),
        "top": float(answers.bincount().max()) / len(y),
    }  # fmt: skip


def mean_loss(
    f: nn.Module, images: Dataset, threat: Threat, attack: Attack | None = None, seed: int = 0
) -> float:
    """Mean cross-entropy of the images, under an attack from random starts if one is given."""
    total = 0.0
    for x, y, index in images.batches(256):
        if attack is not None:
            x = threat.render(attack(f, x, y, threat, start=threat.sample(x, Keyed(seed, index))), x)
        total += float(cross_entropy(predict(f, x), y).sum())
    return total / len(images)
