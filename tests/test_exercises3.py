"""The checkers of chapter 3's exercises accept what is right and name every planted mistake."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from advlearn import training
from advlearn.attacks import pgd
from advlearn.data import load
from advlearn.exercises import (
    check_leak,
    check_promise,
    check_steepest,
    check_tie,
    check_trades,
    check_trainer,
    check_training,
    shortest,
    tie,
)
from advlearn.exercises.chapter3 import trades_floor
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy, kl_divergence
from advlearn.tensors import Keyed, frozen, generator
from advlearn.threats import Linf


def stub(*args, **kwargs):
    raise NotImplementedError


def named(check, wrong, message):
    report = check(wrong)
    assert not report and message in str(report), report


# --- the training loop: text of the report -> loop ----------------------------------------------


def loop(order=None, start=None, inputs=None, where=None, before=None, zero="late", target=None,
         optimizer=None, train=True, hold=True, labels=None, cut=0):  # fmt: skip
    """Adversarial training with one part replaced.

    order(n, epoch, seed) -> rows, start(x, threat, seed, epoch, index) -> start,
    inputs(batch) -> x, where(z, x, start) -> where the loss is taken, before(model) -> attacked
    network, zero in late, early, never; target(y), labels(y), optimizer(parameters, lr).
    """

    def shuffled(n, epoch, seed):
        return torch.randperm(n, generator=generator(seed * 1_000_003 + epoch))

    def drawn(x, threat, seed, epoch, index):
        return threat.sample(x, Keyed((seed, epoch), index))

    def train_(model, images, threat, attack, *, epochs, batch_size, lr, seed):
        adam = (optimizer or torch.optim.Adam)(model.parameters(), lr)
        attacked = model if before is None else before(model)
        if train:
            model.train()
        for epoch in range(epochs):
            rows_ = (order or shuffled)(len(images), epoch, seed)
            for rows in rows_.split(batch_size - cut):
                batch = images.take(rows)
                x, y = batch.tensors() if inputs is None else inputs(batch)
                first = (start or drawn)(x, threat, seed, epoch, batch.index)
                if zero == "early":
                    adam.zero_grad()
                z = attack(attacked, x, y if labels is None else labels(y), threat, start=first)
                if zero == "late":
                    adam.zero_grad()
                z = z.detach() if hold else z
                at = [z] if where is None else where(z, x, first)
                t = y if target is None else target(y)
                sum(F.cross_entropy(model(v), t) for v in at).backward()
                adam.step()

    return train_


def edits_images(model, images, threat, attack, **settings):
    loop()(model, images, threat, attack, **settings)
    images.images.add_(1)


def attacks_first(model, images, threat, attack, *, epochs, batch_size, lr, seed):
    x, y = images.tensors()
    z = attack(model, x, y, threat, start=threat.sample(x, generator(seed)))
    adam = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for part, labels in zip(z.split(batch_size), y.split(batch_size), strict=True):
            adam.zero_grad()
            F.cross_entropy(model.train()(part), labels).backward()
            adam.step()


def attacks_epoch(model, images, threat, attack, *, epochs, batch_size, lr, seed):
    """All batches of an epoch are attacked before its first step."""
    adam = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator(epoch))
        todo = []
        for rows in order.split(batch_size):
            batch = images.take(rows)
            x, y = batch.tensors()
            start = threat.sample(x, Keyed((seed, epoch), batch.index))
            todo.append((attack(model, x, y, threat, start=start), y))
        for z, y in todo:
            adam.zero_grad()
            F.cross_entropy(model(z), y).backward()
            adam.step()


def forgets(model, images, threat, attack, *, epochs, batch_size, lr, seed):
    """A new Adam in every epoch, which is every step of a single batch."""
    for epoch in range(epochs):
        loop(order=lambda n, *_, e=epoch: torch.randperm(n, generator=generator(e)),
             start=lambda x, threat, seed, _, index, e=epoch: threat.sample(
                 x, Keyed((seed, e), index)))(
            model, images, threat, attack, epochs=1, batch_size=batch_size, lr=lr, seed=seed)  # fmt: skip


def same_draws(x, threat, seed, epoch, index):
    return threat.sample(x, generator(epoch))


def one_delta(x, threat, seed, epoch, index):
    return x + (threat.sample(x[:1], Keyed((seed, epoch), index[:1])) - x[:1])


TRAININGS = {
    "edited in place": edits_images,
    "the attack is called 1 times": attacks_first,
    "attacked with weights of an earlier step": attacks_epoch,
    "other labels than those": loop(labels=lambda y: (y + 1) % 3),
    "batches of 3 images": loop(cut=1),
    "does not take every image once": loop(
        order=lambda n, epoch, seed: torch.randint(0, n, (n,), generator=generator(epoch))),
    "the same in every epoch": loop(order=lambda n, epoch, seed: torch.arange(n)),
    "pixels outside [0, 1]": loop(inputs=lambda batch: (batch.images.float(), batch.labels)),
    "something else than the images": loop(
        inputs=lambda batch: (batch.tensors()[0] + 0.01, batch.labels)),
    "start=None": loop(start=lambda *_: None),
    "gives images x + δ, not δ": loop(
        start=lambda x, threat, seed, epoch, index: threat.sample(x, Keyed(epoch, index)) - x),
    "the start is x itself": loop(start=lambda x, *_: x),
    "one δ for the whole batch": loop(start=one_delta),
    "same point in every epoch": loop(
        start=lambda x, threat, seed, epoch, index: threat.sample(x, Keyed(seed, index))),
    "every batch draws the same": loop(start=same_draws),
    "another network than the one": loop(before=copy.deepcopy),
    "the weights have not moved": loop(optimizer=lambda p, lr: torch.optim.Adam(p, 0.0)),
    "the loss of the clean images is added": loop(where=lambda z, x, start: [x, z]),
    "more than one pass": loop(where=lambda z, x, start: [z, z]),
    "the loss is taken at x": loop(where=lambda z, x, start: [x]),
    "the loss is taken at the start": loop(where=lambda z, x, start: [start]),
    "the loss is taken elsewhere": loop(where=lambda z, x, start: [(z + x) / 2]),
    "the step is taken in eval mode": loop(train=False),
    "gradients add up from step to step": loop(zero="never"),
    "the loss goes up": loop(optimizer=partial(torch.optim.Adam, maximize=True)),
    "plain gradient steps": loop(optimizer=torch.optim.SGD),
    "lr is not passed": loop(optimizer=lambda p, lr: torch.optim.Adam(p)),
    "forgets Adam's moments": forgets,
    "the loss has other labels": loop(target=lambda y: (y + 1) % 3),
    "differ from those of training.fit": loop(
        optimizer=lambda p, lr: torch.optim.Adam(p, lr, betas=(0.5, 0.5))),
    "the attack left in .grad": loop(zero="early"),
    "flows back through the attack": loop(hold=False),
}  # fmt: skip


@pytest.mark.parametrize("right", [loop(), loop(order=lambda n, epoch, seed: torch.randperm(
    n, generator=generator(epoch + 9)))], ids=["as in the chapter", "another order"])  # fmt: skip
def test_a_right_loop_passes(right):
    assert check_training(right), check_training(right)


@pytest.mark.parametrize("message", TRAININGS)
def test_a_wrong_loop_is_named(message):
    named(check_training, TRAININGS[message], message)


# --- the steepest direction, and the tie --------------------------------------------------------


def two(g):
    """The chapter's formula: the shortest point of a segment."""
    a, b = g[0], g[-1]
    share = (b @ (b - a) / (a - b).square().sum()).clamp(0, 1)
    return share * a + (1 - share) * b


def affine(g):
    return tie._affine(g) @ g


def cut_off(g):
    w = tie._affine(g).clamp(min=0)
    return w / w.sum() @ g


def pairs(g):
    found = [shortest(g[[i, j]]) for i in range(len(g)) for j in range(i)]
    return min(found, key=lambda v: float(v.norm()))


def edits_gradients(g):
    v = shortest(g)
    g.sub_(v)
    return v


STEEPEST = {
    "the mean of the gradients": lambda g: g.mean(0),
    "the sum of the gradients": lambda g: g.sum(0),
    "the shortest of the gradients": lambda g: g[g.norm(dim=1).argmin()],
    "the longest of the gradients": lambda g: g[g.norm(dim=1).argmax()],
    "negative weights: that is": affine,
    "negative weights were cut off": cut_off,
    "scaled to norm 1 first": lambda g: shortest(g / g.norm(dim=1, keepdim=True)),
    "only pairs are mixed": pairs,
    "minus the shortest point": lambda g: -shortest(g),
    "not finite": two,
    "wanted one vector": lambda g: g,
    "edited in place": edits_gradients,
    "going towards it makes v shorter": lambda g: (shortest(g) + g[0]) / 2,
    "v is not in the hull": lambda g: shortest(g) / 2,
}  # fmt: skip


def test_the_shortest_point_satisfies_the_variational_inequality():
    gen = generator(0)
    for m, d in [(2, 3), (3, 2), (5, 4), (6, 3)]:
        g = torch.randn(m, d, generator=gen, dtype=torch.float64) + 0.5
        v = shortest(g)
        assert (g @ v >= v @ v - 1e-9).all()
        weights = torch.rand(2000, m, generator=gen, dtype=torch.float64).pow(3)
        mixed = weights / weights.sum(1, keepdim=True) @ g
        assert (mixed.norm(dim=1) >= v.norm() - 1e-9).all()


def test_steepest_passes():
    assert check_steepest(shortest), check_steepest(shortest)


@pytest.mark.parametrize("message", STEEPEST)
def test_a_wrong_steepest_is_named(message):
    named(check_steepest, STEEPEST[message], message)


def crossings(losses, box, accept, which=(0, 1)):
    """Points between random weights where the order of two losses changes."""
    gen = generator(3)
    for _ in range(60):
        low, high = box * (2 * torch.rand(2, 2, generator=gen, dtype=torch.float64) - 1)

        def leads(theta):
            return bool(losses[which[0]](theta) > losses[which[1]](theta))

        if leads(low) == leads(high):
            continue
        first = leads(low)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if leads(middle) == first else (low, middle)
        if accept(low, losses):
            return low
    return None


def top(theta, losses, which=(0, 1)):
    values = torch.stack([loss(theta) for loss in losses])
    return bool((values.amax() - values[list(which)]).max() < 1e-9)


def product(theta, losses, which=(0, 1)):
    a, b = (input_grad(losses[i], theta) for i in which)
    return float(a @ b)


def find_tie(losses, box):
    for which in [(i, j) for j in range(len(losses)) for i in range(j)]:
        theta = crossings(losses, box, lambda t, ls, w=which: top(t, ls, w)
                          and product(t, ls, w) < -1e-3, which)  # fmt: skip
        if theta is not None:
            return theta
    return torch.zeros(2, dtype=torch.float64)


def harmless(losses, box):
    """Looks for ties only, where that differs."""
    theta = crossings(losses, box, lambda t, ls: top(t, ls) and product(t, ls) > 1e-2)
    return find_tie(losses, box) if theta is None else theta


def below(losses, box):
    theta = crossings(losses, box, lambda t, ls: not top(t, ls, (1, 3)), (1, 3)) if len(
        losses) > 3 else None  # fmt: skip
    return find_tie(losses, box) if theta is None else theta


TIES = {
    "outside [−3, 3]²": lambda losses, box: torch.tensor([4.0, -4.0], dtype=torch.float64),
    "there is one maximiser": lambda losses, box: find_tie(losses, box) + 1e-3,
    "but a third is larger": below,
    "a step against either of them lowers both": harmless,
    "a tie needs float64": lambda losses, box: find_tie(losses, box).float(),
    "wanted two weights": lambda losses, box: find_tie(losses, box)[:1],
}  # fmt: skip


def test_a_tie_passes():
    assert check_tie(find_tie), check_tie(find_tie)


@pytest.mark.parametrize("message", TIES)
def test_a_wrong_tie_is_named(message):
    named(check_tie, TIES[message], message)


def test_a_tie_of_flat_losses_is_no_answer():
    flat = [lambda t: t.square().sum(), lambda t: t.square().sum()]
    assert "is 0" in tie.tie_problem(flat, torch.zeros(2, dtype=torch.float64), 3.0)


# --- label leaking ------------------------------------------------------------------------------


def leaky(a):
    t = a - 0.5
    return t - 5 * F.relu(t - 0.12) + 5 * F.relu(-t - 0.12)


def remembers():
    seen = []

    def score(a):
        seen.append(len(seen))
        return leaky(a) + 1e-3 * len(seen)

    return score


class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return leaky(a)

    @staticmethod
    def backward(ctx, g):
        return -3 * g


LEAKS = {
    "FGSM always succeeds": lambda a: a - 0.5,
    "has no direction": lambda a: 0 * a,
    "not always the same": remembers(),
    "depends on the others": lambda a: leaky(a) + 0.1 * (a.mean() - 0.5),
    "autograd's slope is not": lambda a: Masked.apply(a),
    "does the slope have one sign": lambda a: (12 * a).sin(),
    "after PGD-40: on the way": lambda a: 0.1 + 0.01 * (a - 0.5) - 5 * F.relu(a - 0.62),
    "wanted one score per pixel": lambda a: leaky(a)[:, None],
    "not finite": lambda a: leaky(a) / 0,
}  # fmt: skip


def test_a_leaking_score_passes():
    assert check_leak(leaky), check_leak(leaky)
    assert check_leak(lambda a: 3 * leaky(a))


@pytest.mark.parametrize("message", LEAKS)
def test_a_wrong_leak_is_named(message):
    named(check_leak, LEAKS[message], message)


def test_a_score_that_sees_the_attack_is_named():
    named(check_leak, lambda a: leaky(a) + 0.01 * a.requires_grad, "not always the same")


# --- TRADES -------------------------------------------------------------------------------------


def trades(f, x, y, threat, *, beta, steps, step_size, start, inner=None, outer=None, natural=None,
           mode=True, loss=None, begin=None):  # fmt: skip
    with frozen(f), torch.no_grad():
        target = f(x)
    z = pgd(f, x, target if loss is None else y, threat, steps=steps, step_size=step_size,
            start=start if begin is None else begin(x, start), loss=loss or inner or kl_divergence)
    clean, moved = f(x), f(z)
    first = cross_entropy(clean, y) if natural is None else natural(clean, moved, y)
    return first + (beta * kl_divergence(moved, clean) if outer is None
                    else outer(clean, moved, beta))  # fmt: skip


def swapped(logits, reference):
    return kl_divergence(reference, logits)


def in_train_mode(f, x, y, threat, *, beta, steps, step_size, start):
    target = f(x).detach()
    z = start
    for _ in range(steps):
        g = input_grad(lambda z: kl_divergence(f(z), target), z)
        z = threat.project(z + step_size * threat.ascend(g, z, x), x)
    clean = f(x)
    return cross_entropy(clean, y) + beta * kl_divergence(f(z), clean)


def frozen_whole(f, *args, **options):
    f.eval()
    return trades(f, *args, **options)


def eval_losses(f, *args, **options):
    f.eval()
    losses = trades(f, *args, **options)
    f.train()
    return losses


def fills_grads(f, *args, **options):
    losses = trades(f, *args, **options)
    losses.mean().backward(retain_graph=True)
    return losses


def no_graph(f, *args, **options):
    with frozen(f):
        return trades(f, *args, **options)


TRADES = {
    "inside and outside": partial(trades, inner=swapped, outer=lambda c, m, b: b * swapped(m, c)),
    "the outer KL has its arguments": partial(trades, outer=lambda c, m, b: b * swapped(m, c)),
    "the attack maximises KL the other way": partial(trades, inner=swapped),
    "f(x) is held in the outer KL": partial(
        trades, outer=lambda c, m, b: b * kl_divergence(m, c.detach())),
    "does not know y": partial(trades, loss=cross_entropy),
    "where KL has no slope": partial(trades, begin=lambda x, start: x),
    "the first term is the loss of z": partial(
        trades, natural=lambda c, m, y: cross_entropy(m, y)),
    "β is missing": partial(trades, outer=lambda c, m, b: kl_divergence(m, c)),
    "the factor is 1/β": partial(trades, outer=lambda c, m, b: kl_divergence(m, c) / b),
    "has the factor 1 − β": partial(trades, natural=lambda c, m, y: -2 * cross_entropy(c, y)),
    "the loss of x is missing": partial(trades, natural=lambda c, m, y: 0),
    "one loss per image": lambda *args, **options: trades(*args, **options).mean(),
    "the attack sees train mode": in_train_mode,
    "left in eval mode": frozen_whole,
    "the losses are taken in eval mode": eval_losses,
    "the weights hold gradients": fills_grads,
    "the losses have no graph": no_graph,
    "not those of the equation": partial(
        trades, outer=lambda c, m, b: b * (c - m).square().sum(1)),
    "the losses are right, their gradients": partial(
        trades, natural=lambda c, m, y: cross_entropy(c.detach(), y)),
}  # fmt: skip


def test_trades_passes():
    assert check_trades(trades), check_trades(trades)


@pytest.mark.parametrize("message", TRADES)
def test_a_wrong_trades_is_named(message):
    named(check_trades, TRADES[message], message)


def test_trades_promises_no_more_and_no_less():
    """Random pairs of predictions with a wrong second one never come below, some come close."""
    gen = generator(0)
    p = torch.rand(200_000, 3, generator=gen, dtype=torch.float64).pow(3).add(1e-9)
    q = torch.rand(200_000, 3, generator=gen, dtype=torch.float64).pow(2).add(1e-9)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    wrong = q[:, 0] <= q[:, 1:].amax(1)
    for beta in (0.5, 1.0, 6.0):
        loss = -p[:, 0].log() + beta * (p * (p / q).log()).sum(1)
        floor = trades_floor(beta)
        assert loss[wrong].min() >= floor - 1e-9
        assert loss[wrong].min() < 1.2 * floor + 0.02
    floors = [trades_floor(beta) for beta in (0, 0.5, 1, 6, 100)]
    assert floors[0] == pytest.approx(0, abs=1e-9) and floors[-1] < math.log(2)
    assert all(a < b for a, b in pairwise(floors))


PROMISES = {
    "log 2 is the constant of the adversarial": lambda beta: math.log(2),
    "that are sure of x": lambda beta: beta * math.log(2),
    "the smaller of the two ends": lambda beta: min(1, beta) * math.log(2),
    "and you promise": lambda beta: trades_floor(beta) + 0.01,
    "holds too": lambda beta: 0.9 * trades_floor(beta),
}  # fmt: skip


def test_the_promise_passes():
    assert check_promise(trades_floor), check_promise(trades_floor)


@pytest.mark.parametrize("message", PROMISES)
def test_a_wrong_promise_is_named(message):
    named(check_promise, PROMISES[message], message)


# --- a budget of gradients ----------------------------------------------------------------------

BUDGET = 8_000


def contest(train, rival="PGD-5", gradients=BUDGET):
    images = load("digits", "train").split_off(200)[0].subset(600)
    return check_trainer(train, images, load("digits", "test"), Linf(0.2), gradients=gradients,
                         rival=rival)  # fmt: skip


def short(model, images, threat, gradients, seed, steps=1, price=2):
    training.fit(model, images, training.adversarial(threat, partial(pgd, steps=steps), ramp=0.3,
                                                     step_size=0.9 * threat.eps),
                 epochs=gradients // (price * len(images)), batch_size=32, lr=8e-3, seed=seed,
                 progress=False)  # fmt: skip


def looks_on(model, images, threat, gradients, seed):
    short(model, images, threat, gradients, seed)
    with torch.no_grad():
        for _ in range(3 * gradients // len(images)):
            model(images.tensors()[0])


def moves_images(model, images, threat, gradients, seed):
    short(model, images, threat, gradients, seed)
    images.images.fill_(0)


CONTESTS = {
    "allowed are 8,000": partial(short, price=1),
    "forward passes, allowed are": looks_on,
    "the training images were changed": moves_images,
    "the weights have not moved": lambda *args: None,
    "does not lie above 0": lambda model, images, threat, gradients, seed: short(
        model, images, threat, gradients // 4, seed),
}  # fmt: skip


def test_cheaper_steps_beat_pgd_5():
    report = contest(short)
    assert report and "6,912 gradients" in str(report), report
    assert "clean / FGSM / PGD-20: yours" in str(report)


@pytest.mark.parametrize("message", CONTESTS)
def test_a_wrong_trainer_is_named(message):
    named(contest, CONTESTS[message], message)


@pytest.mark.parametrize("options, message", [
    ({"rival": "TRADES"}, "rival='TRADES', allowed are FGSM, PGD-5"),
    ({"gradients": 10}, "gradients=10, one epoch of PGD-5 needs 3600"),
])  # fmt: skip
def test_a_wrong_contest_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        contest(short, **options)


# --- stubs --------------------------------------------------------------------------------------

CHECKS = {"training": check_training, "steepest": check_steepest, "tie": check_tie,
          "leak": check_leak, "trades": check_trades, "promise": check_promise,
          "trainer": contest}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)


