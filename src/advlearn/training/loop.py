"""The loop: Adam on the mean of an objective, in one process or several."""

from __future__ import annotations

import math
import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from advlearn.checkpoint import Config, Run, resume, save
from advlearn.checks import check_examples, check_labels, check_logits
from advlearn.data import Dataset
from advlearn.evaluation import predict
from advlearn.progress import bar
from advlearn.tensors import Keyed, generator
from advlearn.training.state import Objective, State, describe
from advlearn.training.watch import History, Validation, check_held_out, overfitted
from advlearn.training.weights import average_in, copied, lent

if TYPE_CHECKING:  # Imported where it is used: it takes a second.
    from lightning_fabric import Fabric

Schedule = Callable[[float], float]


def trapezoid(warmup: float = 0.05, decay_from: float = 0.5) -> Schedule:
    """Learning-rate factor: up over `warmup`, constant, linearly to 0 from `decay_from` on."""

    def factor(progress: float) -> float:
        up = progress / warmup if warmup else 1.0
        return min(1.0, max(up, 1e-3), (1 - progress) / max(1 - decay_from, 1e-9))

    factor.description = f"trapezoid({warmup}, {decay_from})"
    return factor


def drops(*at: float, factor: float = 0.1) -> Schedule:
    """Learning-rate factor: 1, and `factor` times smaller from each share of training in `at` on."""

    def reached(progress: float) -> float:
        return factor ** sum(progress >= share for share in at)

    reached.description = f"drops({', '.join(map(str, at))}, {factor=})"
    return reached


def fit(
    model: nn.Module,
    data: Dataset,
    objective: Objective,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    replays: int = 1,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    average: float = 0.0,
    validate: Validation | Sequence[Validation] = (),
    best_by: str | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    precision: str = "32-true",
    progress: bool = True,
) -> History:
    """Minimise the mean of `objective` over `data` with Adam, in place.

    The order of the images depends on (seed, epoch), random starts on (seed, epoch, image):
    neither on the number of processes. Under `torchrun` each process takes its share of every
    batch, which must be equal (batch norm sees that share alone). The last incomplete batch of an
    epoch is dropped.

    Args:
        model: on the device of `data`.
        data: training images; hold out the validation images before (`Dataset.split_off`).
        objective: `natural()`, `adversarial(...)` or a function like them.
        epochs, batch_size, lr, weight_decay: of Adam; `batch_size` counts all processes.
        replays: how many steps every batch is used for before the next one; more than 1 for
            `free`.
        schedule: share of training done -> factor of `lr`; default `trapezoid()`.
        average: decay per step of an exponential moving average of the weights, e.g. 0.999; the
            averaged weights are validated, and are the result. 0 for none.
        validate: run after every epoch, e.g. `held_out(...)` or `[held_out(...), watch(...)]`;
            its numbers are kept and shown.
        best_by: end with the weights of the epoch at which this number of `validate` was highest
            (the first of equals), e.g. "robust": early stopping.
        checkpoint: file (.safetensors) written after every epoch. If it exists, the training
            goes on from there, and ends with the weights of an uninterrupted one.
        seed: of order and random starts (the weights have their own).
        precision: of Lightning Fabric, e.g. "bf16-mixed".
        progress: show a bar.

    Warns:
        UserWarning: catastrophic overfitting, if `watch` is among the validations.

    Raises:
        ValueError: wrong arguments; a checkpoint of another training; a loss that is not finite;
            `best_by` on test images or on images that are trained on.
    """
    schedule = schedule or trapezoid()
    validations = [validate] if callable(validate) else list(validate or ())
    images = f"{data.name} {data.split}, {zlib.crc32(data.index.cpu().numpy().tobytes()):08x}"
    config = Config(describe(objective), images, len(data), epochs, batch_size, lr, weight_decay,
                    describe(schedule), seed, precision, replays, average, best_by)  # fmt: skip
    _check_arguments(model, data, config)
    if best_by:
        check_held_out(validations, data)
    fabric = _fabric(data.images.device.type, precision)
    wrapped, optimizer = fabric.setup(
        model, torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay))  # fmt: skip
    run, path = Run(model, optimizer), None if checkpoint is None else Path(checkpoint)
    if path is not None and fabric.broadcast(path.is_file()):
        resume(path, config, run)
        run.carry = {k: _share(v, fabric) for k, v in run.carry.items()}
    else:
        _save(path, config, run, fabric)  # So that the first epoch can be resumed too.
    while len(run.rows) < epochs:
        loss = _epoch(fabric, wrapped, run, data, objective, schedule, config, progress)
        if not math.isfinite(loss):
            raise ValueError(f"fit: the loss of epoch {len(run.rows) + 1} is {loss}; a smaller lr "
                             "or a ramp of the threat may help")
        with lent(model, run.average):
            row = {"epoch": len(run.rows) + 1, "loss": loss}
            for validation in validations:
                row |= validation(model)
            row = fabric.broadcast(row)
            if best_by and _is_best(row, run.rows, best_by):
                run.best = copied(model)
        run.rows.append(row)
        message = overfitted(run.rows)
        if message and not overfitted(run.rows[:-1]) and fabric.is_global_zero:
            warnings.warn(message, stacklevel=2)
        _save(path, config, run, fabric)
    if best_by or average:
        model.load_state_dict(run.best or run.average)
    return History(run.rows)


def _epoch(
    fabric: Fabric, wrapped: nn.Module, run: Run, data: Dataset, objective: Objective,
    schedule: Schedule, config: Config, progress: bool,
) -> float:  # fmt: skip
    """One pass over the data; returns the mean loss."""
    epoch, steps, replays = len(run.rows), len(data) // config.batch_size, config.replays
    order = torch.randperm(len(data), generator=generator(config.seed * 1_000_003 + epoch))
    batches = order.to(data.labels.device).split(config.batch_size)[:steps]
    total = torch.zeros((), device=data.labels.device)
    wrapped.train()
    shown = bar(batches, f"epoch {epoch + 1}/{config.epochs}", "batch",
                progress and fabric.is_global_zero)  # fmt: skip
    for batch_number, rows in enumerate(shown):
        rows = _share(rows, fabric)
        batch = data.take(rows)
        x, y = batch.tensors()
        for replay in range(replays):
            step = (epoch * steps + batch_number) * replays + replay
            done = step / (config.epochs * steps * replays)
            key = (config.seed, epoch, replay) if replay else (config.seed, epoch)
            for group in run.optimizer.param_groups:
                group["lr"] = config.lr * schedule(done)
            with fabric.autocast():
                memory = {k: v[rows] for k, v in run.memory.items()}
                state = State(done, Keyed(key, batch.index), run.carry, memory)
                losses, state = objective(wrapped, x, y, state)
                loss = losses.mean()
            fabric.backward(loss)
            run.optimizer.step()
            run.carry = state.after() if state.after else state.carry
            _remember(run.memory, state.memory, rows, len(data))
            run.optimizer.zero_grad()
            if config.average:
                average_in(run.average, run.model, config.average, step)
            total += loss.detach()
        if batch_number % 50 == 49:
            mean = float(total) / ((batch_number + 1) * replays)
            shown.set_postfix_str(f"loss {mean:.3f}{_last(run.rows)}")
    if fabric.world_size > 1:
        _share_memory(run.memory, batches, fabric)
    return float(fabric.all_reduce(total, reduce_op="mean")) / (steps * replays)


def _remember(
    memory: dict[str, Tensor], new: Mapping[str, Tensor], rows: Tensor, n: int
) -> None:  # fmt: skip
    """Put the batch's rows into the memory of all n examples, which begins as zeros."""
    for name, value in new.items():
        whole = memory.setdefault(name, value.new_zeros(n, *value.shape[1:]))
        whole[rows] = value.detach()


def _share_memory(memory: Mapping[str, Tensor], batches: Sequence[Tensor], fabric: Fabric) -> None:
    """Every process has seen its share of the batches; now each gets the rows of the others."""
    mine, seen = torch.cat([_share(rows, fabric) for rows in batches]), torch.cat(list(batches))
    for whole in memory.values():
        rows = torch.zeros_like(whole)
        rows[mine] = whole[mine]
        whole[seen] = fabric.all_reduce(rows, reduce_op="sum")[seen]


def _share(v: Tensor, fabric: Fabric) -> Tensor:
    """This process's rows of a whole batch."""
    return v[fabric.global_rank :: fabric.world_size] if v.ndim else v


def _save(path: Path | None, config: Config, run: Run, fabric: Fabric) -> None:
    """Write the checkpoint in one process, with the carried rows of all of them."""
    if path is None:
        return
    carry = dict(run.carry)
    for name, value in carry.items():
        if value.ndim and fabric.world_size > 1:  # The inverse of `_share`.
            carry[name] = fabric.all_gather(value).transpose(0, 1).flatten(0, 1)
    if fabric.is_global_zero:
        save(path, config, run, carry)


def _is_best(row: Mapping[str, float], rows: Sequence[Mapping[str, float]], by: str) -> bool:
    if by not in row:
        raise ValueError(f"fit: best_by={by!r}, `validate` returns {sorted(row)}")
    return all(row[by] > earlier[by] for earlier in rows)


def _check_arguments(model: nn.Module, data: Dataset, config: Config) -> None:
    batch_size, processes = config.batch_size, int(os.environ.get("WORLD_SIZE", 1))
    if not 1 <= batch_size <= len(data):
        raise ValueError(f"fit: batch_size={batch_size}, allowed are 1 to {len(data)} (the data)")
    if batch_size % processes:
        raise ValueError(f"fit: batch_size={batch_size} cannot be shared equally among "
                         f"{processes} processes")
    if config.epochs < 1 or config.lr <= 0:
        raise ValueError(f"fit: epochs={config.epochs}, lr={config.lr}, both must be positive")
    if config.replays < 1 or not 0 <= config.average < 1:
        raise ValueError(f"fit: replays={config.replays}, average={config.average}, allowed are "
                         "1 or more, and 0 or more but less than 1")
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


def _last(rows: Sequence[Mapping[str, float]]) -> str:
    row = rows[-1] if rows else {}
    return "".join(f", {k} {100 * row[k]:.1f} %" for k in ("clean", "robust") if k in row)
