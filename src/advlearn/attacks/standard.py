"""The standard evaluation: four parameter-free attacks, for `worst_case`."""

from __future__ import annotations

from functools import partial

from advlearn.attacks.apgd import apgd
from advlearn.attacks.boundary import fab
from advlearn.attacks.combine import Attack, from_center, toward
from advlearn.attacks.search import square
from advlearn.losses import dlr_targeted, gap


def standard_attack(
    classes: int = 10, *, steps: int = 100, queries: int = 5000, targets: int = 9
) -> dict[str, Attack]:
    """AutoAttack in its standard form: `worst_case(f, x, y, threat, standard_attack())`.

    Auto-PGD on the cross-entropy, Auto-PGD and FAB toward each of the most likely wrong classes, and
    the Square Attack. Croce & Hein, arXiv:2003.01690. For ℓ∞ and ℓ2.

    Below four classes the targeted DLR loss does not exist, and the gap between the two logits
    takes its place.

    Args:
        classes: K, of the network.
        steps: of every gradient attack.
        queries: of the Square Attack.
        targets: wrong classes aimed at; K − 1 where there are fewer.

    Raises:
        ValueError: fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"standard_attack: classes={classes}, it must be 2 or more")
    ranks = range(1, min(targets, classes - 1) + 1)
    loss, name = (dlr_targeted, "DLR") if classes >= 4 else (gap, "gap")
    climb, walk = partial(apgd, steps=steps), partial(fab, steps=steps)
    return {
        "APGD-CE": climb,
        **{f"APGD-{name} toward {k}": toward(k, climb, between=loss) for k in ranks},
        **{f"FAB toward {k}": from_center(toward(k, walk, between=gap)) for k in ranks},
        "Square": partial(square, queries=queries),
    }
