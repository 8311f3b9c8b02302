"""Two dimensions: surfaces with paths, sets with arrows, grids of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from advlearn.plotting.style import FAINT, NATURAL, OTHER, PALETTE, ROBUST

Extent = tuple[float, float, float, float]


def surface(
    values: np.ndarray,
    extent: Extent,
    paths: Mapping[str, Sequence[np.ndarray]],
    *,
    frame: Extent | None = None,
    label: str,
    colors: Mapping[str, str] | None = None,
    axes: tuple[str, str] = ("$z_1$", "$z_2$"),
) -> Figure:
    """A function of two variables in grey with contours, and paths on it.

    Args:
        values: (H, W), the lowest ordinate first.
        extent: left, right, bottom, top.
        paths: name -> curves (T, 2), each drawn with a dot at its start and a cross at its end.
        frame: a rectangle to be drawn, such as the set of a threat.
        label: of the colour bar.
        colors: name -> colour; others follow the palette.
        axes: names of abscissa and ordinate.
    """
    fig, ax = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
    drawn = ax.imshow(values, origin="lower", extent=extent, cmap="Greys_r", interpolation="none")
    lines = ax.contour(values, levels=8, extent=extent, colors=FAINT, linewidths=0.5)
    lines.set_rasterized(True)  # Its vertices would make the file heavy.
    fig.colorbar(drawn, ax=ax, label=label)
    if frame:
        left, right, bottom, top = frame
        ax.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color="black", lw=1.2)
    for color, (name, curves) in zip(PALETTE[1:], paths.items(), strict=False):
        color = (colors or {}).get(name, color)
        for i, curve in enumerate(curves):
            (line,) = ax.plot(*curve.T, color=color, lw=1.6, label=name if i == 0 else None)
            line.set_path_effects([patheffects.withStroke(linewidth=2.8, foreground="white")])
            ax.plot(*curve[0], "o", color=color, mec="white", ms=5, zorder=3)
            ax.plot(*curve[-1], "X", color=color, mec="white", ms=9, zorder=4)
    ax.grid(False)
    ax.set(xlabel=axes[0], ylabel=axes[1], aspect="equal")
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
    return fig


def regions(
    masks: Mapping[str, np.ndarray],
    extent: Extent,
    center: Sequence[float],
    arrows: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]],
) -> Figure:
    """Sets in the plane, one panel each, and arrows from points to where they are sent.

    Args:
        masks: title -> (H, W) bool, the lowest ordinate first.
        extent: left, right, bottom, top.
        center: marked in every panel.
        arrows: title -> kind -> pairs (from, to). The first kind is drawn solid, the second dashed.
    """
    fig, axes = plt.subplots(1, len(masks), figsize=(2.8 * len(masks), 3.3), sharey=True,
                             squeeze=False, layout="constrained")  # fmt: skip
    kinds: dict[str, object] = {}
    for ax, (title, mask) in zip(axes[0], masks.items(), strict=True):
        ax.contourf(mask.astype(float), levels=[0.5, 1.5], extent=extent, colors=[FAINT], alpha=0.6)
        ax.add_patch(plt.Rectangle((0, 0), 1, 1, fill=False, lw=1.2))
        ax.plot(*center, "o", color="black", ms=5)
        for (kind, pairs), color, line in zip(arrows[title].items(), (OTHER, ROBUST), ("-", "--"),
                                              strict=False):  # fmt: skip
            for tail, head in pairs:
                ax.plot(*tail, "o", mfc="white", mec="black", ms=4, zorder=3)
                kinds[kind] = ax.annotate("", head, tail, arrowprops={
                    "arrowstyle": "->", "color": color, "ls": line, "lw": 1.5,
                    "shrinkA": 2, "shrinkB": 0}).arrow_patch  # fmt: skip
        ax.set(title=title, aspect="equal", xlim=extent[:2], ylim=extent[2:], xlabel="$z_1$")
        ax.grid(False)
    axes[0, 0].set_ylabel("$z_2$")
    lines = [plt.Line2D([], [], color=color, ls=line) for color, line in
             zip((OTHER, ROBUST), ("-", "--"), strict=True)]  # fmt: skip
    fig.legend(lines[: len(kinds)], list(kinds), loc="outside lower center", ncols=2, fontsize=9)
    return fig


def heatmaps(
    tables: Mapping[str, np.ndarray],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    outlined: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> Figure:
    """Grids of numbers in %, side by side, each with a colour range of its own.

    Args:
        tables: title -> (len(rows), len(columns)), in %. Dark is low, NaN stays empty.
        outlined: title -> cells (row, column) with a frame.
    """
    fig, axes = plt.subplots(1, len(tables), squeeze=False, sharey=True, layout="constrained",
                             figsize=(0.62 * len(columns) * len(tables) + 0.9, 0.42 * len(rows) + 1.2))
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        low, high = float(np.nanmin(table)), float(np.nanmax(table))
        ax.imshow(table, cmap="cividis", vmin=low, vmax=max(high, low + 1), aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            if np.isnan(value):
                continue
            dark = value < (low + high) / 2
            ax.text(j, i, f"{value:.0f}" if low < 50 else f"{value:.1f}", ha="center", va="center",
                    fontsize=9, color="white" if dark else "black")
        for i, j in (outlined or {}).get(title, ()):
            ax.add_patch(plt.Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, fill=False, ec=ROBUST, lw=2))
        ax.set_title(title)
        ax.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel=xlabel)
        ax.set_xticklabels(columns)
        ax.set_yticklabels(rows)
        ax.grid(False)
        ax.spines[:].set_visible(False)
    axes[0, 0].set_ylabel(ylabel)
    return fig


def separations(
    panels: Mapping[str, np.ndarray],
    lost: Mapping[str, np.ndarray],
    points: np.ndarray,
    signs: np.ndarray,
    eps: float,
    *,
    extent: Extent,
    columns: int = 4,
) -> Figure:
    """Points of two classes, the squares around them, and where a classifier draws its boundary.

    Args:
        panels: title -> values of the classifier, (H, W), the lowest ordinate first.
        lost: title -> (n,) bool: squares that are not all on their side; drawn thick, and hatched.
        points, signs: (n, 2) and ±1, (n,).
        eps: half a side of the squares.
        extent: left, right, bottom, top.
        columns: panels in a row.
    """
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained", sharex=True,
                             sharey=True, figsize=(2.1 * columns, 2.3 * lines))  # fmt: skip
    for ax, (title, values) in zip(axes.flat, panels.items(), strict=False):
        ax.contourf(values, levels=[-np.inf, 0, np.inf], extent=extent, colors=[NATURAL, ROBUST],
                    alpha=0.18)  # fmt: skip
        ax.contour(values, levels=[0], extent=extent, colors="black", linewidths=1)
        for (u, v), sign, bad in zip(points, signs, lost[title], strict=True):
            color = ROBUST if sign > 0 else NATURAL
            ax.add_patch(plt.Rectangle((u - eps, v - eps), 2 * eps, 2 * eps, fill=False, ec=color,
                                       lw=2 if bad else 0.8, hatch="////" if bad else None))
            ax.plot(u, v, "^" if sign > 0 else "o", color=color, ms=4)
        ax.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[], aspect="equal")
        ax.set_title(title, fontsize=9)
        ax.grid(False)
        ax.spines[:].set_visible(True)
    return fig


def ellipses(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    points: np.ndarray,
    signs: np.ndarray,
    *,
    radius: float = 2.6,
) -> Figure:
    """Two Gaussian classes as models see them: ellipses, the boundary, and the way across it.

    Args:
        panels: title -> mean μ, (2,), and covariance Σ, (2, 2), of the model N(±μ, Σ).
        points, signs: examples (n, 2) and their classes ±1, (n,).
        radius: half a side of the pictures.
    """
    fig, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained", sharex=True,
                             sharey=True, figsize=(2.5 * len(panels), 2.8))  # fmt: skip
    circle = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 81)), np.sin(t)])
    for ax, (title, (mu, sigma)) in zip(axes.flat, panels.items(), strict=True):
        way = np.linalg.solve(sigma, mu)
        way = way / np.linalg.norm(way)
        along = 2 * radius * np.array([-way[1], way[0]])
        for sign, color, marker in ((1, ROBUST, "^"), (-1, NATURAL, "o")):
            ax.plot(*points[signs == sign].T, marker, color=color, ms=2, alpha=0.45,
                    rasterized=True)  # As shapes they would make the file heavy.
            ax.plot(*(sign * mu[:, None] + np.linalg.cholesky(sigma) @ circle), color=color, lw=1.6)
        ax.plot(*np.stack([-along, along]).T, color="black", lw=1)
        ax.annotate("", mu - 0.9 * way, mu, arrowprops={"arrowstyle": "-|>", "lw": 2, "color": OTHER})
        ax.set(xlim=(-radius, radius), ylim=(-radius, radius), aspect="equal")
        ax.set_title(title, fontsize=10)
    return fig
