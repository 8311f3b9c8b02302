"""Figures: arrays in, matplotlib `Figure` out. No function here calls a model.

One colour per thing through the whole book (Okabe & Ito's palette, for colour-blind readers).
"""

from __future__ import annotations

import base64
import io
import itertools
import uuid
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

NATURAL, ROBUST, OTHER = "#0072B2", "#D55E00", "#009E73"
RANDOM, THEORY, FAINT = "#767676", "#CC79A7", "#BBBBBB"
PALETTE = (NATURAL, ROBUST, OTHER, THEORY, "#E69F00", "#56B4E9", RANDOM)


def style() -> None:
    """The book's look: vector figures, quiet axes, colours for colour-blind readers."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("svg")
    mpl.rcParams.update({
        "figure.figsize": (6.4, 3.8), "figure.dpi": 100, "savefig.facecolor": "white",
        "savefig.bbox": "tight", "svg.hashsalt": "advlearn", "font.size": 11,
        "axes.prop_cycle": mpl.cycler(color=PALETTE), "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
        "axes.titlesize": 11, "legend.frameon": False, "lines.linewidth": 2,
        "lines.markersize": 4, "image.interpolation": "nearest",
    })  # fmt: skip


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
                ax.imshow(0.5 + picture / (2 * signed[head]))
            else:
                ax.imshow(picture, cmap="RdBu_r", vmin=-signed[head], vmax=signed[head])
        else:
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color(FAINT)
        if i == 0:
            ax.set_title(head, fontsize=10)
        if head in titles:
            ax.set_xlabel(titles[head][i], fontsize=9, labelpad=2)
    return fig


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    colors: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    ylim: tuple[float, float] | None = None,
    direct: bool = False,
) -> Figure:
    """Named curves over x; a triple (y, low, high) also gets its band.

    Args:
        x: common abscissae.
        lines: name -> y, or name -> (y, low, high).
        colors: name -> colour; others follow the palette.
        dashed: names of theory or baselines.
        direct: put names at the ends of the lines and leave out the legend.
    """
    fig, ax = plt.subplots(layout="constrained")
    for color, (name, values) in zip(itertools.cycle(PALETTE), lines.items(), strict=False):
        color = (colors or {}).get(name, color)
        y, *limits = values if isinstance(values, tuple) else (values,)
        ax.plot(x, y, color=color, ls="--" if name in dashed else "-",
                marker="" if name in dashed or len(x) > 30 else "o", label=name)  # fmt: skip
        if limits:
            ax.fill_between(x, *limits, color=color, alpha=0.2, lw=0)
        if direct:
            ax.annotate(f" {name}", (x[-1], y[-1]), color=color, va="center", fontsize=9)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if ylim:
        ax.set_ylim(*ylim)
    if not direct:
        ax.legend()
    return fig


def _png(image: np.ndarray, scale: int) -> str:
    picture = np.clip(_picture(image), 0, 1)
    big = np.kron(picture, np.ones((scale, scale) + (1,) * (picture.ndim - 2)))
    buffer = io.BytesIO()
    plt.imsave(buffer, big, cmap="gray", vmin=0, vmax=1, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


class Slider:
    """Images behind a slider, in plain HTML: it works in the web book without a kernel."""

    def __init__(self, images: np.ndarray, labels: Sequence[str], name: str, scale: int = 4,
                 start: int = 0) -> None:  # fmt: skip
        self.images, self.labels, self.name = images, list(labels), name
        self.scale, self.start = scale, start

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
