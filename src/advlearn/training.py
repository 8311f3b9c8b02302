"""Training: one loop on Lightning Fabric; what is minimised is an objective, a few lines each.

An objective is a function (model, x, y, state) -> (losses (N,), state).
"""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn.attacks.combine import Attack, name_of
from advlearn.checkpoint import Config, resume, save
from advlearn.checks import check_examples, check_labels, check_logits
from advlearn.data import Dataset
from advlearn.evaluation import predict, worst_case
from advlearn.progress import bar
from advlearn.tensors import Keyed, generator
from advlearn.threats import Threat

if TYPE_CHECKING:  # Imported where it is used: it takes a second.
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class State:
    """What an objective knows of the training around it, and may keep.

    Attributes:
        progress: share of all steps done, in [0, 1).
        keys: random numbers of this batch, keyed by (seed, epoch) and the examples' indices.
        carry: tensors kept from step to step (and in the checkpoint).
    """

    progress: float
    keys: Keyed
    carry: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, Tensor, Tensor, State], tuple[Tensor, State]]


def natural() -> Objective:
    """Empirical risk: the cross-entropy of the images as they are."""

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        return F.cross_entropy(model(x), y, reduction="none"), state

    objective.description = "natural"
    return objective


def adversarial(
    threat: Threat, attack: Attack, *, step_size: float | None = None, ramp: float = 0.0
) -> Objective:
    """Adversarial risk: the cross-entropy of the images that `attack` finds from a random start.

    Madry et al., arXiv:1706.06083: min over weights of the mean of the max over the threat's set.

    Args:
        threat: the set at full size.
        attack: any attack; it sees the network in eval mode.
        step_size: passed to the attack and ramped with ε; None if the attack takes none.
        ramp: share of the training over which ε and step size grow linearly from 0.
    """

    def objective(model: nn.Module, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        scale = min(1.0, state.progress / ramp) if ramp else 1.0
        smaller = threat.scaled(scale)
        options = {} if step_size is None else {"step_size": scale * step_size}
        bare = getattr(model, "module", model)  # The inner maximum needs no gradient averaging.
        z = attack(bare, x, y, smaller, start=smaller.sample(x, state.keys), **options)
        return F.cross_entropy(model(smaller.render(z, x)), y, reduction="none"), state

    # Names in place of functions, whose addresses would differ in the process that resumes.
    bound = {k: name_of(v) if callable(v) else v for k, v in getattr(attack, "keywords", {}).items()}
    objective.description = (f"adversarial({threat}, {name_of(attack)} {bound}, "
                             f"{step_size=}, {ramp=})")
    return objective


def trapezoid(warmup: float = 0.05, decay_from: float = 0.5) -> Callable[[float], float]:
    """Learning-rate factor: up over `warmup`, constant, linearly to 0 from `decay_from` on."""

    def factor(progress: float) -> float:
        up = progress / warmup if warmup else 1.0
        return min(1.0, max(up, 1e-3), (1 - progress) / max(1 - decay_from, 1e-9))

    factor.description = f"trapezoid({warmup}, {decay_from})"
    return factor


def held_out(
    data: Dataset, threat: Threat | None = None, attack: Attack | None = None
) -> Callable[[nn.Module], dict[str, float]]:
    """A validation for `fit`: clean accuracy on `data`, and accuracy under `attack` if given."""
    x, y = data.tensors()

    def validate(model: nn.Module) -> dict[str, float]:
        if threat is None or attack is None:
            return {"clean": float((predict(model, x).argmax(1) == y).double().mean())}
        result = worst_case(model, x, y, threat, [attack], index=data.index)
        return {"clean": result.clean_accuracy, "robust": result.accuracy}

    return validate


@dataclass
class History:
    """One row per epoch: mean training loss and what the validation returned."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def __getitem__(self, key: str) -> list[float]:
        return [row[key] for row in self.rows]


def fit(
    model: nn.Module,
    data: Dataset,
    objective: Objective,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    schedule: Callable[[float], float] | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    precision: str = "32-true",
    progress: bool = True,
) -> History:
    """Minimise the mean of `objective` over `data` with Adam, in place.

    The order of the images depends on (seed, epoch), random starts on (seed, epoch, image):
    neither on the number of processes. Under `torchrun` each process takes its share of every
    batch. The last incomplete batch of an epoch is dropped.

    Args:
        model: on the device of `data`.
        data: training images; hold out the validation images before (`Dataset.split_off`).
        objective: `natural()`, `adversarial(...)` or a function like them.
        epochs, batch_size, lr, weight_decay: of Adam; `batch_size` counts all processes.
        schedule: share of training done -> factor of `lr`; default `trapezoid()`.
        validate: run after every epoch, e.g. `held_out(...)`; its numbers are kept and shown.
        checkpoint: file (.safetensors) written after every epoch. If it exists, the training
            goes on from there, and ends with the weights of an uninterrupted one.
        seed: of order and random starts (the weights have their own).
        precision: of Lightning Fabric, e.g. "bf16-mixed".
        progress: show a bar.

    Raises:
        ValueError: wrong arguments; a checkpoint of another training; a loss that is not finite.
    """
    schedule = schedule or trapezoid()
    images = f"{data.name} {data.split}, {zlib.crc32(data.index.cpu().numpy().tobytes()):08x}"
    config = Config(_description(objective), images, len(data), epochs, batch_size, lr,
                    weight_decay, _description(schedule), seed, precision)  # fmt: skip
    _check_arguments(model, data, epochs, batch_size, lr)
    fabric = _fabric(data.images.device.type, precision)
    optimizer = torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay)
    wrapped, optimizer = fabric.setup(model, optimizer)
    history, carry, steps = History(), {}, len(data) // batch_size
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_file():
        history.rows, carry = resume(path, config, model, optimizer)
    elif path is not None and fabric.is_global_zero:  # So that the first epoch can be resumed too.
        save(path, config, model, optimizer, history.rows, carry)
    for epoch in range(len(history.rows), epochs):
        order = torch.randperm(len(data), generator=generator(seed * 1_000_003 + epoch))
        batches = order.to(data.labels.device).split(batch_size)[:steps]
        total = torch.zeros((), device=data.labels.device)
        wrapped.train()
        shown = bar(batches, f"epoch {epoch + 1}/{epochs}", "batch",
                    progress and fabric.is_global_zero)  # fmt: skip
        for step, rows in enumerate(shown):
            batch = data.take(rows[fabric.global_rank :: fabric.world_size])
            x, y = batch.tensors()
            done = (epoch * steps + step) / (epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(done)
            state = State(done, Keyed((seed, epoch), batch.index), carry)
            with fabric.autocast():
                losses, state = objective(wrapped, x, y, state)
                loss = losses.mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            carry = state.carry
            total += loss.detach()
            if step % 50 == 49:
                shown.set_postfix_str(f"loss {float(total) / (step + 1):.3f}{_last(history)}")
        mean = float(total) / steps
        if not math.isfinite(mean):
            raise ValueError(f"fit: the loss of epoch {epoch + 1} is {mean}; a smaller lr or a "
                             "ramp of the threat may help")
        row = {"epoch": epoch + 1, "loss": mean, **(validate(model) if validate else {})}
        history.rows.append(row)
        if path is not None and fabric.is_global_zero:
            save(path, config, model, optimizer, history.rows, carry)
    return history


def _check_arguments(
    model: nn.Module, data: Dataset, epochs: int, batch_size: int, lr: float
) -> None:
    if not 1 <= batch_size <= len(data):
        raise ValueError(f"fit: batch_size={batch_size}, allowed are 1 to {len(data)} (the data)")
    if epochs < 1 or lr <= 0:
        raise ValueError(f"fit: epochs={epochs}, lr={lr}, both must be positive")
    first = data.take(torch.arange(min(2, len(data)), device=data.labels.device)).tensors()
    check_examples(*first)
    logits = predict(model, first[0])
    check_logits(logits, first[1])
    check_labels(data.labels, logits.shape[1])


def _fabric(device: str, precision: str) -> Fabric:
    from lightning_fabric import Fabric

    processes = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Advice on hardware is not the reader's concern.
        fabric = Fabric(accelerator=device, devices=local, num_nodes=processes // local,
                        strategy="ddp" if processes > 1 else "auto", precision=precision)  # fmt: skip
        fabric.launch()
    return fabric


def _description(f: Callable) -> str:
    return getattr(f, "description", name_of(f))


def _last(history: History) -> str:
    row = history.rows[-1] if history.rows else {}
    return "".join(f", {k} {100 * row[k]:.1f} %" for k in ("clean", "robust") if k in row)
