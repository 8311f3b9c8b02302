"""`check_pgd`: an attack of many steps, followed from one gradient to the next."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from advlearn.exercises.attack import claims_of, examples, linear, network
from advlearn.exercises.mistakes import gradient
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.exercises.watched import Watched, same
from advlearn.losses import margin
from advlearn.tensors import frozen, generator, norms
from advlearn.threats import L2, Linf, Threat

STEPS, EPS, ALPHA = 5, 0.1, 0.06  # The ball binds from the third step on.


class Pgd(Protocol):
    """What the reader writes."""

    def __call__(
        self, f: nn.Module, x: Tensor, y: Tensor, threat: Threat, *,
        steps: int, step_size: float, start: Tensor | None,
    ) -> Tensor: ...  # fmt: skip


class _Path:
    """One run on a curved network: the points of its gradients and its result."""

    def __init__(self, attack: Pgd, threat: Threat, *, centered: bool = False) -> None:
        self.f, self.threat = Watched(network().double(), keep=True), threat
        self.x, _ = examples(-0.5, 1.5, dtype=torch.float64)
        with torch.no_grad():
            self.y = self.f.f(self.x).argmax(1)  # All are right at x, and fall at some step.
        self.start = self.x.clone() if centered else threat.sample(self.x, generator(11))
        self.given = {"x": self.x.clone(), "start": None if centered else self.start.clone()}
        result = attack(self.f, self.given["x"], self.y, threat, steps=STEPS, step_size=ALPHA,
                        start=self.given["start"])  # fmt: skip
        if not isinstance(result, Tensor) or result.shape != self.x.shape:
            raise Unusable("the result is not a tensor of the shape of x")
        self.result, self.points = result.detach(), self.f.points
        if any(len(z) != len(self.x) for z in self.points):
            raise Unusable(
                "cannot be followed: take the gradients of all images at once, of the sum of "
                "their losses" if len(self.points) > STEPS else "images that are fooled already "
                "are left out: the equation has no early stop")  # fmt: skip

    def move(self, z: Tensor, direction: Tensor, step: float = ALPHA) -> Tensor:
        """A step from z along a direction, projected around x."""
        along = self.threat.ascend(direction, z, self.x)
        return self.threat.project(z + step * along, self.x)

    def slope(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        with frozen(self.f):
            return gradient(self.f.f, z, self.y if y is None else y, targeted=False)

    def wrong(self) -> str | None:
        """What explains every step that is not the equation's, if there are such steps."""
        reached = [*self.points[1:], self.result]
        bad = [t for t, z in enumerate(self.points)
               if not same(reached[t], self.move(z, self.slope(z)))]  # fmt: skip
        if not bad:
            return None
        found = [[message for message, z in {**self._sets(t), **self._steps(t)}.items()
                  if same(reached[t], z) or same(reached[t], z.clamp(0, 1))] for t in bad]
        for message in found[0]:
            if all(message in others for others in found):
                return message
        return self._ending(bad) or (found[0] or [self._other(bad[0], reached[bad[0]])])[0]

    def _ending(self, bad: list[int]) -> str | None:
        """The result alone is wrong: an earlier point was returned."""
        if bad != [len(self.points) - 1]:
            return None
        if same(self.result, self.points[-1]):
            return "returns the last point at which a gradient was taken, not the one after it"
        earlier = any(same(self.result, z) for z in self.points)
        return "returns an earlier point: the equation's result is the last one" if earlier else None

    def _other(self, t: int, reached: Tensor) -> str:
        z = self.points[t]
        if same(reached, self.points[0]):
            return ("the gradient is taken at the start in every step: "
                    "assign the projected point to z, and differentiate there")  # fmt: skip
        with frozen(self.f), torch.no_grad():
            right = margin(self.f(z), self.y) <= 0
        if same(reached[right], self.move(z, self.slope(z))[right]):
            return ("images that are fooled already are treated differently: "
                    "the equation has no early stop")  # fmt: skip
        return f"step {t + 1} of {STEPS} does not follow the equation"

    def _steps(self, t: int) -> dict[str, Tensor]:
        """Points after a wrong step and a right projection, by the mistake that makes them."""
        z, x, g = self.points[t], self.x, self.slope(self.points[t])
        with frozen(self.f), torch.no_grad():
            predicted = self.f(z).argmax(1)
        project = self.threat.project
        return {
            "the loss goes down: the step is + α": self.move(z, -g),
            "the step is ε long: its length is step_size": self.move(z, g, self.threat.eps),
            "the step is step_size / steps long: its length is step_size":
                self.move(z, g, ALPHA / STEPS),
            "the step is step_size · ε long: step_size is in pixel units already":
                self.move(z, g, ALPHA * self.threat.eps),
            "every step sets out from x: it is z + α …, not x + α …":
                project(x + ALPHA * self.threat.ascend(g, z, x), x),
            "the gradient is taken at x in every step: take it at z": x,
            "the plain gradient times α: without the sign the steps vanish":
                project(z + ALPHA * g, x),
            "g / ‖g‖₂ over all pixels: call threat.ascend(g, z, x)":
                project(z + ALPHA * g / norms(g, 2).view(-1, 1, 1, 1), x),
            "that is the ℓ2 step: call threat.ascend(g, z, x)":
                project(z + ALPHA * L2(1).ascend(g, z, x), x),
            "the sign is the ℓ∞ step: call threat.ascend(g, z, x)":
                project(z + ALPHA * g.sign(), x),
            "the label is the network's own prediction at z: once fooled, the attack turns back":
                self.move(z, self.slope(z, predicted)),
            "gradients add up over the steps: .grad is not emptied":
                self.move(z, sum(map(self.slope, self.points[: t + 1]))),
        }  # fmt: skip

    def _sets(self, t: int) -> dict[str, Tensor]:
        """Points after a right step and a wrong projection."""
        z, x, eps = self.points[t], self.x, self.threat.eps
        free = z + ALPHA * self.threat.ascend(self.slope(z), z, x)
        delta = free - x
        if isinstance(self.threat, Linf):
            ball, gone = delta.clamp(-eps, eps), ("an iterate leaves the ball around x: project "
                "around x, not around the last iterate, and after every step")  # fmt: skip
        else:
            ball = delta * (eps / norms(delta, 2).view(-1, 1, 1, 1)).clamp(max=1)
            gone = ("an iterate leaves the ℓ2 ball: clipping every pixel to ± ε is the projection "
                    "for ℓ∞, call threat.project(z, x)")  # fmt: skip
        return {
            gone: free,
            "the projection is around the start: the ball is around x":
                self.threat.project(free, self.start),
            "an iterate leaves [0, 1]: the set is ball and box, in every step": x + ball,
        }


def _gradients(attack: Pgd) -> str | None:
    path = _Path(attack, Linf(EPS))
    n, z = len(path.points), path.points[0] if path.points else path.x
    if n == STEPS:
        return None
    if n == 0:
        return "takes none: is the batch given up at once, or f called under no_grad?"
    if n > STEPS:
        return f"takes {n} for steps = {STEPS}: one for each step, and no other"
    if n == 1 and not same(path.result, path.move(z, path.slope(z))):
        return f"takes 1 for steps = {STEPS}: the gradient belongs inside the loop"
    return f"takes {n} for steps = {STEPS}: the loop ends early, for all images at once"


def _begins(attack: Pgd) -> str | None:
    path, centered = (_Path(attack, Linf(EPS), centered=c) for c in (False, True))
    if not path.points or not centered.points:
        return "no gradient is taken"
    first = path.points[0]
    if not same(centered.points[0], centered.x):
        return "with start=None the first gradient is not at x: random starts are the caller's"
    if same(first, path.x):
        return "start is ignored: the first gradient is at x, so all restarts would be alike"
    moved = path.x + path.start
    if any(same(first, z) for z in (moved, moved.clamp(0, 1), path.threat.project(moved, path.x))):
        return "start is added to x: it is the first image itself, not a perturbation"
    return None if same(first, path.start) else "the first gradient is not at start"


def _follows(attack: Pgd, threat: Threat) -> str | None:
    path = _Path(attack, threat)
    return path.wrong() if path.points else "no gradient is taken"


def _keeps(attack: Pgd) -> str | None:
    for path in (_Path(attack, Linf(EPS), centered=c) for c in (False, True)):
        for name, before in (("x", path.x), ("start", path.start)):
            now = path.given[name]
            if now is not None and not torch.equal(now.detach(), before):
                return f"{name} was edited in place (+=, add_, clamp_): work on a new tensor"
            if now is not None and now.requires_grad:
                return f"{name}.requires_grad is left on: differentiate at z.detach().clone()"
    return None


def _never_weaker(attack: Pgd) -> str | None:
    f, (x, y) = linear(), examples(0.4, 0.6)
    with torch.no_grad():
        gains = [margin(f(attack(f, x, y, Linf(EPS), steps=n, step_size=EPS / 4, start=None)), y)
                 for n in (1, 2, 4, 9)]  # fmt: skip
    weaker = any(bool((b < a - 1e-5).any()) for a, b in zip(gains, gains[1:], strict=False))
    return "with more steps the loss is smaller on some image" if weaker else None


def check_pgd(attack: Pgd) -> Report:
    r"""Try `attack(f, x, y, threat, *, steps, step_size, start=None) -> z` against its equation.

    $$z^{t+1} = \Pi_{S(x)}\bigl(z^t + \alpha\,\mathrm{ascend}(\nabla_z L(f(z^t), y))\bigr)$$

    Madry et al., arXiv:1706.06083. A watched network tells where every gradient was taken, so
    each step is held against the equation, for ℓ∞ and ℓ2. If all that holds, the properties of
    `check_attack` are tried, with 20 steps.
    """
    path = examine(attack, [
        ("leaves x and start as they are", lambda: _keeps(attack)),
        ("takes one gradient per step and image", lambda: _gradients(attack)),
        ("begins at start, and at x without one", lambda: _begins(attack)),
        ("every step is the equation's (ℓ∞)", lambda: _follows(attack, Linf(EPS))),
        ("every step is the equation's (ℓ2)", lambda: _follows(attack, L2(EPS))),
        ("more steps are never weaker on a linear network", lambda: _never_weaker(attack)),
    ])  # fmt: skip
    if not path:
        return path
    rest = examine(attack, claims_of(partial(attack, steps=20, step_size=0.05), Linf))
    return Report(path.subject, (*path.findings, *rest.findings))
