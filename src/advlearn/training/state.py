"""What an objective is, and what it may know and keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from advlearn.attacks.combine import name_of
from advlearn.tensors import Keyed


@dataclass(frozen=True)
class State:
    """What an objective knows of the training around it, and may keep.

    Attributes:
        progress: share of all steps done, in [0, 1).
        keys: random numbers of this batch, keyed by (seed, epoch) and the examples' indices; from
            the second replay of a batch on, by the replay too.
        carry: tensors kept from step to step (and in the checkpoint). One with dimensions has a
            row per example of the batch; one without (a running sum, say) must be the same in
            all processes.
        memory: tensors kept from epoch to epoch (and in the checkpoint), a row per example of the
            batch: what the objective returned when the example was last seen, 0 before.
        after: called after the backward pass in place of keeping `carry`: returns the new one.
            For objectives that use the gradients this pass has left in `.grad`.
    """

    progress: float
    keys: Keyed
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    after: Callable[[], Mapping[str, Tensor]] | None = None


Objective = Callable[[nn.Module, Tensor, Tensor, State], tuple[Tensor, State]]


def describe(f: Callable) -> str:
    """The text by which a checkpoint knows an objective or a schedule again."""
    return getattr(f, "description", name_of(f))
