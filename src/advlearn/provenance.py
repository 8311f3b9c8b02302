"""Where a number comes from: date, commit, hardware, versions."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

from advlearn import storage


def hardware(device: str | torch.device | None = None) -> str:
    """The GPU's name, or the processor's with the number of threads used."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Short hash of the clone's commit, None outside a clone."""
    if not storage.in_clone():  # The package may lie inside some other repository.
        return None
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", "-C", here, "rev-parse", "--short=10", "HEAD"],
                                capture_output=True, text=True, timeout=10)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def stamp(device: str | torch.device | None = None) -> dict[str, object]:
    """Date (UTC), commit, hardware and versions, as plain values for JSON."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
