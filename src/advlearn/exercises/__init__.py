"""Checkers for the exercises: they try a reader's function and name the likely mistake.

Every checker returns a `Report`, true if all properties hold. A stub that raises
NotImplementedError gives a false report that says what is missing, so that a notebook of stubs
runs from top to bottom.
"""

from advlearn.exercises.attack import check_attack
from advlearn.exercises.chapter1 import (
    BUGS,
    check_diagnosis,
    check_l1_step,
    check_smallest_eps,
    check_transfer,
    l1_bound,
)
from advlearn.exercises.iterated import check_pgd
from advlearn.exercises.report import Finding, Report, examine

__all__ = ["BUGS", "Finding", "Report", "check_attack", "check_diagnosis", "check_l1_step", "check_pgd",
           "check_smallest_eps", "check_transfer", "examine", "l1_bound"]  # fmt: skip
