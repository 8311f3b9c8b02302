"""The checkers of chapter 7's exercises accept what is right and name every planted mistake."""

from itertools import pairwise

import pytest
import torch

from advlearn.attacks import pgd
from advlearn.exercises import (
    answers_of,
    check_invert,
    check_most_useful,
    check_paired,
    check_relabel,
    check_robust_covariance,
    check_useful,
    gauss,
    paired,
)
from advlearn.losses import cross_entropy
from advlearn.models import features
from advlearn.tensors import generator
from advlearn.threats import L2


def stub(*args, **kwargs):
    raise NotImplementedError


def named(check, wrong, message):
    report = check(wrong)
    assert not report and message in str(report), report


# --- usefulness ---------------------------------------------------------------------------------


def test_usefulness_agrees_with_a_sample():
    (mu, sigma), gen, n, eps = gauss.problem(3), generator(1), 400_000, 0.3
    w = torch.randn(5, generator=gen, dtype=torch.float64)
    y = 2.0 * torch.randint(2, (n,), generator=gen).double() - 1
    noise = torch.randn(n, 5, generator=gen, dtype=torch.float64)
    x = y[:, None] * mu + noise @ torch.linalg.cholesky(sigma).T
    size = (x @ w).std()
    rho, gamma = gauss.useful(mu, sigma, w, eps)
    assert float((y * (x @ w)).mean() / size) == pytest.approx(float(rho), abs=0.005)
    attacked = x - eps * y[:, None] * w / w.norm()
    assert float((y * (attacked @ w)).mean() / size) == pytest.approx(float(gamma), abs=0.005)


def test_a_right_usefulness_passes():
    assert check_useful(gauss.useful), check_useful(gauss.useful)


@pytest.mark.parametrize("message", gauss._USEFUL)
def test_a_wrong_usefulness_is_named(message):
    named(check_useful, gauss._USEFUL[message], message)


def changes_mean(mu, sigma, *rest):
    mu.neg_()
    return torch.linalg.solve(sigma, -mu)


DIRECTIONS = gauss._DIRECTIONS | {
    "minus the best": lambda mu, sigma: -torch.linalg.solve(sigma, mu),
    "not 0": lambda mu, sigma: 0 * mu,
    "what was handed over has been changed": changes_mean,
    "another direction has": lambda mu, sigma: torch.ones_like(mu),
}


def test_the_most_useful_feature_passes_at_any_length():
    for size in (1, 17):
        report = check_most_useful(lambda mu, sigma, s=size: s * torch.linalg.solve(sigma, mu))
        assert report, report


@pytest.mark.parametrize("message", DIRECTIONS)
def test_a_less_useful_feature_is_named(message):
    named(check_most_useful, DIRECTIONS[message], message)


# --- the robust covariance ----------------------------------------------------------------------


def test_the_adversary_of_the_likelihood_is_the_best_one():
    """δ = (λS − I)⁻¹(x − μ) is stationary, and its mean gain is the closed form."""
    (_, sigma), lam = gauss.problem(5), 3.0
    s = gauss.robust(sigma, lam)
    v = torch.linalg.cholesky(sigma)  # Columns whose outer products add up to Σ.
    delta = torch.linalg.solve(lam * s - torch.eye(5), v).requires_grad_()
    moved = v + delta
    gain = (
        0.5 * torch.trace(moved.T @ torch.linalg.solve(s, moved)) - lam / 2 * delta.square().sum()
    )
    (g,) = torch.autograd.grad(gain, delta)
    assert g.abs().max() < 1e-9
    wanted = gauss.robust_likelihood(s, sigma, lam)
    assert float(gain + 0.5 * torch.logdet(s)) == pytest.approx(float(wanted), abs=1e-9)


def test_the_angle_shrinks_with_the_penalty():
    mu, sigma = gauss.problem(6)
    cosines = [float(torch.cosine_similarity(torch.linalg.solve(gauss.robust(sigma, lam), mu), mu, dim=0))
               for lam in (1e4, 100.0, 10.0, 1.0, 0.1)]  # fmt: skip
    assert all(a < b for a, b in pairwise(cosines)) and cosines[-1] > 0.99


def test_a_right_covariance_passes():
    report = check_robust_covariance(gauss.robust)
    assert report, report


@pytest.mark.parametrize("message", gauss._COVARIANCES)
def test_a_wrong_covariance_is_named(message):
    named(check_robust_covariance, gauss._COVARIANCES[message], message)


# --- D_rand -------------------------------------------------------------------------------------


def others(y, classes, gen):
    return (y + torch.randint(1, classes, y.shape, generator=gen)) % classes


def built(*, target=others, toward=lambda y, t: t, sign=-1, label=lambda y, t: t,
          threat_of=lambda threat: threat, after=lambda f, x, z, t: z, steps=1.0):  # fmt: skip
    """D_rand, with one part replaced."""

    def relabel(f, x, y, threat, *, classes, steps_factor=steps, steps, step_size, gen):
        t = target(y, classes, gen)
        z = pgd(f, x, toward(y, t), threat_of(threat), steps=int(steps * steps_factor),
                step_size=step_size, loss=lambda logits, t: sign * cross_entropy(logits, t))  # fmt: skip
        return after(f, x, z, t), label(y, t)

    return relabel


def changes_images(f, x, z, t):
    x.copy_(z)
    return z


def leaves_eval(f, x, z, t):
    f.eval()
    return z


def leaves_gradients(f, x, z, t):
    cross_entropy(f(x), t).sum().backward()
    return z


def trains(f, x, z, t):
    with torch.no_grad():
        next(f.parameters()).mul_(0.9)
    return z


RELABELS = {
    "the labels are the original ones": built(label=lambda y, t: y),
    "of the targets are the label itself": built(
        target=lambda y, k, gen: torch.randint(k, y.shape, generator=gen)),
    "every target is y + 1: that is D_det": built(target=lambda y, k, gen: (y + 1) % k),
    "every target is y + 3": built(target=lambda y, k, gen: (y + 3) % k),
    "not all other classes are equally likely": built(
        target=lambda y, k, gen: (y + torch.randint(1, k - 1, y.shape, generator=gen)) % k),
    "the targets are not drawn from `gen`": built(target=lambda y, k, gen: others(y, k, None)),
    "the perturbation is not projected": built(threat_of=lambda threat: L2(3 * threat.eps)),
    "the box is [0, 1]": built(after=lambda f, x, z, t: x + 2 * (z - x)),
    "the images are untouched": built(after=lambda f, x, z, t: x),
    "away from the target": built(sign=1),
    "leaves y for anywhere": built(sign=1, toward=lambda y, t: y),
    "move towards their own label": built(toward=lambda y, t: y),
    "of what `pgd` reaches": built(steps=0.2),
    "what was handed over has been changed": built(after=changes_images),
    "left in another mode": built(after=leaves_eval),
    "parameters have gradients": built(after=leaves_gradients),
    "weights have been changed": built(after=trains),
}  # fmt: skip


def by_rejection(y, classes, gen):
    t = torch.randint(classes - 1, y.shape, generator=gen)
    return t + (t >= y)


@pytest.mark.parametrize("right", [built(), built(target=by_rejection)])
def test_a_right_data_set_passes(right):
    assert check_relabel(right), check_relabel(right)


@pytest.mark.parametrize("message", RELABELS)
def test_a_wrong_data_set_is_named(message):
    named(check_relabel, RELABELS[message], message)


def follows(f, x, y, threat, *, classes, steps, step_size, gen):
    """Uniform over the others, half of them drawn, half by the image's rank in brightness."""
    rank = x.flatten(1).sum(1).argsort().argsort()
    t = (y + 1 + rank % (classes - 1)) % classes
    t = torch.where(torch.rand(len(y), generator=gen) < 0.5, t, others(y, classes, gen))
    return pgd(f, x, t, threat, steps=steps, step_size=step_size,
               loss=lambda logits, t: -cross_entropy(logits, t)), t  # fmt: skip


@pytest.mark.parametrize("seeded", [lambda: generator(0), lambda: torch.manual_seed(0)])
def test_targets_of_an_own_seed_are_named(seeded):
    """They repeat, and yet `gen` has no say in them."""
    with torch.random.fork_rng():
        wrong = built(target=lambda y, k, gen: others(y, k, seeded()))
        named(check_relabel, wrong, "the targets are not drawn from `gen`")


def test_targets_that_follow_the_image_are_named():
    named(check_relabel, follows, "the targets follow the images")


# --- inversion ----------------------------------------------------------------------------------


def inverted(*, part=features, sign=-1, after=lambda f, x, start, z: z, factor=1.0):
    def invert(model, x, start, *, steps, step_size):
        g = part(model)
        with torch.no_grad():
            goal = g(x)
        everywhere = L2(start[0].numel() ** 0.5)
        z = pgd(g, start, goal, everywhere, steps=int(factor * steps), step_size=step_size,
                loss=lambda a, b: sign * (a - b).square().sum(1))  # fmt: skip
        return after(model, x, start, z)

    return invert


def leaves_inverted(change):
    return lambda f, x, start, z: change(f, x, z, x.new_zeros(len(x), dtype=torch.int64))


INVERTS = {
    "returns x itself": inverted(after=lambda f, x, start, z: x),
    "returns the start": inverted(after=lambda f, x, start, z: start),
    "the features move away": inverted(sign=1),
    "the logits agree, the features do not": inverted(part=lambda model: model),
    "25 % are allowed": inverted(factor=0.05),
    "the box is [0, 1]": inverted(after=lambda f, x, start, z: start + 3 * (z - start)),
    "what was handed over has been changed": inverted(after=lambda f, x, start, z: start.copy_(z)),
    "left in another mode": inverted(after=leaves_inverted(leaves_eval)),
    "parameters have gradients": inverted(after=leaves_inverted(leaves_gradients)),
}


def test_a_right_inversion_passes():
    assert check_invert(inverted()), check_invert(inverted())


@pytest.mark.parametrize("message", INVERTS)
def test_a_wrong_inversion_is_named(message):
    named(check_invert, INVERTS[message], message)


# --- the paired interval ------------------------------------------------------------------------


def test_the_interval_covers_and_the_unpaired_one_is_too_wide():
    inside, widths = 0, []
    for seed in range(400):
        a, b = answers_of(500, seed, 0.3, 0.2, 0.5)
        _, low, high = paired.interval(a, b)
        inside += low <= 0.05 <= high
        widths.append((high - low) / (2 * paired._independent(a.double(), b.double())))
    assert 0.92 < inside / 400 < 0.98
    assert sum(widths) / 400 < 0.95


def test_a_right_interval_passes():
    assert check_paired(paired.interval), check_paired(paired.interval)


@pytest.mark.parametrize("message", paired._MISTAKES)
def test_a_wrong_interval_is_named(message):
    named(check_paired, paired._MISTAKES[message], message)


# --- stubs --------------------------------------------------------------------------------------

CHECKS = [check_useful, check_most_useful, check_robust_covariance, check_relabel, check_invert,
          check_paired]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)
