import math
from functools import partial

import pytest
import torch
from helpers import digits
from torch import nn

from advlearn import data, models, training
from advlearn.attacks import fgsm, pgd
from advlearn.capacity import cell, mean_loss, measure, objective, threat_of
from advlearn.evaluation import predict, worst_case
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed
from advlearn.threats import Linf

THREAT = Linf(0.2)
STRONG = partial(pgd, steps=40, step_size=0.2 / 30)
small = partial(cell, images=320, epochs=1, dataset="digits", n=60)


def constant(label):
    """Nearly the same probability for every class, and always the same answer."""
    f = models.linear((1, 8, 8))
    for p in f.parameters():
        p.data.zero_()
    f[-1].bias.data[label] = 1e-4
    return f


def test_a_cell_written_out():
    train = data.load("digits", "train").split_off(200)[0].subset(320, 3)
    test = data.load("digits", "test").subset(60, 3)
    f = models.madry_mnist((1, 8, 8), 2, seed=3)
    adversarial = training.adversarial(THREAT, partial(pgd, steps=5), step_size=0.2 / 3, ramp=0.3)
    history = training.fit(f, train, adversarial, epochs=2, batch_size=32, lr=1e-3, seed=3,
                           progress=False)  # fmt: skip
    values = cell(2, "pgd", True, 3, 320, 2, dataset="digits", n=60, lr=1e-3)
    assert values["losses"] == history["loss"]
    x, y = test.tensors()
    for name, attacks in {"natural": [], "fgsm": [fgsm], "pgd": [STRONG]}.items():
        assert values[name] == worst_case(f, x, y, THREAT, attacks, seed=3, index=test.index).accuracy
    assert values["top"] == predict(f, x).argmax(1).bincount().max().item() / 60
    x, y = train.subset(60).tensors()
    keys = Keyed(3, train.subset(60).index)
    for name, attack in {"loss": partial(pgd, steps=5, step_size=0.2 / 3), "pgd_loss": STRONG}.items():
        z = attack(f, x, y, THREAT, start=THREAT.sample(x, keys))
        assert values[name] == pytest.approx(float(cross_entropy(predict(f, z), y).mean()), rel=1e-5)


@pytest.mark.parametrize("ramp", [False, True])
def test_objectives_by_name(ramp):
    share = 0.3 if ramp else 0.0
    same = {
        "natural": training.natural(),
        "fgsm": training.adversarial(THREAT, fgsm, ramp=share),
        "pgd": training.adversarial(THREAT, partial(pgd, steps=5), step_size=0.2 / 3, ramp=share),
    }
    for name, expected in same.items():
        assert objective(name, THREAT, ramp).description == expected.description


def test_the_loss_is_that_of_the_trainings_own_attack():
    seen, test, f = digits(40, "train"), digits(20), models.madry_mnist((1, 8, 8), 4)
    loss = {name: measure(f, name, seen, test, THREAT)["loss"] for name in ("natural", "fgsm", "pgd")}
    x, y = seen.tensors()
    assert loss["natural"] == pytest.approx(float(cross_entropy(predict(f, x), y).mean()), rel=1e-5)
    attacked = fgsm(f, x, y, THREAT)
    assert loss["fgsm"] == pytest.approx(float(cross_entropy(predict(f, attacked), y).mean()), rel=1e-5)
    assert loss["natural"] < loss["fgsm"] < loss["pgd"]
    assert loss["pgd"] == pytest.approx(measure(f, "natural", seen, test, THREAT)["pgd_loss"], rel=0.1)


def test_a_constant_network():
    test = digits(100)
    values = measure(constant(7), "pgd", digits(50, "train"), test, THREAT)
    share = float((test.labels == 7).double().mean())
    assert values["top"] == 1 and values["natural"] == values["fgsm"] == values["pgd"] == share
    assert values["loss"] == pytest.approx(math.log(10), abs=1e-3)
    assert values["pgd_loss"] == pytest.approx(math.log(10), abs=1e-3)


def test_mean_loss_counts_every_image_once():
    """Also where the last batch is smaller, and whatever mode the network is in."""
    images, f = digits(300, "train"), models.madry_mnist((1, 8, 8), 1)
    f = nn.Sequential(*f[:-1], nn.Dropout(0.5), f[-1]).train()
    x, y = images.tensors()
    whole = float(cross_entropy(predict(f, x), y).mean())
    assert mean_loss(f, images, THREAT) == pytest.approx(whole, rel=1e-5)
    assert f[-2].training


def test_a_given_network_is_trained_in_place():
    f, x = models.mlp((1, 8, 8), (5,)), digits(30).tensors()[0]
    before, random = f(x).detach(), torch.get_rng_state()
    values = small(1, "natural", False, 0, network=f)
    assert not torch.equal(before, f(x)) and not f.training
    assert torch.equal(random, torch.get_rng_state())
    again = models.mlp((1, 8, 8), (5,))
    assert small(1, "natural", False, 0, network=again) == values
    assert small(1, "natural", False, 0) != values


def test_batch_size():
    """128 by default, 32 where images are few, else what is asked for."""
    assert small(1, "natural", False, 0) == small(1, "natural", False, 0, batch_size=32)
    assert small(1, "natural", False, 0)["losses"] != small(1, "natural", False, 0, batch_size=64)["losses"]
    with pytest.raises(ValueError, match="batch_size=400, allowed are 1 to 320"):
        small(1, "natural", False, 0, batch_size=400)


def test_seed_and_width_matter():
    first = small(2, "fgsm", True, 0)
    assert first == small(2, "fgsm", True, 0)
    for other in (small(2, "fgsm", True, 1), small(1, "fgsm", True, 0), small(2, "fgsm", False, 0)):
        assert other["losses"] != first["losses"]


def test_unknown_names():
    with pytest.raises(ValueError, match="training='trades', allowed are natural, fgsm, pgd"):
        small(1, "trades", False, 0)
    with pytest.raises(ValueError, match="dataset='svhn', allowed are digits, mnist"):
        threat_of("svhn")
    assert threat_of("mnist") == Linf(0.3)
