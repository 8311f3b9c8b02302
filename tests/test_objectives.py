"""Every objective against its equation, written out once more in plain PyTorch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import digits, mixed_network, same_state, state_of
from torch import nn

from advlearn import models
from advlearn.attacks import fgsm, pgd
from advlearn.data import load
from advlearn.losses import kl_divergence
from advlearn.tensors import Keyed, generator, normal
from advlearn.threats import L2, Linf
from advlearn.training import (
    State,
    adversarial,
    fgsm_training,
    fit,
    free,
    gradient_regularised,
    mixture,
    natural,
    trades,
)

EPS = 0.2


def network():
    return models.mlp((1, 8, 8), (24,))


def state_at(progress=0.5, n=20, carry=None):
    return State(progress, Keyed((0, 0), torch.arange(n)), carry or {})


def gradients(model, losses):
    """Of the mean loss, by all weights, flat."""
    found = torch.autograd.grad(losses.mean(), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def step(f, z, x, y, alpha, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="sum")):
    z = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(f(z), y), z)
    z = torch.max(torch.min(z.detach() + alpha * g.sign(), x + EPS), x - EPS)
    return z.clamp(0, 1)


# --- FGSM ---------------------------------------------------------------------------------------


def test_fgsm_training_from_a_random_start():
    """Algorithm 3 of Wong et al.: uniform start, one step of 1.25 ε, clipped to ball and box."""
    f, (x, y) = network(), digits(20).tensors()
    losses, _ = fgsm_training(Linf(EPS))(f, x, y, state_at())
    z = step(f, Linf(EPS).sample(x, state_at().keys), x, y, 1.25 * EPS)
    assert torch.allclose(losses, F.cross_entropy(f(z), y, reduction="none"), atol=1e-6)


def test_fgsm_training_from_the_image():
    f, (x, y) = network(), digits(20).tensors()
    losses, _ = fgsm_training(Linf(EPS), random_start=False)(f, x, y, state_at())
    z = (x + EPS * (step(f, x, x, y, EPS) - x).sign()).clamp(0, 1)
    assert torch.allclose(losses, F.cross_entropy(f(z), y, reduction="none"), atol=1e-6)


# --- resumed attacks --------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_attacks_that_go_on_where_they_ended(ramp):
    """Two epochs by hand: every image keeps its own perturbation, whatever batch it comes in."""
    data, epochs, alpha = load("digits", "train").subset(100), 2, 0.07
    mine, theirs = network(), network()
    objective = adversarial(Linf(EPS), partial(pgd, steps=2), step_size=alpha, ramp=ramp, resume=True)
    fit(theirs, data, objective, epochs=epochs, batch_size=32, seed=4, progress=False,
        schedule=lambda progress: 1.0)  # fmt: skip
    optimizer, moved = torch.optim.Adam(mine.parameters(), 2e-3), torch.zeros(100, *data.shape)
    for epoch in range(epochs):
        order = torch.randperm(100, generator=generator(4 * 1_000_003 + epoch))
        for i, rows in enumerate(order.split(32)[:3]):
            x, y = data.take(rows).tensors()
            scale = min(1, (3 * epoch + i) / 6 / ramp) if ramp else 1
            threat = Linf(scale * EPS)
            z = threat.project(x + moved[rows], x)
            for _ in range(2):
                g = torch.autograd.grad(F.cross_entropy(mine(z.requires_grad_()), y), z)[0]
                z = threat.project(z.detach() + scale * alpha * g.sign(), x)
            moved[rows] = z - x
            optimizer.zero_grad()
            F.cross_entropy(mine(z), y).backward()
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert "resume=True" in objective.description


# --- free ---------------------------------------------------------------------------------------


def by_hand(model, data, m, epochs, batch_size, lr, alpha):
    """Algorithm 1 of Shafahi et al., with Adam and the order of `fit`; δ projected to the box too."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    delta = torch.zeros(batch_size, *data.shape)
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator(4 * 1_000_003 + epoch))
        for rows in order.split(batch_size)[: len(data) // batch_size]:
            x, y = data.take(rows).tensors()
            for _ in range(m):
                z = (x + delta).clamp(0, 1).requires_grad_()
                optimizer.zero_grad()
                F.cross_entropy(model(z), y).backward()
                optimizer.step()
                z = z.detach() + alpha * z.grad.sign()
                delta = torch.max(torch.min(z, x + EPS), x - EPS).clamp(0, 1) - x


@pytest.mark.parametrize("m, alpha", [(1, None), (3, None), (3, 0.05)])
def test_free_is_the_published_algorithm(m, alpha):
    data = load("digits", "train").subset(200)
    ours, theirs = network(), network()
    fit(ours, data, free(Linf(EPS), step_size=alpha), epochs=2, batch_size=64, replays=m, lr=1e-3,
        schedule=lambda progress: 1.0, seed=4, progress=False)  # fmt: skip
    by_hand(theirs, data, m, 2, 64, 1e-3, alpha or EPS)
    a, b, start = (nn.utils.parameters_to_vector(model.parameters()).detach()
                   for model in (ours, theirs, network()))  # fmt: skip
    assert torch.allclose(a, b, atol=1e-5) and (a - start).abs().max() > 5e-3


class Counted(nn.Module):
    """Counts the passes through a network."""

    def __init__(self):
        super().__init__()
        self.body, self.forwards, self.backwards = network(), 0, 0
        self.body.register_full_backward_hook(self.backward_pass)

    def backward_pass(self, *_):
        self.backwards += 1

    def forward(self, x):
        self.forwards += torch.is_grad_enabled()
        return self.body(x)


@pytest.mark.parametrize("m", [1, 4])
def test_free_needs_one_forward_and_one_backward_pass_a_step(m):
    model = Counted()
    fit(model, load("digits", "train").subset(320), free(Linf(EPS)), epochs=2, batch_size=64,
        replays=m, progress=False)  # fmt: skip
    assert model.forwards == model.backwards == 2 * 5 * m


def test_free_carries_its_perturbation():
    f, (x, y) = network(), digits(20).tensors()
    objective, seen = free(Linf(EPS)), []
    f.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    losses, state = objective(f, x, y, state_at())
    losses.mean().backward()
    carry = state.after()
    assert torch.equal(seen[0], x), "δ begins at 0"
    assert set(carry) == {"delta"} and float(carry["delta"].abs().max()) == pytest.approx(EPS)
    other, labels = x.flip(0), y.flip(0)
    objective(f, other, labels, state_at(carry=carry))
    assert torch.allclose(seen[1], (other + carry["delta"]).clamp(0, 1))


# --- TRADES -------------------------------------------------------------------------------------


def test_trades_is_the_published_loss():
    """trades_loss of the authors' code, ℓ∞. In float64: near x the signs are of tiny numbers."""
    f, (x, y) = network().double(), digits(20).tensors()
    x = x.double()
    p, state = F.softmax(f(x), 1).detach(), state_at()
    z = (x + 0.001 * normal(x, state.keys)).clamp(0, 1)
    for _ in range(4):
        z = step(f, z, x, p, 0.06, lambda logits, p: F.kl_div(
            F.log_softmax(logits, 1), p, reduction="sum"))  # fmt: skip
    robust = F.kl_div(F.log_softmax(f(z), 1), F.softmax(f(x), 1), reduction="batchmean")
    expected = F.cross_entropy(f(x), y) + 30.0 * robust

    objective = trades(Linf(EPS), partial(pgd, steps=4), 30.0, step_size=0.06)
    losses, after = objective(f, x, y, state)
    assert after is state and losses.shape == (20,)
    assert torch.allclose(losses.mean(), expected) and robust > 5e-3
    assert torch.allclose(gradients(f, losses), gradients(f, expected))


def test_trades_does_not_look_at_the_label_inside():
    f, (x, y) = network(), digits(20).tensors()
    found = []

    def attack(*arguments, **options):
        found.append(pgd(*arguments, steps=3, **options))
        return found[-1]

    for labels in (y, (y + 1) % 10):
        trades(L2(1.0), attack, step_size=0.5)(f, x, labels, state_at())
    assert torch.equal(*found) and not torch.equal(found[0], x)
    moved = kl_divergence(f(found[0]), f(x))
    random = kl_divergence(f(L2(1.0).sample(x, generator(0))), f(x))
    assert (moved > 3 * random).all()


def test_the_inner_maximum_leaves_the_network_alone():
    """Evaluation mode inside, the training's own mode for the loss, and everything put back."""
    x, y = digits(6).tensors()
    for objective in (trades(Linf(EPS), partial(pgd, steps=2), step_size=0.1),
                      adversarial(Linf(EPS), partial(pgd, steps=2), step_size=0.1),
                      fgsm_training(Linf(EPS))):  # fmt: skip
        f = mixed_network()
        for module in f.modules():  # without a running average to be moved, or random draws
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                module.eval()
        before = state_of(f)
        objective(f, x.double(), y, state_at(n=6))
        assert same_state(state_of(f), before)


# --- gradient regularisation --------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_gradient_regularisation_on_a_linear_network(lam):
    """There the gradient by x is W^T (p − e_y), so the penalty can be written down."""
    f = models.linear((1, 8, 8)).double()
    x, y = digits(20).tensors()
    x = x.double()
    losses, _ = gradient_regularised(lam)(f, x, y, state_at())
    logits, w = f(x), f[-1].weight
    by_x = (logits.softmax(1) - F.one_hot(y, 10)) @ w
    expected = F.cross_entropy(logits, y, reduction="none") + lam * by_x.square().sum(1)
    assert torch.allclose(losses, expected, atol=1e-12)
    assert torch.allclose(gradients(f, losses), gradients(f, expected), atol=1e-12)
    assert not x.requires_grad


# --- mixtures -----------------------------------------------------------------------------------


def test_mixture():
    f, (x, y) = network(), digits(20).tensors()
    a, b = natural(), fgsm_training(Linf(EPS))
    losses, _ = mixture(0.3, a, b)(f, x, y, state_at())
    parts = [objective(f, x, y, state_at())[0] for objective in (a, b)]
    assert torch.allclose(losses, 0.3 * parts[0] + 0.7 * parts[1])
    for parts in ((free(Linf(EPS)), a), (a, free(Linf(EPS)))):
        _, state = mixture(0.3, *parts)(f, x, y, state_at())
        assert state.after is not None, "what either part keeps is kept"
    text = mixture(0.3, a, b).description
    assert text == f"mixture(0.3, natural, {b.description})" and "0x" not in text


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_share_of_a_mixture(share):
    with pytest.raises(ValueError, match=f"mixture: share={share}, it must be in "):
        mixture(share, natural(), natural())


# --- ramps and descriptions ---------------------------------------------------------------------


@pytest.mark.parametrize("progress, scale", [(0.0, 0), (0.1, 0.25), (0.4, 1), (0.9, 1)])
def test_every_ramp_is_the_same(progress, scale):
    f, (x, y) = network(), digits(20).tensors()
    seen = []

    def watching(f, x, y, threat, *, start, step_size, loss=None):
        seen.append((threat.eps, step_size, float((start - x).abs().max())))
        return start

    for make in (adversarial, trades):
        make(Linf(EPS), watching, step_size=0.04, ramp=0.4)(f, x, y, state_at(progress))
    for eps, step_size, reach in seen:
        assert eps == pytest.approx(EPS * scale) and step_size == pytest.approx(0.04 * scale)
        assert reach <= EPS * scale + 1e-6
    losses, state = free(Linf(EPS), ramp=0.4)(f, x, y, state_at(progress))
    losses.mean().backward()
    assert float(state.after()["delta"].abs().max()) == pytest.approx(EPS * scale)
    for random_start in (True, False):
        objective = fgsm_training(Linf(EPS), random_start=random_start, ramp=0.4)
        full = fgsm_training(Linf(EPS * scale), random_start=random_start)
        losses = [o(f, x, y, state_at(progress))[0] for o in (objective, full)]
        assert torch.allclose(*losses, atol=1e-6)


def test_descriptions_tell_objectives_apart():
    attack, other = partial(pgd, steps=2), partial(pgd, steps=3)
    threats = Linf(0.1), L2(0.1)
    texts = [objective.description for objective in (
        natural(), *(make(t) for t in threats for make in (fgsm_training, free)),
        fgsm_training(Linf(0.1), random_start=False), fgsm_training(Linf(0.1), ramp=0.1),
        free(Linf(0.1), step_size=0.2), free(Linf(0.1), ramp=0.1),
        *(make(t, a) for make in (adversarial, trades) for t in threats for a in (attack, other)),
        trades(Linf(0.1), attack, 1.0), trades(Linf(0.1), attack, step_size=0.1),
        trades(Linf(0.1), attack, ramp=0.1), gradient_regularised(1.0), gradient_regularised(2.0),
        mixture(0.5, natural(), natural()), mixture(0.4, natural(), natural()),
        mixture(0.5, natural(), adversarial(Linf(0.1), fgsm)),
    )]  # fmt: skip
    assert len(set(texts)) == len(texts) and not any("0x" in text for text in texts)
