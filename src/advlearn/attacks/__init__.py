"""Attacks: functions (f, x, y, threat, *, start) -> z."""

from advlearn.attacks.apgd import apgd
from advlearn.attacks.boundary import fab
from advlearn.attacks.captured import captured
from advlearn.attacks.combine import Attack, from_center, name_of, on, toward
from advlearn.attacks.gradient import cw_inf, fgsm, pgd
from advlearn.attacks.inversion import excite, interpolate, invert, noise
from advlearn.attacks.search import square
from advlearn.attacks.standard import standard_attack

__all__ = ["Attack", "apgd", "captured", "cw_inf", "excite", "fab", "fgsm", "from_center",
           "interpolate", "invert", "name_of", "noise", "on", "pgd", "square",
           "standard_attack", "toward"]  # fmt: skip
