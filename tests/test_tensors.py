import math

import numpy as np
import pytest
import torch
from helpers import mixed_network, same_state, state_of
from scipy import stats
from torch import nn

from advlearn.models import fast
from advlearn.tensors import Keyed, frozen, generator, key_of, normal, norms, per_example, uniform


def test_per_example_shapes():
    x = torch.zeros(3, 2, 4, 4)
    assert per_example(0.5, x) == 0.5
    assert per_example(torch.tensor(0.5), x).ndim == 0
    shaped = per_example(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), x)
    assert shaped.shape == (3, 1, 1, 1) and shaped.dtype == x.dtype
    assert (x + shaped)[1].unique().tolist() == [2.0]


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_norms_equal_numpy(p):
    d = torch.randn(5, 2, 3, 4, generator=generator(0), dtype=torch.float64)
    expected = [np.linalg.norm(row.flatten().numpy(), p) for row in d]
    assert norms(d, p).tolist() == pytest.approx(expected, rel=1e-12)


# --- Keyed ----------------------------------------------------------------------------------

X = torch.zeros(400, 1, 5, 5, dtype=torch.float64)
ROWS = torch.arange(400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, -3, 2**40, (0, 7), (123, 4, 5)])
def test_keyed_is_uniform_in_the_open_interval(seed, dtype):
    u = Keyed(seed, ROWS).uniform(X.to(dtype))
    assert u.dtype == dtype and u.shape == X.shape
    assert 0 < u.min() and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3


def test_keyed_normal_is_normal():
    z = normal(X, Keyed(3, ROWS))
    assert z.isfinite().all()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


def test_key_of_an_example_depends_on_its_values_alone():
    x = torch.rand(50, 2, 4, 4, generator=generator(0))
    key = key_of(x)
    assert key.shape == (50,) and key.dtype == torch.int64 and len(key.unique()) == 50
    assert torch.equal(key, torch.cat([key_of(x[i : i + 1]) for i in range(50)]))
    assert torch.equal(key, key_of(x.double()))
    for other in (x.flip(3), x.transpose(2, 3), x.flip(1), x + 2**-20, 1 - x):  # same values, moved
        assert (key_of(other) != key).all()
    flat = torch.zeros(2, 1, 3, 3)
    flat[1, 0, 1, 1] = 2**-100
    assert key_of(flat).unique().numel() == 2


def _correlations(a, b):
    a, b = a.flatten(1) - 0.5, b.flatten(1) - 0.5
    return (a * b).mean(1) * 12  # variance of a uniform number is 1/12


def test_keyed_rows_coordinates_seeds_and_streams_are_independent():
    x = torch.zeros(200, 1, 40, 40, dtype=torch.float64)
    rows = torch.arange(200)
    u = Keyed(0, rows).uniform(x)
    others = [u.roll(1, 0), u.roll(1, 3), u.flip(0), Keyed(1, rows).uniform(x),
              Keyed((0, 0), rows).uniform(x), Keyed((0, 1), rows).uniform(x),
              Keyed(0, rows).uniform(x, stream=1), Keyed(0, rows + 200).uniform(x),
              Keyed(-1, rows).uniform(x)]  # fmt: skip
    for other in others:  # 1600 numbers per row: standard deviation 1/40 = 0.025
        r = _correlations(u, other)
        assert r.abs().max() < 5 * 0.025 and abs(float(r.mean())) < 5 * 0.025 / math.sqrt(200)
    assert len({tuple(v[1].flatten()[:5].tolist()) for v in [u, *others]}) == len(others) + 1


def test_keyed_order_of_seed_parts_matters():
    a, b = Keyed((1, 2), ROWS).uniform(X), Keyed((2, 1), ROWS).uniform(X)
    assert not torch.equal(a, b)
    assert _correlations(a, b).mean().abs() < 0.05


def test_keyed_depends_on_the_example_alone():
    whole = Keyed((5, 1), ROWS).uniform(X)
    order = torch.randperm(400, generator=generator(0))
    assert torch.equal(Keyed((5, 1), ROWS[order]).uniform(X), whole[order])
    pieces = [Keyed((5, 1), rows).uniform(X[rows]) for rows in ROWS.split(7)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(Keyed((5, 1), ROWS[[390]]).uniform(X[:1]), whole[[390]])
    assert torch.equal(Keyed((5, 1), ROWS).uniform(X), whole), "drawing twice must repeat"
    same = Keyed((5, 1), ROWS).uniform(X.float()).double()
    assert torch.allclose(same, whole, atol=1e-7, rtol=0)


def test_keyed_known_values():
    """The numbers of recorded runs must not change with the code."""
    u = Keyed((0, 3), torch.tensor([0, 10**6])).uniform(torch.zeros(2, 2, dtype=torch.float64))
    assert (u * 2**23 - 0.5).long().tolist() == [[4892298, 4724526], [1357210, 4177127]]


def test_keyed_many_coordinates_do_not_repeat():
    u = Keyed(0, torch.arange(8)).uniform(torch.zeros(8, 3072, dtype=torch.float64))
    expected = 8 * 3072 - (8 * 3072) ** 2 / 2 / 2**23  # birthdays among 2^23 values
    assert abs(len(u.unique()) - expected) < 40


def test_generator_draws_leave_the_global_state_alone():
    before = torch.get_rng_state()
    x = torch.zeros(4, 3)
    a, b = uniform(x, generator(1)), normal(x, generator(1))
    assert torch.equal(a, uniform(x, generator(1))) and not torch.equal(a, uniform(x, generator(2)))
    assert a.shape == b.shape == x.shape and torch.equal(torch.get_rng_state(), before)
    moving = generator(1)
    assert torch.equal(uniform(x, moving), a) and not torch.equal(uniform(x, moving), a)


# --- frozen ---------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, fast, lambda m: nn.Sequential(Wrapper(m))])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_frozen_restores_exactly(wrap, error):
    model = mixed_network()
    wrapped = wrap(model)
    wrapped.training = False  # a wrapper whose mode differs from its parts'
    before, modes = state_of(model), [m.training for m in wrapped.modules()]
    try:
        with frozen(wrapped):
            assert not any(m.training for m in wrapped.modules())
            assert not any(p.requires_grad for p in wrapped.parameters())
            wrapped(torch.zeros(2, 1, 8, 8, dtype=torch.float64))
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert error and isinstance(caught, error)
    assert same_state(state_of(model), before)
    assert [m.training for m in wrapped.modules()] == modes


def test_frozen_nests_and_takes_functions():
    model = mixed_network()
    before = state_of(model)
    with frozen(model):
        with frozen(model):
            pass
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert same_state(state_of(model), before)
    with frozen(lambda x: x):
        pass
