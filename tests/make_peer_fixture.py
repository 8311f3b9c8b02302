"""Make tests/fixtures/peers.npz: what other libraries' attacks return from a given start.

    make bench ARGS="--help"             # makes the environment
    .venv-bench/bin/python tests/make_peer_fixture.py

Float64, at most 10 steps, a tiny random network whose weights are stored with the images. The
libraries draw their random start themselves, from torch's global state: a run of 0 steps returns
it, and a run from the same state takes its steps from there. Nothing of theirs is changed.

In the ℓ2 case all images are so far from black and white that the ball never meets the box: only
there is scaling followed by clipping, which the libraries do, the projection on the set.
"""

from pathlib import Path

import numpy as np
import torch
import torchattacks
from foolbox import PyTorchModel
from foolbox import __version__ as foolbox_version
from foolbox.attacks import L2PGD, LinfFastGradientAttack, LinfPGD

from advlearn import data, models

FIXTURE = Path(__file__).parent / "fixtures" / "peers.npz"
ARCHITECTURE = {"name": "small_conv", "shape": (1, 8, 8), "width": 0.25}

model = models.build({**ARCHITECTURE, "seed": 5}).double().eval()
images, labels = data.load("digits", "test").subset(16).tensors()
images = images.double()
gray = 0.5 + (images - 0.5) / 5  # in [0.4, 0.6]
bounded = PyTorchModel(model, bounds=(0, 1))


def by_torchattacks(kind, eps, step_size):
    return lambda x, steps: kind(model, eps=eps, alpha=step_size, steps=steps)(x, labels)


def by_foolbox(kind, eps, step_size):
    def run(x, steps):
        attack = kind(abs_stepsize=step_size, steps=steps, random_start=True)
        return attack.run(bounded, x, labels, epsilon=eps)

    return run


def fgsm(x, steps):
    return LinfFastGradientAttack().run(bounded, x, labels, epsilon=0.2) if steps else x


# name: threat, images, eps, step size, steps, attack
CASES = {
    "torchattacks PGD": ("Linf", images, 0.2, 0.05, 10,
                         by_torchattacks(torchattacks.PGD, 0.2, 0.05)),
    "torchattacks PGDL2": ("L2", gray, 0.35, 0.1, 10,
                           by_torchattacks(torchattacks.PGDL2, 0.35, 0.1)),
    "foolbox LinfPGD": ("Linf", images, 0.2, 0.05, 10, by_foolbox(LinfPGD, 0.2, 0.05)),
    "foolbox L2PGD": ("L2", gray, 0.35, 0.1, 10, by_foolbox(L2PGD, 0.35, 0.1)),
    "foolbox LinfFastGradientAttack": ("Linf", images, 0.2, 0.2, 1, fgsm),
}  # fmt: skip

arrays = {f"weights/{k}": v.numpy() for k, v in model.state_dict().items()}
arrays |= {"labels": labels.numpy(), "made with": np.array(
    f"torch {torch.__version__}, torchattacks {torchattacks.__version__}, "
    f"foolbox {foolbox_version}")}  # fmt: skip
for name, (threat, x, eps, step_size, steps, attack) in CASES.items():
    torch.manual_seed(0)
    start = attack(x, 0)
    torch.manual_seed(0)
    x_adv = attack(x, steps)
    assert start.dtype == x_adv.dtype == torch.float64
    arrays |= {f"{name}/threat": np.array(threat), f"{name}/eps": np.array(eps),
               f"{name}/step_size": np.array(step_size), f"{name}/steps": np.array(steps),
               f"{name}/x": x.numpy(), f"{name}/start": start.numpy(),
               f"{name}/x_adv": x_adv.detach().numpy()}  # fmt: skip
FIXTURE.parent.mkdir(exist_ok=True)
np.savez_compressed(FIXTURE, **arrays)
print(f"{FIXTURE.name}: {FIXTURE.stat().st_size / 1024:.0f} KB, {len(CASES)} cases")
