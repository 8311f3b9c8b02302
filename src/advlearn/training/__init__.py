"""Training: one loop on Lightning Fabric; what is minimised is an objective, a few lines each.

An objective is a function (model, x, y, state) -> (losses (N,), state).
"""

from advlearn.training.loop import drops, fit, trapezoid
from advlearn.training.objectives import (
    adversarial,
    fgsm_training,
    free,
    gradient_regularised,
    mixture,
    natural,
    trades,
)
from advlearn.training.state import Objective, State
from advlearn.training.watch import History, held_out, overfitted, watch

__all__ = ["History", "Objective", "State", "adversarial", "drops", "fgsm_training", "fit",
           "free", "gradient_regularised", "held_out", "mixture", "natural", "overfitted",
           "trades", "trapezoid", "watch"]  # fmt: skip
