"""A training set that is built part by part in a folder, so that an interrupted build resumes.

`recipe.json` holds the recipe, its hash and where it comes from; each finished part is a safetensors
file of images (uint8), labels and index. Nothing is pickled.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from advlearn import provenance, storage
from advlearn.data import Dataset

SIZE = 1024  # Images of one part.


def claim(folder: Path, data: Dataset, recipe: Mapping[str, object], digest: str) -> Path:
    """Write the recipe into a new or empty folder, or make sure that it lies there already.

    Args:
        folder: where the parts go.
        data: the training set, for name, split and classes.
        recipe: what decides the images, as plain values; "examples" is their number.
        digest: its hash.

    Raises:
        ValueError: the folder holds another recipe (the message says what differs), or other files.
    """
    found = _about(folder)
    if found is None:
        if folder.exists() and any(p for p in folder.iterdir() if not p.name.endswith(".part")):
            raise ValueError(f"{folder} holds other files; name an empty folder or a new one")
        about = {"name": data.name, "split": data.split, "classes": list(data.classes),
                 "sha256": digest, "recipe": dict(recipe), **provenance.stamp(data.images.device)}
        with storage.atomic(folder / "recipe.json") as temporary:
            text = json.dumps(about, indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf8")
    elif found["sha256"] != digest:
        held = found["recipe"]
        wrong = sorted(k for k in recipe.keys() | held.keys() if recipe.get(k) != held.get(k))
        raise ValueError(f"{folder} already holds another recipe: " + "; ".join(
            f"its {k} is {held.get(k)!r}, asked for is {recipe.get(k)!r}" for k in wrong))  # fmt: skip
    return folder


def put(folder: Path, i: int, part: Dataset) -> None:
    """Write part i, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {"images": part.images, "labels": part.labels, "index": part.index}
    with storage.atomic(folder / f"part-{i:04}.safetensors") as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary)


def get(folder: Path, i: int) -> dict[str, Tensor] | None:
    """Part i if it is finished, else None. A damaged one is moved aside, to be made again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"part-{i:04}.safetensors"
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        storage.move_aside(path)
        return None


def read(folder: str | Path) -> Dataset:
    """A finished training set, without the network that it was made with.

    Raises:
        ValueError: no training set, or an unfinished or damaged one.
    """
    folder = Path(folder)
    about = _about(folder)
    if about is None:
        raise ValueError(f"{folder} holds no training set: there is no recipe.json")
    found = [get(folder, i) for i in range(-(-about["recipe"]["examples"] // SIZE))]
    if None in found:
        raise ValueError(f"{folder} is not finished: part {found.index(None)} of {len(found)} is "
                         "missing. The call that began it goes on where it stopped.")
    whole = {key: torch.cat([part[key] for part in found]) for key in ("images", "labels", "index")}
    return Dataset(about["name"], about["split"], whole["images"], whole["labels"],
                   tuple(about["classes"]), whole["index"])  # fmt: skip


def crc(v: Tensor) -> str:
    """Eight hex digits that tell one tensor from another, for a recipe."""
    return f"{zlib.crc32(v.cpu().contiguous().numpy().tobytes()):08x}"


def _about(folder: Path) -> dict[str, object] | None:
    path = folder / "recipe.json"
    try:
        return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); name another folder") from error
