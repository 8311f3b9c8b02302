"""Pictures of pictures: grids, strips, and a slider that works without a kernel."""

from __future__ import annotations

import base64
import io
import itertools
import uuid
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from advlearn.plotting.style import FAINT, ROBUST


def _picture(image: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (H, W) or (H, W, 3)."""
    image = np.asarray(image)
    return image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)


def image_grid(
    columns: Mapping[str, np.ndarray],
    titles: Mapping[str, Sequence[str]] | None = None,
    *,
    signed: Mapping[str, float] | None = None,
    size: float = 1.25,
) -> Figure:
    """Images as a grid: one row per example, one named column per kind of image.

    Args:
        columns: heading -> images (N, C, H, W) in [0, 1]; signed ones in [−limit, limit].
        titles: heading -> N captions under the images of that column.
        signed: heading -> limit, for perturbations: red adds, blue takes away, white is 0.
        size: inches per image.
    """
    titles, signed = titles or {}, signed or {}
    n = len(next(iter(columns.values())))
    space = 0.26 if titles else 0.05
    fig, axes = plt.subplots(n, len(columns), squeeze=False, layout="constrained",
                             figsize=(size * len(columns) * 1.15, (size + space) * n + 0.35))
    for (i, row), (j, (head, images)) in itertools.product(enumerate(axes),
                                                           enumerate(columns.items())):
        ax, picture = row[j], _picture(images[i])
        if head in signed:
            if picture.ndim == 3:
                ax.imshow(0.5 + picture / (2 * signed[head]), interpolation="none")
            else:
                ax.imshow(picture, cmap="RdBu_r", vmin=-signed[head], vmax=signed[head],
                          interpolation="none")  # fmt: skip
        else:
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="none")
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color(FAINT)
        if i == 0:
            ax.set_title(head, fontsize=10)
        if head in titles:
            ax.set_xlabel(titles[head][i], fontsize=9, labelpad=2)
    return fig


def strips(
    rows: Mapping[str, np.ndarray],
    captions: Mapping[str, Sequence[str]],
    wrong: Mapping[str, Sequence[bool]],
) -> Figure:
    """Versions of the same images below each other, with answers; wrong ones in orange.

    Args:
        rows: name -> images (N, C, H, W) in [0, 1].
        captions: name -> N texts under the images.
        wrong: name -> N flags.
    """
    n = len(next(iter(rows.values())))
    fig, axes = plt.subplots(len(rows), n, squeeze=False, layout="constrained",
                             figsize=(1.2 * n + 1, 1.5 * len(rows)))  # fmt: skip
    for strip, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image, text, mistake in zip(strip, images, captions[name], wrong[name],
                                            strict=True):  # fmt: skip
            ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="none")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(text, color=ROBUST if mistake else "black", fontsize=10)
        strip[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return fig


def filters(rows: Mapping[str, np.ndarray]) -> Figure:
    """First-layer filters, one row per network: (F, 1, h, w) in [−1, 1], red adds, blue takes."""
    n = len(next(iter(rows.values())))
    fig, axes = plt.subplots(len(rows), n, squeeze=False, layout="constrained",
                             figsize=(0.5 * n + 0.9, 0.62 * len(rows)))  # fmt: skip
    for strip, (name, weights) in zip(axes, rows.items(), strict=True):
        for ax, weight in zip(strip, weights, strict=True):
            ax.imshow(weight[0], cmap="RdBu_r", vmin=-1, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
        strip[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return fig


def _png(image: np.ndarray, scale: int) -> str:
    picture = np.clip(_picture(image), 0, 1)
    big = np.kron(picture, np.ones((scale, scale) + (1,) * (picture.ndim - 2)))
    buffer = io.BytesIO()
    plt.imsave(buffer, big, cmap="gray", vmin=0, vmax=1, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


class Slider:
    """Images behind a slider, in plain HTML: it works in the web book without a kernel."""

    def __init__(
        self, images: np.ndarray, labels: Sequence[str], name: str, start: int = 0
    ) -> None:
        self.images, self.labels, self.name, self.start = images, list(labels), name, start
        self.scale = max(1, 168 // images.shape[-1])

    def __repr__(self) -> str:
        return f"Slider over {len(self.images)} images: {self.labels[0]} … {self.labels[-1]}"

    def _repr_html_(self) -> str:
        key = "s" + uuid.uuid5(uuid.NAMESPACE_OID, "".join(self.labels)).hex[:8]
        frames = "".join(
            f'<figure data-frame{"" if i == self.start else " hidden"} style="margin:0">'
            f'<img alt="{label}" src="data:image/png;base64,{_png(image, self.scale)}">'
            f"<figcaption>{label}</figcaption></figure>"
            for i, (image, label) in enumerate(zip(self.images, self.labels, strict=True))
        )
        return (
            f'<div class="advlearn-slider" id="{key}">{frames}<label>{self.name} '
            f'<input type="range" min="0" max="{len(self.images) - 1}" value="{self.start}" '
            "oninput=\"this.closest('.advlearn-slider').querySelectorAll('[data-frame]')"
            '.forEach((f, i) => { f.hidden = i != this.value })"></label></div>'
        )
