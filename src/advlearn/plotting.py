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
            ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(text, color=ROBUST if mistake else "black", fontsize=10)
        strip[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return fig


def curves(
    x: Sequence[float],
    lines: Mapping[str, Sequence[float] | tuple[Sequence[float], Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    colors: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    dots: Sequence[str] = (),
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """Named curves over x; a triple (y, low, high) also gets its band.

    Args:
        x: common abscissae.
        lines: name -> y, or name -> (y, low, high).
        colors: name -> colour; others follow the palette.
        dashed: names of predictions.
        dots: names drawn as points only, on top of another line.
    """
    fig, ax = plt.subplots(layout="constrained")
    for color, (name, values) in zip(itertools.cycle(PALETTE), lines.items(), strict=False):
        color = (colors or {}).get(name, color)
        y, *limits = values if isinstance(values, tuple) else (values,)
        line = "--" if name in dashed else "" if name in dots else "-"
        ax.plot(x, y, color=color, ls=line, marker="o" if name in dots else "", label=name)
        if limits:
            ax.fill_between(x, *limits, color=color, alpha=0.2, lw=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if ylim:
        ax.set_ylim(*ylim)
    ax.legend(fontsize=9)
    return fig


def histograms(
    samples: Mapping[str, np.ndarray],
    marks: Mapping[str, Mapping[str, float]],
    *,
    colors: Mapping[str, str],
    xlabel: str,
) -> Figure:
    """One panel per name: the histogram of its samples, and marked values as vertical lines."""
    fig, axes = plt.subplots(len(samples), 1, sharex=True, squeeze=False, layout="constrained",
                             figsize=(6.4, 1.9 * len(samples) + 0.4))
    for ax, (name, values) in zip(axes[:, 0], samples.items(), strict=True):
        ax.hist(values, bins=40, color=RANDOM, alpha=0.6)
        for (mark, at), line, side in zip(marks[name].items(), ("--", "-"), ("left", "right"),
                                          strict=False):  # fmt: skip
            ax.axvline(at, color=colors[name], ls=line)
            ax.annotate(f" {mark} {at:.1f} ", (at, 0.97), xycoords=("data", "axes fraction"),
                        color=colors[name], va="top", ha=side, fontsize=9)  # fmt: skip
        ax.set_title(name, loc="left")
        ax.set(ylabel="draws")
    axes[-1, 0].set_xlabel(xlabel)
    low, high = axes[-1, 0].get_xlim()
    low = min(0, low - 0.12 * (high - low))  # Room for the marks' names.
    for ax in axes[:, 0]:
        ax.set_xlim(low, high)
        ax.axvspan(low, 0, color=FAINT, alpha=0.35, lw=0)
    return fig


def along_direction(
    t: np.ndarray,
    losses: tuple[np.ndarray, np.ndarray],
    agreement: Mapping[str, np.ndarray],
    *,
    colors: Mapping[str, str],
    xlabel: str,
    ylabel: str,
    n: int = 8,
) -> Figure:
    """Left: losses and their tangents along a line. Right: agreement of gradients with the start.

    Args:
        t: distances, (T,).
        losses: (values, tangents), each (T, N); the first `n` are drawn.
        agreement: name -> cosines (T, N), drawn as median and quartiles.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.6), layout="constrained")
    for value, tangent, color in zip(*(a.T[:n] for a in losses), itertools.cycle(PALETTE),
                                     strict=False):  # fmt: skip
        left.plot(t, value, color=color)
        left.plot(t, tangent, color=color, ls="--", lw=1, alpha=0.7)
    left.axhline(0, color=RANDOM, lw=1)
    values = losses[0][:, :n]
    left.set_ylim(values.min() - 2, values.max() + 0.6 * np.ptp(values))
    left.set(xlabel=xlabel, ylabel=ylabel)
    for name, cosines in agreement.items():
        low, middle, high = np.nanpercentile(cosines, [25, 50, 75], axis=1)
        right.plot(t, middle, color=colors[name], label=name)
        right.fill_between(t, low, high, color=colors[name], alpha=0.2, lw=0)
    right.set(xlabel=xlabel, ylabel="cosine with the first gradient", ylim=(-0.1, 1.02))
    right.legend(fontsize=9)
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
