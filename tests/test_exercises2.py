"""The checkers of chapter 2's exercises accept what is right and name every planted mistake."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch

from advlearn import zoo
from advlearn.attacks import cw_inf, pgd
from advlearn.data import load
from advlearn.evaluation import audit
from advlearn.exercises import (
    PGD_BUGS,
    check_dykstra,
    check_l2_projection,
    check_pgd,
    check_pgd_diagnosis,
    check_restarts,
    check_stronger,
    check_verdict,
    projection,
    unknown_networks,
)
from advlearn.exercises.diagnosis import PGD_SUSPECTS, flawed_pgd
from advlearn.exercises.unknown import accuracies, trials
from advlearn.exercises.watched import Watched
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy, margin
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


# --- projections ------------------------------------------------------------------------------


def to_ball(v, x, eps):
    d = v - x
    return x + d * (eps / d.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)


def bisection(v, x, eps, rounds=60):
    low, high = torch.zeros(len(v), 1).to(v), torch.ones(len(v), 1).to(v)
    for _ in range(rounds):
        s = (low + high) / 2
        p = (x + s * (v - x)).clamp(0, 1)
        long = (p - x).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(long, low, s), torch.where(long, s, high)
    p = v.clamp(0, 1)
    inside = (p - x).norm(dim=1, keepdim=True) <= eps
    return torch.where(inside, p, (x + low * (v - x)).clamp(0, 1))


def whole_batch(v, x, eps):
    return (x + (v - x) * min(1, eps / float((v - x).norm().clamp(min=1e-30)))).clamp(0, 1)


def to_sphere(v, x, eps):
    d = v - x
    return (x + d * eps / d.norm(dim=1, keepdim=True)).clamp(0, 1)


def in_place(v, x, eps):
    return v.copy_(bisection(v, x, eps))


PROJECTIONS = {
    "clipping after scaling": lambda v, x, eps: to_ball(v, x, eps).clamp(0, 1),
    "scaling after clipping": lambda v, x, eps: to_ball(v.clamp(0, 1), x, eps),
    "the box is missing": to_ball,
    "reaches": lambda v, x, eps: v.clamp(0, 1),
    "one norm for the whole batch": whole_batch,
    "scale down and never up": to_sphere,
    "0 / 0": lambda v, x, eps: bisection(v, x, eps) if (v != x).any() else v / 0,
    "every point is moved to the sphere": to_sphere,
    "depends on the others": lambda v, x, eps: bisection(v, x, eps) + 1e-3 * (
        0.5 - v.mean()) * (len(v) == 1) * (v != x).any(),
    "v or x was edited in place": in_place,
    "ε = 0 leaves only x": lambda v, x, eps: bisection(v, x, max(eps, 1e-3)),
    "the ℓ∞ ball's projection": lambda v, x, eps: to_ball(
        (x + (v - x).clamp(-eps, eps)).clamp(0, 1), x, eps),
    "returns x for every point outside": lambda v, x, eps: torch.where(
        (to_ball(v, x, eps).clamp(0, 1) == v).all(1, keepdim=True), v, x),
    "farther from v than the nearest": lambda v, x, eps: bisection(v, x, 0.99 * eps),
    "wanted (N, d)": lambda v, x, eps: bisection(v, x, eps).sum(1),
    "not finite": lambda v, x, eps: bisection(v, x, eps) / 0,
}  # fmt: skip


@pytest.mark.parametrize("project", [bisection, lambda v, x, eps: L2(eps).project(v, x)])
def test_the_exact_projection_passes(project):
    assert check_l2_projection(project), check_l2_projection(project)


@pytest.mark.parametrize("message", PROJECTIONS)
def test_a_wrong_projection_is_named(message):
    report = check_l2_projection(PROJECTIONS[message])
    assert not report and message in str(report), report


@pytest.mark.parametrize("order", [0, 1])
def test_alternating_ends_after_one_round_and_not_at_the_nearest_point(order):
    v, x = projection._points()
    sets = [lambda u: to_ball(u, x, 1.0), lambda u: u.clamp(0, 1)][:: 1 - 2 * order]
    once, often = (projection._alternating(v, sets, n) for n in (1, 50))
    assert torch.allclose(once, often, atol=1e-12)
    assert (once - L2(1.0).project(v, x)).norm(dim=1).max() > 0.3
    assert torch.allclose(projection.nearest_point(v, sets, 300), L2(1.0).project(v, x), atol=1e-9)


def stops_early(v, projections, rounds):
    return projection.nearest_point(v, projections, 2)


def half_way(v, projections, rounds):
    p = projection.nearest_point(v, projections, rounds)
    return (p + projection._alternating(v, projections, rounds)) / 2


DYKSTRAS = {
    **{message: mistake for message, mistake in projection._MISTAKES.items()},
    "outside a set": lambda v, projections, rounds: v,
    "each is wanted 7 times": stops_early,
    "farther from v than need be": half_way,
    "v was edited in place": lambda v, projections, rounds: v.copy_(
        projection.nearest_point(v, projections, rounds)),
    "with one set the answer is": lambda v, projections, rounds: projection.nearest_point(
        v, projections, rounds) if len(projections) > 1 else v,
    "wanted (N, d)": lambda v, projections, rounds: None,
}  # fmt: skip


def test_dykstra_passes():
    assert check_dykstra(projection.nearest_point), check_dykstra(projection.nearest_point)


@pytest.mark.parametrize("message", DYKSTRAS)
def test_a_wrong_dykstra_is_named(message):
    report = check_dykstra(DYKSTRAS[message])
    assert not report and message in str(report), report


# --- restarts ---------------------------------------------------------------------------------


def verdicts(f, x, y, threat, attack, n, gen, same=False, start=True):
    """Losses and successes of all runs, (n, N), and whether f is right on the images."""
    losses, hits, drawn = [], [], threat.sample(x, gen)
    for _ in range(n):
        drawn = drawn if same else threat.sample(x, gen)
        z = attack(f, x, y, threat, start=drawn if start else None)
        with torch.no_grad():
            losses.append(cross_entropy(f(z), y))
        hits.append(fooled(f, z, y))
    return torch.stack(losses), torch.stack(hits), ~fooled(f, x, y)


def by(rule, **options):
    return lambda *args: rule(*verdicts(*args, **options))


def stands(losses, hits, right):
    return right & ~hits.any(0)


def only_what_stands(f, x, y, threat, attack, n, gen):
    stands = ~fooled(f, x, y)
    for _ in range(n):
        rows = stands.nonzero()[:, 0]
        if len(rows):
            z = attack(f, x[rows], y[rows], threat, start=threat.sample(x[rows], gen))
            stands[rows] = ~fooled(f, z, y[rows])
    return stands


def largest(losses, hits, right):
    return right & ~hits.gather(0, losses.argmax(0)[None])[0]


def stop_at_the_first(f, x, y, threat, attack, n, gen):
    stands = ~fooled(f, x, y)
    for _ in range(n):
        hit = fooled(f, attack(f, x, y, threat, start=threat.sample(x, gen)), y)
        stands &= ~hit
        if hit.any():
            break
    return stands


def reseeded(f, x, y, threat, attack, n, gen):
    stands = ~fooled(f, x, y)
    for _ in range(n):
        start = threat.sample(x, torch.Generator().manual_seed(0))
        stands &= ~fooled(f, attack(f, x, y, threat, start=start), y)
    return stands


def from_x(f, x, y, threat, attack, n, gen):
    stands = ~fooled(f, x, y)
    for _ in range(n):
        stands &= ~fooled(f, attack(f, x, y, threat, start=x.clone()), y)
    return stands


RESTARTS = {
    "the run with the largest loss decides": by(largest),
    "the last run overwrites": by(lambda losses, hits, right: right & ~hits[-1]),
    "only the first run counts": by(lambda losses, hits, right: right & ~hits[0]),
    "the majority of the runs": by(
        lambda losses, hits, right: right & (hits.double().mean(0) < 0.5)),
    "only if all runs fool it": by(lambda losses, hits, right: right & ~hits.all(0)),
    "without any attack are counted": by(lambda losses, hits, right: ~hits.any(0)),
    "true and false are exchanged": by(lambda *args: ~stands(*args)),
    "no mean": by(lambda losses, hits, right: (right & ~hits).double().mean(0)),
    "wanted one verdict per image": by(lambda *args: stands(*args).double().mean()),
    "attacked 4 times, n = 5": lambda f, x, y, threat, attack, n, gen: only_what_stands(
        f, x, y, threat, attack, n - 1, gen),
    "attacked 1 times, n = 5": stop_at_the_first,
    "draw inside the loop": by(stands, same=True),
    "all runs have the same start": reseeded,
    "start=None": by(stands, start=False),
    "a run starts at x itself": from_x,
    "and you say the opposite": by(
        lambda losses, hits, right: stands(losses, hits, right) & ~(losses > 1).any(0)),
    "depends on the others": lambda f, x, *args: only_what_stands(f, x, *args) & (len(x) > 1),
}  # fmt: skip


@pytest.mark.parametrize("surviving", [by(stands), only_what_stands])
def test_a_right_count_of_restarts_passes(surviving):
    assert check_restarts(surviving), check_restarts(surviving)


@pytest.mark.parametrize("message", RESTARTS)
def test_a_wrong_count_of_restarts_is_named(message):
    report = check_restarts(RESTARTS[message])
    assert not report and message in str(report), report


# --- better than PGD-40 -----------------------------------------------------------------------


@cache
def robust_digits():
    f = zoo.load_or_train("digits-small-pgd", progress=False)
    test = load("digits", "test")
    return f, *test.tensors(), Linf(0.2), test.index


def shrinking(f, x, y, threat, *, start, steps=40, factor=1.0):
    """Steps from 2 ε down to 0, the largest margin is kept."""
    z, best = start, start.clone()
    most = torch.full((len(x),), -torch.inf)
    with frozen(f):
        for t in range(steps):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                logits = f(z)
                g = torch.autograd.grad(cross_entropy(logits, y).sum(), z)[0]
            z, logits = z.detach(), logits.detach()
            new = margin(logits, y)
            best[new > most], most = z[new > most], most.maximum(new)
            z = threat.project(z + factor * 2 * threat.eps * (1 - t / steps) * g.sign(), x)
        with torch.no_grad():
            rows = margin(f(z), y) > most
    best[rows] = z[rows]
    return best


def searches(f, x, y, threat, *, start):
    z = shrinking(f, x, y, threat, start=start)
    with frozen(f), torch.no_grad():
        for _ in range(60):
            f(z)
    return z


def backward_too(f, x, y, threat, *, start):
    cross_entropy(f(x), y).sum().backward()
    return shrinking(f, x, y, threat, start=start, steps=30)


def moves_x(f, x, y, threat, *, start):
    z = shrinking(f, x, y, threat, start=start)
    x.add_(1e-3)
    return z


STRONGER = {
    "the gain's interval does not lie above 0": partial(pgd, steps=40, step_size=0.0125),
    "gradients per image, allowed are 40": partial(shrinking, steps=80),
    "forward passes per image, allowed are 80": searches,
    "leaves the set": lambda f, x, y, threat, *, start: shrinking(
        f, x, y, Linf(0.3), start=start),
    "not a tensor of the shape of x": lambda f, x, y, threat, *, start: None,
    "x or f was changed": backward_too,
}  # fmt: skip


def test_shrinking_steps_beat_pgd():
    report = check_stronger(shrinking, *robust_digits())
    assert report and "right after PGD-40" in str(report), report
    assert "40.0 gradients and 41.0 forward passes" in str(report)


@pytest.mark.parametrize("message", STRONGER)
def test_a_wrong_contender_is_named(message):
    f, *rest = robust_digits()
    report = check_stronger(STRONGER[message], deepcopy(f), *(v for v in rest))
    assert not report and message in str(report), report


def test_edited_images_do_not_help():
    f, x, *rest = robust_digits()
    report = check_stronger(moves_x, f, x.clone(), *rest)
    assert not report and "x or f was changed" in str(report), report


def test_watched_counts_images():
    f, x, y, threat, _ = robust_digits()
    watched = Watched(f, keep=True)
    pgd(watched, x[:7], y[:7], threat, steps=3, step_size=0.1)
    with torch.no_grad():
        watched(x[:5])
    assert (watched.calls, watched.images, watched.gradients) == (4, 26, 21)
    assert [len(z) for z in watched.points] == [7] * 3 and torch.equal(watched.points[0], x[:7])


# --- find the bug -----------------------------------------------------------------------------


def test_every_hidden_suspect_is_broken_and_the_innocent_is_not():
    for bug in PGD_BUGS:
        report = check_pgd(flawed_pgd(bug))
        assert bool(report) is (bug == "none"), (bug, report)


def test_hidden_suspects_have_the_bug_of_their_name():
    """In the words of `check_pgd`, where that has a word for it."""
    for bug, words in {
        "ball": "leaves the ball", "stale": "at the start in every step",
        "batch": "loop ends early", "label": "network's own prediction", "start": "start is ignored",
        "mode": "left in train mode",
    }.items():  # fmt: skip
        assert words in str(check_pgd(flawed_pgd(bug))), bug
    for bug in ("step", "keep"):
        assert "leaves the ball" not in str(check_pgd(flawed_pgd(bug)))


@pytest.mark.parametrize("answer, message", [
    ("none", "acquitted, but it is broken"),
    ("label", "found guilty of 'label', but it is right"),
    ("label", "found guilty of 'label', wrongly"),
    ("box", "answers 'box', allowed are none, ball, step"),
])  # fmt: skip
def test_a_wrong_diagnosis_is_named(answer, message):
    report = check_pgd_diagnosis(lambda attack: answer, dict.fromkeys(PGD_SUSPECTS, pgd))
    assert not report and message in str(report), report


def test_a_wrong_diagnosis_fails_even_if_all_others_are_right():
    known = {id(pgd): "none", **{id(f): bug for bug, f in SUSPECTS2.items()}}
    suspects = {name: SUSPECTS2[bug] for name, bug in PGD_SUSPECTS.items()}
    report = check_pgd_diagnosis(lambda attack: known.get(id(attack), "none"), suspects)
    problems = {f.claim for f in report.findings if f.problem}
    assert problems == {f"another attack with the bug {bug!r}" for bug in PGD_BUGS if bug != "none"}


SUSPECTS2 = {bug: flawed_pgd(bug) for bug in PGD_BUGS if bug != "none"}


# --- unknown networks -------------------------------------------------------------------------


@cache
def offered():
    get = partial(zoo.load_or_train, progress=False)
    networks = {"natural": get("digits-small-natural"), "robust": get("digits-small-pgd"),
                "mlp": get("digits-mlp-natural")}  # fmt: skip
    x, y = load("digits", "test").subset(100).tensors()
    return networks, x, y, Linf(0.2)


def test_what_is_called_honest_and_masked_is_so():
    networks, x, y, threat = offered()
    for trial in trials(networks, x.shape[1:]):
        plain, inside = accuracies(trial, x, y, threat)
        assert (plain > inside + 0.3) is (trial.truth == "masked"), (trial.claim, plain, inside)
        assert not any(m.training for m in trial.f.modules())
        if "rounded" in trial.claim or "foreign" in trial.claim:  # The others are in test_audit.
            assert audit(trial.f, x[:60], y[:60], threat, queries=300).raised, trial.claim
    assert {repr(f) for f in unknown_networks(*list(networks.values())[:2]).values()} == {
        "Unknown network"}  # fmt: skip


def truths():
    networks, x, *_ = offered()
    return [trial.truth for trial in trials(networks, x.shape[1:])]


def in_turn(answers):
    answers = iter(answers)
    return lambda f, x, y, threat: next(answers)


def flipped(position):
    answers = truths()
    answers[position] = {"honest": "masked", "masked": "honest"}[answers[position]]
    return in_turn(answers)


def by_accuracy(f, x, y, threat):
    """Honest is what falls."""
    with frozen(f):
        z = pgd(f, x, y, threat, steps=40, step_size=threat.eps / 16)
    return "masked" if (~fooled(f, z, y)).double().mean() > 0.2 else "honest"


def by_zeros(f, x, y, threat):
    g = gradient(f, x, y)
    return "masked" if (norms(g, 2) == 0).double().mean() > 0.05 else "honest"


VERDICTS = {
    "network A: you say 'honest': PGD-40 leaves": lambda: flipped(0),
    "network B: you say 'masked': PGD-40 leaves": lambda: flipped(1),
    "the margin's is not": lambda: flipped(2),
    "a network that falls hides nothing": lambda: flipped(3),
    "at every call": lambda: flipped(-3),
    "larger differences are not": lambda: flipped(-2),
    "leads nowhere": lambda: by_zeros,
    "what survives is no fraud by itself": lambda: by_accuracy,
    "the verdict is always 'masked'": lambda: lambda *args: "masked",
    "answers None, allowed are 'honest' and 'masked'": lambda: lambda *args: None,
}  # fmt: skip


def test_right_verdicts_pass():
    report = check_verdict(in_turn(truths()), *offered())
    assert report, report


@pytest.mark.parametrize("message", VERDICTS)
def test_a_wrong_verdict_is_named(message):
    report = check_verdict(VERDICTS[message](), *offered())
    assert not report and message in str(report), report


# --- stubs ------------------------------------------------------------------------------------

CHECKS = {
    "pgd": check_pgd,
    "l2 projection": check_l2_projection,
    "dykstra": check_dykstra,
    "restarts": check_restarts,
    "diagnosis": lambda f: check_pgd_diagnosis(f, dict.fromkeys(PGD_SUSPECTS, pgd)),
    "verdict": lambda f: check_verdict(f, *offered()),
    "stronger": lambda f: check_stronger(f, *robust_digits()),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)
