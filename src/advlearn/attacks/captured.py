"""A whole attack as one CUDA graph: its hundreds of small kernels are launched at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from advlearn.attacks.combine import Attack
from advlearn.models import Classifier
from advlearn.threats import Threat


def captured(attack: Attack) -> Attack:
    """The same attack, on CUDA recorded at its first call and replayed at later ones.

    A recording belongs to a network, a shape of images and a kind of threat. Its inputs are x, y,
    the start, ε and every float among the options of the call (the step size, say), so that a ramp
    is not baked in; what `functools.partial` has bound is. Fewer examples than recorded are
    padded, more are recorded anew. Weights are read where they lay: training in place goes on, a
    network moved elsewhere needs `captured(...)` again. Without CUDA the attack is just called;
    the graph itself is exercised only where there is CUDA.

    Args:
        attack: without random draws, and without a branch on a tensor or on a float that comes
            with the call, such as `partial(pgd, steps=40)`. Capture last: `captured(toward(1, pgd))`,
            and not `toward(1, captured(pgd))`, whose loss is a new one at every call.
    """
    recordings: dict[tuple, Callable[[Mapping[str, Tensor | float], int], Tensor]] = {}

    def replayed(f, x, y, threat, *, start=None, **options):
        if not _has_graphs(x):
            return attack(f, x, y, threat, start=start, **options)
        inputs = {"x": x, "y": y, "eps": threat.eps, "start": start, **options}
        fixed = {k: v for k, v in inputs.items() if not isinstance(v, (float, Tensor))}
        inputs = {k: v for k, v in inputs.items() if k not in fixed}
        kinds = [(k, v.shape[1:], v.ndim, v.dtype) if isinstance(v, Tensor) else k
                 for k, v in inputs.items()]  # fmt: skip
        key = (id(f), type(threat), x.device, _autocast(x), *kinds, *fixed.items())
        recording = recordings.get(key)
        if recording is None or recording.rows < len(x):
            recording = recordings[key] = _recorded(attack, f, threat, inputs, fixed)
            for oldest in list(recordings)[:-8]:  # Each holds the memory of a whole attack.
                del recordings[oldest]
        return recording(inputs, len(x))

    # By these `name_of` and the objectives describe it like the attack itself.
    replayed.func, replayed.keywords = attack, getattr(attack, "keywords", {})
    return replayed


def _recorded(
    attack: Attack, f: Classifier, threat: Threat, inputs: Mapping[str, Tensor | float],
    fixed: Mapping[str, object],
) -> Callable[[Mapping[str, Tensor | float], int], Tensor]:  # fmt: skip
    """A function (inputs, rows in use) -> z, with the number of rows it has room for."""
    x = inputs["x"]
    slots = {k: torch.as_tensor(v, dtype=None if isinstance(v, Tensor) else x.dtype,
                                device=x.device).clone() for k, v in inputs.items()}  # fmt: skip

    def run() -> Tensor:
        given = {**fixed, **slots}
        f_x_y = f, given.pop("x"), given.pop("y")
        with torch.autocast(x.device.type, *_autocast(x), cache_enabled=False):
            return attack(*f_x_y, replace(threat, eps=given.pop("eps")), **given)

    replay, z = _record(run, x.device)

    def recording(inputs: Mapping[str, Tensor | float], rows: int) -> Tensor:
        for name, value in inputs.items():
            slot = slots[name]
            if isinstance(value, Tensor):  # Rows not in use keep what they had.
                (slot[:rows] if slot.ndim else slot).copy_(value)
            else:
                slot.fill_(value)
        replay()
        return z[:rows].clone()

    recording.rows, recording.f = len(x), f  # Else another network could get the same id.
    return recording


def _record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture `run`: a function that replays it, and the tensor that every replay fills."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # Libraries choose their kernels and take their memory first.
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z = run()
    return graph.replay, z


def _has_graphs(x: Tensor) -> bool:
    return x.is_cuda


def _autocast(x: Tensor) -> tuple[torch.dtype, bool]:
    kind = x.device.type
    return torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
