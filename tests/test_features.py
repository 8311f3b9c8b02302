"""Feature inversion: pgd on the representation, so every property of pgd must hold."""

import pytest
import torch
from helpers import digits, mixed_network, same_state, state_of, uniform01
from torch import nn

from advlearn import models, zoo
from advlearn.attacks import excite, interpolate, invert, noise, pgd
from advlearn.losses import feature_distance
from advlearn.tensors import Keyed, generator, norms
from advlearn.threats import L2


@pytest.fixture(scope="module")
def robust():
    return zoo.load_or_train("digits-small-pgd", progress=False)


@pytest.fixture(scope="module")
def x():
    return digits(24).tensors()[0]


def distance(model, z, x):
    with torch.no_grad():
        R = models.features(model)
        return -feature_distance(R(z), R(x))


def test_inversion_finds_the_representation(robust, x):
    start = noise(x, Keyed(3, torch.arange(len(x))))
    z = invert(robust, x, start, steps=200, step_size=0.05)
    assert ((0 <= z) & (z <= 1)).all() and not z.requires_grad
    assert distance(robust, z, x).median() < 0.1 < 0.5 < distance(robust, start, x).median()
    with torch.no_grad():
        assert torch.equal(robust(z).argmax(1), robust(x).argmax(1))
        assert torch.equal(invert(robust, models.features(robust)(x), start, steps=3),
                           invert(robust, x, start, steps=3)), "images, or their representations"  # fmt: skip


def test_inversion_is_the_core_loop(robust, x):
    start, R = noise(x, generator(0)), models.features(robust)
    with torch.no_grad():
        target = R(x)
    same = pgd(R, start, target, L2(1000.0), loss=feature_distance, steps=5, step_size=0.3)
    assert torch.equal(invert(robust, x, start, steps=5, step_size=0.3), same)


def test_steps_are_normalised_and_skip_the_box():
    """On a linear representation of one unit: one step has length step_size, less what is stuck."""
    w = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    f = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False), nn.Linear(1, 2))
    f[1].weight.data = w
    x = torch.full((2, 1, 2, 2), 0.5)
    x[1, 0, 0, 1] = 0.0  # this pixel cannot go further down
    z = excite(f, x, 0, steps=1, step_size=0.1)
    assert torch.allclose(norms(z - x, 2), torch.tensor([0.1, 0.1]))
    assert torch.allclose((z - x).flatten(1), torch.tensor([[0.06, -0.08, 0, 0], [0.1, 0, 0, 0]]))
    down = excite(f, x, 0, steps=1, step_size=0.1, sign=-1)
    assert torch.allclose((down - x)[0].flatten(), -(z - x)[0].flatten())


def test_a_small_ball_is_kept(robust, x):
    start = x.roll(1, 0)
    z = invert(robust, x, start, threat=L2(0.5), steps=20, step_size=0.1)
    assert (norms(z - start, 2) <= 0.5 + 1e-5).all()
    assert (distance(robust, z, x) < distance(robust, start, x)).all()


def test_excite_raises_and_lowers_each_its_own_unit(robust, x):
    R, units = models.features(robust, rectified=False), torch.arange(len(x))
    with torch.no_grad():
        before = R(x).gather(1, units[:, None])
        up, down = (R(excite(robust, x, units, steps=10, step_size=0.1, sign=s)).gather(1, units[:, None])
                    for s in (1, -1))  # fmt: skip
    assert (up > before).all() and (down < before).all()
    assert (before < 0).any(), "also units that are dead after the ReLU"


def test_interpolation(robust, x):
    a, b = x[:6], x[6:12]
    walk = interpolate(robust, a, b, 4, steps=60, step_size=0.05)
    assert walk.shape == (4, *a.shape) and torch.equal(walk[0], a)
    R = models.features(robust)
    with torch.no_grad():
        first, last = R(a), R(b)
        for share, z in zip((1 / 3, 2 / 3, 1), walk[1:], strict=True):
            target = first + share * (last - first)
            assert (-feature_distance(R(z), target)).median() < 0.15


def test_nothing_is_left_behind():
    f, x = mixed_network(), uniform01(4, 1, 8, 8)
    before, random, given = state_of(f), torch.get_rng_state(), x.clone()
    invert(f, x, x.flip(0), steps=2)
    excite(f, x, 3, steps=2)
    interpolate(f, x, x.flip(0), 3, steps=1)
    assert same_state(state_of(f), before) and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)


def test_noise():
    x = torch.zeros(3, 1, 8, 8)
    z = noise(x, Keyed(0, torch.tensor([4, 5, 6])))
    assert torch.equal(z[1:], noise(x[1:], Keyed(0, torch.tensor([5, 6]))))
    assert abs(float(z.mean()) - 0.5) < 0.02 and 0.03 < float(z.std()) < 0.07


def test_bad_input(robust, x):
    with pytest.raises(ValueError, match=r"invert: target \(24, 100\) for 5 images to start from"):
        invert(robust, x, x[:5])
    with pytest.raises(ValueError, match="interpolate: frames=1"):
        interpolate(robust, x, x, 1)
    with pytest.raises(ValueError, match=r"interpolate: .* \(24, 1, 8, 8\) and \(5, 1, 8, 8\)"):
        interpolate(robust, x, x[:5])
    for unit, sign in ((100, 1), (-1, 1), (0, 2)):
        with pytest.raises(ValueError, match=f"excite: unit=.*sign={sign}; allowed are units 0 to 99"):
            excite(robust, x[:1], unit, sign=sign)
    with pytest.raises(ValueError, match="features: model must be an nn.Sequential"):
        invert(nn.Sequential(nn.Flatten()), x, x)
