import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from advlearn import threats
from advlearn.tensors import Keyed, generator, norms
from advlearn.threats import L1, L2, Linf

THREATS = [Linf, L2, L1]
fixed = settings(max_examples=120, deadline=None, derandomize=True, database=None)

pixel = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, allow_subnormal=False))
move = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.3]), st.floats(-3, 3, allow_subnormal=False),
                 st.floats(-300, 300, allow_subnormal=False))  # fmt: skip
radius = st.sampled_from([0.0, 1e-6, 1e-3, 8 / 255, 0.3, 1.0, 1.7, 40.0])


@st.composite
def problems(draw, rows=3):
    """(x, z, eps): images, points to project and radii, of one small dimension."""
    d = draw(st.integers(1, 6))
    x = draw(st.lists(st.lists(pixel, min_size=d, max_size=d), min_size=rows, max_size=rows))
    v = draw(st.lists(st.lists(move, min_size=d, max_size=d), min_size=rows, max_size=rows))
    eps = draw(st.lists(radius, min_size=rows, max_size=rows))
    x, v = (torch.tensor(t, dtype=torch.float64).view(rows, 1, 1, d) for t in (x, v))
    return x, x + v, torch.tensor(eps, dtype=torch.float64)


def ball(kind, eps):
    return kind(eps.clamp(max=1) if kind is Linf else eps)


def bisect(x, z, eps, p):
    """The projection by 200 bisections on the multiplier, one example, in numpy."""
    v, low, high = z - x, -x, 1 - x

    def point(m):
        if p == math.inf:
            return np.clip(np.clip(v, -eps, eps), low, high)
        if p == 2:
            return np.clip(v / (1 + m), low, high)
        return np.clip(np.sign(v) * np.maximum(np.abs(v) - m, 0), low, high)

    if p == math.inf or np.linalg.norm(point(0), p) <= eps:
        return x + point(0)
    a, b = -40.0, 60.0  # the multiplier is e^a … e^b
    for _ in range(200):
        m = (a + b) / 2
        a, b = (m, b) if np.linalg.norm(point(math.exp(m)), p) > eps else (a, m)
    return x + point(math.exp(b))


@pytest.mark.parametrize("kind", THREATS)
@fixed
@given(problem=problems())
def test_project_is_the_nearest_point(kind, problem):
    x, z, eps = problem
    threat = ball(kind, eps)
    p = threat.project(z, x)
    for row in range(len(x)):
        expected = bisect(*(t[row].flatten().numpy() for t in (x, z)), float(threat.eps[row]), kind.p)
        scale = 1e-9 * (1 + float(threat.eps[row]))
        assert np.abs(p[row].flatten().numpy() - expected).max() <= scale


def by_solver(x, z, eps, p):
    """The projection by scipy's SLSQP, which knows nothing of our derivation."""
    d = len(x)
    box = [(-a, 1 - a) for a in x]
    v = z - x
    if p == 1:  # δ = a − b with a, b ≥ 0 and Σ(a + b) ≤ ε
        target = optimize.minimize(
            lambda t: ((t[:d] - t[d:] - v) ** 2).sum(), np.zeros(2 * d),
            jac=lambda t: np.concatenate([2 * (t[:d] - t[d:] - v), -2 * (t[:d] - t[d:] - v)]),
            bounds=[(0, h) for _, h in box] + [(0, -low) for low, _ in box], method="SLSQP",
            constraints={"type": "ineq", "fun": lambda t: eps - t.sum(),
                         "jac": lambda t: -np.ones(2 * d)},
            options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
        return x + target.x[:d] - target.x[d:]
    norm = [] if p == math.inf else {"type": "ineq", "fun": lambda t: eps**2 - t @ t,
                                     "jac": lambda t: -2 * t}  # fmt: skip
    if p == math.inf:
        box = [(max(low, -eps), min(high, eps)) for low, high in box]
    start = np.clip(v, *np.array(box).T)
    start *= min(1, 0.9 * eps / max(np.linalg.norm(start), 1e-12))
    target = optimize.minimize(lambda t: ((t - v) ** 2).sum(), start, jac=lambda t: 2 * (t - v),
                               bounds=box, constraints=norm, method="SLSQP",
                               options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
    return x + target.x


@pytest.mark.parametrize("kind", THREATS)
def test_project_equals_a_library_solver(kind):
    rng = np.random.default_rng(0)
    for _ in range(40):
        d = rng.integers(1, 7)
        x = np.where(rng.random(d) < 0.4, rng.integers(0, 2, d), rng.random(d)).astype(float)
        z = x + rng.normal(size=d) * rng.choice([0.1, 1, 3])
        eps = rng.choice([0.05, 0.3, 0.9])
        ours = kind(eps).project(torch.tensor(z).view(1, 1, 1, d), torch.tensor(x).view(1, 1, 1, d))
        assert np.abs(ours.flatten().numpy() - by_solver(x, z, eps, kind.p)).max() < 1e-5


@pytest.mark.parametrize("kind", THREATS)
@fixed
@given(problem=problems())
def test_project_stays_inside_and_repeats(kind, problem):
    x, z, eps = problem
    threat = ball(kind, eps)
    p = threat.project(z, x)
    assert (0 <= p).all() and (p <= 1).all()
    assert (norms(p - x, kind.p) <= threat.eps * (1 + 1e-12) + 1e-12).all()
    assert torch.allclose(threat.project(p, x), p, atol=1e-12, rtol=0)
    assert torch.equal(threat.project(x, x), x)
    assert torch.equal(p[threat.eps == 0], x[threat.eps == 0])
    inside = x + 0.5 * (p - x)
    assert torch.allclose(threat.project(inside, x), inside, atol=1e-15, rtol=0)


@pytest.mark.parametrize("kind", THREATS)
def test_no_radius_is_the_image_even_where_squares_vanish(kind):
    x = torch.tensor([1e-200, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    assert torch.equal(kind(0.0).project(torch.tensor([0, 0.5]).double().view(1, 1, 1, 2), x), x)


@pytest.mark.parametrize("kind", THREATS)
def test_one_radius_per_example_equals_one_at_a_time(kind):
    gen = generator(0)
    x = torch.rand(6, 3, 4, 4, generator=gen, dtype=torch.float64)
    z = x + torch.randn(x.shape, generator=gen, dtype=torch.float64)
    eps = torch.tensor([0.0, 0.01, 0.1, 0.3, 0.7, 1.0], dtype=torch.float64)
    whole = kind(eps).project(z, x)
    for i, e in enumerate(eps.tolist()):
        assert torch.allclose(kind(e).project(z[i : i + 1], x[i : i + 1]), whole[i], atol=1e-12)
    rows = torch.tensor([4, 1])
    taken = kind(eps).take(rows)
    assert torch.equal(taken.eps, eps[rows]) and torch.allclose(
        taken.project(z[rows], x[rows]), whole[rows], atol=1e-12)  # fmt: skip
    mask = eps > 0.2
    assert torch.equal(kind(eps).take(mask).eps, eps[mask])
    single = kind(0.3)
    assert single.take(rows) is single
    assert torch.equal(kind(torch.tensor(0.3)).take(rows).eps, torch.tensor(0.3))
    assert torch.equal(kind(eps).scaled(0.5).eps, eps / 2) and kind(0.3).scaled(0.5).eps == 0.15


def hard_problems(d):
    """Random, digit-like (mostly 0), saturated and constant images, near and far points."""
    gen = generator(1)
    x = torch.rand(4, d, generator=gen)
    x[1] *= torch.rand(d, generator=gen) < 0.2
    x[2] = x[2].round()
    x[3] = 0.7
    one = torch.zeros(4, d)
    one[:, 0] = 5
    moves = (torch.randn(4, d, generator=gen), torch.full((4, d), 0.4), torch.full((4, d), -0.4), one)
    z = torch.cat([x + size * v for v in moves for size in (1e-3, 1, 30)])
    return x.repeat(12, 1).view(-1, 1, 1, d), z.view(-1, 1, 1, d)


@pytest.mark.parametrize("eps", [0.001, 0.3, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("d", [784, 3072])
@pytest.mark.parametrize("kind", THREATS)
def test_float32_projection_is_accurate_and_satisfies_the_judge(kind, d, eps):
    """As near to the exact projection as float32 images can be, also for a small ε."""
    if kind is Linf and eps > 1:
        return
    x, z = hard_problems(d)
    p = kind(eps).project(z, x)
    assert kind(eps).contains(p, x).all() and (0 <= p).all() and (p <= 1).all()
    exact = kind(eps).project(z.double(), x.double())
    given = 1e-7 * math.sqrt(d) * norms(z, math.inf).clamp(min=1)  # z itself is rounded
    assert (norms(p.double() - exact, 2) <= 1e-3 * eps + given).all()


@pytest.mark.parametrize("kind", THREATS)
def test_contains_refuses_what_is_outside(kind):
    x = torch.full((1, 1, 2, 2), 0.5)
    threat = kind(0.2)
    unit = torch.zeros_like(x)
    unit[0, 0, 0, 0] = 1
    assert threat.contains(x, x).item() and threat.contains(x + 0.2 * unit, x).item()
    assert not threat.contains(x + 0.2005 * unit, x).item()
    bad = x.clone()
    bad[0, 0, 1, 1] = math.nan
    assert not threat.contains(bad, x).item()
    assert not threat.contains(torch.full_like(x, math.inf), x).item()
    edge = torch.ones_like(x)
    assert not kind(0.2).contains(edge + 0.01 * unit, edge).item(), "outside the pixel box"
    assert not kind(0.2).contains(-0.01 * unit, 0 * unit).item()
    both = kind(torch.tensor([0.2, 0.0])).contains(torch.cat([x + 0.1 * unit] * 2), torch.cat([x] * 2))
    assert both.tolist() == [True, False]


# --- ascend ---------------------------------------------------------------------------------


@st.composite
def slopes(draw):
    """(g, z): a gradient, and a point some of whose coordinates stand at the box."""
    d = draw(st.integers(1, 6))
    row = st.lists(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.1, 0.9)), min_size=d, max_size=d)
    slope = st.lists(st.one_of(st.just(0.0), st.floats(-5, 5, allow_subnormal=False)),
                     min_size=d, max_size=d)  # fmt: skip
    return tuple(torch.tensor(draw(part), dtype=torch.float64).view(1, 1, 1, d)
                 for part in (slope, row))  # fmt: skip


@pytest.mark.parametrize("kind", THREATS)
@fixed
@given(problem=slopes(), seed=st.integers(0, 1000))
def test_ascend_beats_every_feasible_direction(kind, problem, seed):
    g, z = problem
    threat, t = kind(0.5), 1e-3
    step = threat.project(z + t * threat.ascend(g, z, z), z) - z
    u = torch.randn(64, *z.shape[1:], generator=generator(seed), dtype=torch.float64)
    u = torch.cat([u, torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape[1:]),
                   u.sign(), g.sign(), g])  # fmt: skip
    u = torch.where((z <= 0) & (u < 0) | (z >= 1) & (u > 0), 0.0, u)
    u = u / norms(u, kind.p).clamp(min=1e-300).view(-1, 1, 1, 1)
    assert (norms(step, kind.p) <= t * (1 + 1e-9)).all()
    gains = (g * t * u).flatten(1).sum(1)
    assert float((g * step).sum()) >= float(gains.max()) - 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-25, 1e-37, 1e10])
@pytest.mark.parametrize("kind", THREATS)
def test_ascend_has_unit_norm_for_any_size_of_gradient(kind, scale):
    """A confident network's float32 gradients are tiny, their squares vanish."""
    x = torch.full((4, 1, 5, 5), 0.5)
    g = torch.randn(x.shape, generator=generator(0)) * scale
    a = kind(0.1).ascend(g, x, x)
    assert norms(a, kind.p).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
    assert ((a * g.sign()) >= 0).all()


@pytest.mark.parametrize("kind", THREATS)
def test_zero_gradient_and_stuck_coordinates_give_a_zero_step(kind):
    x = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(1, 1, 2, 2)
    assert torch.equal(kind(0.1).ascend(torch.zeros_like(x), x, x), torch.zeros_like(x))
    g = torch.tensor([-9.0, 9.0, 0.0, 2.0]).view(1, 1, 2, 2)
    step = kind(0.5).project(x + 0.1 * kind(0.5).ascend(g, x, x), x) - x
    assert torch.allclose(step.flatten(), torch.tensor([0.0, 0.0, 0.0, 0.1])), "others get it all"
    outward = torch.tensor([-9.0, 9.0, 0.0, 0.0]).view(1, 1, 2, 2)
    still = kind(0.5).project(x + 0.1 * kind(0.5).ascend(outward, x, x), x)
    assert torch.equal(still, x)


@pytest.mark.parametrize("kind", THREATS)
def test_rows_do_not_interact(kind):
    gen = generator(3)
    x = torch.rand(5, 2, 3, 3, generator=gen, dtype=torch.float64)
    g = torch.randn(x.shape, generator=gen, dtype=torch.float64)
    far = x + g
    threat = kind(0.3)
    for i in range(5):
        one = slice(i, i + 1)
        assert torch.allclose(threat.ascend(g, x, x)[one], threat.ascend(g[one], x[one], x[one]))
        assert torch.allclose(threat.project(far, x)[one], threat.project(far[one], x[one]), atol=1e-12)


# --- sample ---------------------------------------------------------------------------------

N, D, EPS = 4000, 4, 0.3
SOURCES = {"generator": lambda: generator(0), "keyed": lambda: Keyed((0, 1), torch.arange(N))}


def draws(kind, source, x=None, dtype=torch.float64):
    x = torch.full((N, 1, 1, D), 0.5, dtype=dtype) if x is None else x
    return kind(EPS).sample(x, SOURCES[source]()) - x


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", THREATS)
def test_sample_is_uniform_in_the_ball(kind, source):
    d = draws(kind, source).view(N, D)
    assert stats.kstest((norms(d, kind.p) / EPS) ** D, "uniform").pvalue > 1e-3, "radius"
    cube = (2 * torch.rand(400_000, D, generator=generator(9), dtype=torch.float64) - 1) * EPS
    kept = cube[norms(cube, kind.p) <= EPS]  # the same by rejection
    for i in range(D):
        assert stats.ks_2samp(d[:, i], kept[:, i]).pvalue > 1e-3
    for p in (1, 2, math.inf):
        assert stats.ks_2samp(norms(d, p), norms(kept, p)).pvalue > 1e-3
    correlation = np.corrcoef(d.numpy().T) - np.eye(D)
    assert np.abs(correlation).max() < 5 / math.sqrt(N)
    signs = (d > 0).long() @ torch.tensor([8, 4, 2, 1])
    assert stats.chisquare(signs.bincount(minlength=16)).pvalue > 1e-3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", THREATS)
def test_sample_stays_in_the_set_at_the_corners(kind, source):
    x = (torch.rand(N, 1, 1, D, generator=generator(2)) * 3 - 1).clamp(0, 1)
    z = x + draws(kind, source, x)
    assert kind(EPS).contains(kind(EPS).sample(x, SOURCES[source]()), x).all() and z.isfinite().all()


@pytest.mark.parametrize("kind", THREATS)
def test_sample_with_one_radius_per_example(kind):
    x = torch.full((N, 1, 1, D), 0.5, dtype=torch.float64)
    eps = torch.linspace(0, 0.4, N, dtype=torch.float64)
    size = norms(kind(eps).sample(x, Keyed(0, torch.arange(N))) - x, kind.p)
    assert size[0] == 0 and (size <= eps + 1e-12).all()
    assert stats.kstest(((size / eps)[1:]) ** D, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", THREATS)
def test_center_render_and_names(kind):
    x = torch.rand(2, 1, 3, 3, generator=generator(0))
    assert kind(0.1).center(x) is x and kind(0.1).render(x, x) is x
    assert str(kind(0.1)) == {Linf: "ℓ∞", L2: "ℓ2", L1: "ℓ1"}[kind] + ", ε = 0.1"
    assert str(kind(torch.tensor([0.1, 0.2]))).endswith("ε = …")
    assert kind(0.1) == kind(0.1) and kind(0.1) != kind(0.2)
    assert repr(kind(0.1)) == f"{kind.__name__}(eps=0.1)"


@pytest.mark.parametrize("kind", [L2, L1])
def test_a_usual_projection_takes_few_newton_steps(kind, monkeypatch):
    """Bisection alone would be right too, with 30 evaluations."""
    count = []

    def counting(excess, *args, **options):
        def counted(s):
            count.append(1)
            return excess(s)

        return solve(counted, *args, **options)

    solve = threats._solve
    monkeypatch.setattr(threats, "_solve", counting)
    gen = generator(0)
    x = (torch.rand(32, 1, 28, 28, generator=gen) * 2 - 1).clamp(0, 1)
    eps = 2.0 if kind is L2 else 10.0
    threat = kind(eps)
    z = threat.sample(x, gen)
    for _ in range(5):
        count.clear()
        z = threat.project(z + eps / 4 * threat.ascend(torch.randn(x.shape, generator=gen), z, x), x)
        assert sum(count) <= 8
    count.clear()
    kind(0.0).project(z, x), kind(1e6).project(z, x)
    assert sum(count) == 2
