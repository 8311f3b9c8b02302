"""Checkers for the exercises of chapter 1 that are not attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from advlearn import models
from advlearn.attacks import Attack, fgsm
from advlearn.evaluation import paired, predict
from advlearn.exercises.attack import SHAPE
from advlearn.exercises.diagnosis import examine_diagnosis
from advlearn.exercises.report import Finding, Report, Unusable, examine
from advlearn.exercises.watched import Watched
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import frozen, generator
from advlearn.threats import Linf, Threat


def l1_bound(g: Tensor, x: Tensor, eps: float) -> Tensor:
    r"""No feasible δ has a larger $g \cdot \delta$ than this (weak duality), and the best has it.

    $$\min_{\lambda \ge 0}\; \lambda\varepsilon + \sum_i \max(|g_i| - \lambda, 0)\,\text{room}_i$$

    The sum is piecewise linear in λ with its corners at the $|g_i|$, so these (and 0) suffice.

    Args:
        g, x: gradients and images, (N, d).
        eps: ℓ1 radius.

    Returns:
        The bound, (N,).
    """
    room = torch.where(g > 0, 1 - x, x)
    corners = torch.cat([torch.zeros_like(g[:, :1]), g.abs()], 1)
    gain = (g.abs()[:, None] - corners[:, :, None]).clamp(min=0)
    return (eps * corners + (gain * room[:, None]).sum(2)).amin(1)


def check_l1_step(step: Callable[[Tensor, Tensor, float], Tensor]) -> Report:
    """Try `step(g, x, eps) -> delta`, the maximiser of g·δ over the ℓ1 ball cut by the box.

    All of shape (N, d). The value is held against the dual bound `l1_bound`.
    """
    gen = generator(7)
    g = torch.randn(32, 20, generator=gen, dtype=torch.float64)
    x = torch.rand(32, 20, generator=gen, dtype=torch.float64)
    x = torch.where(torch.rand(32, 20, generator=gen) < 0.3, x.round(), x)

    def value(eps: float) -> tuple[Tensor, Tensor]:
        if feasible():
            raise Unusable("cannot be judged: δ leaves the set")
        return (g * step(g, x, eps)).sum(1), l1_bound(g, x, eps)

    def feasible() -> str | None:
        for eps in (0.3, 3.0, 100.0):
            delta = step(g, x, eps)
            if delta.shape != g.shape or not delta.isfinite().all():
                return f"δ must be finite and of shape {tuple(g.shape)}"
            if (used := float(delta.abs().sum(1).max())) > eps + 1e-6:
                return f"‖δ‖₁ reaches {used:.2f}, ε is {eps:g}: stop when the budget is used up"
            if (x + delta).min() < -1e-6 or (x + delta).max() > 1 + 1e-6:
                return "x + δ leaves [0, 1]: a pixel takes at most its room (1 − x up, x down)"
        return None

    def untouched() -> str | None:
        before = torch.stack([g, x])
        step(g, x, 1.0)
        return None if torch.equal(before, torch.stack([g, x])) else "g or x was edited in place"

    def optimal() -> str | None:
        reached, bound = value(3.0)
        if (reached > bound - 1e-6).all():
            return None
        if (reached <= 0).all():
            return "g·δ is not positive: δ takes the sign of g"
        delta = step(g, x, 3.0)
        if bool(((delta.abs() > 1e-9).sum(1) <= 1).all()):
            return "one pixel only, and budget is left: go on with the next largest |g|"
        room = torch.where(g > 0, 1 - x, x)
        if torch.allclose(delta, _greedy(g, room, 3.0, g.abs() * room)):
            return "filled in the order of |g|·room: a unit of budget earns |g|, whatever the room"
        return f"reaches {100 * float((reached / bound).min()):.0f} % of what the dual allows"

    def ample() -> str | None:
        reached, bound = value(100.0)
        hint = "with ε larger than all the room every pixel should go to its end of the box"
        return None if (reached > bound - 1e-6).all() else hint

    return examine(step, [
        ("‖δ‖₁ ≤ ε and x + δ in [0, 1]", feasible), ("leaves g and x as they are", untouched),
        ("reaches the dual bound", optimal), ("uses all the room when ε allows it", ample),
    ])  # fmt: skip


def _greedy(g: Tensor, room: Tensor, eps: float, key: Tensor) -> Tensor:
    order = key.argsort(1, descending=True)
    room = room.gather(1, order)
    spent = torch.minimum(room, (eps - (room.cumsum(1) - room)).clamp(min=0))
    return torch.zeros_like(g).scatter(1, order, spent) * g.sign()


def _two_classes() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear network, interior images, labels, and the exact smallest ε of every image."""
    f = models.linear(SHAPE, 2).eval()
    f[1].weight.data = torch.randn(2, 16, generator=generator(5))
    f[1].bias.data = torch.tensor([0.0, 0.4])
    x = 0.4 + 0.2 * torch.rand(24, *SHAPE, generator=generator(3))
    x[::3] += 0.12 * (f[1].weight[0] - f[1].weight[1]).detach().sign().view(SHAPE)
    y = torch.arange(24) % 2
    with torch.no_grad():
        logits = f(x)
        lead = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
        size = (f[1].weight[0] - f[1].weight[1]).abs().sum()
    return f, x, y, (lead[:, 0] / size).clamp(min=0)


def check_smallest_eps(search: Callable[..., Tensor]) -> Report:
    """Try `search(f, x, y, hi, tol) -> eps`, the smallest ε at which FGSM fools f, (N,).

    0 where the image is misclassified already, inf where FGSM at `hi` does not fool.
    """
    f, x, y, exact = _two_classes()
    hi, tol = 0.3, 1e-3

    def shape() -> str | None:
        eps = search(f, x, y, hi, tol)
        if not isinstance(eps, Tensor) or eps.shape != y.shape:
            return f"returns {getattr(eps, 'shape', type(eps).__name__)}, wanted one ε per image, (N,)"
        return "some ε are NaN" if eps.isnan().any() else None

    def ends() -> str | None:
        if (search(f, x, y, hi, tol)[exact == 0] != 0).any():
            return "an image that is misclassified already needs ε = 0"
        low = float(exact[exact > 0].median())
        out = search(f, x, y, low, tol)[exact > low + tol]
        return None if out.isinf().all() else "where FGSM at hi does not fool, the answer is inf"

    def fools() -> str | None:
        eps = search(f, x, y, hi, tol)
        z = fgsm(f, x, y, Linf(eps.clamp(max=1)))
        with torch.no_grad():
            right = f(z).argmax(1) == y
        return "FGSM at the returned ε does not fool: return the bracket's upper end" if (
            right & eps.isfinite()).any() else None  # fmt: skip

    def close() -> str | None:
        eps = search(f, x, y, hi, tol)
        if (eps - exact).abs().max() <= 1.01 * tol:
            return None
        if len(eps[exact > 0].unique()) == 1:
            return "one ε for the whole batch: halve every image's own bracket"
        return f"off by {float((eps - exact).abs().max()):.2g}, allowed is tol = {tol:g}"

    def cheap() -> str | None:
        counting = Watched(f)
        search(counting, x, y, hi, tol)
        allowed = 2 * math.ceil(math.log2(hi / tol)) + 6
        return None if counting.calls <= allowed else (
            f"calls the network {counting.calls} times, bisection of the whole batch needs "
            f"{allowed} at most: a loop over images, or a grid?")  # fmt: skip

    def alone() -> str | None:
        rows = torch.tensor([1, 6, 17])
        same = torch.allclose(search(f, x, y, hi, tol)[rows], search(f, x[rows], y[rows], hi, tol))
        return None if same else "an image's ε depends on the others in the batch"

    return examine(search, [
        ("returns one ε per image", shape), ("0 and inf where they belong", ends),
        ("the returned ε fools", fools), ("right to within tol on a linear network", close),
        ("needs about log₂(hi / tol) calls", cheap), ("treats every image by itself", alone),
    ])  # fmt: skip


BUGS = {
    "none": "it is FGSM",
    "sign": "it walks down the loss",
    "label": "it uses the network's prediction in place of y",
    "box": "it clamps to something else than [0, 1]",
    "ball": "the result can be farther than ε from x",
    "direction": "the step is not the steepest one for ℓ∞",
    "state": "a call changes x or the network",
}
SUSPECTS = {"A": "label", "B": "ball", "C": "box", "D": "state", "E": "direction"}


def _flawed(bug: str) -> Attack:
    """Another FGSM with the same bug, so that a name or a special case is not enough."""

    def attack(f, x, y, threat, *, start=None):
        eps = threat.eps
        with frozen(f), torch.no_grad():
            label = f(x).argmax(1) if bug == "label" else y
        with frozen(f):
            g = input_grad(lambda z: cross_entropy(f(z), label), x)
        step = g / g.abs().flatten(1).amax(1).view(-1, 1, 1, 1) if bug == "direction" else g.sign()
        z = x + (-eps if bug == "sign" else 1.5 * eps if bug == "ball" else eps) * step
        if bug == "state":
            return x.copy_(z.clamp(0, 1))
        return z.clamp(-1, 1) if bug == "box" else z.clamp(0, 1)

    return attack


def check_diagnosis(diagnose: Callable[[Attack], str], suspects: Mapping[str, Attack]) -> Report:
    """Try `diagnose(attack) -> name of the bug` on the suspects and on other attacks."""
    return examine_diagnosis(diagnose, BUGS, suspects, SUSPECTS, fgsm, _flawed)


Transfer = Callable[[Sequence[nn.Module], Tensor, Tensor, Threat], Tensor]


def check_transfer(
    attack: Transfer, sources: Sequence[nn.Module], victims: Mapping[str, nn.Module],
    x: Tensor, y: Tensor, threat: Threat,
) -> Report:  # fmt: skip
    """Does `attack(sources, x, y, threat) -> z` fool the victims more often than FGSM?

    The comparison is with FGSM on one source, averaged over the sources. It is paired by image:
    the 95 % interval of the difference in the victims' mean accuracy must lie above 0. The gain
    over the best source, which an attacker cannot know, is told beside it.
    """
    before = [p.clone() for f in (*sources, *victims.values()) for p in f.parameters()]
    x_before, outcome = x.clone(), []

    def right(z: Tensor) -> Tensor:
        return torch.stack([predict(f, z).argmax(1) == y for f in victims.values()]).double()

    singles = torch.stack([right(fgsm(f, x, y, threat)).mean(0) for f in sources])

    def in_set() -> str | None:
        outcome.append(attack(sources, x, y, threat))
        ok = outcome[0].shape == x.shape and bool(threat.contains(outcome[0], x).all())
        return None if ok else f"the result leaves the set ({threat}, pixels in [0, 1])"

    def untouched() -> str | None:
        now = [p for f in (*sources, *victims.values()) for p in f.parameters()]
        same = all(torch.equal(a, b) and b.grad is None for a, b in zip(before, now, strict=True))
        return None if same and torch.equal(x, x_before) else "x or a network was changed"

    def gain(single: Tensor) -> tuple[float, float, float]:
        return paired(single, right(outcome[0]).mean(0))

    def better() -> str | None:
        _, low, high = gain(singles.mean(0))
        return None if low > 0 else (f"the gain's interval [{100 * low:.1f}, {100 * high:.1f}] "
                                     "points does not lie above 0")  # fmt: skip

    report = examine(attack, [("stays in the set", in_set), ("leaves x and networks", untouched),
                              ("fools the victims more often than FGSM on one source", better)])
    if not outcome:
        return report
    best = singles[singles.mean(1).argmin()]
    text = [f"{what} {100 * m:+.1f} points [{100 * a:+.1f}, {100 * b:+.1f}]"
            for what, (m, a, b) in (("gain over the average source", gain(singles.mean(0))),
                                    ("over the best one", gain(best)))]  # fmt: skip
    text += [f"{name} still right {100 * float(r.mean()):.1f} %"
             for name, r in zip(victims, right(outcome[0]), strict=True)]  # fmt: skip
    *others, last = report.findings
    return Report(report.subject, (*others, Finding(last.claim, last.problem, "; ".join(text))))
