"""The state of a training after an epoch, in one safetensors file; nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from advlearn import storage


@dataclass(frozen=True)
class Config:
    """What a resumed training must have in common with the interrupted one."""

    objective: str
    data: str
    examples: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: str
    seed: int
    precision: str
    replays: int
    average: float
    best_by: str | None


@dataclass
class Run:
    """All that a training changes, and all that its checkpoint holds.

    Attributes:
        model, optimizer: changed in place.
        rows: the history so far.
        carry: what the objective keeps from step to step.
        memory: what it keeps of every example from epoch to epoch.
        average: weights averaged over the steps, empty without averaging.
        best: weights of the best epoch so far, empty without early stopping.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rows: list[dict[str, float]] = field(default_factory=list)
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


def save(path: Path, config: Config, run: Run, carry: Mapping[str, Tensor]) -> None:
    """Weights, Adam's moments, `carry` and the history in one safetensors file."""
    from safetensors.torch import save_file

    parts = {"model": run.model.state_dict(), "carry": carry, "memory": run.memory,
             "average": run.average, "best": run.best}  # fmt: skip
    tensors = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
    for i, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    text = json.dumps({"config": asdict(config), "history": run.rows})
    with storage.atomic(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary,
                  metadata={"advlearn": text})  # fmt: skip


def resume(path: Path, config: Config, run: Run) -> None:
    """Put everything back as `save` found it; `run.carry` is what was saved.

    Raises:
        ValueError: not such a file, or one of another training or network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            saved = json.loads(file.metadata()["advlearn"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a training checkpoint of advlearn: {error}. Delete it "
                         "to start again.") from error  # fmt: skip
    for key, value in asdict(config).items():
        if saved["config"].get(key) != value:
            raise ValueError(f"{path} belongs to another training: its {key} is "
                             f"{saved['config'].get(key)!r}, asked for is {value!r}. Delete it "
                             "or name another file.")  # fmt: skip
    parts: dict[str, dict[str, Tensor]] = {
        part: {} for part in ("model", "optimizer", "carry", "memory", "average", "best")}  # fmt: skip
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    try:
        run.model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another network: {error}") from error
    state = run.optimizer.state_dict()
    for key, value in parts["optimizer"].items():
        i, name = key.split(".")
        state["state"].setdefault(int(i), {})[name] = value
    run.optimizer.load_state_dict(state)
    device = next(run.model.parameters()).device
    for part in ("carry", "memory", "average", "best"):
        setattr(run, part, {k: v.to(device) for k, v in parts[part].items()})
    run.rows = saved["history"]
