"""Progress bars, in one place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def bar(items: Sequence[T], what: str, unit: str, show: bool = True) -> tqdm[T]:
    """A tqdm bar over `items`; hidden if `show` is false or TQDM_DISABLE is set (tqdm's own)."""
    hidden = not show or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(items, disable=hidden, leave=False, desc=what, unit=unit)
