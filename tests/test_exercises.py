"""The checkers of the exercises accept what is right and name every planted mistake."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from advlearn import models
from advlearn.attacks import cw_inf, fgsm, pgd
from advlearn.exercises import (
    BUGS,
    Report,
    check_attack,
    check_diagnosis,
    check_l1_step,
    check_smallest_eps,
    check_transfer,
    l1_bound,
)
from advlearn.exercises.chapter1 import SUSPECTS, _flawed, _greedy
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import frozen, norms
from advlearn.threats import L1, L2, Linf


def gradient(f, x, y):
    with frozen(f):
        return input_grad(lambda z: cross_entropy(f(z), y), x)


def size(g, p):
    return norms(g, p).view(-1, 1, 1, 1).clamp(min=1e-30)


def targeted(f, x, y, threat, *, start=None):
    return fgsm(f, x, y, threat, loss=lambda logits, t: -cross_entropy(logits, t))


def stub(*args, **kwargs):
    raise NotImplementedError


@pytest.mark.parametrize("attack, norm", [
    *((fgsm, norm) for norm in ("linf", "l2", "l1")),
    (partial(pgd, steps=20, step_size=0.05), "linf"),
    (partial(pgd, steps=20, step_size=0.05), "l2"),
    (partial(cw_inf, steps=20, step_size=0.05), "linf"),
])  # fmt: skip
def test_a_right_attack_passes(attack, norm):
    report = check_attack(attack, norm)
    assert report, report


def test_a_right_targeted_attack_passes():
    assert check_attack(targeted, targeted=True)
    assert "the sign is minus" in str(check_attack(fgsm, targeted=True))
    assert "wrong sign" in str(check_attack(targeted))


# --- planted mistakes in attacks: text of the report -> attack --------------------------------


def steps(direction, norm="linf"):
    """A planted attack that is right except for its step: direction(f, x, y, eps) -> δ."""

    def attack(f, x, y, threat, *, start=None):
        with frozen(f):
            return (x + direction(f, x, y, threat.eps)).clamp(0, 1)

    return attack, norm


def sign(f, x, y):
    return gradient(f, x, y).sign()


def ends(finish, norm="linf"):
    """A planted attack that is right up to its end: finish(x, δ, f) -> z."""

    def attack(f, x, y, threat, *, start=None):
        return finish(x, threat.eps * threat.ascend(gradient(f, x, y), x, x), f)

    return attack, norm


def backward(f, x, y, threat, *, start=None):
    x = x.detach().clone().requires_grad_()
    with_modes = [(m, m.training) for m in f.modules()]
    f.eval()
    F.cross_entropy(f(x), y).backward()
    for m, mode in with_modes:
        m.training = mode
    return (x + threat.eps * x.grad.sign()).clamp(0, 1).detach()


def requires_grad_left(f, x, y, threat, *, start=None):
    x.requires_grad_()
    with frozen(f):
        g = torch.autograd.grad(cross_entropy(f(x), y).sum(), x)[0]
    return (x.detach() + threat.eps * g.sign()).clamp(0, 1)


def in_mode(mode):
    def attack(f, x, y, threat, *, start=None):
        z = fgsm(f, x, y, threat)
        f.train(mode)
        return z

    return attack, "linf"


def no_frozen(f, x, y, threat, *, start=None):
    g = input_grad(lambda z: cross_entropy(f(z), y), x)
    return (x + threat.eps * g.sign()).clamp(0, 1)


def parameters_off(f, x, y, threat, *, start=None):
    for p in f.parameters():
        p.requires_grad_(False)
    return fgsm(f, x, y, threat)


def weights_moved(f, x, y, threat, *, start=None):
    with torch.no_grad():
        next(f.parameters()).mul_(1.01)
    return fgsm(f, x, y, threat)


def reseeds(f, x, y, threat, *, start=None):
    torch.manual_seed(4321)
    return fgsm(f, x, y, threat)


def graph(f, x, y, threat, *, start=None):
    return fgsm(f, x, y, threat) + 0 * next(f.parameters()).sum()


def early_stop(f, x, y, threat, *, start=None):
    with frozen(f):
        done = (f(x).argmax(1) != y).sum() > 1
    return x if done else fgsm(f, x, y, threat)


def random_start(f, x, y, threat, *, start=None):
    u = threat.eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1)
    return (x + u.to(x) + threat.eps * sign(f, x, y)).clamp(0, 1)


def predicted(f, x, y, eps):
    return eps * sign(f, x, f(x).argmax(1))


def of_logits(pick):
    return steps(lambda f, x, y, eps: eps * input_grad(lambda z: pick(f(z), y), x).sign())


def batch_norm(f, x, y, eps):
    g = gradient(f, x, y)
    return eps * g / g.norm().clamp(min=1e-30)


def l1_at_the_box(f, x, y, threat, *, start=None):
    flat = gradient(f, x, y).flatten(1)
    best = flat.abs().argmax(1, keepdim=True)
    one = torch.zeros_like(flat).scatter(1, best, flat.gather(1, best).sign())
    return (x + threat.eps * one.view_as(x)).clamp(0, 1)


def capped(f, x, y, eps):
    return (eps if eps < 0.5 else 0.1) * sign(f, x, y)


def another_network(f, x, y, eps):
    if x.dtype == torch.float32 and len(list(f)) > 2:
        return eps * sign(models.mlp(x.shape[1:], (8,), 3, seed=9), x, y)
    return eps * sign(f, x, y)


def to_float32(f, x, y, threat, *, start=None):
    return fgsm(f, x, y, threat).float()


def nan_at_zero(f, x, y, threat, *, start=None):
    g = threat._free(gradient(f, x, y), x)
    return threat.project(x + threat.eps * g / norms(g, 2).view(-1, 1, 1, 1), x)


MISTAKES = {
    "wrong sign": steps(lambda f, x, y, eps: -eps * sign(f, x, y)),
    "the step is missing": steps(lambda f, x, y, eps: 0 * x),
    "255 times too small": steps(lambda f, x, y, eps: eps / 255 * sign(f, x, y)),
    "is it multiplied by 255?": steps(lambda f, x, y, eps: 255 * eps * sign(f, x, y)),
    "plain gradient": steps(lambda f, x, y, eps: eps * gradient(f, x, y)),
    "is the ℓ2 step": steps(lambda f, x, y, eps: eps * (g := gradient(f, x, y)) / size(g, 2)),
    "moves one pixel by ε": steps(
        lambda f, x, y, eps: eps * (g := gradient(f, x, y)) / size(g, float("inf"))),
    "that is the ℓ1 step": steps(lambda f, x, y, eps: eps * L1(1).ascend(gradient(f, x, y), x, x)),
    "that is the ℓ∞ step": steps(lambda f, x, y, eps: eps * sign(f, x, y), "l2"),
    "one norm per image": steps(batch_norm, "l2"),
    "all images get the same δ": steps(
        lambda f, x, y, eps: eps * gradient(f, x, y).mean(0, keepdim=True).sign()),
    "network's own prediction": steps(predicted),
    "another label than y": steps(lambda f, x, y, eps: eps * sign(f, x, (y + 1) % 3)),
    "label is always 0": steps(lambda f, x, y, eps: eps * sign(f, x, 0 * y)),
    "up the logit of y": of_logits(lambda logits, y: logits.gather(1, y[:, None])[:, 0]),
    "down the logit of y": of_logits(lambda logits, y: -logits.gather(1, y[:, None])[:, 0]),
    "y plays no part": of_logits(lambda logits, y: logits.sum(1)),
    "a number in place of threat.eps": steps(
        lambda f, x, y, eps: min(eps, 0.01) * sign(f, x, y)),
    "a larger ε is weaker here": steps(capped),
    "gradient of the loss of f at x?": steps(another_network),
    "clamp x + δ to [0, 1]\n": ends(lambda x, d, f: x + d),
    "clamp x + δ to [0, 1], not δ": ends(lambda x, d, f: (x + d.clamp(0, 1)).clamp(0, 1)),
    "the batch's own min and max": ends(lambda x, d, f: (x + d).clamp(x.min(), x.max())),
    "x was edited in place": ends(lambda x, d, f: x.add_(d).clamp_(0, 1)),
    "instead of the images": ends(lambda x, d, f: (x + d).clamp(0, 1).flatten(1)),
    "returns NoneType": ends(lambda x, d, f: None),
    "not finite": ends(lambda x, d, f: (x + d).clamp(0, 1) / 0),
    "although ε = 0": ends(lambda x, d, f: (x + d + 1e-3).clamp(0, 1)),
    "stopped with TypeError at `return": ends(lambda x, d, f: x + "d"),
    "project x + δ back": (random_start, "linf"),
    "the weights hold gradients": (backward, "linf"),
    "x.requires_grad is left on": (requires_grad_left, "linf"),
    "left in train mode": in_mode(True),
    "left in eval mode": in_mode(False),
    "active during the attack": (no_frozen, "linf"),
    "lost requires_grad": (parameters_off, "linf"),
    "buffers of the network were changed": (weights_moved, "linf"),
    "reseeds": (reseeds, "linf"),
    "detach it": (graph, "linf"),
    "depends on the others": (early_stop, "linf"),
    "pixels at 0 or 1 that cannot move": (l1_at_the_box, "l1"),
    "returns torch.float32": (to_float32, "linf"),
    "rounding error once f is sure": steps(lambda f, x, y, eps: eps * input_grad(
        lambda z: F.cross_entropy(f(z), y, reduction="none"), x).sign()),
    "0 / 0": (nan_at_zero, "l2"),
}  # fmt: skip


@cache
def report_on(message):
    with torch.random.fork_rng():
        return check_attack(*MISTAKES[message])


@pytest.mark.parametrize("message", MISTAKES)
def test_a_planted_mistake_is_named(message):
    report = report_on(message)
    assert not report
    assert message in str(report) + "\n", report


def test_every_mistake_has_its_own_report():
    reports = {message: report_on(message).findings for message in MISTAKES}
    assert len(set(reports.values())) == len(reports)


# --- reports ----------------------------------------------------------------------------------

CHECKS = {
    "attack": lambda f: check_attack(f),
    "l1 step": lambda f: check_l1_step(f),
    "smallest eps": lambda f: check_smallest_eps(f),
    "diagnosis": lambda f: check_diagnosis(f, dict.fromkeys(SUSPECTS, fgsm)),
    "transfer": lambda f: check_transfer(f, *victims_and_images()),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)


def test_a_report_is_readable():
    assert not Report("nothing was tried", ())
    good, bad = check_attack(fgsm), check_attack(lambda f, x, y, threat, *, start=None: 1 / 0)
    assert str(good).startswith("fgsm: all properties hold\n  ✓ ")
    assert "✗" not in good._repr_html_() and "✗" in bad._repr_html_()
    assert str(bad).count("ZeroDivisionError") == 1, "the same problem is told once"
    with pytest.raises(ValueError, match="norm='linfty', allowed are linf, l2, l1"):
        check_attack(fgsm, "linfty")


# --- the best ℓ1 step in the box --------------------------------------------------------------


def room_of(g, x):
    return torch.where(g > 0, 1 - x, x)


def greedy(g, x, eps):
    return _greedy(g, room_of(g, x), eps, g.abs())


def one_pixel(g, x, eps):
    best = torch.where(room_of(g, x) > 0, g.abs(), 0).argmax(1, keepdim=True)
    spent = room_of(g, x).gather(1, best).clamp(max=eps)
    return torch.zeros_like(g).scatter(1, best, spent) * g.sign()


STEPS = {
    "stop when the budget is used up": lambda g, x, eps: room_of(g, x) * g.sign(),
    "takes at most its room": lambda g, x, eps: _greedy(g, torch.ones_like(g), eps, g.abs()),
    "δ takes the sign of g": lambda g, x, eps: -_greedy(g, room_of(-g, x), eps, g.abs()),
    "one pixel only": one_pixel,
    "in the order of |g|·room":
        lambda g, x, eps: _greedy(g, room_of(g, x), eps, g.abs() * room_of(g, x)),
    "edited in place": lambda g, x, eps: greedy(g, x.mul_(0.999), eps),
    "of what the dual allows": lambda g, x, eps: _greedy(g, room_of(g, x), eps, -g.abs()),
    "larger than all the room":
        lambda g, x, eps: greedy(g, x, min(eps, 5)),
    "must be finite and of shape": lambda g, x, eps: greedy(g, x, eps).T,
}  # fmt: skip


def test_the_greedy_step_passes():
    assert check_l1_step(greedy)


@pytest.mark.parametrize("message", STEPS)
def test_a_wrong_l1_step_is_named(message):
    report = check_l1_step(STEPS[message])
    assert not report and message in str(report), report


def test_the_dual_bound_is_the_linear_programs_optimum():
    from scipy.optimize import linprog

    gen = torch.Generator().manual_seed(0)
    g = torch.randn(5, 12, generator=gen, dtype=torch.float64)
    x = torch.rand(5, 12, generator=gen, dtype=torch.float64)
    for eps in (0.2, 2.0, 20.0):
        for row in range(5):
            cost = torch.cat([-g[row], g[row]])  # δ = up − down
            bounds = [(0, float(r)) for r in torch.cat([1 - x[row], x[row]])]
            best = linprog(cost.numpy(), A_ub=[[1.0] * 24], b_ub=[eps], bounds=bounds)
            assert float(l1_bound(g, x, eps)[row]) == pytest.approx(-best.fun, abs=1e-8)


# --- the smallest ε ---------------------------------------------------------------------------


def fooled(f, x, y, d, eps):
    with torch.no_grad():
        return f((x + eps.view(-1, 1, 1, 1) * d).clamp(0, 1)).argmax(1) != y


def search(f, x, y, hi, tol, *, end="high", whole=False, zero=True, infinite=True, rounds=None):
    d = sign(f, x, y)
    low, high = torch.zeros(len(y)), torch.full((len(y),), hi)
    at_hi, at_0 = fooled(f, x, y, d, high), fooled(f, x, y, d, low)
    for _ in range(rounds or 9):
        middle = (low + high) / 2
        hit = fooled(f, x, y, d, middle)
        hit = hit.double().mean().expand(len(y)) > 0.5 if whole else hit
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    eps = high if end == "high" else low
    eps = torch.where(at_hi, eps, torch.inf) if infinite else eps
    return torch.where(at_0, 0, eps) if zero else eps


def on_a_grid(f, x, y, hi, tol):
    grid = torch.linspace(0, hi, round(hi / tol) + 1)
    d = sign(f, x, y)
    hits = torch.stack([fooled(f, x, y, d, eps.expand(len(y))) for eps in grid])
    return torch.where(hits.any(0), grid[hits.int().argmax(0)], torch.inf)


def coupled(f, x, y, hi, tol):
    return search(f, x, y, hi, tol) + (0 if len(y) == 24 else 2e-4)


SEARCHES = {
    "the bracket's upper end": partial(search, end="low"),
    "halve every image's own bracket": partial(search, whole=True),
    "misclassified already needs ε = 0": partial(search, zero=False),
    "the answer is inf": partial(search, infinite=False),
    "allowed is tol": partial(search, rounds=4),
    "a loop over images, or a grid?": on_a_grid,
    "depends on the others": coupled,
    "wanted one ε per image": lambda *args: search(*args).mean(),
    "NaN": lambda *args: search(*args) * torch.nan,
}


def test_bisection_passes():
    report = check_smallest_eps(search)
    assert report, report


@pytest.mark.parametrize("message", SEARCHES)
def test_a_wrong_search_is_named(message):
    report = check_smallest_eps(SEARCHES[message])
    assert not report and message in str(report), report


# --- find the bug -----------------------------------------------------------------------------


def test_every_hidden_suspect_is_broken_and_the_innocent_is_not():
    for bug in BUGS:
        assert bool(check_attack(_flawed(bug))) is (bug == "none"), bug


@pytest.mark.parametrize("answer, message", [
    ("none", "acquitted, but it is broken"),
    ("sign", "found guilty of 'sign', but it is right"),
    ("sign", "found guilty of 'sign', wrongly"),
    ("clamp", "answers 'clamp', allowed are none, sign, label"),
])  # fmt: skip
def test_a_wrong_verdict_is_named(answer, message):
    report = check_diagnosis(lambda attack: answer, dict.fromkeys(SUSPECTS, fgsm))
    assert not report and message in str(report), report


# --- transfer ---------------------------------------------------------------------------------


def victims_and_images():
    sources = [models.linear((1, 4, 4), 3, seed=i).eval() for i in range(3)]
    victim = models.linear((1, 4, 4), 3).eval()
    victim[1].load_state_dict(
        {k: sum(f[1].state_dict()[k] for f in sources) for k in ("weight", "bias")}
    )
    x = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return sources, {"sum": victim}, x, victim(x).argmax(1), Linf(0.1)


def ensemble(sources, x, y, threat):
    return threat.project(x + threat.eps * sum(gradient(f, x, y) for f in sources).sign(), x)


TRANSFERS = {
    "does not lie above 0":
        lambda sources, x, y, threat: threat.sample(x, torch.Generator().manual_seed(0)),
    "leaves the set": lambda sources, x, y, threat: ensemble(sources, x, y, Linf(0.2)),
    "x or a network was changed":
        lambda sources, x, y, threat: x.copy_(ensemble(sources, x, y, threat)),
}  # fmt: skip


def test_an_ensemble_transfers_better():
    report = check_transfer(ensemble, *victims_and_images())
    assert report and "gain over the average source +" in str(report), report


@pytest.mark.parametrize("message", TRANSFERS)
def test_a_wrong_transfer_is_named(message):
    report = check_transfer(TRANSFERS[message], *victims_and_images())
    assert not report and message in str(report), report


def test_l2_threat_is_available_to_readers():
    assert check_attack(fgsm, "l2") and L2(0.5).eps == 0.5
