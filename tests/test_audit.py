"""The audit finds every planted fraud, which plain PGD believes, and flags no honest network."""

from functools import partial

import pytest
import torch
from helpers import digits, mixed_network, same_state, state_of
from torch import nn

from advlearn import zoo
from advlearn.attacks import on, pgd
from advlearn.defences import Quantised, RandomResized, Saturated
from advlearn.evaluation import audit, predict, worst_case
from advlearn.gradients import averaged, input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import frozen, generator
from advlearn.threats import L1, L2, Linf

EPS = 0.2
RANDOM = "the verdict does not repeat"
ZERO = "gradients are zero"
NOISE = "noise beats the attack"
LOSS = "another loss beats the attack"
MORE = "more steps and restarts go on winning"
BOX = "images survive the whole box"
BLIND = "a black-box attack beats the gradient"


@pytest.fixture(scope="module")
def networks():
    load = zoo.load_or_train
    return {"natural": load("digits-small-natural"), "robust": load("digits-small-pgd"),
            "other seed": load("digits-small-natural", seed=1), "mlp": load("digits-mlp-natural")}


def judged(f, threat=None, n=150, **options):
    return audit(f, *digits(n).tensors(), threat or Linf(EPS), queries=300, **options)


@pytest.mark.parametrize("name", ["natural", "robust", "other seed", "mlp"])
@pytest.mark.parametrize("threat", [Linf(EPS), Linf(EPS / 3), L2(0.5), L1(2.0)], ids=str)
def test_no_honest_network_is_flagged(networks, name, threat):
    page = judged(networks[name], threat, source=networks["other seed" if name == "natural" else "natural"])
    assert page.raised == (), page
    assert page.accuracy <= page.claimed.accuracy and len(page.flags) == 7


FRAUDS = {  # how to make it, and what must be found; more may be
    "saturated": (Saturated, {ZERO, LOSS, BOX}),
    "quantised": (Quantised, {ZERO, BLIND, BOX}),
    "random resizing": (RandomResized, {RANDOM, ZERO, BLIND, BOX}),
}


@pytest.mark.parametrize("name", FRAUDS)
def test_every_fraud_is_found_out(networks, name):
    make, flags = FRAUDS[name]
    page = judged(make(networks["natural"]), source=networks["natural"], n=100)
    assert page.claimed.accuracy > 0.6, "plain PGD believes it"
    assert page.accuracy < 0.2, "the audit's attacks do not"
    assert flags <= set(page.raised), page
    assert LOSS in page.raised or name != "saturated"


def test_quantised_needs_no_source(networks):
    page = judged(Quantised(networks["natural"]))
    assert BLIND in page.raised and page.accuracy < 0.3, "Square alone finds it"


def test_a_late_gradient_is_found_by_more_steps(networks):
    """Far steps are needed: a network whose gradient is right, and whose first steps find nothing."""

    class Slow(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, z):
            out = self.model(z)
            if z.requires_grad:  # The gradient of every other image only, then of the others.
                self.calls += 1
                keep = (torch.arange(len(z)) + (self.calls > 60)) % 2 == 0
                out = torch.where(keep[:, None], out, out.detach())
            return out

    page = judged(Slow(networks["natural"]))
    assert MORE in page.raised, page


def test_noise_that_finds_more_than_the_attack():
    class Spiky(nn.Module):
        """Right where the first pixel lies near the image's own; the gradient leads back there."""

        def forward(self, z):
            s = (z[:, 0, 0, 0] - 0.5).abs() - 0.05
            wrong = (s > 0).to(z)  # a jump that no gradient sees
            logits = torch.stack([-s.detach() * 0 - z[:, 0, 0, 0].sub(0.5).square(), 0 * s - 1], 1)
            return logits + torch.stack([-4 * wrong, 4 * wrong], 1) * (s.abs() < 0.04)[:, None]

    x = torch.full((60, 1, 4, 4), 0.5)
    page = audit(Spiky(), x, torch.zeros(60, dtype=torch.long), Linf(0.1), queries=2)
    assert NOISE in page.raised, page


def test_the_network_and_the_images_stay_as_they_are():
    f = mixed_network().float()
    x, y = digits(40).tensors()
    before, x_before = state_of(f), x.clone()
    audit(f, x, y, Linf(EPS), queries=10)
    assert same_state(state_of(f), before) and torch.equal(x, x_before)


def test_the_page_repeats_and_reads_well(networks):
    x, y = digits(40).tensors()
    pages = [audit(Saturated(networks["natural"]), x, y, Linf(EPS), queries=20, batch_size=size)
             for size in (256, 16)]
    assert [f.measured for f in pages[0].flags] == [f.measured for f in pages[1].flags]
    assert torch.equal(pages[0].correct, pages[1].correct)
    text = repr(pages[0])
    for flag in pages[0].flags:
        assert flag.name in text and (flag.meaning in text) == flag.raised
    assert [row[0] for row in pages[0].rows()] == ["⚑" if f.raised else "–" for f in pages[0].flags]
    low, high = pages[0].interval
    assert low <= pages[0].accuracy <= high


def test_the_whole_box_is_whole():
    """Any two images of the box are within the radius; a hundredth less would not do."""
    from advlearn.evaluation.audit import _whole_box

    black, white = torch.zeros(1, 3, 5, 5), torch.ones(1, 3, 5, 5)
    for kind in (Linf, L2, L1):
        radius = _whole_box(kind(0.5), black)
        assert kind(radius).contains(white, black).all()
        assert not kind(0.99 * radius).contains(white, black).any()


@pytest.mark.parametrize("change, message", [
    (lambda x, y: (x * 2, y, Linf(0.1)), r"\[0, 1\]"),
    (lambda x, y: (x, y + 10, Linf(0.1)), "label"),
    (lambda x, y: (x, y, Linf(torch.full((len(x),), 0.1))), "one ε per example"),
])  # fmt: skip
def test_wrong_arguments(networks, change, message):
    with pytest.raises(ValueError, match=message):
        audit(networks["natural"], *change(*digits(8).tensors()))


# --- the defences themselves -------------------------------------------------------------------


def test_saturated_and_quantised_change_what_they_say(networks):
    f, x = networks["natural"], digits(100).tensors()[0]
    logits = predict(f, x)
    assert torch.equal(predict(Saturated(f, 50.0), x), 50 * logits)
    grey = (x * 3).round() / 3
    assert len(grey.unique()) == 4 and torch.equal(predict(Quantised(f, 4), x), predict(f, grey))
    assert torch.equal(predict(Quantised(f, 256), x), logits), "stored images have 256 grey levels"


def test_random_resizing_draws_anew_and_from_its_own_seed():
    x = torch.rand(5, 2, 12, 12, generator=generator(0))
    identity = nn.Identity()
    a, b = (RandomResized(identity, 0.5, None, seed=3) for _ in range(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = a(x), a(x)
    assert torch.equal(torch.get_rng_state(), state), "the global state is left alone"
    assert not torch.allclose(first, second) and torch.equal(first, b(x))
    assert torch.allclose(RandomResized(identity, 1.0, None)(x), x, atol=1e-5)


def test_random_resizing_keeps_the_whole_image():
    """Mass shrinks with the area and nothing is pushed over the edge."""
    x = torch.zeros(400, 1, 40, 40)
    x[:, :, 2:38, 2:38] = 1
    share = RandomResized(nn.Identity(), 0.5, None, seed=1)(x).sum((1, 2, 3)) / 36**2
    assert 0.24 < share.min() < 0.32 and 0.9 < share.max() <= 1.02


def test_without_the_rounding_plain_pgd_is_not_fooled(networks):
    """Forty steps see forty draws: randomness alone hides little. With it, nothing is seen."""
    x, y = digits(150).tensors()
    attack = partial(pgd, steps=40, step_size=EPS / 16)
    left = [worst_case(RandomResized(networks["natural"], 0.9, levels), x, y, Linf(EPS), [attack],
                       votes=11).accuracy for levels in (None, 256)]  # fmt: skip
    assert left[0] < 0.15 and left[1] > 0.6


@pytest.mark.parametrize("make", [
    lambda: Quantised(nn.Identity(), 1), lambda: RandomResized(nn.Identity(), 0.0),
    lambda: RandomResized(nn.Identity(), 1.5), lambda: RandomResized(nn.Identity(), 0.5, 1),
    lambda: averaged(input_grad, 0),
])  # fmt: skip
def test_settings_out_of_range(make):
    with pytest.raises(ValueError):
        make()


def test_averaged_is_the_mean_of_its_draws():
    calls = []

    def noisy(objective, z):
        calls.append(len(calls))
        return torch.full_like(z, len(calls))

    assert torch.equal(averaged(noisy, 4)(None, torch.zeros(2, 3)), torch.full((2, 3), 2.5))


def test_averaged_gradients_of_a_random_network_agree_better(networks):
    f = RandomResized(networks["natural"], 0.8, None)
    x, y = digits(30).tensors()

    def agreement(oracle):
        with frozen(f):
            a, b = (oracle(lambda z: cross_entropy(f(z), y), x).flatten(1) for _ in range(2))
        return torch.cosine_similarity(a, b).mean()

    assert agreement(averaged(input_grad, 32)) > agreement(input_grad) + 0.05


def test_transfer_uses_the_source(networks):
    """Attacking the undefended network through `on` is what breaks the quantised one."""
    x, y = digits(150).tensors()
    attack = on(networks["natural"], partial(pgd, steps=40, step_size=EPS / 16))
    assert worst_case(Quantised(networks["natural"]), x, y, Linf(EPS), [attack]).accuracy < 0.2
