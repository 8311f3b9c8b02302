"""The theorems of chapter 3 on maxima, against difference quotients and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advlearn import attacks
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import generator
from advlearn.threats import Linf

fixed = settings(max_examples=100, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
T = 1e-6  # of the difference quotients; their error is of the order of T


class Pieces:
    """g(θ, j) = c_j + a_j·θ + sin(b_j·θ) for j < m: smooth in θ, on a finite set of δ."""

    def __init__(self, rng, m, n, tied, theta):
        self.a, self.b = rng.normal(size=(2, m, n))
        self.c = np.zeros(m)
        gap = rng.uniform(0.1, 1, m)
        gap[:tied] = 0  # the first `tied` functions share the maximum at θ
        self.c = -gap - self.values(theta)

    def values(self, theta):
        return self.c + self.a @ theta + np.sin(self.b @ theta)

    def gradients(self, theta):
        return self.a + np.cos(self.b @ theta)[:, None] * self.b

    def phi(self, theta):
        return self.values(theta).max()


def quotient(phi, theta, h, t=T):
    return (phi(theta + t * h) - phi(theta)) / t


def shortest(points):
    """The point of smallest norm in the hull of (k, n) points: over all faces, by brute force."""
    best = min(points, key=np.linalg.norm)
    for k in range(2, min(len(points), points.shape[1] + 1) + 1):
        for face in itertools.combinations(points, k):
            corner, edges = face[0], np.array(face[1:]) - face[0]
            weights = np.linalg.lstsq(edges.T, -corner, rcond=None)[0]
            point = corner + weights @ edges
            if min(*weights, 1 - weights.sum()) >= 0:
                best = min(best, point, key=np.linalg.norm)
    return best


@fixed
@given(seed=seeds, m=st.integers(1, 6), n=st.integers(1, 4), data=st.data())
def test_danskin_on_a_finite_set(seed, m, n, data):
    tied = data.draw(st.integers(1, m))
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=n)
    g = Pieces(rng, m, n, tied, theta)
    maximisers = g.gradients(theta)[:tied]
    for h in rng.normal(size=(8, n)):
        formula = (maximisers @ h).max()
        assert quotient(g.phi, theta, h) == pytest.approx(formula, abs=1e-3)
        if tied == 1:  # then, and only then, the slopes are those of one gradient
            assert -quotient(g.phi, theta, -h) == pytest.approx(formula, abs=1e-3)
    if tied > 1:
        h = maximisers[0] - maximisers[1]
        assert quotient(g.phi, theta, h) + quotient(g.phi, theta, -h) > 0.99 * h @ h - 1e-3


def on_interval(coefficients):
    """Exact maximisers on [−1, 1] of a polynomial, highest power first: (points, values)."""
    derivative = np.polyder(np.poly1d(coefficients))
    roots = derivative.roots
    inside = roots.real[(abs(roots.imag) < 1e-9) & (abs(roots.real) < 1)]
    points = np.array([-1.0, 1.0, *inside])
    return points, np.polyval(coefficients, points)


@fixed
@given(seed=seeds, degree=st.integers(1, 5), n=st.integers(1, 3))
def test_gradient_where_the_maximiser_is_unique(seed, degree, n):
    rng = np.random.default_rng(seed)
    a, b, phase = rng.normal(size=(degree + 1, n)), rng.normal(size=degree + 1), rng.normal(size=n)

    def coefficients(theta):
        return a @ np.sin(theta + phase) + b

    def phi(theta):
        return on_interval(coefficients(theta))[1].max()

    theta = rng.normal(size=n)
    points, values = on_interval(coefficients(theta))
    best = points[values.argmax()]
    assume(all(values.max() - values[abs(points - best) > 1e-6] > 1e-2))
    gradient = np.polyval(a * np.cos(theta + phase), best)  # of g(·, δ*), δ* held
    for e in np.eye(n):
        central = (phi(theta + T * e) - phi(theta - T * e)) / (2 * T)
        assert central == pytest.approx(gradient @ e, abs=1e-3)


@fixed
@given(seed=seeds)
def test_a_planted_tie_on_an_interval(seed):
    """g(θ, δ) = θ1 δ + θ2 δ³ − (δ² − r²)²: at θ = 0 both ±r are maximal, inside the interval."""
    rng = np.random.default_rng(seed)
    r = rng.uniform(0.3, 0.9)

    def phi(theta):
        return on_interval([-1, theta[1], 2 * r**2, theta[0], -(r**4)])[1].max()

    gradients = np.array([[r, r**3], [-r, -(r**3)]])
    for h in rng.normal(size=(8, 2)):
        assert quotient(phi, np.zeros(2), h) == pytest.approx((gradients @ h).max(), abs=1e-3)


@fixed
@given(seed=seeds, m=st.integers(2, 5), n=st.integers(1, 3))
def test_steepest_descent_is_the_shortest_point_of_the_hull(seed, m, n):
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=n)
    g = Pieces(rng, m, n, m, theta)
    gradients = g.gradients(theta)
    v = shortest(gradients)
    length = np.linalg.norm(v)
    h = rng.normal(size=(2000, n))
    slopes = (gradients @ (h / np.linalg.norm(h, axis=1, keepdims=True)).T).max(0)
    assert slopes.min() >= -length - 1e-9  # no direction is steeper, and at v = 0 none descends
    if length > 1e-9:
        assert (gradients @ -v).max() == pytest.approx(-(length**2), rel=1e-6, abs=1e-12)
    if n < 3 and length > 0.1:  # close to the best of many random directions
        assert slopes.min() < -0.9 * length
    for one in gradients:  # when a single gradient serves, and when it does not
        falls = (gradients @ one).min() > 0
        assume(abs((gradients @ one).min()) > 1e-2)
        assert (quotient(g.phi, theta, -one) < 0) == falls


def grey(theta, delta):
    """The page's toy: logits (0, θ1 δ, θ2 δ), the true class is the first."""
    return (F.pad(theta, (1, 0)) * delta).logsumexp(-1)


@fixed
@given(s=st.floats(0.1, 10), eps=st.floats(0.05, 0.5), eta=st.floats(1e-3, 10))
def test_corollary_fails_at_every_maximiser(s, eps, eta):
    theta = torch.tensor([s, -s], dtype=torch.float64)

    def phi(theta):
        return torch.maximum(grey(theta, eps), grey(theta, -eps))

    inside = torch.linspace(-eps, eps, 101, dtype=torch.float64)[1:-1, None]
    assert (grey(theta, inside) < phi(theta)).all()  # the two ends are all maximisers there are
    assert grey(theta, eps) == pytest.approx(float(grey(theta, -eps)), abs=1e-12)
    bright, dark = (input_grad(lambda t, d=d: grey(t, d), theta) for d in (eps, -eps))
    p, q = bright / eps
    assert dark.tolist() == pytest.approx((-eps * q.item(), -eps * p.item()))
    assert bright @ dark == pytest.approx(float(-2 * eps**2 * p * q))
    for one in (bright, dark):
        assert phi(theta - eta * one) > phi(theta)
    assert phi(theta - min(eta, s) * (bright + dark) / 2) < phi(theta)


@pytest.mark.parametrize("a, eps", [(0.1, 0.3), (0.05, 0.2), (0.2, 0.3), (0.25, 0.2)])
def test_corollary_fails_at_most_maximisers_that_pgd_finds(a, eps):
    """Logistic regression on (ε + a, 0) + 1/2: the loss rises where |t| > a² / ε."""
    runs = 2000
    w = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = torch.tensor([0.5 + eps + a, 0.5], dtype=torch.float64).expand(runs, 1, 1, 2)
    y = torch.ones(runs, dtype=torch.long)

    def logits(w, z):
        return F.pad((w * (z.flatten(1) - 0.5)).sum(1, keepdim=True), (1, 0))

    def phi(w):
        return F.softplus(eps * w.abs().sum(-1) - (eps + a) * w[..., 0])

    start = Linf(eps).sample(x, generator(0))
    z = attacks.pgd(lambda z: logits(w, z), x, y, Linf(eps), steps=20, step_size=0.1, start=start)
    g = input_grad(lambda w: cross_entropy(logits(w, z), y), w.expand(runs, 2))
    t = (z - x).flatten(1)[:, 1]
    assert torch.allclose(cross_entropy(logits(w, z), y), phi(w), rtol=0, atol=1e-12)
    for eta in (10, 1, 1e-3):
        assert ((phi(w - eta * g) > phi(w)) == (t.abs() > a**2 / eps)).all()
    share = float((t.abs() > a**2 / eps).double().mean())
    assert share == pytest.approx(max(0, 1 - (a / eps) ** 2), abs=0.05)


@fixed
@given(seed=seeds, n=st.integers(1, 3), d=st.integers(1, 4))
def test_bound_for_a_bad_maximiser(seed, n, d):
    """g = sin θ1 + (Mθ)·δ − μ/2 |δ|² on a box: strongly concave in δ, so part 2 applies."""
    rng = np.random.default_rng(seed)
    M, theta, mu = rng.normal(size=(d, n)), rng.normal(size=n), rng.uniform(0.2, 3)

    def g(theta, delta):
        return np.sin(theta[0]) + M @ theta @ delta - mu / 2 * delta @ delta

    def best(theta):
        return np.clip(M @ theta / mu, -0.5, 0.5)

    def gradient(theta, delta):
        return np.cos(theta[0]) * np.eye(n)[0] + M.T @ delta

    phi = g(theta, best(theta))
    bad = rng.uniform(-0.5, 0.5, d)
    for share in (1, 0.1, 0.01):
        delta = best(theta) + share * (bad - best(theta))
        tau, ghat = phi - g(theta, delta), gradient(theta, delta)
        assert tau >= 0
        bound = np.linalg.norm(M, 2) * math.sqrt(2 * tau / mu)
        assert np.linalg.norm(ghat - gradient(theta, best(theta))) <= bound + 1e-9
        if np.linalg.norm(ghat) > bound:
            assert gradient(theta, best(theta)) @ ghat > 0
        for h in rng.normal(size=(8, n)):  # part 1, where ∇g(·, δ) has Lipschitz constant 1
            lower = phi - tau + ghat @ h - h @ h / 2
            assert g(theta + h, best(theta + h)) >= lower - 1e-9


def test_bound_for_a_bad_maximiser_is_sharp():
    """One dimension, inside the interval: the error of the gradient equals the bound."""
    slope, mu, best, delta = 2.0, 0.7, 0.1, 0.3
    tau = mu / 2 * (delta - best) ** 2
    assert slope * abs(delta - best) == pytest.approx(slope * math.sqrt(2 * tau / mu))


@fixed
@given(seed=seeds, tau=st.sampled_from([0.0, 1e-3, 0.1]))
def test_convex_training_pays_for_a_bad_maximiser_once(seed, tau):
    """Part 3 on g(θ, j) = a_j·θ + |θ|²/2 − c_j, with the worst δ that is still within τ."""
    rng = np.random.default_rng(seed)
    a, c, theta = rng.normal(size=(5, 2)), rng.uniform(0, 1, 5), 3 * rng.normal(size=2)
    eta, steps = 0.02, 500
    largest = np.linalg.norm(a, axis=1).max()  # θ stays in the hull of the −a and the start
    largest += max(largest, np.linalg.norm(theta))

    def values(theta):
        return a @ theta + theta @ theta / 2 - c

    start, seen = theta, []
    for _ in range(steps):
        value = values(theta)
        chosen = int(np.where(value >= value.max() - tau, value, np.inf).argmin())
        seen.append(value.max())
        theta = theta - eta * (a[chosen] + theta)
    for rival in (np.zeros(2), *rng.normal(size=(20, 2))):
        slack = tau + (start - rival) @ (start - rival) / (2 * eta * steps) + eta * largest**2 / 2
        assert min(seen) <= values(rival).max() + slack + 1e-9


@fixed
@given(logits=st.lists(st.floats(-20, 20), min_size=2, max_size=5))
def test_a_wrong_answer_costs_at_least_log_2(logits):
    z = torch.tensor([logits], dtype=torch.float64)
    if z[0, 1:].max() >= z[0, 0]:
        assert cross_entropy(z, torch.tensor([0])) >= math.log(2) - 1e-12
    equal = torch.zeros(1, 2, dtype=torch.float64)
    assert cross_entropy(equal, torch.tensor([0])) == pytest.approx(math.log(2))


def test_relu_breaks_the_formula_at_a_unique_maximiser():
    """min(v, −2v), v = θ − δ: φ is constant, autograd at the maximiser reports 1."""

    def g(theta, delta):
        return (theta - delta) - torch.relu(3 * (theta - delta))

    deltas = torch.linspace(-0.3, 0.3, 61, dtype=torch.float64)
    table = g(deltas[:, None], deltas)
    assert (table.diagonal() == 0).all() and (table[~torch.eye(61, dtype=torch.bool)] < 0).all()
    assert (input_grad(lambda theta: g(theta, deltas), deltas) == 1).all()
