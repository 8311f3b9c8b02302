"""The other libraries' ℓ∞ attacks behind one signature, set up as their own examples do.

Every maker takes a network in eval mode and gives `attack(x, y) -> x_adv` without a random start.
The network is handed over as a reader would hand it over: its weights may still ask for gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn

Attack = Callable[[Tensor, Tensor], Tensor]
Maker = Callable[..., Attack]


def torchattacks(model: nn.Module, eps: float, step_size: float, steps: int, **kw) -> Attack:
    from torchattacks import PGD

    return PGD(model, eps=eps, alpha=step_size, steps=steps, **{"random_start": False, **kw})


def foolbox(model: nn.Module, eps: float, step_size: float, steps: int) -> Attack:
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD

    wrapped = PyTorchModel(model, bounds=(0, 1))
    attack = LinfPGD(abs_stepsize=step_size, steps=steps, random_start=False)
    return lambda x, y: attack.run(wrapped, x, y, epsilon=eps)


def cleverhans(model: nn.Module, eps: float, step_size: float, steps: int) -> Attack:
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    return lambda x, y: projected_gradient_descent(
        model, x, eps, step_size, steps, np.inf, clip_min=0, clip_max=1, y=y, rand_init=False
    )


def art(model: nn.Module, eps: float, step_size: float, steps: int) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 28, 28), 10,
                                   clip_values=(0, 1), device_type="cpu")  # fmt: skip
    attack = ProjectedGradientDescent(classifier, np.inf, eps, step_size, max_iter=steps,
                                      batch_size=256, verbose=False)  # fmt: skip
    return lambda x, y: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def torchattacks_strong(
    model: nn.Module, eps: float, steps: int, queries: int
) -> dict[str, Attack]:
    """torchattacks' strong attacks. Its own AutoAttack takes 10 steps where the papers take 100 (and
    has no argument for it), so it is put together here from the same four attacks.
    """
    from torchattacks import APGD, APGDT, FAB, MultiAttack, Square

    climb = APGD(model, eps=eps, steps=steps)
    targeted = APGDT(model, eps=eps, steps=steps)
    walk = FAB(model, eps=eps, steps=steps, multi_targeted=True)
    search = Square(model, eps=eps, n_queries=queries)
    return {"Auto-PGD on cross-entropy": climb, "Square Attack": search,
            "AutoAttack": MultiAttack([climb, targeted, walk, search])}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    name: str
    package: str
    make: Maker


PEERS = (
    Peer("torchattacks", "torchattacks", torchattacks),
    Peer("foolbox", "foolbox", foolbox),
    Peer("cleverhans", "cleverhans", cleverhans),
    Peer("ART", "adversarial-robustness-toolbox", art),
)


def versions() -> dict[str, str]:
    found = {}
    for peer in PEERS:
        try:
            found[peer.name] = version(peer.package)
        except PackageNotFoundError:
            found[peer.name] = "not installed"
    return found
