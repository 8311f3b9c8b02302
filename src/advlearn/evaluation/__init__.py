"""The judge: accuracy, accuracy under the worst of many attacks, and the audit of both."""

from advlearn.evaluation.audit import Audit, Flag, audit
from advlearn.evaluation.judge import (
    Result,
    accuracy,
    interval,
    paired,
    predict,
    worst_case,
)

__all__ = ["Audit", "Flag", "Result", "accuracy", "audit", "interval", "paired", "predict", "worst_case"]
