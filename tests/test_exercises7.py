"""The checkers of chapter 7's exercises accept what is right and name every planted mistake."""

from itertools import pairwise

import pytest
import torch

from advlearn.attacks import pgd
from advlearn.exercises import (
    answers_of,
    check_control,
    check_effect,
    check_invert,
    check_most_useful,
    check_paired,
    check_relabel,
    check_robust_covariance,
    check_useful,
    check_worst_shift,
    control,
    gauss,
    paired,
    secular,
)
from advlearn.losses import cross_entropy
from advlearn.models import features
from advlearn.tensors import generator, norms, per_example
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


# --- the hard ball ------------------------------------------------------------------------------

FAMILIES = secular._problems()
PROBLEMS = [pytest.param(*given, id=name) for family in FAMILIES.values()
            for name, given in family.items()]  # fmt: skip


@pytest.mark.parametrize("s, v, eps", PROBLEMS)
def test_the_best_shift_beats_climbs_and_meets_its_bound(s, v, eps):
    """λ(ε² + vᵀ(λI − S)⁺Sv) bounds every δ of the ball from above; the best one reaches it."""
    delta = secular.worst(s, v, eps)
    best = float(secular.value(s, v, delta))
    assert float(delta.norm()) == pytest.approx(eps, rel=1e-9)
    assert best >= secular.climbed(s, v, eps) * (1 - 1e-9)
    lam = float(delta @ s @ (v + delta)) / eps**2
    inverse = torch.linalg.pinv(lam * torch.eye(len(v)) - s, rtol=1e-9, hermitian=True)
    assert best == pytest.approx(lam * (eps**2 + float(v @ inverse @ s @ v)), rel=1e-6)


def test_the_price_of_the_chapter_is_the_multiplier():
    """At the price λ* the priced adversary of the theorem goes exactly as far as ε."""
    for s, v, eps in FAMILIES["easy"].values():
        delta = secular.worst(s, v, eps)
        lam = delta @ s @ (v + delta) / eps**2
        priced = torch.linalg.solve(lam * torch.linalg.inv(s) - torch.eye(len(v)), v)
        assert torch.allclose(priced, delta, rtol=1e-5)


def only(wanted):
    """Stays at stationary points of the sphere, but on another root of the secular equation."""

    def shift(s, v, eps):
        values, vectors = torch.linalg.eigh(s)
        b = values * (vectors.T @ v)
        if len(v) == 1 or b[-1] == 0:
            return secular.worst(s, v, eps)

        def step(lam):
            return b / (lam - values)

        ends = ((float(values[-1]), float(values[-2] + values[-1]) / 2) if wanted == "saddle"
                else (float(values[0]), -1e4))  # fmt: skip
        if step(ends[1]).norm() > eps:
            return secular.worst(s, v, eps)
        share = secular.halved(lambda t: bool(step(ends[0] + t * (ends[1] - ends[0])).norm() < eps), 0, 1)
        return vectors @ step(ends[0] + share * (ends[1] - ends[0]))

    return shift


def changes_v(s, v, eps):
    delta = secular.worst(s, v, eps)
    v.add_(delta)
    return delta


SHIFTS = secular._MISTAKES | {
    "lies inside the ball of radius": lambda s, v, eps: 0.5 * secular.worst(s, v, eps),
    "outside the ball of radius": lambda s, v, eps: 1.1 * secular.worst(s, v, eps),
    "a saddle, or a lower hill": only("saddle"),
    "the lowest point of the sphere": only("minimum"),
    "A(v + δ) is not parallel to δ": lambda s, v, eps: secular.worst(s, v + 0.1, eps),
    "a climb from a random start": lambda s, v, eps: secular.worst(s.diag().diag(), v, eps),
    "the hard case: v has nothing along": lambda s, v, eps: secular.worst(s, v, eps, complete=False),
    "what was handed over has been changed": changes_v,
    "wanted float64": lambda s, v, eps: secular.worst(s, v, eps).float(),
    "the shape of v": lambda s, v, eps: secular.worst(s, v, eps)[None],
}  # fmt: skip


def stuck(s, v, eps):
    """Projected gradient, from δ along v: it never leaves what is orthogonal to the top."""
    delta = eps * v / v.norm()
    for _ in range(3000):
        delta = s @ (v + delta)
        delta = eps * delta / delta.norm()
    return delta


def test_a_right_shift_passes_with_either_sign_in_the_hard_case():
    assert check_worst_shift(secular.worst), check_worst_shift(secular.worst)

    def mirrored(s, v, eps):
        return -secular.worst(s, -v, eps)

    assert check_worst_shift(mirrored), check_worst_shift(mirrored)


@pytest.mark.parametrize("message", SHIFTS)
def test_a_wrong_shift_is_named(message):
    named(check_worst_shift, SHIFTS[message], message)


@pytest.mark.parametrize("short", [stuck, SHIFTS["the hard case: v has nothing along"]])
def test_whoever_forgets_the_hard_case_alone_hears_of_nothing_else(short):
    *easy, hard = check_worst_shift(short).findings
    assert not any(f.problem for f in easy) and hard.problem == secular.HARD


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


# --- the control --------------------------------------------------------------------------------


def noise(x, x_adv, t, gen):
    return torch.randn(x.shape, generator=gen)


def stretched(d, x, length):
    """x + c d, clipped and as long as wanted, by bisection."""
    low, high = torch.zeros(len(x)), torch.full((len(x),), 100.0)
    for _ in range(40):
        c = (low + high) / 2
        short = norms((x + per_example(c, x) * d).clamp(0, 1) - x, 2) < length
        low, high = torch.where(short, c, low), torch.where(short, high, c)
    return (x + per_example(high, x) * d).clamp(0, 1)


def controlled(*, way=noise, length=lambda sizes: sizes, label=lambda t, gen: t, fit=stretched,
               store=control.stored, after=lambda x, z: z):  # fmt: skip
    """The control, with one part replaced."""

    def build(x, x_adv, t, gen):
        d = torch.nn.functional.normalize(way(x, x_adv, t, gen).flatten(1)).view_as(x)
        z = store(fit(d, x, length(norms(x_adv - x, 2)).expand(len(x))))
        return after(x, z), label(t, gen)

    return build


def same_target(x, x_adv, t, gen):
    d = x_adv - x
    for k in t.unique():
        d[t == k] = d[t == k].roll(1, 0)
    return d


def projected(d, x, length):
    """What the package does: the nearest image of the ball to four times the noise."""
    return L2(length).project(x + per_example(4 * length, x) * d, x)


CONTROLS = {
    "others than those of D_rand": controlled(label=lambda t, gen: torch.randint(10, t.shape, generator=gen)),
    "the labels are shuffled": controlled(label=lambda t, gen: t[torch.randperm(len(t), generator=gen)]),
    "every perturbation has the average length": controlled(length=lambda sizes: sizes.mean()),
    "every perturbation has the greatest length": controlled(length=lambda sizes: sizes.max()),
    "the largest pixel has the attack's size": lambda x, x_adv, t, gen: (control.stored(
        x + per_example(norms(x_adv - x, torch.inf), x) * noise(x, x_adv, t, gen).sign()), t),
    "clipping takes what leaves [0, 1]": controlled(
        fit=lambda d, x, length: (x + per_example(length, x) * d).clamp(0, 1)),
    "between the 256 grey values": controlled(store=lambda z: z),
    "the box is [0, 1]": controlled(fit=lambda d, x, length: x + per_example(length, x) * d,
                                    store=lambda z: (255 * z).round() / 255),
    "the images are untouched": controlled(after=lambda x, z: x),
    "those are the images of D_rand itself": lambda x, x_adv, t, gen: (x_adv, t),
    "still follows the attack on its image": controlled(
        way=lambda x, x_adv, t, gen: x_adv - x + 0.03 * noise(x, x_adv, t, gen)),
    "the attack turned around": controlled(way=lambda x, x_adv, t, gen: x - x_adv),
    "other images with the same label": controlled(way=same_target),
    "what an attack wrote is no noise": controlled(
        way=lambda x, x_adv, t, gen: (x_adv - x)[torch.randperm(len(x), generator=gen)]),
    "the mean cosine with the attack is": controlled(
        way=lambda x, x_adv, t, gen: x_adv - x + 0.2 * noise(x, x_adv, t, gen)),
    "every image gets the same noise": controlled(
        way=lambda x, x_adv, t, gen: noise(x[:1], None, t, gen).expand_as(x)),
    "images of one label get the same noise": controlled(
        way=lambda x, x_adv, t, gen: torch.randn(10, *x.shape[1:], generator=gen)[t]),
    "it has a direction": controlled(
        way=lambda x, x_adv, t, gen: torch.rand(x.shape, generator=gen)),
    "the noise is not drawn from `gen`": controlled(
        way=lambda x, x_adv, t, gen: torch.randn(x.shape, generator=generator(3))),
    "the control teaches the true classes": controlled(way=same_target),
    "what was handed over has been changed": controlled(after=lambda x, z: x.copy_(z)),
}  # fmt: skip


@pytest.mark.parametrize("right", [controlled(), controlled(fit=projected)])
def test_a_right_control_passes(right):
    assert check_control(right), check_control(right)


@pytest.mark.parametrize("message", CONTROLS)
def test_a_wrong_control_is_named(message):
    named(check_control, CONTROLS[message], message)


def test_the_control_of_the_package_is_as_long_as_an_attack_that_reaches_the_sphere():
    x, x_adv, t = control.relabelled_digits()
    assert (norms(x_adv - x, 2) > 0.69).all() and control.learned_from(x_adv, t) > 0.5
    z, labels = controlled(fit=projected)(x, x_adv, t, generator(1))
    assert control.learned_from(z, labels) < 0.1


def test_a_right_rule_passes():
    assert check_effect(control.effect), check_effect(control.effect)


@pytest.mark.parametrize("message", control._RULES)
def test_a_wrong_rule_is_named(message):
    named(check_effect, control._RULES[message], message)


def test_a_rule_that_says_something_else_is_refused():
    named(check_effect, lambda a, b, margin: True, "wanted is 'yes', 'no' or 'undecided'")


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

CHECKS = [check_useful, check_most_useful, check_robust_covariance, check_worst_shift, check_relabel,
          check_control, check_effect, check_invert, check_paired]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)
