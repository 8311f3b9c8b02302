"""Find the bug: a table of bugs, suspects that have them, and attacks the reader does not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from advlearn.attacks import Attack, pgd
from advlearn.exercises.iterated import Pgd
from advlearn.exercises.report import Report, examine
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import frozen, generator


def examine_diagnosis(
    diagnose: Callable[[Attack], str], bugs: Mapping[str, str], suspects: Mapping[str, Attack],
    truth: Mapping[str, str], innocent: Attack, flawed: Callable[[str], Attack],
) -> Report:  # fmt: skip
    """Try `diagnose(attack) -> name of the bug` on the suspects and on attacks that are not shown.

    Args:
        diagnose: the reader's function.
        bugs: name -> description, with "none" for a right attack.
        suspects: name -> attack, shown to the reader; `truth`: name -> its bug.
        innocent: a right attack.
        flawed: makes another attack with the bug of this name.
    """

    def tries(attack: Attack, bug: str, shown: str) -> Callable[[], str | None]:
        def test() -> str | None:
            answer = diagnose(attack)
            if answer not in bugs:
                return f"answers {answer!r}, allowed are {', '.join(bugs)}"
            if answer == bug:
                return None
            if answer == "none":
                return "acquitted, but it is broken"
            return f"found guilty of {answer!r}" + (", but it is right" if bug == "none" else shown)

        return test

    claims = [(f"suspect {name}", tries(suspects[name], bug, ", wrongly"))
              for name, bug in truth.items()]  # fmt: skip
    claims += [(f"the package's {innocent.__name__.upper()}", tries(innocent, "none", "")),
               *((f"another attack with the bug {bug!r}", tries(flawed(bug), bug, ", wrongly"))
                 for bug in bugs if bug != "none")]  # fmt: skip
    return examine(diagnose, claims)


# --- attacks of many steps --------------------------------------------------------------------

PGD_BUGS = {
    "none": "it is PGD",
    "ball": "the result can be farther than ε from x",
    "step": "the steps are not α long in every pixel",
    "stale": "the gradient is not taken at the current point",
    "batch": "an image's result depends on the others in the batch",
    "label": "it uses the network's prediction in place of y",
    "start": "it ignores start",
    "keep": "of several runs it keeps another than one that fools",
    "mode": "it uses the network in train mode, or leaves it there",
}
PGD_SUSPECTS = {"A": "stale", "B": "batch", "C": "label", "D": "keep", "E": "ball"}


def flawed_pgd(bug: str) -> Pgd:
    """PGD with one bug, in other words than the suspects shown to the reader."""

    def once(f, x, y, threat, steps, step_size, z):
        first = z
        for _ in range(steps):
            with torch.no_grad():
                answer = f(z).argmax(1)
            if bug == "batch" and bool((answer != y).any()):
                break
            label = answer if bug == "label" else y
            g = input_grad(lambda z, label=label: cross_entropy(f(z), label),
                           first if bug == "stale" else z)  # fmt: skip
            uneven = g / g.abs().flatten(1).mean(1).clamp(min=1e-30).view(-1, 1, 1, 1)
            z = z + step_size * (uneven if bug == "step" else threat.ascend(g, z, x))
            z = z.clamp(0, 1) if bug == "ball" else threat.project(z, x)
        return z

    def attack(f, x, y, threat, *, steps, step_size, start=None):
        z = x if start is None or bug == "start" else start
        with frozen(f):
            z = once(f, x, y, threat, steps, step_size, z)
            for i in range(6 if bug == "keep" else 0):
                other = threat.sample(x, generator(i))
                other = once(f, x, y, threat, steps, step_size, other)
                with torch.no_grad():
                    larger = cross_entropy(f(other), y) > cross_entropy(f(z), y)
                z = torch.where(larger.view(-1, 1, 1, 1), other, z)
        if bug == "mode":
            f.train()
        return z

    return attack


def check_pgd_diagnosis(diagnose: Callable[[Pgd], str], suspects: Mapping[str, Pgd]) -> Report:
    """Try `diagnose(attack) -> name of the bug` on the suspects and on other attacks.

    All are called as `attack(f, x, y, threat, *, steps, step_size, start=None)`.
    """
    return examine_diagnosis(diagnose, PGD_BUGS, suspects, PGD_SUSPECTS, pgd, flawed_pgd)
