"""The state of a training after an epoch, in one safetensors file; nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


def save(
    path: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer,
    rows: list[dict[str, float]], carry: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Weights, Adam's moments and the history in one safetensors file; nothing is pickled."""
    from safetensors.torch import save_file

    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"carry.{k}": v for k, v in carry.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
    text = json.dumps({"config": asdict(config), "history": rows})
    with storage.atomic(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary,
                  metadata={"advlearn": text})  # fmt: skip


def resume(
    path: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:  # fmt: skip
    """Put model and optimizer back as `save` found them; returns the history's rows and the carry.

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
    wanted = asdict(config)
    for key, value in wanted.items():
        if saved["config"].get(key) != value:
            raise ValueError(f"{path} belongs to another training: its {key} is "
                             f"{saved['config'].get(key)!r}, asked for is {value!r}. Delete it "
                             "or name another file.")  # fmt: skip
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "carry": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    try:
        model.load_state_dict(parts["model"])
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another network: {error}") from error
    state = optimizer.state_dict()
    for key, value in parts["optimizer"].items():
        i, name = key.split(".")
        state["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(state)
    device = next(model.parameters()).device
    return saved["history"], {k: v.to(device) for k, v in parts["carry"].items()}
