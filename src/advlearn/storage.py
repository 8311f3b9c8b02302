"""Where files live, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CLONE = _PACKAGE.parents[1]


def in_clone() -> bool:
    """Whether the package runs from a clone of the book (an editable installation)."""
    return _PACKAGE.parent.name == "src" and (_CLONE / "_toc.yml").is_file()


def shipped() -> Path:
    """Checkpoints and recorded results: `data/` of the clone, else inside the wheel."""
    return _CLONE / "data" if in_clone() else _PACKAGE / "_data"


def cache() -> Path:
    """Downloads and retrained networks: `data/` of the clone, else the user's cache."""
    if in_clone():
        return _CLONE / "data"
    import pooch

    return Path(pooch.os_cache("advlearn"))


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it at the end; removed after an error.

    A full disk or an interrupt leaves the old file or none, never half of one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def move_aside(path: Path) -> Path:
    """Rename a damaged file so that it is neither used nor lost, and say so."""
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    warnings.warn(f"{path.name} is damaged; kept as {aside.name}", stacklevel=3)
    return aside


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
