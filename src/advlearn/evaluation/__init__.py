"""The judge: accuracy, also under the worst of many attacks; the audit; what restarts say."""

from advlearn.evaluation.audit import Audit, Flag, audit
from advlearn.evaluation.judge import (
    Result,
    accuracy,
    interval,
    paired,
    predict,
    worst_case,
)
from advlearn.evaluation.restarts import (
    Unseen,
    excluded,
    expected_accuracy,
    largest_gap,
    unseen,
)

__all__ = ["Audit", "Flag", "Result", "Unseen", "accuracy", "audit", "excluded", "expected_accuracy",
           "interval", "largest_gap", "paired", "predict", "unseen", "worst_case"]  # fmt: skip
