"""Watching, choosing the best epoch, averaging the weights, bf16."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from advlearn import models
from advlearn.attacks import fgsm, pgd
from advlearn.data import load
from advlearn.evaluation import accuracy, worst_case
from advlearn.threats import L2, Linf
from advlearn.training import (
    adversarial,
    fgsm_training,
    fit,
    free,
    held_out,
    natural,
    overfitted,
    trades,
    watch,
)

FEW = load("digits", "train").subset(320)


def network(seed=0):
    return models.mlp((1, 8, 8), (24,), seed=seed)


def run(model, objective=None, **options):
    settings = {"epochs": 3, "batch_size": 64, "progress": False, "seed": 4} | options
    return fit(model, FEW, objective or natural(), **settings)


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


# --- the watch ----------------------------------------------------------------------------------


def rows(fgsm, pgd):
    return [{"epoch": i + 1, "loss": 1.0, "fgsm": f / 100, "pgd": p / 100}
            for i, (f, p) in enumerate(zip(fgsm, pgd, strict=True))]  # fmt: skip


@pytest.mark.parametrize("fgsm, pgd, from_epoch", [
    ([30, 50, 90], [25, 40, 0], 2),  # overnight
    ([30, 50, 55, 60, 70], [25, 40, 35, 28, 19], 2),  # over several epochs
    ([30, 50, 55, 60, 70], [25, 40, 35, 28, 21], None),  # not yet by 20 points
    ([30, 50, 90, 60], [25, 40, 0, 45], None),  # and recovered
    ([30, 50, 50], [25, 40, 0], None),  # FGSM does not rise: it is something else
    ([30, 50, 30], [25, 40, 0], None),
    ([50, 80, 99], [0, 0, 0], None),  # never robust
    ([30, 60, 90], [25, 40, 60], None),  # as it should be
    ([10, 50], [30, 5], 1),
    ([50], [10], None),
    ([], [], None),
])  # fmt: skip
def test_the_rule_of_overfitting(fgsm, pgd, from_epoch):
    message = overfitted(rows(fgsm, pgd))
    if from_epoch is None:
        assert message is None
        return
    assert message == (
        f"catastrophic overfitting: from epoch {from_epoch} to {len(fgsm)} accuracy under PGD fell "
        f"from {pgd[from_epoch - 1]:.1f} to {pgd[-1]:.1f} %, while under FGSM it rose from "
        f"{fgsm[from_epoch - 1]:.1f} to {fgsm[-1]:.1f} %")  # fmt: skip


def test_rows_without_a_watch_set_nothing_off():
    assert overfitted([{"epoch": 1, "loss": 1.0, "clean": 0.9, "robust": 0.5}]) is None


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0)])
def test_the_watch_measures_fgsm_and_pgd(threat):
    model, (data, kept) = network(), load("digits", "train").split_off(200)
    history = fit(model, data, fgsm_training(threat), epochs=4, batch_size=32, progress=False,
                  validate=[held_out(kept), watch(kept, threat)])  # fmt: skip
    x, y = kept.tensors()
    assert history["clean"][-1] == accuracy(model, x, y)
    ten = partial(pgd, steps=10, step_size=threat.eps / 4)
    for name, attack in (("fgsm", fgsm), ("pgd", ten)):
        found = worst_case(model, x, y, threat, [attack], index=kept.index).accuracy
        assert history[name][-1] == found
    assert history["pgd"][-1] < history["fgsm"][-1] < history["clean"][-1]


def test_overfitting_is_warned_of_once(tmp_path):
    """Also after a recovery, but not again by the training that goes on."""
    planted, epoch = rows([30, 50, 90, 95, 60, 90], [25, 40, 0, 0, 45, 0]), []

    def validate(model):
        epoch.append(0)
        return {k: planted[len(epoch) - 1][k] for k in ("fgsm", "pgd")}

    with pytest.warns(UserWarning, match="catastrophic overfitting") as caught:
        run(network(), validate=validate, epochs=6, checkpoint=tmp_path / "t.safetensors")
    assert [str(w.message).split(" accuracy")[0][-6:] for w in caught] == ["2 to 3", "5 to 6"]
    assert {w.filename for w in caught} == {__file__}, "it points to the call of fit"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(network(), validate=validate, epochs=6, checkpoint=tmp_path / "t.safetensors")


# --- the best epoch -----------------------------------------------------------------------------


def scored(scores, seen):
    """A validation with planted scores, which notes the weights that it is shown."""
    scores = iter(scores)

    def validate(model):
        seen.append(weights(model))
        return {"score": next(scores)}

    return validate


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("scores, best", [([1, 3, 2, 3], 1), ([0, 1, 2, 3], 3), ([3, 2, 1, 0], 0)])
def test_the_weights_of_the_best_epoch_are_kept(scores, best, average):
    model, seen = network(), []
    run(model, validate=scored(scores, seen), best_by="score", epochs=4, average=average)
    assert torch.equal(weights(model), seen[best]) and len({float(w.sum()) for w in seen}) == 4
    plain, again = network(), []
    run(plain, validate=scored(scores, again), epochs=4, average=average)
    assert all(map(torch.equal, seen, again)), "choosing does not change the training"
    assert torch.equal(weights(plain), seen[-1])


@pytest.mark.parametrize("scores, best", [([1, 3, 2, 0], 1), ([1, 2, 3, 0], 2)])
def test_the_best_epoch_may_lie_before_an_interruption(tmp_path, scores, best):
    seen, calls, path = [], [], tmp_path / "t.safetensors"
    validate = scored(scores, seen)

    def stopping(model, x, y, state):
        calls.append(0)
        if len(calls) > 12:
            raise KeyboardInterrupt
        return natural()(model, x, y, state)

    stopping.description = natural().description
    options = {"validate": validate, "best_by": "score", "epochs": 4, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        run(network(), stopping, **options)
    assert len(seen) == 2
    model = network(seed=3)
    run(model, **options)
    assert torch.equal(weights(model), seen[best])
    finished = network(seed=5)
    run(finished, **options)
    assert torch.equal(weights(finished), seen[best])


def test_early_stopping_by_robust_accuracy():
    data, kept = load("digits", "train").split_off(200)
    model, threat = network(), Linf(0.2)
    validate = held_out(kept, threat, partial(pgd, steps=5, step_size=0.1))
    history = fit(model, data, adversarial(threat, partial(pgd, steps=2), step_size=0.1), epochs=6,
                  batch_size=32, lr=2e-2, schedule=lambda progress: 1.0, validate=validate,
                  best_by="robust", progress=False)  # fmt: skip
    assert validate(model)["robust"] == max(history["robust"]) > history["robust"][-1]


def test_weights_are_chosen_on_held_out_training_images():
    data, kept = load("digits", "train").split_off(200)
    for images, message in (
        (load("digits", "test"), "uses test images of digits"),
        (load("digits", "train").subset(300), r"best_by: \d+ of the 300 validation images are trained on"),
    ):  # fmt: skip
        for validation in (held_out(images), watch(images, Linf(0.1))):
            options = {"validate": [held_out(kept), validation], "progress": False, "epochs": 1}
            with pytest.raises(ValueError, match=message):
                fit(network(), data, natural(), best_by="clean", **options)
            fit(network(), data, natural(), **options)  # looking is allowed
    with pytest.raises(ValueError, match="best_by: there is no `validate` to choose by"):
        fit(network(), data, natural(), best_by="clean", progress=False)
    with pytest.raises(ValueError, match=r"best_by='robust', `validate` returns \['clean', 'epoch'"):
        fit(network(), data, natural(), best_by="robust", validate=held_out(kept), progress=False)


# --- averaged weights ---------------------------------------------------------------------------


def test_the_average_is_the_published_one(monkeypatch):
    """Mean teacher: decay min(1 − 1/(t + 1), α) in the t-th step, the training itself unchanged."""
    step, model, plain, seen = torch.optim.Adam.step, network(), network(), []

    def recording(self, *args, **kwargs):
        done = step(self, *args, **kwargs)
        seen.append(torch.cat([p.detach().flatten().double() for p in self.param_groups[0]["params"]]))
        return done

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    run(plain)
    raw, expected = list(seen), torch.zeros(())
    assert len(raw) == 15
    seen.clear()
    shown = []
    run(model, average=0.8, validate=lambda m: shown.append(weights(m)) or {})
    assert all(map(torch.equal, raw, seen))
    for t, w in enumerate(raw):
        decay = min(1 - 1 / (t + 1), 0.8)
        expected = decay * expected + (1 - decay) * w
        if t == 2:
            assert torch.allclose(expected, torch.stack(raw[:3]).mean(0)), "first the plain mean"
    assert torch.allclose(weights(model), expected, atol=1e-6)
    assert not torch.allclose(weights(model), weights(plain), atol=1e-4)
    assert len(shown) == 3 and torch.equal(shown[-1], weights(model)), "validated is the average"


def test_buffers_are_averaged_and_counters_are_not(tmp_path):
    def normed():
        body = network()
        return nn.Sequential(*body[:2], nn.BatchNorm1d(24), *body[2:])

    model = normed()
    run(model, average=0.9, checkpoint=tmp_path / "t.safetensors")
    assert int(model[2].num_batches_tracked) == 15
    plain = normed()
    run(plain)
    assert not torch.equal(model[2].running_mean, plain[2].running_mean)


@pytest.mark.parametrize("options", [{"replays": 0}, {"average": 1.0}, {"average": -0.1}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=r"fit: replays=.*, average=.*, allowed are 1 or more, and 0"):
        run(network(), **options)


# --- bf16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["natural", "adversarial", "free", "trades"])
def test_bf16_trains(kind):
    data, kept = load("digits", "train").split_off(200)
    types = []

    def attack(f, x, y, threat, *, start, **options):
        types.append(f(x[:1]).dtype)
        return pgd(f, x, y, threat, start=start, steps=2, step_size=0.05, **options)

    threat = Linf(0.1)
    objective = {"natural": natural(), "adversarial": adversarial(threat, attack),
                 "free": free(threat), "trades": trades(threat, attack, 1.0)}[kind]  # fmt: skip
    model = network()
    history = fit(model, data, objective, epochs=6, batch_size=32, precision="bf16-mixed",
                  progress=False, validate=held_out(kept))  # fmt: skip
    assert history["clean"][-1] > 0.7 and history["loss"][-1] < 0.8 * history["loss"][0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    inside = {torch.bfloat16} if kind in ("adversarial", "trades") else set()
    assert set(types) == inside, "the attack computes in bf16 too"
    exact = network()
    fit(exact, data, objective, epochs=6, batch_size=32, progress=False)
    difference = (weights(exact) - weights(model)).abs().max()
    assert 1e-4 < difference, "bf16 was not used"
