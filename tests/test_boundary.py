"""FAB: exact steps to a plane inside the box, and the distance of the boundary."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import Opposed, digits, uniform01
from scipy.optimize import linprog, minimize

from advlearn import zoo
from advlearn.attacks import apgd, fab, from_center, toward
from advlearn.attacks.boundary import _to_plane
from advlearn.evaluation import predict, worst_case
from advlearn.losses import cross_entropy, gap, margin
from advlearn.tensors import generator, norms
from advlearn.threats import L1, L2, Linf

NORMS = [math.inf, 2]
DUAL = {math.inf: 1, 2: 2}
IDS = ["linf", "l2"]


def problem(n=40, shape=(1, 3, 3), seed=0):
    """Points of which a third of the coordinates stand at each wall, planes, and distances to go."""
    x = uniform01(n, *shape, seed=seed).mul(3).sub(1).clamp(0, 1)
    w = torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)
    w[:, :, 0, 0] *= torch.arange(n)[:, None] % 3 > 0  # some coordinates do not matter
    c = torch.randn(n, generator=generator(seed + 1), dtype=torch.float64) * norms(w, 1) / 4
    return x, w, c


def by_scipy(x, w, c, p):
    """Least ‖d‖ with ⟨w, d⟩ = c, x + d in the box; None where the box is too small."""
    bounds = list(zip(-x, 1 - x, strict=True))
    d = len(x)
    if p == math.inf:  # minimise t over (d, t), −t ≤ d ≤ t
        both = np.block([[np.eye(d), -np.ones((d, 1))], [-np.eye(d), -np.ones((d, 1))]])
        answer = linprog(np.eye(d + 1)[d], both, np.zeros(2 * d), [[*w, 0]], [c], [*bounds, (0, None)])
        return answer.fun if answer.success else None
    if linprog(np.zeros(d), A_eq=[w], b_eq=[c], bounds=bounds).success:
        answer = minimize(lambda v: v @ v, np.zeros(d), jac=lambda v: 2 * v, bounds=bounds, method="SLSQP",
                          constraints={"type": "eq", "fun": lambda v: w @ v - c, "jac": lambda v: w},
                          options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
        return math.sqrt(answer.fun)
    return None


@pytest.mark.parametrize("p", NORMS, ids=IDS)
def test_step_to_a_plane_is_the_shortest_in_the_box(p):
    x, w, c = problem()
    d = _to_plane(x, w, c, p)
    assert ((x + d >= -1e-12) & (x + d <= 1 + 1e-12)).all()
    met = (w * d).flatten(1).sum(1)
    best = [by_scipy(*(a.flatten().numpy(), b.flatten().numpy(), float(e)), p)
            for a, b, e in zip(x, w, c, strict=True)]  # fmt: skip
    reachable = torch.tensor([b is not None for b in best])
    assert 5 < reachable.sum() < 40
    assert torch.allclose(met[reachable], c[reachable], atol=1e-9)
    shortest = torch.tensor([b for b in best if b is not None], dtype=torch.float64)
    assert torch.allclose(norms(d, p)[reachable], shortest, rtol=1e-4, atol=1e-7)
    # Out of reach: as far as the box goes.
    farthest = torch.where(w * c.sign().view(-1, 1, 1, 1) > 0, 1 - x, -x) * (w != 0)
    assert torch.equal((d * (w != 0))[~reachable], farthest[~reachable])


@pytest.mark.parametrize("p", NORMS, ids=IDS)
def test_step_to_a_plane_in_many_dimensions_and_at_the_ends(p):
    x, w, c = problem(30, (1, 28, 28))
    longest = torch.where(w > 0, w * (1 - x), -w * x).flatten(1).sum(1)
    for share in (0.01, 0.5, 0.9, 0.999):
        d = _to_plane(x, w, share * longest, p)
        assert torch.allclose((w * d).flatten(1).sum(1), share * longest, rtol=1e-6)
    assert torch.equal(_to_plane(x, w, torch.zeros_like(c), p), torch.zeros_like(x))
    assert torch.equal(_to_plane(x, torch.zeros_like(w), c, p), torch.zeros_like(x)), "no gradient, no step"
    halves = torch.cat([_to_plane(x[r], w[r], c[r], p) for r in torch.arange(30).split(7)])
    assert torch.equal(halves, _to_plane(x, w, c, p)), "rows depend on each other"


@pytest.mark.parametrize("kind", [Linf, L2], ids=IDS)
def test_finds_the_distance_of_a_linear_boundary(kind):
    f, x = Opposed(), 0.3 + 0.4 * uniform01(16, 1, 4, 4, seed=1)
    s = f(x)[:, 1].detach()
    y, exact = (s > 0).long(), s.abs() / norms(f.w.detach()[None], DUAL[kind.p])  # no wall in reach
    z = fab(f, x, y, kind(0.9))
    found = norms(z - x, kind.p)
    assert (predict(f, z).argmax(1) != y).all()
    assert (found >= exact * (1 - 1e-9)).all() and (found <= exact * 1.02 + 1e-9).all()
    # Just too small a radius: the projected point is right on the edge of the ball, and fools nothing.
    near = fab(f, x, y, kind(exact * 0.99))
    assert (predict(f, near).argmax(1) == y).all()
    assert torch.allclose(norms(near - x, kind.p), 0.99 * exact)


def network(name="digits-small-pgd"):
    return zoo.load_or_train(name, progress=False)


def plane_step(z, w, c, p):
    """The same step by bisection, for one image as a numpy vector."""
    w, c = (w, c) if c >= 0 else (-w, -c)
    room, rate = np.where(w > 0, 1 - z, z), np.abs(w) if p == 2 else np.ones_like(w)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        if np.abs(w) @ np.minimum(middle * rate, room) < c:
            low = middle
        else:
            high = middle
    return np.sign(w) * np.minimum(high * rate, room)


def reference(f, x, y, p, steps, start):
    """Algorithm 1 of the paper for one image (1, C, H, W), with the margin as the one boundary."""
    length = {math.inf: lambda d: np.abs(d).max(), 2: np.linalg.norm}[p]
    z, nearest, shape, x = start, None, x.shape, x.flatten().numpy()
    for _ in range(steps):
        leaf = z.clone().requires_grad_()
        value = margin(f(leaf), y)
        (g,) = torch.autograd.grad(value.sum(), leaf)
        w, v, here = g.flatten().numpy(), value.item(), z.flatten().numpy()
        near = plane_step(here, w, -v, p)
        far = plane_step(x, w, w @ here - v - w @ x, p)
        a = min(length(near) / (length(near) + length(far)), 0.1)
        here = np.clip((1 - a) * (here + 1.05 * near) + a * (x + 1.05 * far), 0, 1)
        if int(f(torch.from_numpy(here).view(shape)).argmax(1)) != int(y):
            if nearest is None or length(here - x) < length(nearest - x):
                nearest = here
            here = 0.1 * x + 0.9 * here
        z = torch.from_numpy(here).view(shape)
    return torch.from_numpy(x if nearest is None else nearest).view(shape)


@pytest.mark.parametrize("kind, eps", [(Linf, 1.0), (L2, 8.0)], ids=IDS)
def test_equals_the_algorithm(kind, eps):
    f, (x, y) = network().double(), digits(12).tensors()
    x = x.double()
    for start in (x, Linf(0.1).sample(x, generator(0))):
        for steps in (1, 6):
            ours = fab(f, x, y, kind(eps), steps=steps, start=start)
            for i in range(len(x)):
                row = slice(i, i + 1)
                hand = reference(f, x[row], y[row], kind.p, steps, start[row])
                torch.testing.assert_close(ours[row], hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0)], ids=IDS)
def test_about_as_strong_as_apgd_on_the_margin(threat):
    f, (x, y) = network(), digits(200).tensors()
    ours = worst_case(f, x, y, threat, [from_center(fab)])
    other = worst_case(f, x, y, threat, [partial(apgd, loss=margin)])
    assert ours.accuracy <= other.accuracy + 0.04


@pytest.mark.parametrize("kind", [Linf, L2], ids=IDS)
def test_the_radius_only_matters_at_the_end(kind):
    """What is found is a distance: the same point for every ε beyond it, and never a farther one."""
    f, (x, y) = network("digits-small-natural"), digits(60).tensors()
    wide, less = (fab(f, x, y, kind(0.9 if kind is Linf else 4.0), steps=steps) for steps in (40, 10))
    fooled = predict(f, wide).argmax(1) != y
    assert fooled.all(), "with the whole box at hand every image is lost"
    length = norms(wide - x, kind.p)
    assert (length <= norms(less - x, kind.p) + 1e-6).all(), "a nearer point was forgotten"
    near = fab(f, x, y, kind(float(length.median()) * (1 + 1e-5)), steps=40)
    inside = length <= length.median()
    assert torch.allclose(near[inside], wide[inside], atol=1e-6)
    assert (predict(f, near).argmax(1) != y)[inside].all()


def test_nothing_found_gives_the_image_back():
    class Sure(torch.nn.Module):
        def forward(self, x):
            return torch.stack([1 + 0 * x.sum((1, 2, 3)), x.mean((1, 2, 3)) / 2], 1)

    x = uniform01(3, 1, 4, 4)
    assert torch.equal(fab(Sure(), x, torch.zeros(3, dtype=torch.long), Linf(0.3), steps=5), x)


def test_toward_a_class():
    """The targeted form walks on the boundary of that class; with margins it is the plain one."""
    f, (x, y) = network("digits-small-natural"), digits(40).tensors()
    logits = predict(f, x).scatter(1, y[:, None], -math.inf)
    target = logits.topk(3).indices[:, 2]
    z = from_center(toward(3, fab, between=gap))(f, x, y, L2(4.0), start=None)
    by_hand = fab(f, x, y, L2(4.0), loss=lambda logits, y: gap(logits, y, target))
    assert torch.equal(z, by_hand)
    reached = gap(predict(f, z), y, target)
    assert reached.abs().median() < 0.1 * predict(f, x).abs().median()


@pytest.mark.parametrize("threat", [L1(3.0), None])
def test_refuses_other_threats(threat):
    with pytest.raises(ValueError, match="fab: threat=.*, allowed are Linf and L2"):
        fab(Opposed(), torch.zeros(1, 1, 4, 4), torch.tensor([0]), threat, loss=cross_entropy)
