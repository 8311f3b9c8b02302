"""Auto-PGD against its definition: a trace by hand, and the algorithm written once more per image."""

import math
from functools import partial

import pytest
import torch
from helpers import Opposed, digits
from torch import nn

from advlearn import zoo
from advlearn.attacks import apgd, pgd, toward
from advlearn.attacks.apgd import checkpoints
from advlearn.evaluation import predict, worst_case
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy, dlr, dlr_targeted, gap, margin
from advlearn.tensors import Keyed, generator
from advlearn.threats import L1, L2, Linf

THREATS, IDS = [Linf(0.2), L2(1.0)], ["linf", "l2"]


class Recorder(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.queries = f, []

    def forward(self, x):
        self.queries.append(x.detach().clone())
        return self.f(x)


def network(name="digits-small-pgd", dtype=torch.float64):
    return zoo.load_or_train(name, progress=False).to(dtype)


def some_digits(n, dtype=torch.float64):
    x, y = digits(n).tensors()
    return x.to(dtype), y


def test_checkpoints_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9, 10] and checkpoints(1) == [1] and checkpoints(0) == [0]


class Tent(nn.Module):
    """One pixel, two classes; the second logit is −|x − c|."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x):
        value = -(x[:, 0, 0, 0] - self.c).abs()
        return torch.stack([torch.zeros_like(value), value], 1)


def height(logits, y):
    return logits[:, 1]


def test_trace_by_hand():
    """ε = 0.2 around 0.5, the top at 0.55, ten steps: checkpoints after 3, 5, 6, 7, …"""
    f, x = Recorder(Tent(0.55)), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    z = apgd(f, x, torch.tensor([0]), Linf(0.2), loss=height, steps=10)
    expected = [
        0.5,
        0.7,  # η = 0.4, cut by the ball; the first step has no momentum
        0.7 - 0.75 * 0.4 + 0.25 * 0.2,  # 0.45, from the cut point 0.3
        0.45 + 0.75 * 0.25 - 0.25 * 0.25,  # 0.575, the best so far; rose 2 times, 2.25 are needed
        0.575 - 0.75 * 0.2 + 0.25 * 0.125,  # η = 0.2, and on from 0.575: 0.45625
        0.45625 + 0.75 * 0.2 - 0.25 * 0.11875,  # 0.5765625; rose 1 time of 2: back to 0.575
        0.575 - 0.75 * 0.1 + 0.25 * 0.11875,  # η = 0.1: 0.5296875, the best so far, rose 1 of 1
        0.5296875 + 0.75 * 0.1 - 0.25 * 0.0453125,  # 0.593359375, fell: back to 0.5296875
        0.5296875 + 0.75 * 0.05 + 0.0,  # η = 0.05: 0.5671875; rose: 0.0171875 from the top
    ]
    seen = [float(q) for q in f.queries]
    assert len(seen) == 11 and seen[:9] == pytest.approx(expected, abs=1e-12)
    assert float(z) == min(seen, key=lambda v: abs(v - 0.55))


def reference(f, x, y, threat, loss, steps, rho, start, fired):
    """Algorithm 1 of the paper for one image (1, C, H, W), with its whole history."""

    def look(z):
        leaf = z.clone().requires_grad_()
        value = loss(f(leaf), y)
        (g,) = torch.autograd.grad(value.sum(), leaf)
        return g, value.item(), int(f(z).argmax(1)) != int(y)

    marks, eta = [0, *checkpoints(steps)], 2 * float(threat.eps)
    z = before = start
    g, value, wrong = look(z)
    points, grads, values, fooled, tops, etas, rose = [z], [g], [value], [wrong], [value], [eta], [None]
    for k in range(1, steps + 1):
        step = threat.project(z + eta * threat.ascend(g, z, x), x)
        alpha = 1 if k == 1 else 0.75
        moved = z + alpha * (step - z) + (1 - alpha) * (z - before)
        before, z, current = z, threat.project(moved, x), value
        g, value, wrong = look(z)
        for history, new in zip((points, grads, values, fooled, etas, rose),
                                (z, g, value, wrong, eta, value > current), strict=True):  # fmt: skip
            history.append(new)
        tops.append(max(values))
        if k in marks:
            last = marks[marks.index(k) - 1]
            first = sum(rose[last + 1 :]) < rho * (k - last)
            second = tops[k] == tops[last] and etas[k] == etas[last]
            fired.append((first, second))
            if first or second:
                best = values.index(max(values))
                eta, z, g, value = eta / 2, points[best], grads[best], values[best]
    pool = [i for i, w in enumerate(fooled) if w] or range(len(values))
    return points[max(pool, key=lambda i: values[i])]


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
@pytest.mark.parametrize("rho", [0.75, 0.3])
def test_equals_the_algorithm(threat, rho):
    f, (x, y) = network(), some_digits(12)
    fired = []
    for loss in (cross_entropy, dlr):
        start = threat.sample(x, generator(0))
        for i in range(len(x)):
            row = slice(i, i + 1)
            ours = apgd(f, x[row], y[row], threat, loss=loss, steps=40, rho=rho, start=start[row])
            hand = reference(f, x[row], y[row], threat, loss, 40, rho, start[row], fired)
            torch.testing.assert_close(ours, hand, rtol=0, atol=1e-12)
    assert {(False, False), (True, False)} <= set(fired)
    assert rho == 0.75 or (False, True) in fired, "condition 2 never decided"


def test_a_wrong_prediction_is_preferred_to_a_larger_loss():
    """Three classes, one pixel: left of 0.4 the prediction is wrong, right of it the loss is larger."""

    class Trap(nn.Module):
        def forward(self, x):
            v = x[:, 0, 0, 0]
            return torch.stack([torch.zeros_like(v), 10 * (0.4 - v), 0 * v], 1)

    def rising(logits, y):  # 5 (v − 0.4)
        return -logits[:, 1] / 2

    x = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    start = torch.tensor([0.35, 0.45], dtype=torch.float64).view(2, 1, 1, 1)
    z = apgd(Trap(), x, torch.zeros(2, dtype=torch.long), Linf(0.2), loss=rising, steps=5, start=start)
    assert z.flatten().tolist() == pytest.approx([0.35, 0.7])


def test_one_pass_per_step_and_one_more_for_an_oracle_that_looks_around():
    f, (x, y) = Recorder(network()), some_digits(6)
    one = apgd(f, x, y, Linf(0.2), steps=9)
    assert len(f.queries) == 10

    def twice(objective, z):
        return (input_grad(objective, z + 1e-9) + input_grad(objective, z - 1e-9)) / 2

    f.queries.clear()
    two = apgd(f, x, y, Linf(0.2), steps=9, grad=twice)
    assert len(f.queries) == 30
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, margin])
@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_never_weaker_than_pgd_with_as_many_steps(threat, loss):
    f, (x, y) = network(dtype=torch.float32), some_digits(200, torch.float32)
    for steps in (20, 60):
        ours = worst_case(f, x, y, threat, [partial(apgd, steps=steps, loss=loss)])
        for size in (threat.eps / 4, threat.eps / 10):
            fixed = partial(pgd, steps=steps, step_size=size, loss=loss)
            plain = worst_case(f, x, y, threat, [fixed])
            assert ours.accuracy <= plain.accuracy + 0.01, f"APGD {ours.accuracy}, PGD {plain.accuracy}"


def test_one_radius_per_example():
    f, (x, y) = network(), some_digits(5)
    eps = torch.tensor([0.0, 0.05, 0.1, 0.2, 0.3], dtype=x.dtype)
    z = apgd(f, x, y, Linf(eps), steps=12)
    for i in range(5):
        row = slice(i, i + 1)
        assert torch.allclose(z[row], apgd(f, x[row], y[row], Linf(float(eps[i])), steps=12), atol=1e-9)


def test_toward_one_class_with_the_targeted_ratio():
    f, (x, y) = network("digits-small-natural"), some_digits(60)
    logits = predict(f, x).scatter(1, y[:, None], -math.inf)
    for k in (1, 3):
        target = logits.topk(k).indices[:, k - 1]
        attack = toward(k, partial(apgd, steps=20), between=dlr_targeted)
        start = Linf(0.4).sample(x, Keyed(0, torch.arange(60)))
        z = attack(f, x, y, Linf(0.4), start=start)
        by_hand = apgd(f, x, y, Linf(0.4), steps=20, start=start,
                       loss=lambda logits, y, t=target: dlr_targeted(logits, y, t))  # fmt: skip
        assert torch.equal(z, by_hand)
        assert (gap(predict(f, z), y, target) > 0).double().mean() > 0.9


@pytest.mark.parametrize("threat", [L1(3.0), None])
def test_refuses_other_threats(threat):
    with pytest.raises(ValueError, match="apgd: threat=.*, allowed are Linf and L2"):
        apgd(Opposed(), torch.zeros(1, 1, 4, 4), torch.tensor([0]), threat)
