"""The standard evaluation: what it is made of, and that it is the strongest attack of the book."""

from functools import partial

import pytest
import torch
from helpers import digits, uniform01

from advlearn import models, zoo
from advlearn.attacks import apgd, cw_inf, fab, from_center, pgd, square, standard_attack, toward
from advlearn.defences import Quantised, Saturated
from advlearn.evaluation import worst_case
from advlearn.losses import dlr_targeted, gap
from advlearn.tensors import generator
from advlearn.threats import L1, L2, Linf


def test_its_parts():
    names = list(standard_attack())
    assert names[:2] == ["APGD-CE, 10 steps", "APGD-CE"] and names[-1] == "Square" and len(names) == 21
    assert names[2:11] == [f"APGD-DLR toward {k}" for k in range(1, 10)]
    assert names[11:20] == [f"FAB toward {k}" for k in range(1, 10)]
    assert len(standard_attack(100)) == 21 and len(standard_attack(10, targets=3)) == 9
    assert list(standard_attack(3))[1:] == ["APGD-CE", "APGD-gap toward 1", "APGD-gap toward 2",
                                            "FAB toward 1", "FAB toward 2", "Square"]  # fmt: skip
    with pytest.raises(ValueError, match="standard_attack: classes=1, it must be 2 or more"):
        standard_attack(1)


@pytest.mark.parametrize("classes, loss, name", [(10, dlr_targeted, "DLR"), (4, dlr_targeted, "DLR"), (3, gap, "gap")])
def test_every_part_aims_at_its_class_from_its_start(classes, loss, name):
    f, x = models.mlp((1, 4, 4), (16,), classes, seed=1), uniform01(12, 1, 4, 4, dtype=torch.float32)
    y, threat = f(x).argmax(1), Linf(0.1)
    attacks = standard_attack(classes, steps=12, queries=20)
    start = threat.sample(x, generator(0))
    wanted = {"APGD-CE": partial(apgd, steps=12), "Square": partial(square, queries=20),
              "APGD-CE, 10 steps": partial(apgd, steps=10)}  # fmt: skip
    for k in range(1, classes):
        wanted[f"APGD-{name} toward {k}"] = toward(k, partial(apgd, steps=12), between=loss)
        wanted[f"FAB toward {k}"] = from_center(toward(k, partial(fab, steps=12), between=gap))
    assert wanted.keys() == attacks.keys()
    for part, attack in wanted.items():
        by_hand, z = (run(f, x, y, threat, start=start) for run in (attack, attacks[part]))
        assert torch.equal(z, by_hand), part


class Counting(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.calls = f, 0

    def forward(self, x):
        self.calls += 1
        return self.f(x)


def test_steps_and_queries_reach_every_part():
    x, y = torch.full((1, 1, 8, 8), 0.5), torch.tensor([0])
    f = models.mlp((1, 8, 8), (), 10)
    with torch.no_grad():
        f[1].weight.zero_()
        f[1].bias.copy_(torch.arange(10, 0, -1))  # never fooled
    spent = {}
    for name, attack in standard_attack(steps=7, queries=13).items():
        counting = Counting(f)
        attack(counting, x, y, Linf(0.1), start=x)
        spent[name.split()[0]] = counting.calls
    assert spent.pop("Square") <= 13
    assert spent == {"APGD-CE,": 11, "APGD-CE": 8, "APGD-DLR": 9, "FAB": 15}  # toward: one look at x


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 12])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=["linf", "l2"])
def test_runs_with_few_classes(classes, threat):
    f, x = models.mlp((1, 4, 4), (16,), classes, seed=1), uniform01(20, 1, 4, 4, dtype=torch.float32)
    y = f(x).argmax(1)
    result = worst_case(f, x, y, threat, standard_attack(classes, steps=10, queries=50))
    plain = worst_case(f, x, y, threat, [partial(pgd, steps=10, step_size=threat.eps / 4)])
    assert result.accuracy <= plain.accuracy < 1 and result.clean_accuracy == 1


def test_more_targets_than_classes_are_refused():
    f, (x, y) = models.mlp((1, 8, 8), (), 10), digits(4).tensors()
    with pytest.raises(ValueError, match="toward: k=10, allowed are 1 to 9"):
        list(standard_attack(20, targets=10).values())[11](f, x, y, Linf(0.1), start=None)


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0)], ids=["linf", "l2"])
def test_stronger_than_restarts_of_pgd(threat):
    f, (x, y) = zoo.load_or_train("digits-small-pgd", progress=False), digits(150).tensors()
    step = threat.eps / 10
    ours = worst_case(f, x, y, threat, standard_attack(steps=40, queries=300))
    restarts = [partial(pgd, steps=40, step_size=step)] * 8 + [partial(cw_inf, steps=40, step_size=step)] * 8
    plain = worst_case(f, x, y, threat, restarts)
    assert ours.accuracy <= plain.accuracy, f"standard {ours.accuracy}, 16 restarts {plain.accuracy}"


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("masked", [Saturated, Quantised])
def test_masked_gradients_fool_pgd_and_not_the_standard_evaluation(masked, threat):
    f = masked(zoo.load_or_train("digits-small-natural", progress=False))
    x, y = digits(100).tensors()
    plain = worst_case(f, x, y, threat, [partial(pgd, steps=40, step_size=threat.eps / 16)])
    r = worst_case(f, x, y, threat, standard_attack(steps=20, queries=200))
    assert plain.accuracy > 0.8, "PGD sees no gradient"
    assert r.accuracy < plain.accuracy / 2, f"PGD {plain.accuracy}, standard {r.accuracy}"
    if masked is Quantised:  # Hardly a gradient anywhere: most of what fell, fell to the search.
        assert (r.fooled_by == len(r.names) - 1).sum() > (r.fooled_by >= 0).sum() / 2


def test_names_the_threats_it_is_made_for():
    f, (x, y) = zoo.load_or_train("digits-small-pgd", progress=False), digits(4).tensors()
    with pytest.raises(ValueError, match="allowed are Linf and L2"):
        worst_case(f, x, y, L1(3.0), standard_attack())
