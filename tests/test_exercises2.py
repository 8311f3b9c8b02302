"""The checkers of chapter 2's exercises accept what is right and name every planted mistake."""

from functools import cache, partial

import pytest
import torch

from advlearn.attacks import cw_inf, pgd
from advlearn.exercises import check_pgd
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import frozen, norms
from advlearn.threats import L2, Linf


def gradient(f, x, y):
    with frozen(f):
        return input_grad(lambda z: cross_entropy(f(z), y), x)


def stub(*args, **kwargs):
    raise NotImplementedError


# --- PGD from memory: text of the report -> attack --------------------------------------------


def loop(direct=None, place=None, at=None, finish=None, begin=None, stop=None):
    """PGD with one part replaced.

    direct(f, z, y, threat, x) -> direction, place(z, x, threat, start, last) -> z,
    at(z, x, start) -> where the gradient is taken, finish(points, x) -> result,
    begin(x, start) -> first point, stop(f, z, y) -> end the loop?
    """

    def attack(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
        start_ = x if start is None else start
        z = start_ if begin is None else begin(x, start)
        points = [z]
        for t in range(steps):
            if stop is not None and stop(f, z, y):
                break
            where = z if at is None else at(z, x, start_)
            d = (threat.ascend(gradient(f, where, y), where, x) if direct is None
                 else direct(f, where, y, threat, x))  # fmt: skip
            new = z + step_size * d
            z = threat.project(new, x) if place is None else place(z, new, x, threat, start_, t)
            points.append(z)
        return z if finish is None else finish(points, x)

    return attack


def fooled(f, z, y):
    with frozen(f), torch.no_grad():
        return f(z).argmax(1) != y


def predicted(f, z, y, threat, x):
    with frozen(f), torch.no_grad():
        y = f(z).argmax(1)
    return gradient(f, z, y).sign()


def adding_up():
    def attack(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
        z, total = x if start is None else start, 0
        for _ in range(steps):
            total = total + gradient(f, z, y)
            z = threat.project(z + step_size * threat.ascend(total, z, x), x)
        return z

    return attack


def scaled(factor):
    """PGD with another step size: factor(threat.eps, steps, step_size)."""

    def attack(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
        size = factor(threat.eps, steps, step_size)
        return pgd(f, x, y, threat, steps=steps, step_size=size, start=start)

    return attack


def one_gradient(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    z = x if start is None else start
    g = gradient(f, z, y)
    for _ in range(steps):
        z = threat.project(z + step_size * threat.ascend(g, z, x), x)
    return z


def frozen_when_fooled(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    z = x if start is None else start
    for _ in range(steps):
        new = threat.project(z + step_size * threat.ascend(gradient(f, z, y), z, x), x)
        z = torch.where(fooled(f, z, y).view(-1, 1, 1, 1), z, new)
    return z


def left_out_when_fooled(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    z = (x if start is None else start).clone()
    for _ in range(steps):
        rows = ~fooled(f, z, y)
        if rows.any():
            g = gradient(f, z[rows], y[rows])
            z[rows] = threat.project(z[rows] + step_size * threat.ascend(g, z[rows], x[rows]),
                                     x[rows])  # fmt: skip
    return z


def one_more(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    return pgd(f, x, y, threat, steps=steps + 1, step_size=step_size, start=start)


def edits_x(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    z = x if start is None else start.clone()
    for _ in range(steps):
        z += step_size * threat.ascend(gradient(f, z, y), z, x)
        z.copy_(threat.project(z, x))
    return z.clone()


def edits_start(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    z = x.clone() if start is None else start
    for _ in range(steps):
        z.copy_(threat.project(z + step_size * threat.ascend(gradient(f, z, y), z, x), x))
    return z.clone()


def marks_start(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    if start is not None:
        start.requires_grad_()
    return pgd(f, x, y, threat, steps=steps, step_size=step_size, start=start)


def draws_its_own(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    start = threat.sample(x, torch.Generator().manual_seed(1)) if start is None else start
    return pgd(f, x, y, threat, steps=steps, step_size=step_size, start=start)


def one_by_one(f, x, y, threat, **options):
    start = options.pop("start")
    return torch.cat([pgd(f, x[i : i + 1], y[i : i + 1], threat, **options,
                          start=None if start is None else start[i : i + 1])
                      for i in range(len(x))])  # fmt: skip


def no_frozen(f, x, y, threat, *, steps=40, step_size=0.01, start=None):
    z = x if start is None else start
    for _ in range(steps):
        g = input_grad(lambda z: cross_entropy(f(z), y), z)
        z = threat.project(z + step_size * threat.ascend(g, z, x), x)
    return z


def ball_only(z, new, x, threat, start, t):
    d = new - x
    if isinstance(threat, L2):
        return x + d * (threat.eps / norms(d, 2).clamp(min=1e-30)).clamp(max=1).view(-1, 1, 1, 1)
    return x + d.clamp(-threat.eps, threat.eps)


PGDS = {
    "one for each step, and no other": one_more,
    "the gradient belongs inside the loop": one_gradient,
    "the loop ends early, for all images": loop(stop=lambda f, z, y: fooled(f, z, y).any()),
    "is the batch given up at once": loop(stop=lambda f, z, y: True),
    "already are left out": left_out_when_fooled,
    "treated differently": frozen_when_fooled,
    "start is ignored": loop(begin=lambda x, start: x),
    "random starts are the caller's": draws_its_own,
    "start is added to x": loop(
        begin=lambda x, start: x if start is None else (x + start).clamp(0, 1)),
    "the first gradient is not at start": loop(
        begin=lambda x, start: x if start is None else (x + start) / 2),
    "the loss goes down: the step is + α": loop(
        direct=lambda f, z, y, threat, x: threat.ascend(-gradient(f, z, y), z, x)),
    "the step is ε long": scaled(lambda eps, steps, size: eps),
    "step_size / steps long": scaled(lambda eps, steps, size: size / steps),
    "step_size · ε long": scaled(lambda eps, steps, size: size * eps),
    "every step sets out from x": loop(
        place=lambda z, new, x, threat, start, t: threat.project(x + new - z, x)),
    "the gradient is taken at x in every step": loop(at=lambda z, x, start: x),
    "the gradient is taken at the start in every step": loop(at=lambda z, x, start: start),
    "without the sign the steps vanish": loop(
        direct=lambda f, z, y, threat, x: gradient(f, z, y)),
    "g / ‖g‖₂ over all pixels": loop(
        direct=lambda f, z, y, threat, x: (g := gradient(f, z, y)) / norms(g, 2).view(-1, 1, 1, 1)),
    "that is the ℓ2 step": loop(
        direct=lambda f, z, y, threat, x: L2(1).ascend(gradient(f, z, y), z, x)),
    "the sign is the ℓ∞ step": loop(
        direct=lambda f, z, y, threat, x: gradient(f, z, y).sign()),
    "once fooled, the attack turns back": loop(direct=predicted),
    "gradients add up over the steps": adding_up(),
    "an iterate leaves the ball around x": loop(
        place=lambda z, new, x, threat, start, t: threat.project(new, z)),
    "and after every step": loop(
        place=lambda z, new, x, threat, start, t: new.clamp(0, 1),
        finish=lambda points, x: Linf(0.1).project(points[-1], x)),
    "the projection is around the start": loop(
        place=lambda z, new, x, threat, start, t: threat.project(new, start)),
    "an iterate leaves [0, 1]": loop(place=ball_only, finish=lambda points, x: points[-1].clamp(0, 1)),
    "is the projection for ℓ∞": loop(
        place=lambda z, new, x, threat, start, t: Linf(threat.eps).project(new, x)),
    "not the one after it": loop(finish=lambda points, x: points[-2]),
    "returns an earlier point": loop(finish=lambda points, x: points[1]),
    "start was edited in place": edits_start,
    "x was edited in place": edits_x,
    "start.requires_grad is left on": marks_start,
    "the gradients of all images at once": one_by_one,
    "active during the attack": no_frozen,
    "does not follow the equation": loop(
        direct=lambda f, z, y, threat, x: threat.ascend(gradient(f, z, y).flip(0), z, x)),
    "with more steps the loss is smaller": scaled(lambda eps, steps, size: -size if steps > 8 else size),
    "stopped with TypeError": lambda f, x, y, threat, *, start=None: x,
}  # fmt: skip


@cache
def report_on_pgd(message):
    return check_pgd(PGDS[message])


def test_pgd_passes():
    assert check_pgd(pgd), check_pgd(pgd)


@pytest.mark.parametrize("attack", [cw_inf, partial(pgd, momentum=0.5)], ids=["margin", "momentum"])
def test_another_attack_is_not_the_equation(attack):
    assert "does not follow the equation" in str(check_pgd(attack))


@pytest.mark.parametrize("message", PGDS)
def test_a_wrong_pgd_is_named(message):
    report = report_on_pgd(message)
    assert not report and message in str(report), report
