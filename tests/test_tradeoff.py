from functools import partial

import pytest
import torch
from helpers import digits

from advlearn import data, models, tradeoff, training
from advlearn.attacks import pgd
from advlearn.evaluation import predict, worst_case
from advlearn.threats import L2, Linf
from advlearn.tradeoff import cell, images_of, objective, overfit, robust

small = partial(cell, images=200, steps=12, seed=3, dataset="digits", n=50)


def judged(f, images, eps, seed=3):
    x, y = images.tensors()
    walk = partial(pgd, steps=40, step_size=eps / 15)
    return worst_case(f, x, y, Linf(eps), [walk], seed=seed, index=images.index).accuracy


def test_a_cell_written_out():
    chosen = data.load("digits", "train").split_off(200)[0].subset(200, 3)
    test = data.load("digits", "test").subset(50, 3)
    f, threat = models.small_conv((1, 8, 8), seed=3), Linf(0.1)
    walk = partial(pgd, steps=5)
    # 200 // 64 = 3 steps in an epoch, so 12 steps are 4 epochs.
    training.fit(f, chosen, training.adversarial(threat, walk, step_size=0.1 / 3, ramp=0.3),
                 epochs=4, batch_size=64, seed=3, progress=False)  # fmt: skip
    x, y = test.tensors()
    right = float((predict(f.eval(), x).argmax(1) == y).double().mean())
    assert small("pgd", 0.1) == {
        "natural": right, "pgd_low": judged(f, test, 0.05), "pgd_high": judged(f, test, 0.2),
        "train": judged(f, chosen.subset(50), 0.1),
    }  # fmt: skip


def test_a_cell_names_each_accuracy(monkeypatch):
    # An untrained network is wrong at both ε, so accuracies cannot tell them apart.
    monkeypatch.setattr(tradeoff, "robust", lambda f, images, eps, seed: {
        "natural": 0.5, "pgd": (eps, len(images), seed)})  # fmt: skip
    assert small("pgd", 0.1, images=60, steps=1, n=30) == {
        "natural": 0.5, "pgd_low": (0.05, 30, 3), "pgd_high": (0.2, 30, 3), "train": (0.1, 30, 3),
    }  # fmt: skip
    assert small("natural", 0.1, images=20, steps=1)["train"] == (0.0, 20, 3)


def test_natural_training_knows_no_eps_and_few_images_get_as_many_steps(monkeypatch):
    assert small("natural", 0.0) == small("natural", 0.2)
    asked = []
    monkeypatch.setattr(tradeoff, "fit", lambda f, d, o, **options: asked.append(options))
    for images, epochs, batch_size in ((20, 640, 20), (64, 640, 64), (640, 64, 64), (1000, 43, 64)):
        small("natural", 0.0, images=images, steps=640)
        assert (asked[-1]["epochs"], asked[-1]["batch_size"]) == (epochs, batch_size)


def test_objectives_by_name():
    walk, options = partial(pgd, steps=5), {"step_size": 0.3 / 3, "ramp": 0.3}
    same = {
        "natural": training.natural(),
        "pgd": training.adversarial(Linf(0.3), walk, **options),
        "trades": training.trades(Linf(0.3), walk, 2.0, **options),
    }
    for name, expected in same.items():
        assert objective(name, 0.3, 2.0).description == expected.description


def test_held_out_images_are_not_trained_on():
    whole = data.load("digits", "train")
    assert set(images_of("digits", 1000, 0).index.tolist()).isdisjoint(whole.index[-200:].tolist())
    same = [images_of("digits", 50, s).index for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    few, more = (set(images_of("digits", n, 1).index.tolist()) for n in (50, 100))
    assert few < more


def test_robust_needs_no_attack_at_zero():
    f = models.small_conv((1, 8, 8))
    assert len(set(robust(f, digits(40), 0.0).values())) == 1


def test_robust_is_pgd_40_with_steps_of_a_15th(monkeypatch):
    # The small networks of this file fall to weaker attacks as well, so accuracies cannot tell.
    asked = []
    monkeypatch.setattr(tradeoff, "worst_case", lambda f, x, y, threat, attacks, **options: (
        asked.append((threat.eps, attacks, options["seed"])), worst_case(f, x, y, threat, []))[1])
    for eps in (0.0, 0.3):
        robust(models.small_conv((1, 8, 8)), digits(4), eps, seed=7)
    assert asked[0] == (0.0, [], 7)
    eps, (attack,), seed = asked[1]
    assert (eps, seed, attack.func) == (0.3, 7, pgd)
    assert attack.keywords == {"steps": 40, "step_size": 0.3 / 15}


def test_overfitting_keeps_the_best_epoch_after_the_ramp():
    rows, networks = overfit(100, 10, 1, dataset="digits", n=60)
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    best = max(rows[3:], key=lambda row: row["robust"])  # of equals, max takes the first
    threat, kept = Linf(0.2), data.load("digits", "train").split_off(200)[1].subset(60, 1)
    attack = partial(pgd, steps=10, step_size=0.05)
    for name, row in (("best", best), ("last", rows[-1])):
        result = worst_case(networks[name], *kept.tensors(), threat, [attack], index=kept.index)
        assert (result.accuracy, result.clean_accuracy) == (row["robust"], row["clean"])
        assert not networks[name].training
    seen = images_of("digits", 100, 1).subset(60)
    result = worst_case(networks["last"], *seen.tensors(), threat, [attack], index=seen.index)
    assert result.accuracy == rows[-1]["seen"]
    assert networks["best"] is not networks["last"]


@pytest.mark.parametrize("epochs, first", [(10, 4), (60, 19), (1, 1)])
def test_best_is_sought_where_eps_has_its_full_size(monkeypatch, epochs, first):
    seen = []
    monkeypatch.setattr(tradeoff, "fit", lambda f, d, o, **options: (
        seen.append(options["validate"]), training.History())[1])  # fmt: skip
    overfit(40, epochs, 0, dataset="digits", n=20)
    assert seen[0].first == first


def test_overfitting_in_another_ball_with_another_network(monkeypatch):
    asked, fast = {}, []
    monkeypatch.setattr(tradeoff, "fit", lambda f, d, o, **options: (
        asked.update(options, f=f, objective=o.description), options["validate"](f),
        training.History([{}]))[2])  # fmt: skip
    monkeypatch.setattr(models, "fast", lambda f: (fast.append(f), f)[1])
    options = dict(dataset="digits", n=20, threat=L2(0.5), steps=4, ramp=0.1, batch_size=16)
    rows, networks = overfit(
        40, 10, 2, architecture={"name": "five_conv", "width": 2}, precision="bf16-mixed",
        schedule=training.drops(0.5), **options)  # fmt: skip
    assert rows == [{}] and networks["last"] is asked["f"]
    assert asked["objective"] == training.adversarial(
        L2(0.5), partial(pgd, steps=4), step_size=5 * 0.5 / 12, ramp=0.1).description  # fmt: skip
    same = models.five_conv((1, 8, 8), 2, seed=2).state_dict()
    assert all(torch.equal(v, same[k]) for k, v in asked["f"].state_dict().items())
    assert (asked["precision"], asked["batch_size"]) == ("bf16-mixed", 16)
    assert asked["schedule"].description == "drops(0.5, factor=0.1)"
    assert asked["validate"].first == 2 and fast == [asked["f"]] * len(fast) and fast
    fast.clear()
    overfit(40, 10, 2, **options)
    assert not fast


def test_best_is_a_copy_and_not_from_the_ramp():
    keep = tradeoff._Best(digits(20), digits(20, "train"), Linf(0.1), pgd, first=3)
    scores = iter([0.9, 0.8, 0.5, 0.7, 0.7, 0.1])
    keep.validate, keep.on_seen = lambda f: {"robust": next(scores)}, lambda f: {"robust": 0.0}
    f = models.linear((1, 8, 8))
    for epoch in range(1, 7):
        f[-1].bias.data.fill_(epoch)
        keep(f)
    assert keep.best[-1].bias.unique().item() == 4


@pytest.mark.parametrize(
    "change, message",
    [({"training": "fgsm"}, "training='fgsm', allowed are natural, pgd, trades"),
     ({"dataset": "svhn"}, "dataset='svhn', allowed are digits, mnist, cifar10"),
     ({"images": 5000}, r"images=5000, allowed are 1 to \d+"), ({"images": 0}, "images=0")],
)  # fmt: skip
def test_bad_cells(change, message):
    with pytest.raises(ValueError, match=f"tradeoff: {message}"):
        small(**({"training": "natural", "eps": 0.1} | change))
