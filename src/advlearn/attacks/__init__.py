"""Attacks: functions (f, x, y, threat, *, start) -> z."""

from advlearn.attacks.combine import Attack, from_center, name_of, on, toward
from advlearn.attacks.gradient import cw_inf, fgsm, pgd
from advlearn.attacks.search import square

__all__ = ["Attack", "cw_inf", "fgsm", "from_center", "name_of", "on", "pgd", "square", "toward"]
