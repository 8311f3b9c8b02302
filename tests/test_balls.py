import numpy as np
import pytest
import torch
from helpers import uniform01
from scipy.optimize import linprog
from torch import nn

from advlearn.balls import Crowd, kept, line_separates, offsets, scene, train


def sequential(crowd, k):
    """Network k of a crowd, built from its own sizes and no padding."""
    layers = []
    for w, b, n_in, n_out in zip(crowd.weights, crowd.biases, crowd.sizes[k], crowd.sizes[k][1:],
                                 strict=False):  # fmt: skip
        layers += [nn.Linear(n_in, n_out).double(), nn.ReLU()]
        layers[-2].weight.data.copy_(w[k, :n_out, :n_in])
        layers[-2].bias.data.copy_(b[k, :n_out])
    return nn.Sequential(*layers[:-1])


def hand_made(*layers):
    """A crowd of one network with given weights, [(W, b), ...] for coordinates 2 x − 1."""
    crowd = Crowd([[len(b) for _, b in layers[:-1]]], [0])
    for (w, b), weight, bias in zip(layers, crowd.weights, crowd.biases, strict=True):
        weight.data[0], bias.data[0] = torch.tensor(w).float(), torch.tensor(b).float()
    return crowd


# --- the scene -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_scene(seed):
    x, y = scene(14, 0.08, seed)
    assert x.shape == (14, 2) and x.dtype == y.dtype == torch.float64
    assert ((x >= 0) & (x <= 1)).all() and set(y.tolist()) == {-1.0, 1.0}
    far = (x[:, None] - x).abs().amax(2)
    assert far[~torch.eye(14, dtype=bool)].min() >= 2.5 * 0.08
    assert torch.equal(y > 0, x[:, 1] > x[:, 0]) and (x[:, 1] - x[:, 0]).abs().min() >= 0.014
    assert line_separates(x, y) and not line_separates(x, y, 0.08)
    assert torch.equal(scene(14, 0.08, seed)[0], x) and not torch.equal(scene(14, 0.08, seed + 1)[0], x)


def test_points_keep_their_distance_from_the_line():
    gaps = [float((x[:, 1] - x[:, 0]).abs().min()) for x, _ in (scene(14, 0.08, s) for s in range(20))]
    assert 0.014 <= min(gaps) < 0.03


def test_scene_without_room():
    with pytest.raises(ValueError, match="n=60 balls with eps=0.2 do not fit"):
        scene(60, 0.2)


def by_linear_program(x, y, eps):
    """w, b with y (w·x + b) − ε (|w₁| + |w₂|) ≥ 1, by its eight corners."""
    corners = (x[:, None] + offsets(eps, 2).double()).flatten(0, 1).numpy()
    rows = -y.repeat_interleave(4).numpy()[:, None] * np.c_[corners, np.ones(len(corners))]
    return linprog(np.zeros(3), rows, -np.ones(len(rows)), bounds=[(None, None)] * 3).status == 0


def test_lines_against_linear_programs():
    found = []
    for seed in range(40):
        x = uniform01(7, 2, seed=seed)
        y = torch.where(x[:, 0] + uniform01(7, seed=seed + 100) > 1.0, 1.0, -1.0).double()
        for eps in (0.0, 0.03):
            found.append(line_separates(x, y, eps))
            assert found[-1] == by_linear_program(x, y, eps), (seed, eps)
    assert 20 < sum(found) < 60


# --- many networks side by side ----------------------------------------------------------------

HIDDEN = {1: [(3,), (1,), (5,)], 2: [(3, 2), (1, 4), (5, 5)]}


@pytest.mark.parametrize("depth", HIDDEN)
def test_a_crowd_is_its_networks(depth):
    crowd, points = Crowd(HIDDEN[depth], [0, 1, 2]), uniform01(50, 2)
    for k in range(3):
        alone = sequential(crowd, k)
        value = alone(2 * points - 1)[:, 0].float()
        assert torch.allclose(crowd(points.float())[k], value, atol=1e-5)
        assert crowd.parameters_each[k] == sum(p.numel() for p in alone.parameters())
        same = Crowd(HIDDEN[depth][k : k + 1], [k])  # Its draws are its own.
        assert torch.allclose(same(points.float())[0], value, atol=1e-5)
    several = torch.stack([points, points.flip(0), points]).float()
    assert torch.allclose(crowd(several)[1], crowd(points.float())[1].flip(0), atol=1e-6)


def test_every_kink_goes_through_the_square():
    crowd = Crowd([(40,)], [0])
    corners = offsets(1.0, 2)
    values = corners @ crowd.weights[0][0].T + crowd.biases[0][0]
    assert ((values.amin(0) < 0) & (values.amax(0) > 0)).all()


@pytest.mark.parametrize("depth", HIDDEN)
def test_networks_are_trained_apart(depth):
    x, y = scene(10, 0.08)
    together = Crowd(HIDDEN[depth], [0, 1, 2])
    padding = [(w == 0) for w in together.weights]
    before = [w.clone() for w in together.weights]
    train(together, x, y, 0.08, steps=20)
    for k in range(3):
        alone = Crowd(HIDDEN[depth][k : k + 1], [k])
        train(alone, x, y, 0.08, steps=20)
        assert torch.allclose(alone(x.float())[0], together(x.float())[k], atol=1e-4)
    for w, empty, old in zip(together.weights, padding, before, strict=True):
        assert (w[empty] == 0).all() and not torch.equal(w, old)


def test_depths_do_not_mix():
    with pytest.raises(ValueError, match=r"2 networks of depths \[1, 2\] with 2 seeds"):
        Crowd([(3,), (3, 3)], [0, 1])
    with pytest.raises(ValueError, match="2 networks .* with 1 seeds"):
        Crowd([(3,), (4,)], [0])


def test_training_takes_the_worst_point_of_every_ball():
    """One step, written out."""
    x, y = scene(6, 0.08)
    crowd, other = Crowd([(4,)], [3]), Crowd([(4,)], [3])
    train(crowd, x, y, 0.08, steps=1, lr=0.1, grid=3)
    optimizer, x, y = torch.optim.Adam(other.parameters(), 0.1), x.float(), y.float()
    around = x[:, None] + offsets(0.08, 3)
    losses = torch.nn.functional.softplus(-y[:, None] * other(around.flatten(0, 1)).view(6, 9))
    losses.amax(1).mean().backward()
    optimizer.step()
    for a, b in zip(crowd.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_points_and_balls_are_learned():
    x, y = scene(seed=1)
    crowd = Crowd([(24,)] * 3, range(3))
    train(crowd, x, y, 0.0, steps=400)
    assert kept(crowd, x, y, 0.0).all() and not kept(crowd, x, y, 0.08).all(1).any()
    crowd = Crowd([(24,)] * 3, range(3))
    train(crowd, x, y, 0.08, steps=600)
    assert kept(crowd, x, y, 0.08).double().mean() > 0.9


# --- the proof ---------------------------------------------------------------------------------


def test_kept_at_the_exact_distance():
    """f = x₁ − 1/2 as a network: |…| of the kinks cancel, and the ball's side decides."""
    f = hand_made(([[2.0, 0.0], [-2.0, 0.0]], [0.0, 0.0]), ([[0.25, -0.25]], [0.0]))
    x, y = torch.tensor([[0.6, 0.2], [0.45, 0.9]]).double(), torch.tensor([1.0, -1.0]).double()
    for eps, expected in ((0.0, [True, True]), (0.0499, [True, True]), (0.0501, [True, False]),
                          (0.0999, [True, False]), (0.1001, [False, False])):  # fmt: skip
        assert kept(f, x, y, eps).tolist() == [expected], eps
    assert not kept(f, x, -y, 0.0).any()


@pytest.mark.parametrize("width", [0.02, 0.002])
def test_kept_finds_a_narrow_dip(width):
    """A spike of the wrong sign strictly inside the ball, between all points of a coarse grid."""
    at, scale = 2 * 0.5173 - 1, 1 / width
    f = hand_made(([[1.0, 0.0]] * 3, [-at + width, -at, -at - width]),
                  ([[-2 * scale, 4 * scale, -2 * scale]], [1.0]))  # fmt: skip
    x, y = torch.tensor([[0.5, 0.5], [0.7, 0.5]]).double(), torch.ones(2).double()
    assert kept(f, x, y, 0.08).tolist() == [[False, True]]


@pytest.mark.parametrize("depth", HIDDEN)
def test_kept_against_a_dense_grid(depth):
    x, y = scene(12, 0.08, seed=2)
    crowd = Crowd([size for size in HIDDEN[depth] for _ in range(8)], range(24))
    train(crowd, x, y, 0.05, steps=150)
    around = (x[:, None] + offsets(0.08, 61).double()).flatten(0, 1)
    value = torch.stack([sequential(crowd, k)(2 * around - 1)[:, 0] for k in range(24)])
    worst = (value.view(24, 12, -1) * y[:, None]).amin(2)
    found = kept(crowd, x, y, 0.08)
    assert (worst[found] > 0).all() and (worst[~found] < 0.02).all()
    assert 0.3 < found.double().mean() < 0.98
