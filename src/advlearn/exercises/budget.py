"""`check_trainer`: what a trainer makes of a fixed number of gradients, beside a rival."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from advlearn import models, training
from advlearn.attacks import fgsm, pgd
from advlearn.data import Dataset
from advlearn.evaluation import paired, predict
from advlearn.exercises.report import Finding, Report, Unusable, examine
from advlearn.exercises.watched import Watched
from advlearn.tensors import Keyed
from advlearn.threats import Threat

SEEDS, BATCH, LR, RAMP = (0, 1, 2), 32, 8e-3, 0.3
COSTS = {"FGSM": 2, "PGD-5": 6}  # Gradients per image and step.
Trainer = Callable[[nn.Module, Dataset, Threat, int, int], object]


def rival(name: str, model: nn.Module, images: Dataset, threat: Threat, gradients: int,
          seed: int) -> None:  # fmt: skip
    """Train `model` in place with as many whole epochs of "FGSM" or "PGD-5" as the budget pays.

    Adam with a learning rate of 0.008 and batches of 32; ε grows over the first 30 %.
    """
    objective = (training.fgsm_training(threat, random_start=False, ramp=RAMP) if name == "FGSM"
                 else training.adversarial(threat, partial(pgd, steps=5), ramp=RAMP,
                                           step_size=threat.eps / 3))  # fmt: skip
    training.fit(model, images, objective, epochs=gradients // (COSTS[name] * len(images)),
                 batch_size=BATCH, lr=LR, seed=seed, progress=False)  # fmt: skip


class _Contest:
    """The reader's trainer and its rival, from the same weights, on the same images."""

    def __init__(self, train: Trainer, images: Dataset, test: Dataset, threat: Threat,
                 gradients: int, name: str) -> None:  # fmt: skip
        self.train, self.images, self.test, self.threat = train, images, test, threat
        self.gradients, self.name, self.measured = gradients, name, ""
        self.x, self.y = test.tensors()
        self.before = images.images.clone()
        self.networks: list[Watched] = []

    def fresh(self, seed: int) -> nn.Module:
        return models.small_conv(self.images.shape, seed=seed).to(self.x.device)

    def in_budget(self) -> str | None:
        for seed in SEEDS:
            model = Watched(self.fresh(seed))
            start = torch.cat([p.detach().flatten() for p in model.parameters()])
            self.train(model, self.images, self.threat, self.gradients, seed)
            self.networks.append(model.eval())
            if model.gradients > self.gradients:
                return f"{model.gradients:,} gradients, allowed are {self.gradients:,}"
            if model.images > 2 * self.gradients:
                return (f"{model.images:,} images in forward passes, allowed are twice as many as "
                        "gradients")  # fmt: skip
            after = torch.cat([p.detach().flatten() for p in model.parameters()])
            if torch.equal(start, after):
                return "the weights have not moved: train the given network in place"
        return None

    def untouched(self) -> str | None:
        same = torch.equal(self.before, self.images.images)
        return None if same else "the training images were changed"

    def right(self, f: nn.Module) -> Tensor:
        """Right without attack, under FGSM and under PGD-20 from a random start, (3, N)."""
        start = self.threat.sample(self.x, Keyed(7, self.test.index))
        eps = self.threat.eps
        walk = pgd(f, self.x, self.y, self.threat, steps=20, step_size=eps / 8, start=start)
        step = fgsm(f, self.x, self.y, self.threat)
        return torch.stack([predict(f, z).argmax(1) == self.y for z in (self.x, step, walk)])

    def better(self) -> str | None:
        if len(self.networks) < len(SEEDS):
            raise Unusable("cannot be judged: no three trained networks within the budget")
        rivals = [self.fresh(seed) for seed in SEEDS]
        for seed, model in zip(SEEDS, rivals, strict=True):
            rival(self.name, model, self.images, self.threat, self.gradients, seed)
        yours, theirs = (torch.stack([self.right(f) for f in fs]).double().mean(0)
                         for fs in ([w.f for w in self.networks], rivals))  # fmt: skip
        gain, low, high = (100 * v for v in paired(yours[2], theirs[2]))
        spent = max(w.gradients for w in self.networks)

        def said(shares: Tensor) -> str:
            return " / ".join(f"{100 * float(v):.1f}" for v in shares.mean(1))

        self.measured = (f"under PGD-20 {gain:+.1f} points [{low:+.1f}, {high:+.1f}]; clean / FGSM "
                         f"/ PGD-20: yours {said(yours)} %, {self.name}-trained {said(theirs)} %; "
                         f"{spent:,} gradients")  # fmt: skip
        if low > 0:
            return None
        return "the gain's interval does not lie above 0" + (
            ": yours does well under FGSM only" if yours[1].mean() > theirs[1].mean() else "")


def check_trainer(
    train: Trainer, images: Dataset, test: Dataset, threat: Threat, *, gradients: int,
    rival: str = "PGD-5",
) -> Report:  # fmt: skip
    """Does `train(model, images, threat, gradients, seed)` beat a rival at the same price?

    Three small networks (seeds 0 to 2 of weights) are trained in place by the reader's function
    and by the rival: "FGSM" or "PGD-5", with a learning rate and a batch size at which both do
    well. An image's score is the share of the three that is right under PGD-20. The comparison is
    paired by image: the 95 % interval of the difference must lie above 0.

    Args:
        train: the reader's function; the network it is given counts its gradients, those of the
            images and those of the weights, one for each image in a backward pass.
        images: training images; `test`: others.
        threat: for the training and the test.
        gradients: the budget for one network. Twice as many images may pass forward.
        rival: "FGSM" or "PGD-5".

    Raises:
        ValueError: another rival; a budget that does not pay one epoch of it.
    """
    if rival not in COSTS:
        raise ValueError(f"check_trainer: rival={rival!r}, allowed are {', '.join(COSTS)}")
    if gradients < (least := COSTS[rival] * len(images)):
        raise ValueError(f"check_trainer: gradients={gradients}, one epoch of {rival} needs {least}")
    contest = _Contest(train, images, test, threat, gradients, rival)
    report = examine(train, [
        (f"at most {gradients:,} gradients for each of {len(SEEDS)} networks", contest.in_budget),
        ("leaves the images as they are", contest.untouched),
        (f"more robust than after {rival} training", contest.better),
    ])  # fmt: skip
    *others, last = report.findings
    return Report(report.subject, (*others, Finding(last.claim, last.problem, contest.measured)))
