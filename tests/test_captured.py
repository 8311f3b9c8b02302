"""Captured attacks. The CUDA graph itself runs only where there is CUDA (the last tests); what is
around it, inputs, padding and bookkeeping, runs here on a stand-in that repeats the recorded call.
"""

import gc
import weakref
from functools import partial
from importlib import import_module

import pytest
import torch
from helpers import digits

from advlearn import models
from advlearn.attacks import captured, fgsm, name_of, pgd
from advlearn.data import load
from advlearn.evaluation import worst_case
from advlearn.losses import kl_divergence, margin
from advlearn.tensors import generator
from advlearn.threats import L1, L2, Linf
from advlearn.training import adversarial, fit, trades

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here: graphs stay untested")
PGD = partial(pgd, steps=3)


def network(seed=0):
    return models.mlp((1, 8, 8), (24,), seed=seed).eval()


def images(n=20, device="cpu"):
    x, y = digits(n).tensors()
    return x.to(device), y.to(device)


@pytest.fixture
def graphs(monkeypatch):
    """Recordings that repeat the call on the slots; a list of how many were made."""
    made = []

    def record(run, device):
        made.append(0)
        z = run().clone()
        return (lambda: z.copy_(run())), z

    module = import_module("advlearn.attacks.captured")  # its name in the package is the function
    monkeypatch.setattr(module, "_has_graphs", lambda x: True)
    monkeypatch.setattr(module, "_record", record)
    return made


def test_without_cuda_the_attack_is_called(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    f, (x, y) = network(), images()
    start = Linf(0.2).sample(x, generator(0))
    z = captured(PGD)(f, x, y, Linf(0.2), start=start, step_size=0.1)
    assert torch.equal(z, PGD(f, x, y, Linf(0.2), start=start, step_size=0.1))


def test_it_goes_by_the_name_of_the_attack():
    """So a checkpoint does not mind whether its attack was captured."""
    assert name_of(captured(PGD)) == "pgd"
    plain, other = (adversarial(Linf(0.1), a, step_size=0.1).description for a in (PGD, captured(PGD)))
    assert plain == other


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0), L1(3.0), Linf(torch.linspace(0, 0.3, 20))])
def test_new_inputs_reach_the_recording(graphs, threat):
    f, attack = network(), captured(PGD)
    for i in range(3):
        x, y = (v.roll(i, 0) for v in images())
        now = threat.scaled(1 - 0.3 * i)
        start = now.sample(x, generator(i))
        for _ in range(2):
            z = attack(f, x, y, now, start=start, step_size=0.02 * i)
            assert torch.allclose(z, PGD(f, x, y, now, start=start, step_size=0.02 * i), atol=1e-6)
        with torch.no_grad():
            f[-1].bias += i  # trained in place
    assert len(graphs) == 1, "recorded once"


def test_fewer_images_are_padded_and_more_recorded_anew(graphs):
    f, attack, threat = network(), captured(PGD), Linf(0.2)
    x, y = images(30)
    for n, recordings in ((10, 1), (3, 1), (10, 1), (30, 2), (1, 2), (20, 2)):
        rows = torch.arange(n)
        z = attack(f, x[rows], y[rows], threat, start=x[rows], step_size=0.1)
        assert torch.allclose(z, PGD(f, x[rows], y[rows], threat, step_size=0.1), atol=1e-6)
        assert len(graphs) == recordings
    z_before = z.clone()
    attack(f, 1 - x, y, threat, start=1 - x, step_size=0.1)
    assert torch.equal(z, z_before), "an answer is the caller's own"


def test_what_needs_a_recording_of_its_own(graphs):
    f, g, attack = network(), network(1), captured(PGD)
    x, y = images()
    calls = [dict(f=f, threat=Linf(0.2)), dict(f=g, threat=Linf(0.2)), dict(f=f, threat=L2(0.2)),
             dict(f=f, threat=Linf(0.2), loss=margin), dict(f=f, threat=Linf(0.2), start=x)]  # fmt: skip
    for made, options in enumerate(calls, 1):
        options = {"x": x, "y": y, "step_size": 0.1, **options}
        for _ in range(2):
            assert torch.allclose(attack(**options), PGD(**options), atol=1e-6)
        assert len(graphs) == made
    target = g(x).detach()  # TRADES: logits in place of labels
    options = {"start": 1 - x, "step_size": 0.1, "loss": kl_divergence}
    z = attack(f, x, target, Linf(0.2), **options)
    assert torch.allclose(z, PGD(f, x, target, Linf(0.2), **options), atol=1e-6)


def test_a_network_is_not_mistaken_for_one_that_is_gone(graphs, monkeypatch):
    """Python gives the id of a dead network to the next one, so a recorded one is kept alive."""
    module, (x, y) = import_module("advlearn.attacks.captured"), images()
    attack = captured(PGD)
    for seed in range(12):  # more than are kept
        f = network(seed)
        z = attack(f, x, y, Linf(0.2), step_size=0.1)
        assert torch.allclose(z, PGD(f, x, y, Linf(0.2), step_size=0.1), atol=1e-6)
    assert len(graphs) == 12
    # A true graph holds no Python object.
    monkeypatch.setattr(module, "_record", lambda run, device: ((lambda: None), run()))
    alive = weakref.ref(f := network())
    attack(f, x, y, Linf(0.2), step_size=0.1)
    del f
    gc.collect()
    assert alive() is not None


def test_judge_and_training_with_captured_attacks(graphs):
    f, (x, y) = network(), images(100)
    attacks = [fgsm, partial(pgd, steps=3, step_size=0.1)]
    plain, ours = (worst_case(f, x, y, Linf(0.1), [wrap(a) for a in attacks], batch_size=32)
                   for wrap in (lambda a: a, captured))  # fmt: skip
    assert plain.trace == ours.trace and len(graphs) == 2
    data = digits(split="train").subset(128)
    for make in (adversarial, trades):
        results = []
        for attack in (PGD, captured(PGD)):
            model = network()
            fit(model, data, make(Linf(0.2), attack, step_size=0.1, ramp=0.5), epochs=2,
                batch_size=32, progress=False)  # fmt: skip
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.allclose(*results, atol=1e-4)
    assert len(graphs) == 4


# --- only where there is CUDA -------------------------------------------------------------------


@CUDA
@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0), L1(3.0)])
def test_a_graph_gives_what_the_attack_gives(threat):
    f, attack = network().cuda(), captured(partial(pgd, steps=10))
    for i, n in enumerate((64, 64, 20)):
        x, y = images(n, "cuda")
        now = threat.scaled(1 - 0.3 * i)
        start = now.sample(x, generator(i, "cuda"))
        z = attack(f, x, y, now, start=start, step_size=0.02 * (i + 1))
        plain = pgd(f, x, y, now, start=start, steps=10, step_size=0.02 * (i + 1))
        assert ((z - plain).abs() < 1e-4).double().mean() > 0.99 and bool(now.contains(z, x).all())


@CUDA
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_on_graphs(precision):
    data = load("digits", "train", "cuda").subset(320)
    losses = []
    for attack in (PGD, captured(PGD)):
        objective = adversarial(Linf(0.1), attack, step_size=0.1, ramp=0.5)
        history = fit(network().cuda(), data, objective, epochs=3, batch_size=32,
                      precision=precision, progress=False)  # fmt: skip
        losses.append(history["loss"][-1])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
