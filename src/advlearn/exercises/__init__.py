"""Checkers for the exercises: they try a reader's function and name the likely mistake.

Every checker returns a `Report`, true if all properties hold. A stub that raises
NotImplementedError gives a false report that says what is missing, so that a notebook of stubs
runs from top to bottom.
"""

from advlearn.exercises.agreement import check_decoy, check_start_angle
from advlearn.exercises.attack import check_attack
from advlearn.exercises.budget import check_trainer
from advlearn.exercises.chapter1 import (
    BUGS,
    check_diagnosis,
    check_l1_step,
    check_smallest_eps,
    check_transfer,
    l1_bound,
)
from advlearn.exercises.chapter2 import check_restarts, check_stronger
from advlearn.exercises.chapter3 import check_leak, check_promise, check_trades
from advlearn.exercises.checkpoints import check_stop, overfitting_runs
from advlearn.exercises.control import check_control, check_effect, learned_from, relabelled_digits
from advlearn.exercises.conviction import check_break_even, check_convict
from advlearn.exercises.diagnosis import PGD_BUGS, check_pgd_diagnosis
from advlearn.exercises.fence import check_fence, check_forecast, equal_restarts
from advlearn.exercises.few import check_learn, check_needed, gaussian
from advlearn.exercises.gauss import check_most_useful, check_robust_covariance, check_useful
from advlearn.exercises.iterated import check_pgd
from advlearn.exercises.lesson import check_training
from advlearn.exercises.odds import check_ceiling, check_critical, check_exact
from advlearn.exercises.paired import answers_of, check_paired
from advlearn.exercises.plane import check_line, check_whole
from advlearn.exercises.projection import check_dykstra, check_l2_projection, nearest_point
from advlearn.exercises.relabel import check_invert, check_relabel
from advlearn.exercises.report import Finding, Report, examine
from advlearn.exercises.rescue import check_keeper, check_ramp
from advlearn.exercises.secular import check_worst_shift
from advlearn.exercises.shares import check_choices, check_excluded
from advlearn.exercises.summit import check_summit
from advlearn.exercises.tie import check_steepest, check_tie, shortest
from advlearn.exercises.unknown import check_verdict, unknown_networks
from advlearn.exercises.weak import check_draw, check_turn, twins
from advlearn.exercises.widening import check_widen

__all__ = ["BUGS", "Finding", "PGD_BUGS", "Report", "answers_of", "check_attack",
           "check_break_even", "check_ceiling", "check_choices", "check_control", "check_convict",
           "check_critical", "check_decoy", "check_diagnosis", "check_draw", "check_dykstra",
           "check_effect", "check_exact", "check_excluded", "check_fence", "check_forecast",
           "check_invert", "check_keeper", "check_l1_step", "check_l2_projection", "check_leak",
           "check_learn", "check_line", "check_most_useful", "check_needed", "check_paired",
           "check_pgd", "check_pgd_diagnosis", "check_promise", "check_ramp", "check_relabel",
           "check_restarts", "check_robust_covariance", "check_smallest_eps", "check_start_angle",
           "check_steepest", "check_stop", "check_stronger", "check_summit", "check_tie",
           "check_trades", "check_trainer", "check_training", "check_transfer", "check_turn",
           "check_useful", "check_verdict", "check_whole", "check_widen", "check_worst_shift",
           "equal_restarts", "examine", "gaussian", "l1_bound", "learned_from", "nearest_point",
           "overfitting_runs", "relabelled_digits", "shortest", "twins", "unknown_networks"]  # fmt: skip
