"""One table of checks for every attack and combinator, and broken attacks that it must catch."""

import math
from functools import partial

import pytest
import torch
from helpers import Opposed, digits, mixed_network, same_state, state_of, uniform01
from torch import nn

from advlearn import models, zoo
from advlearn.attacks import apgd, cw_inf, fab, fgsm, from_center, name_of, on, pgd, square, toward
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy, cw, dlr, gap, margin
from advlearn.tensors import Keyed, frozen, generator, norms, per_example
from advlearn.threats import L1, L2, Linf

THREATS = [Linf, L2, L1]
IDS = ["linf", "l2", "l1"]
DUAL = {Linf: 1, L2: 2, L1: math.inf}

# How to make each attack for a network f and a radius eps. A new attack is a new row here.
ATTACKS = {
    "fgsm": lambda f, eps: fgsm,
    "pgd": lambda f, eps: partial(pgd, steps=60, step_size=eps / 4),
    "pgd, momentum": lambda f, eps: partial(pgd, steps=60, step_size=eps / 4, momentum=0.9),
    "pgd, cw(50)": lambda f, eps: partial(pgd, steps=60, step_size=eps / 4, loss=cw(50)),
    "pgd, dlr": lambda f, eps: partial(pgd, steps=60, step_size=eps / 4, loss=dlr),
    "cw_inf": lambda f, eps: partial(cw_inf, steps=60, step_size=eps / 4),
    "cw_inf, momentum": lambda f, eps: partial(cw_inf, steps=60, step_size=eps / 4, momentum=0.5),
    "on": lambda f, eps: on(f, partial(pgd, steps=60, step_size=eps / 4)),
    "on fast": lambda f, eps: on(models.fast(f), partial(pgd, steps=60, step_size=eps / 4)),
    "toward 1": lambda f, eps: toward(1, partial(pgd, steps=60, step_size=eps / 4)),
    "toward 1, margin": lambda f, eps: toward(1, fgsm, loss=margin),
    "from_center": lambda f, eps: from_center(partial(pgd, steps=60, step_size=eps / 4)),
    "toward from_center on": lambda f, eps: toward(
        1, from_center(on(f, partial(pgd, steps=60, step_size=eps / 4)))),
    "apgd": lambda f, eps: partial(apgd, steps=40),
    "apgd, dlr": lambda f, eps: partial(apgd, steps=40, loss=dlr),
    "toward 1 apgd": lambda f, eps: toward(1, partial(apgd, steps=40), between=gap),
    "fab": lambda f, eps: partial(fab, steps=40),
    "toward 1 fab from center": lambda f, eps: from_center(toward(1, partial(fab, steps=40), between=gap)),
    "square": lambda f, eps: partial(square, queries=100),
    "toward 1 square": lambda f, eps: toward(1, partial(square, queries=200), loss=margin),
}  # fmt: skip
EPS = {Linf: 0.2, L2: 1.0, L1: 3.0}


def call(make, f, x, y, threat, *, index=None):
    eps = float(threat.eps if not isinstance(threat.eps, torch.Tensor) else threat.eps.max())
    start = threat.sample(x, Keyed(1, torch.arange(len(x)) if index is None else index))
    return make(f, eps)(f, x, y, threat, start=start)


def some_digits(n=24, dtype=torch.float64):
    x, y = digits(n).tensors()  # many pixels are exactly 0 or 1
    return x.to(dtype), y


def check_in_the_set(make, kind):
    x, y = some_digits()
    for eps in (0.02 * EPS[kind], EPS[kind]):
        f = mixed_network()
        z = call(make, f, x, y, kind(eps))
        assert z.shape == x.shape and z.dtype == x.dtype and not z.requires_grad
        assert ((0 <= z) & (z <= 1)).all(), "outside the pixel box"
        assert (norms(z - x, kind.p) <= eps * (1 + 1e-9)).all(), "outside the ball"
    eps = torch.linspace(0, EPS[kind], len(x), dtype=x.dtype)
    z = call(make, mixed_network(), x, y, kind(eps))
    assert (norms(z - x, kind.p) <= eps * (1 + 1e-9) + 1e-12).all(), "one radius per example"


def check_inputs_untouched(make, kind):
    x, y = some_digits()
    f, eps = mixed_network(), torch.full((len(x),), EPS[kind], dtype=x.dtype)
    threat = kind(eps)
    start = threat.sample(x, generator(0))
    before = [t.clone() for t in (x, y, start, eps)]
    z = make(f, EPS[kind])(f, x, y, threat, start=start)
    assert all(map(torch.equal, before, (x, y, start, eps)))
    assert z.data_ptr() not in (x.data_ptr(), start.data_ptr())
    assert not any(t.requires_grad for t in (x, start, eps)) and x.grad is None


def check_model_untouched(make, kind):
    x, y = some_digits(8)
    f = mixed_network()
    before = state_of(f)
    call(make, f, x, y, kind(EPS[kind]))
    assert same_state(state_of(f), before)


def check_model_untouched_after_an_error(make, kind):
    x, y = some_digits(8)
    f = mixed_network()
    before = state_of(f)
    with pytest.raises(Exception):  # noqa: B017 - whatever a wrong shape raises
        call(make, f, x[..., :5], y, kind(EPS[kind]))
    assert same_state(state_of(f), before)


def check_global_randomness_untouched(make, kind):
    x, y = some_digits(8)
    f = mixed_network()
    before = torch.get_rng_state()
    a = call(make, f, x, y, kind(EPS[kind]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    assert torch.equal(call(make, f, x, y, kind(EPS[kind])), a), "another result from another seed"
    torch.set_rng_state(before)


def check_independent_of_the_batch(make, kind):
    x, y = uniform01(12, 1, 8, 8), torch.arange(12) % 2
    threat = kind(EPS[kind])
    f = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Tanh(), Opposed((1, 8, 8))).double()
    with torch.no_grad():
        f[0].weight.copy_(torch.randn(1, 1, 3, 3, generator=generator(5)))
    whole = call(make, f, x, y, threat)
    order = torch.randperm(12, generator=generator(0))
    for split in (order.split(1), order.split(5)):
        z = torch.cat([call(make, f, x[rows], y[rows], threat, index=rows) for rows in split])
        assert torch.allclose(z[order.argsort()], whole, rtol=0, atol=1e-6)


def _linear_problem():
    f = Opposed()
    x = 0.3 + 0.4 * uniform01(16, 1, 4, 4, seed=1)
    s = f(x)[:, 1].detach()
    return f, x, (s > 0).long()


def check_larger_eps_is_never_weaker(make, kind):
    f, x, y = _linear_problem()
    found = [margin(f(call(make, f, x, y, kind(eps * EPS[kind]))), y).detach()
             for eps in (0.0, 0.05, 0.1, 0.2, 0.4)]  # fmt: skip
    for weaker, stronger in zip(found, found[1:], strict=False):
        assert (stronger >= weaker - 1e-6).all() and stronger.mean() > weaker.mean()


def check_optimal_on_a_linear_model(make, kind):
    f, x, y = _linear_problem()
    eps = 0.05 * EPS[kind]  # the nearest wall is 0.3 away
    gain = margin(f(call(make, f, x, y, kind(eps))), y) - margin(f(x), y)
    best = 2 * eps * norms(f.w.detach()[None], DUAL[kind])  # the margin moves by 2⟨w, δ⟩
    assert torch.allclose(gain, best.expand(len(x)), rtol=1e-4)


def check_stronger_than_noise(make, kind):
    f = zoo.load_or_train("digits-small-natural", progress=False)
    x, y = some_digits(200, torch.float32)
    threat = kind(EPS[kind])
    with frozen(f), torch.no_grad():
        noise = [threat.sample(x, generator(seed)) for seed in range(5)]
        noise.append(threat.project(x + threat.eps * torch.sign(noise[0] - x), x))
        left = torch.stack([f(z).argmax(1) == y for z in noise]).all(0).double().mean()
        right = (f(call(make, f, x, y, threat)).argmax(1) == y).double().mean()
    assert right < left - 0.02, f"attack leaves {right:.3f}, noise {left:.3f}"


def check_zero_eps_gives_x_back(make, kind):
    x, y = some_digits()
    assert torch.equal(call(make, mixed_network(), x, y, kind(0.0)), x)
    x, y = some_digits(dtype=torch.float32)
    assert torch.equal(call(make, mixed_network().float(), x, y, kind(0.0)), x)


CHECKS = {k.removeprefix("check_"): v for k, v in list(globals().items()) if k.startswith("check_")}


OPTIMAL = {"larger_eps_is_never_weaker", "optimal_on_a_linear_model"}
EXEMPT = {  # attack -> checks that say nothing about it
    "on fast": OPTIMAL | {"independent_of_the_batch"},  # rounded to bfloat16, where there is one
    "fab": OPTIMAL, "toward 1 fab from center": OPTIMAL,  # stops at the boundary
    "square": OPTIMAL, "toward 1 square": OPTIMAL,  # stops at the first wrong prediction
}  # fmt: skip
NOT_L1 = {"apgd", "apgd, dlr", "toward 1 apgd", "fab", "toward 1 fab from center", "square", "toward 1 square"}
TABLE = [pytest.param(check, name, kind, id=f"{check}-{name}-{ID}")
         for check in CHECKS for name in ATTACKS for kind, ID in zip(THREATS, IDS, strict=True)
         if check not in EXEMPT.get(name, ()) and not (kind is L1 and name in NOT_L1)]  # fmt: skip


@pytest.mark.parametrize("check, name, kind", TABLE)
def test_attack(check, name, kind):
    CHECKS[check](ATTACKS[name], kind)


# --- the tests of the tests: planted mistakes -------------------------------------------------


def broken_pgd(f, x, y, threat, *, start=None, eps, steps=40, mistake=""):
    """PGD written once more, with one mistake."""
    alpha, z = eps / 4, (threat.center(x) if start is None else start).clone()
    if mistake == "global seed":
        torch.manual_seed(0)
    if mistake == "global noise":
        z = threat.project(x + 0.3 * eps * torch.randn_like(x), x)
    if mistake == "train mode":
        f.train()
    if mistake == "eval mode left":
        f.eval()
    if mistake == "flags left":
        for p in f.parameters():
            p.requires_grad_(False)
    context = frozen(f if "mode" not in mistake and mistake != "flags left" else None)
    if mistake == "parameter gradients":
        context = frozen(None)
    with context:
        for _ in range(0 if mistake == "only noise" else steps):
            objective = lambda z: cross_entropy(f(z), y)  # noqa: E731
            if mistake == "parameter gradients":
                leaf = z.detach().requires_grad_()
                objective(leaf).sum().backward()
                g = leaf.grad
            else:
                g = input_grad(objective, z)
            if mistake == "wrong sign":
                g = -g
            a = threat.ascend(g, z, x)
            if mistake == "gradient scaled by the batch":
                a = g / g.abs().max().clamp(min=1e-30)
            if mistake == "batch stops when most are wrong" and (f(z).argmax(1) != y).double().mean() > 0.5:
                break
            moved = z + alpha * a
            if mistake == "no projection":
                z = moved.clamp(0, 1)
            elif mistake == "no pixel box":
                z = x + (moved - x) * (eps / per_example(norms(moved - x, threat.p).clamp(min=1e-30), x)).clamp(max=1)
            elif mistake == "ball of another norm":
                z = torch.clamp(moved, x - eps, x + eps).clamp(0, 1)
            elif mistake == "ignores eps":
                z = type(threat)(0.1).project(moved + 0.01 * a, x)
            elif mistake == "projects around the last point":
                z = threat.project(moved, z)
            elif mistake == "first half of the steps only" and _ > 0:
                z = threat.project(x + 0.5 * (z - x), x)
            elif mistake == "half the radius":
                z = threat.scaled(0.5).project(moved, x)
            else:
                z = threat.project(moved, x)
    if mistake == "edits x":
        x.copy_(z)
        return x
    if mistake == "edits start" and start is not None:
        return start.copy_(z)
    if mistake == "edits y":
        y.zero_()
    return z.requires_grad_() if mistake == "not detached" else z


PLANTED = {  # mistake -> (a threat where it shows, the checks that must fail)
    "wrong sign": (Linf, {"optimal_on_a_linear_model", "stronger_than_noise"}),
    "no projection": (Linf, {"in_the_set"}),
    "no pixel box": (L2, {"in_the_set"}),
    "ball of another norm": (L2, {"in_the_set"}),
    "ignores eps": (Linf, {"in_the_set", "zero_eps_gives_x_back"}),
    "projects around the last point": (L2, {"in_the_set"}),
    "half the radius": (L1, {"optimal_on_a_linear_model"}),
    "first half of the steps only": (Linf, {"optimal_on_a_linear_model"}),
    "only noise": (Linf, {"optimal_on_a_linear_model", "stronger_than_noise"}),
    "edits x": (Linf, {"inputs_untouched"}),
    "edits start": (Linf, {"inputs_untouched"}),
    "edits y": (Linf, {"inputs_untouched"}),
    "not detached": (Linf, {"in_the_set"}),
    "train mode": (Linf, {"model_untouched"}),
    "eval mode left": (Linf, {"model_untouched"}),
    "flags left": (Linf, {"model_untouched"}),
    "parameter gradients": (Linf, {"model_untouched"}),
    "global seed": (Linf, {"global_randomness_untouched"}),
    "global noise": (Linf, {"global_randomness_untouched"}),
    "gradient scaled by the batch": (L2, {"independent_of_the_batch"}),
    "batch stops when most are wrong": (Linf, {"independent_of_the_batch"}),
}


def planted(mistake):
    return lambda f, eps: partial(broken_pgd, eps=eps, mistake=mistake)


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistake_is_caught(mistake):
    kind, responsible = PLANTED[mistake]
    for check in responsible:
        state = torch.get_rng_state()
        with pytest.raises(AssertionError):
            CHECKS[check](planted(mistake), kind)
        torch.set_rng_state(state)


@pytest.mark.parametrize("kind", THREATS, ids=IDS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_same_attack_without_a_mistake_passes(check, kind):
    CHECKS[check](planted(""), kind)


# --- what single attacks promise --------------------------------------------------------------


@pytest.mark.parametrize("kind", THREATS, ids=IDS)
def test_fgsm_is_one_step_from_the_center(kind):
    f, x, y = _linear_problem()
    threat = kind(EPS[kind])
    g = input_grad(lambda z: cross_entropy(f(z), y), x)
    by_hand = threat.project(x + threat.eps * threat.ascend(g, x, x), x)
    assert torch.equal(fgsm(f, x, y, threat), by_hand)
    assert torch.equal(fgsm(f, x, y, threat, start=threat.sample(x, generator(0))), by_hand)
    if kind is Linf:
        assert torch.equal(by_hand, (x + 0.2 * g.sign()).clamp(0, 1))


def small_net(dtype=torch.float64):
    return zoo.load_or_train("digits-small-natural", progress=False).to(dtype)


@pytest.mark.parametrize("kind", THREATS, ids=IDS)
def test_pgd_equals_its_equation(kind):
    f, threat = small_net(), kind(EPS[kind])
    x, y = some_digits()
    start = threat.sample(x, generator(0))
    z = start
    for _ in range(7):
        leaf = z.clone().requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(f(leaf), y).sum(), leaf)
        z = threat.project(z + 0.1 * threat.ascend(g, z, x), x)
    assert torch.allclose(pgd(f, x, y, threat, steps=7, step_size=0.1, start=start), z, atol=1e-12)
    assert torch.equal(pgd(f, x, y, threat, steps=0, step_size=0.1, start=start), start)
    ours = pgd(f, x, y, threat, steps=7, step_size=0.1)
    assert torch.equal(pgd(f, x, y, threat, steps=7, step_size=0.1, start=x), ours)


@pytest.mark.parametrize("kind", THREATS, ids=IDS)
def test_momentum(kind):
    """Zero is plain PGD; otherwise Dong et al.: g ← μ g + ∇ / ‖∇‖₁."""
    f, threat = small_net(), kind(EPS[kind])
    x, y = some_digits()
    options = {"steps": 6, "step_size": 0.1 * EPS[kind]}
    plain = pgd(f, x, y, threat, **options)
    assert torch.equal(pgd(f, x, y, threat, momentum=0.0, **options), plain)
    z, velocity = x, torch.zeros_like(x)
    for _ in range(6):
        g = input_grad(lambda z: cross_entropy(f(z), y), z)
        velocity = 0.8 * velocity + g / g.abs().sum((1, 2, 3), keepdim=True)
        z = threat.project(z + options["step_size"] * threat.ascend(velocity, z, x), x)
    ours = pgd(f, x, y, threat, momentum=0.8, **options)
    assert torch.allclose(ours, z, atol=1e-10) and not torch.allclose(ours, plain)


def test_momentum_survives_a_zero_gradient():
    f = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    nn.init.zeros_(f[1].weight)
    x = uniform01(3, 1, 2, 2)
    z = pgd(f, x, torch.zeros(3, dtype=torch.long), L2(0.5), steps=3, step_size=0.1, momentum=0.9)
    assert torch.equal(z, x)


@pytest.mark.parametrize("kind", THREATS, ids=IDS)
def test_one_step_size_per_example(kind):
    f, x, y = _linear_problem()
    sizes = torch.linspace(0.01, 0.3, len(x), dtype=x.dtype)
    z = pgd(f, x, y, kind(EPS[kind]), steps=3, step_size=sizes)
    for i in (0, 7, 15):
        one = pgd(f, x[[i]], y[[i]], kind(EPS[kind]), steps=3, step_size=float(sizes[i]))
        assert torch.allclose(z[[i]], one, atol=1e-12)


def test_cw_inf_is_pgd_on_the_margin():
    f, (x, y) = small_net(), some_digits()
    options = {"steps": 5, "step_size": 0.05, "start": Linf(0.2).sample(x, generator(0))}
    a = cw_inf(f, x, y, Linf(0.2), momentum=0.5, **options)
    assert torch.equal(a, pgd(f, x, y, Linf(0.2), loss=margin, momentum=0.5, **options))


def test_gradients_of_the_inputs_are_not_recorded():
    f, x, y = _linear_problem()
    z = pgd(f, x.requires_grad_(), y, L2(0.1), steps=2, step_size=0.1)
    assert not z.requires_grad and x.grad is None and x.requires_grad


def test_from_center_ignores_the_start():
    f, (x, y) = small_net(), some_digits()
    attack = partial(pgd, steps=3, step_size=0.05)
    start = Linf(0.2).sample(x, generator(0))
    z = from_center(attack)(f, x, y, Linf(0.2), start=start)
    assert torch.equal(z, attack(f, x, y, Linf(0.2)))
    assert not torch.equal(z, attack(f, x, y, Linf(0.2), start=start))


def test_on_attacks_the_source():
    f, (x, y) = small_net(), some_digits()
    source = models.mlp((1, 8, 8), (16,)).double()
    start = Linf(0.2).sample(x, generator(0))
    attack = partial(pgd, steps=3, step_size=0.05)
    z = on(source, attack)(f, x, y, Linf(0.2), start=start)
    assert torch.equal(z, attack(source, x, y, Linf(0.2), start=start))

    def never(x):
        raise AssertionError("the judge's network must not be asked")

    on(source, attack)(never, x, y, Linf(0.2), start=start)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_toward_reaches_the_kth_most_likely_wrong_class(k):
    f, (x, y) = small_net(), some_digits(100)
    with torch.no_grad():
        logits = f(x)
    order = [[c for c in row.argsort(descending=True).tolist() if c != label]
             for row, label in zip(logits, y.tolist(), strict=True)]  # fmt: skip
    wanted = torch.tensor([row[k - 1] for row in order])
    attack = partial(pgd, steps=60, step_size=0.05)
    for loss in (cross_entropy, margin):
        z = toward(k, attack, loss)(f, x, y, Linf(0.6), start=Linf(0.6).sample(x, generator(0)))
        with torch.no_grad():
            assert (f(z).argmax(1) == wanted).double().mean() > 0.9
    bound = partial(pgd, steps=60, step_size=0.05, loss=dlr)
    same = toward(k, bound)(f, x, y, Linf(0.6), start=None)
    assert torch.equal(same, toward(k, attack)(f, x, y, Linf(0.6), start=None))


@pytest.mark.parametrize("k", [0, 10, -1])
def test_toward_refuses_a_class_that_is_not_there(k):
    f, (x, y) = small_net(), some_digits(2)
    with pytest.raises(ValueError, match=f"toward: k={k}, allowed are 1 to 9 for 10 classes"):
        toward(k, fgsm)(f, x, y, Linf(0.1))


def test_names():
    attack = partial(partial(pgd, steps=3), step_size=0.1)
    assert name_of(attack) == "pgd"
    assert name_of(on(None, attack)) == "pgd on source"
    assert name_of(toward(3, fgsm)) == "fgsm toward 3"
    assert name_of(from_center(toward(3, attack))) == "pgd toward 3 from center"
