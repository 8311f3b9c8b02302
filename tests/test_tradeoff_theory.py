"""Chapter 6's theory: closed forms against simulation, theorems at their edges, bad input."""

import math

import pytest
import torch

from advlearn.distributions import (
    Twofold,
    bernoulli_error,
    expected_hinge,
    gaussian_learners,
    gaussian_lower,
    gaussian_upper,
    normal_cdf,
    posterior,
    robust_error,
    shrink,
    signs,
)
from advlearn.tensors import generator

TOY = Twofold(0.9, 0.3, 50)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def wrong(w, x, y, eps):
    """Share of examples on which the worst ℓ∞ perturbation beats sign(w·x)."""
    return float((y * (x @ w) - eps * w.abs().sum() <= 0).double().mean())


def within(share, expected, n, z=4.5):
    return abs(share - expected) <= z * math.sqrt(max(expected * (1 - expected), 1 / n) / n)


@pytest.mark.parametrize("ab", [(1, 0), (0, 1), (0.6, 0.8), (0.95, 0.31)])
@pytest.mark.parametrize("eps", [0.0, 0.2, 0.6])
def test_accuracy_of_twofold_against_simulation(ab, eps):
    x, y = TOY.sample(20_000, generator(1))
    assert x.shape == (20_000, 51) and set(y.tolist()) == {-1.0, 1.0}
    share = 1 - wrong(TOY.weights(*ab), x, y, eps)
    assert within(share, TOY.accuracy(*ab, eps), len(y)), (share, TOY.accuracy(*ab, eps))


def test_the_averaged_feature_has_variance_one_over_d():
    x, y = TOY.sample(20_000, generator(2))
    average = y * x[:, 1:].mean(1)
    assert float(average.var()) == pytest.approx(1 / TOY.d, rel=0.05)
    assert float((average > 0).double().mean()) == pytest.approx(normal_cdf(0.3 * 50**0.5), abs=0.005)


def test_the_loss_of_twofold_against_simulation():
    x, y = TOY.sample(50_000, generator(3))
    for eps, (a, b) in ((0.0, (0.3, 0.9)), (0.25, (0.7, 0.7)), (0.5, (1, 0))):
        w = TOY.weights(a, b)
        sampled = (1 - y * (x @ w) + eps * w.abs().sum()).clamp(min=0).mean()
        assert float(sampled) == pytest.approx(TOY.loss(a, b, eps), rel=0.03, abs=1e-3)


def test_expected_hinge():
    z = normal(200_000)
    for m, s in ((1, 0.5), (-3, 1), (0, 2), (-0.5, 0)):
        assert expected_hinge(m, s) == pytest.approx(float((m + s * z).clamp(min=0).mean()),
                                                     abs=0.01, rel=0.02)  # fmt: skip
    assert expected_hinge(-1, 0) == 0 and expected_hinge(2, 0) == 2


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.25, 0.3, 0.5])
def test_soft_margin_is_the_minimiser(eps):
    """No direction and no length on a grid, and no uneven weights, have a smaller loss."""
    a, b = TOY.soft_margin(eps)
    least = TOY.loss(a, b, eps)
    assert a**2 + b**2 <= 1 + 1e-9
    for r in (0.5, 0.9, 1.0):
        for degrees in range(0, 91, 3):
            t = math.radians(degrees)
            assert TOY.loss(r * math.cos(t), r * math.sin(t), eps) >= least - 1e-7
    x, y = TOY.sample(20_000, generator(4))
    even, uneven = TOY.weights(0.6, 0.8), TOY.weights(0.6, 0.8)
    uneven[1:] *= 1 + 0.8 * normal(50)
    uneven[1:] *= even[1:].sum() / uneven[1:].sum()
    losses = [(1 - y * (x @ w) + eps * w.abs().sum()).clamp(min=0).mean() for w in (even, uneven)]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("toy", [TOY, Twofold(0.8, 0.1, 900), Twofold(0.975, 0.4, 100)])
def test_the_weak_features_are_dropped_exactly_from_eta_on(toy):
    top = 2 * toy.p - 1
    for eps in (0.5 * toy.eta, 0.9 * toy.eta, 0.99 * toy.eta):
        assert toy.soft_margin(eps)[1] > 1e-3
    for eps in (toy.eta, 1.01 * toy.eta, min(2 * toy.eta, 0.99 * top)):
        if eps < top:
            assert toy.soft_margin(eps) == pytest.approx((1, 0), abs=1e-6)
    a, b = toy.soft_margin(max(top, toy.eta) + 0.01)
    assert (a, b) == pytest.approx((0, 0), abs=1e-6)


def test_part_one_of_the_theorem():
    """The smallest case, and larger ones: more weight on the weak features, and lost at 2η."""
    for toy in (Twofold(0.975, 0.4, 100), Twofold(0.95, 0.3, 400), Twofold(0.6, 0.2, 2500)):
        a, b = toy.soft_margin()
        assert a < b and toy.accuracy(a, b) > 0.99 and toy.accuracy(a, b, 2 * toy.eta) < 0.01
    toy = Twofold(0.95, 0.3, 400)
    a, b = toy.soft_margin(0.1)  # η − ε = 4/√d: kept, although trained under attack
    assert a < b and toy.accuracy(a, b) > 0.99
    assert 0.025 / 2**0.5 * expected_hinge(1 + 2**0.5 - 4, 1) > expected_hinge(-3, 1)


def test_the_bound_of_no_free_lunch():
    for a, b in ((1, 0), (0.99, 0.14), (0.9, 0.44), (0.5, 0.87), (0, 1)):
        delta = 1 - TOY.accuracy(a, b)
        for eps in (0.6, 0.8):
            assert TOY.accuracy(a, b, eps) <= 9 * delta + 1e-12
    # It needs 2η: at less, some classifier is above it.
    assert TOY.accuracy(0.9, 0.44, 0.3) > 9 * (1 - TOY.accuracy(0.9, 0.44))


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.25])
def test_what_can_be_kept(eps):
    """The classifier of the proof reaches it under its worst attack, and no linear one exceeds it."""
    toy, n = Twofold(0.8, 0.3, 30), 100_000
    x, y = toy.sample(n, generator(5))
    odds = math.log(0.8 / 0.2)
    weak = x[:, 1:].sum(1) - eps * toy.d * y
    score = odds * x[:, 0].sign() + 2 * (toy.eta - eps) * weak
    assert within(float((score * y > 0).double().mean()), toy.best(eps), n)
    for degrees in range(0, 91, 5):
        t = math.radians(degrees)
        assert toy.accuracy(math.cos(t), math.sin(t), eps) <= toy.best(eps) + 1e-12


def test_what_can_be_kept_at_the_edges():
    assert TOY.best(0.3) == TOY.best(0.9) == 0.9 and TOY.best(1.2) == 0.5
    assert TOY.best(0.3 - 1e-9) == pytest.approx(0.9, abs=1e-6)
    values = [TOY.best(e / 100) for e in range(31)]
    assert values == sorted(values, reverse=True)
    wide = Twofold(0.9, 2.0, 4)  # ε between 1 and η: x₁ is the attacker's, the others are not
    assert wide.best(1.5) == pytest.approx(normal_cdf(2 * 0.5))


@pytest.mark.parametrize("bad", [(0.4, 0.3, 5), (1.0, 0.3, 5), (0.9, 0, 5), (0.9, 0.3, 0)])
def test_bad_parameters(bad):
    with pytest.raises(ValueError, match="Twofold: (p|eta|d)="):
        Twofold(*bad)


# --- the Gaussian model -----------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_robust_error_against_simulation(eps):
    theta, sigma = normal(40), 2.0
    w = theta + normal(40, seed=1)
    y = signs(50_000, 0.5, generator(2))
    x = y[:, None] * theta + sigma * normal(50_000, 40, seed=3)
    assert within(wrong(w, x, y, eps), float(robust_error(w, theta, sigma, eps)), len(y))
    assert float(robust_error(0 * w, theta, sigma, eps)) == 0.5


def test_posterior_by_regression():
    """θ given the mean of the examples: regression coefficient and remaining variance."""
    n, sigma = 3, 1.5
    theta, noise = normal(100_000), normal(100_000, seed=1)
    seen = theta + sigma / n**0.5 * noise
    v, rest = posterior(n, sigma)
    assert float((theta * seen).mean() / seen.square().mean()) == pytest.approx(v, abs=0.01)
    assert float((theta - v * seen).var()) == pytest.approx(rest, abs=0.01)
    assert float((v * seen).var()) == pytest.approx(v, abs=0.01)


def test_expected_errors_of_learners_against_learning():
    d, n, sigma, eps, repeats = 200, 4, 2.0, 0.6, 600
    expected = [float(v.mean()) for v in gaussian_learners(d, n, sigma, eps, draws=2000,
                                                           gen=generator(0))]  # fmt: skip
    theta = normal(repeats, d, seed=1)
    seen = theta + sigma / n**0.5 * normal(repeats, d, seed=2)
    mu = posterior(n, sigma)[0] * seen
    for value, w, e in zip(expected, (seen, seen, shrink(mu, eps)), (0, eps, eps), strict=True):
        errors = robust_error(w, theta, sigma, e)
        assert float(errors.mean()) == pytest.approx(value, abs=4 * float(errors.std()) / repeats**0.5)


def test_no_learner_beats_the_best_one():
    d, n, sigma, eps = 100, 6, 2.0, 0.5
    theta = normal(400, d, seed=1)
    seen = theta + sigma / n**0.5 * normal(400, d, seed=2)
    mu = posterior(n, sigma)[0] * seen
    best = robust_error(shrink(mu, eps), theta, sigma, eps)
    for other in (seen, seen.sign(), shrink(mu, eps / 2), shrink(mu, 1.4 * eps)):
        assert float((robust_error(other, theta, sigma, eps) - best).mean()) > 0


def test_upper_bound_holds_as_often_as_it_says():
    d, n, sigma, eps = 400, 100, 1.5, 0.3
    bound, probability = gaussian_upper(d, n, sigma, eps)
    theta = normal(d)
    theta *= d**0.5 / theta.norm()
    seen = theta + sigma / n**0.5 * normal(300, d, seed=1)
    assert bound < 0.01 and probability > 0.999
    assert bool((robust_error(seen, theta, sigma, eps) <= bound).all())
    beta = 0.05  # as the theorem is stated, solved for ε
    rho = (2 * n**0.5 - 1) / (2 * n**0.5 + 4 * sigma)
    edge = rho - sigma * math.sqrt(2 * math.log(1 / beta) / d)
    assert gaussian_upper(d, n, sigma, edge)[0] == pytest.approx(beta)
    assert gaussian_upper(d, 1, 50.0, 0.9)[0] == 1


def test_lower_bound():
    for d, sigma, eps in ((10**8, 60.0, 0.75), (10**10, 200.0, 0.5)):
        for constant in (4, 8):
            n = eps**2 * sigma**2 / (constant * math.log(d))
            assert gaussian_lower(d, n, sigma, eps) >= 0.5 * (1 - 1 / d)
    for n in (1, 3, 10):
        best = gaussian_learners(20, n, 3.0, 0.8, draws=4000, gen=generator(0))[2]
        assert float(best.mean()) >= gaussian_lower(20, n, 3.0, 0.8) - 1e-3


def test_the_mean_learner_needs_root_d_examples_to_beat_a_coin():
    t2 = 0.75**2 * 2 / math.pi
    for d in (10_000, 250_000):
        sigma = 0.6 * d**0.25
        n = t2 / (1 - t2) * sigma**2
        for factor, side in ((0.8, 1), (1.25, -1)):
            error = gaussian_learners(d, factor * n, sigma, 0.75, draws=4, gen=generator(0))[1].mean()
            assert (float(error) - 0.5) * side > 0.2


# --- the Bernoulli model ----------------------------------------------------------------------


def test_bernoulli_error_against_simulation():
    d, tau = 1000, 0.15
    theta = signs(d, 0.5, generator(0))
    w = (theta * signs((15, d), 0.5 + tau, generator(1))).mean(0)
    z = theta * signs((4000, d), 0.5 + tau, generator(2))  # y · x
    for eps in (0.0, 0.1, 0.2):
        share = float((z @ w - eps * w.abs().sum() <= 0).double().mean())
        assert share == pytest.approx(float(bernoulli_error(w, theta, tau, eps)), abs=0.03)


def test_one_example_and_a_threshold():
    d, tau = 1000, 0.25
    theta = signs(d, 0.5, generator(0))
    w = theta * signs(d, 0.5 + tau, generator(1))
    z = theta * signs((2000, d), 0.5 + tau, generator(2))
    bound = math.exp(-2 * tau**4 * d)
    assert float((z @ w <= 0).double().mean()) <= bound
    for eps in (0.5, 0.99):
        attacked = z - eps * w.sign()
        assert torch.equal(attacked.sign(), z) and float((attacked @ w <= 0).double().mean()) > 0.9


def test_constants_of_the_linear_lower_bound():
    """The chain at the end of the proof, at its worst corner and for the paper's own constant."""
    for d in (5, 100, 10**6):
        for gamma in (0.5, 0.1):
            for tau, share in ((0.25, 0.999), (0.01, 0.999), (0.01, 0.3)):
                eps = 3 * tau * share
                for n in (eps**2 * gamma**2 / (50 * tau**4 * math.log(2 * d / gamma)),
                          eps**2 * gamma**2 / (5000 * tau**4 * math.log(4 * d / gamma))):
                    s = 2 * tau * n + math.sqrt(2 * n * math.log(2 * d / gamma))
                    kappa = 2 * tau * math.tanh(s * math.atanh(2 * tau))
                    assert (1 - gamma) * (0.5 - kappa / (2 * eps)) >= 0.5 - gamma


def test_the_attackers_share_in_the_linear_lower_bound():
    """P(right under attack) ≤ 1/2 + κ / (2ε) for signs of mean at most κ, whatever the weights."""
    kappa, eps, n = 0.06, 0.1, 40_000
    for w in (torch.ones(30).double(), normal(30).abs(), torch.eye(30)[0].double()):
        w = w / w.sum()
        signs_of = signs((n, 30), 0.5 + kappa / 2, generator(1))
        right = float((signs_of @ w > eps).double().mean())
        assert right <= 0.5 + kappa / (2 * eps) + 0.01
