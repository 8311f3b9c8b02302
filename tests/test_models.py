import copy

import pytest
import torch
from helpers import digits, uniform01
from torch import nn

from advlearn import models, zoo
from advlearn.attacks import on, pgd
from advlearn.evaluation import worst_case
from advlearn.threats import Linf

ARCHITECTURES = {
    "linear": models.linear, "mlp": models.mlp, "small_conv": models.small_conv,
    "madry_mnist": models.madry_mnist, "five_conv": models.five_conv,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_seeds_and_build(name, shape):
    width = {"width": 1} if "width" in ARCHITECTURES[name].__code__.co_varnames else {}
    x = uniform01(2, *shape, dtype=torch.float32)
    before = torch.get_rng_state()
    f = ARCHITECTURES[name](shape, classes=7, **width)
    assert torch.equal(torch.get_rng_state(), before), "the global random state has moved"
    assert f(x).shape == (2, 7)
    again = models.build({"name": name, "shape": list(shape), "classes": 7, **width})
    assert torch.equal(again(x), f(x))
    other = models.build({"name": name, "shape": shape, "classes": 7, "seed": 1, **width})
    assert not torch.equal(other(x), f(x))
    spec = {"name": name}
    models.build(spec)
    assert spec == {"name": name}


def test_constructors_leave_the_gpu_generators_alone(monkeypatch):
    def forbidden(seed):
        raise AssertionError("reseeds every GPU")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    models.linear()


def parameters(f):
    return sum(p.numel() for p in f.parameters())


def test_sizes_of_the_papers_networks():
    # Conv 5×5: (25·1 + 1)·32 and (25·32 + 1)·64; FC 7·7·64 → 1024 → 10.
    assert parameters(models.madry_mnist()) == 832 + 51264 + (3136 + 1) * 1024 + 1025 * 10
    assert [models.madry_mnist(width=w)[0].out_channels for w in (1, 2, 4, 8, 16)] == [2, 4, 8, 16, 32]
    assert [models.madry_mnist(width=w)[7].out_features for w in (1, 16)] == [64, 1024]
    assert parameters(models.small_conv()) == 17 * 16 + (16 * 16 + 1) * 32 + 1569 * 100 + 101 * 10
    assert parameters(models.linear()) == 7850
    assert [m.out_features for m in models.mlp(hidden=(5, 6)) if isinstance(m, nn.Linear)] == [5, 6, 10]


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"build: name='resnet', allowed are linear, mlp"):
        models.build({"name": "resnet"})


def test_normalize_is_part_of_the_model():
    layer = models.Normalize([0.5, 0.4, 0.3], [0.1, 0.2, 0.5])
    x = uniform01(2, 3, 4, 4, dtype=torch.float32)
    expected = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.5]).view(3, 1, 1)
    assert torch.equal(layer(x), expected)
    assert set(layer.state_dict()) == {"mean", "std"} and not list(layer.parameters())


def test_features_share_the_weights():
    f = models.small_conv((1, 8, 8))
    x = uniform01(2, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(f[-1](models.features(f)(x)), f(x))
    with torch.no_grad():
        f[0].weight.mul_(2)
    assert torch.equal(f[-1](models.features(f)(x)), f(x))
    with pytest.raises(ValueError, match="features: model must be an nn.Sequential that ends in"):
        models.features(nn.Sequential(nn.Flatten(), nn.ReLU()))


@pytest.mark.parametrize("name", ["small_conv", "five_conv", "linear"])
def test_features_without_their_relu(name):
    """One layer less, so that a unit at 0 keeps its slope; nothing to leave out of a linear network."""
    f = models.build({"name": name, "shape": (1, 8, 8)}).eval()
    x = uniform01(6, 1, 8, 8, dtype=torch.float32)
    whole, bare = models.features(f)(x), models.features(f, rectified=False)(x)
    assert whole.shape == bare.shape == (6, f[-1].in_features)
    if name == "linear":
        assert torch.equal(whole, bare)
    elif name == "small_conv":
        assert (bare < 0).any() and torch.equal(bare.relu(), whole)
    else:  # the mean over places comes after the ReLU
        assert (bare < 0).any() and (whole >= bare - 1e-6).all() and (whole >= 0).all()


def test_the_five_layers():
    f = models.five_conv(width=8)
    assert [m.out_channels for m in f if isinstance(m, nn.Conv2d)] == [8, 16, 16, 24, 24]
    assert isinstance(f[0], models.Normalize), "ε keeps its meaning in pixels"
    assert 4 * parameters(models.five_conv()) < 2**20, "its checkpoint must stay under 1 MB"


@pytest.mark.parametrize("bf16", [True, False])
def test_fast_agrees_with_the_plain_model(monkeypatch, bf16):
    monkeypatch.setattr(models, "_has_bf16", lambda device: bf16)
    f = zoo.load_or_train("digits-small-natural")
    x, y = digits().tensors()
    with torch.no_grad():
        plain, quick = f(x), models.fast(f)(x)
    assert quick.dtype == torch.float32
    assert torch.allclose(quick, plain, rtol=0, atol=(0.03 if bf16 else 1e-4) * float(plain.abs().max()))
    assert (quick.argmax(1) == plain.argmax(1)).double().mean() > 0.98
    before = copy.deepcopy(f.state_dict())
    attack = lambda *args, start: pgd(*args, start=start, steps=10, step_size=0.03)  # noqa: E731
    a, b = (worst_case(f, x[:200], y[:200], Linf(0.1), [attack]).accuracy
            for attack in (attack, on(models.fast(f), attack)))  # fmt: skip
    assert abs(a - b) <= 0.03, "an attack through the fast network is about as strong"
    assert all(torch.equal(v, f.state_dict()[k]) for k, v in before.items())
    with torch.no_grad():
        f[0].weight.mul_(2)
        assert not torch.allclose(models.fast(f)(x), quick), "weights are shared"
