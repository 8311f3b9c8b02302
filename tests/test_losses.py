import math

import pytest
import torch

from advlearn.gradients import grad_and_output, input_grad
from advlearn.losses import (
    activation,
    cross_entropy,
    cw,
    dlr,
    dlr_targeted,
    feature_distance,
    gap,
    kl_divergence,
    margin,
)
from advlearn.tensors import generator

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0], [-5.0, -1.0, -2.0, -9.0]], dtype=torch.float64)
Y = torch.tensor([1, 0])


def test_values_by_hand():
    lse = [math.log(sum(math.exp(v) for v in row)) for row in LOGITS.tolist()]
    assert cross_entropy(LOGITS, Y).tolist() == pytest.approx([lse[0] - 3, lse[1] + 5])
    assert margin(LOGITS, Y).tolist() == [2 - 3, -1 + 5]
    assert dlr(LOGITS, Y).tolist() == pytest.approx([-1 / (3 - 1), 4 / (-1 + 5)])
    assert cw(0)(LOGITS, Y).tolist() == [-1, 0]
    assert cw(50)(LOGITS, Y).tolist() == [-51, -46]
    assert cw(3)(LOGITS, Y).tolist() == [-4, 0]


def test_losses_of_two_classes_by_hand():
    target = torch.tensor([2, 3])
    assert gap(LOGITS, Y, target).tolist() == [2 - 3, -9 + 5]
    # (z_t − z_y) / (largest − mean of third and fourth)
    assert dlr_targeted(LOGITS, Y, target).tolist() == pytest.approx([-1 / (3 - 0.5), -4 / (-1 + 7)])
    more = torch.cat([LOGITS, torch.full((2, 1), -50.0)], 1)
    assert dlr_targeted(more, Y, target).tolist() == dlr_targeted(LOGITS, Y, target).tolist()
    assert torch.allclose(dlr_targeted(7 * LOGITS + 3, Y, target), dlr_targeted(LOGITS, Y, target))
    for loss in (gap, dlr_targeted):
        rows = torch.cat([loss(LOGITS[i : i + 1], Y[i : i + 1], target[i : i + 1]) for i in (0, 1)])
        assert torch.equal(loss(LOGITS, Y, target), rows)
    with pytest.raises(ValueError, match=r"dlr_targeted: 3 classes, it needs at least 4"):
        dlr_targeted(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))


def test_margin_with_negative_logits():
    """Masking the true class with zero would give 0 − (−1) = 1, a mistake that looks fooled."""
    logits = torch.tensor([[-1.0, -3.0, -2.0]])
    assert margin(logits, torch.tensor([0])).item() == -1
    assert margin(logits, torch.tensor([1])).item() == 2


def test_margin_is_positive_exactly_when_the_prediction_is_wrong():
    logits = torch.randn(500, 10, generator=generator(0)) - 20
    y = torch.randint(10, (500,), generator=generator(1))
    y[:250] = logits[:250].argmax(1)
    assert torch.equal(margin(logits, y) > 0, logits.argmax(1) != y)


@pytest.mark.parametrize("loss", [cross_entropy, margin, cw(0), cw(50), dlr])
def test_shape_direction_and_independence_of_rows(loss):
    logits = torch.randn(7, 5, generator=generator(0), dtype=torch.float64)
    y = torch.randint(5, (7,), generator=generator(1))
    values = loss(logits, y)
    assert values.shape == (7,)
    assert torch.equal(values, torch.cat([loss(logits[i : i + 1], y[i : i + 1]) for i in range(7)]))
    worse = logits - torch.nn.functional.one_hot(y, 5)  # less of the true class
    assert (loss(worse, y) >= values).all()
    before = logits.clone()
    loss(logits, y)
    assert torch.equal(logits, before)


def test_scaling_the_logits():
    logits = torch.randn(50, 5, generator=generator(0), dtype=torch.float64)
    y = torch.randint(5, (50,), generator=generator(1))
    for scale in (1e-3, 7, 1e4):
        assert torch.allclose(dlr(scale * logits, y), dlr(logits, y), rtol=1e-6)
        assert torch.allclose(margin(scale * logits, y), scale * margin(logits, y))
    assert torch.allclose(dlr(logits + 100, y), dlr(logits, y))


def test_cw_stops_at_its_confidence():
    logits = torch.tensor([[0.0, 4.0], [0.0, 6.0]], requires_grad=True)
    cw(5)(logits, torch.tensor([0, 0])).sum().backward()
    assert logits.grad.tolist() == [[-1, 1], [0, 0]]


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match=r"dlr: 2 classes, it needs at least 3"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


def test_input_grad_is_one_gradient_per_example():
    z = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)
    g = input_grad(lambda z: (z**3).sum(1), z)
    assert torch.allclose(g, 3 * z**2) and not g.requires_grad
    assert not z.requires_grad and z.grad is None
    with torch.no_grad():
        assert torch.allclose(input_grad(lambda z: (z**3).sum(1), z), 3 * z**2)


def test_gradient_and_output_in_one_pass():
    z = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)
    calls = []

    def forward(z):
        calls.append(1)
        return z**2

    g, out = grad_and_output(forward, lambda out: (out**2).sum(1), z)
    assert torch.allclose(g, 4 * z**3) and torch.equal(out, z**2) and not out.requires_grad
    assert len(calls) == 1

    def mean(objective, z):
        return (input_grad(objective, z - 1) + input_grad(objective, z + 1)) / 2

    g, out = grad_and_output(forward, lambda out: (out**2).sum(1), z, mean)
    assert torch.allclose(g, 4 * z**3 + 12 * z) and torch.equal(out, z**2) and len(calls) == 4


@pytest.mark.parametrize("lead", [1.0, 20.0, 60.0, 200.0])
def test_cross_entropy_of_a_confident_network_keeps_its_gradient(lead):
    """softmax − 1 cancels in float32: the gradient would be 0 though its direction is known."""
    y = torch.tensor([0])

    def grad(dtype):
        logits = torch.tensor([[lead, 0.0, -1.0]], dtype=dtype, requires_grad=True)
        return torch.autograd.grad(cross_entropy(logits, y).sum(), logits)[0].double()

    exact, ours = grad(torch.float64), grad(torch.float32)
    if lead < 80:  # e^-87 is float32's smallest normal number
        assert torch.allclose(ours, exact, rtol=1e-4, atol=0) and (ours != 0).all()
    assert ours.isfinite().all()
    assert float(cross_entropy(torch.tensor([[-lead, 0.0]]), y)) == pytest.approx(lead, rel=0.4)


def test_kl_divergence():
    """KL(reference ‖ logits), not the other way round; gradients flow into both."""
    a, b = (torch.randn(7, 5, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    p, q = a.softmax(1), b.softmax(1)
    expected = (p * (p / q).log()).sum(1)
    assert torch.allclose(kl_divergence(b, a), expected) and (expected > 0).all()
    assert not torch.allclose(kl_divergence(a, b), expected)
    assert torch.allclose(kl_divergence(a + 3, a), torch.zeros(7, dtype=torch.float64), atol=1e-12)
    a.requires_grad_(), b.requires_grad_()
    by_a, by_b = torch.autograd.grad(kl_divergence(b, a).sum(), (a, b))
    assert torch.allclose(by_b, q - p)
    assert torch.allclose(by_a, p * ((p / q).log() - expected[:, None]))
    far = kl_divergence(torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]]))
    assert far.item() == 300


def test_feature_distance():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    # |(3, 2)| / |(0, 2)|, and 0 where they are equal; 0 is the largest value.
    assert torch.allclose(feature_distance(a, b), torch.tensor([-(13**0.5) / 2, 0.0]))
    z = a.clone().requires_grad_()
    feature_distance(z, b).sum().backward()
    assert torch.isfinite(z.grad).all() and (z.grad[1] == 0).all(), "no NaN at the minimum"
    assert (z.grad[0] * (b - a)[0]).sum() > 0, "the attacker's ascent leads to the target"
    assert torch.isfinite(feature_distance(a, torch.zeros(2, 2))).all()
    for wrong in (b[:1], b[:, :1], torch.zeros(2)):
        with pytest.raises(ValueError, match=r"feature_distance: features \(2, 2\), target .*\(N, F\)"):
            feature_distance(a, wrong)


def test_activation():
    assert activation(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0])).tolist() == [2.0, 3.0]
