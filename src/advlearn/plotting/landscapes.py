"""Pictures of a loss under many runs: bundles of lines, hills of a histogram, angles, slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from advlearn.plotting.planes import Extent
from advlearn.plotting.style import FAINT, OTHER, RANDOM, THEORY

GROUPS = (OTHER, "#E69F00", "#56B4E9", THEORY)  # No network's colour.


def bundles(
    x: Sequence[float],
    rows: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    *,
    colors: Mapping[str, str],
    titles: Sequence[str],
    xlabel: str,
    ylabel: str,
    dashed: Sequence[str] = (),
    log: bool = False,
) -> Figure:
    """Bundles of thin lines: one panel per row and column, every kind of line in its colour.

    Args:
        x: common abscissae, (T,).
        rows: name -> for every column: kind -> lines (runs, T). A row has one axis of ordinates.
        colors: kind -> colour.
        titles: of the columns.
        dashed: kinds drawn dashed.
        log: logarithmic ordinates.
    """
    n = len(titles)
    fig, axes = plt.subplots(len(rows), n, sharex=True, sharey="row", squeeze=False, dpi=72,
                             layout="constrained", figsize=(1.75 * n + 0.7, 2.1 * len(rows) + 0.7))
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        for ax, kinds in zip(line, panels, strict=True):
            for kind, lines in kinds.items():
                ax.plot(x, np.asarray(lines).T, color=colors[kind], lw=0.9, alpha=0.7,
                        ls="--" if kind in dashed else "-", rasterized=True)
            if log:
                ax.set_yscale("log")
        line[0].set_ylabel(f"{name}\n{ylabel}" if name else ylabel)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    keys = [Line2D([], [], color=colors[k], ls="--" if k in dashed else "-") for k in colors]
    fig.supxlabel(xlabel, fontsize=11)
    fig.legend(keys, list(colors), loc="outside upper center", ncols=len(colors), fontsize=9)
    return fig


def hills(
    columns: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    *,
    titles: Sequence[str],
    xlabel: str,
    marks: Mapping[str, Sequence[float]] | None = None,
    bins: int = 40,
) -> Figure:
    """Histograms of grouped values: one row per title, one column per name with its own abscissae.

    Args:
        columns: name -> for every row (values (N,), group of each (N,)). The groups of a panel are
            stacked, its four largest in colours of their own, with their name and size.
        titles: of the rows.
        marks: name -> for every row a value to be marked by a vertical line.
    """
    fig, axes = plt.subplots(len(titles), len(columns), sharex="col", squeeze=False,
                             layout="constrained", figsize=(8.2, 1.45 * len(titles) + 0.5))
    for j, (name, panels) in enumerate(columns.items()):
        edges = np.histogram_bin_edges(np.concatenate([values for values, _ in panels]), bins)
        for i, (values, groups) in enumerate(panels):
            ax, (names, sizes) = axes[i, j], np.unique(groups, return_counts=True)
            order = names[np.argsort(-sizes, kind="stable")]
            shown = [values[groups == g] for g in order[: len(GROUPS)]]
            rest = values[~np.isin(groups, order[: len(GROUPS)])]
            labels = [f"→ {g}: {len(v)}" for g, v in zip(order, shown, strict=False)]
            # As an image: bars for every bin and group would be a third of a page's weight.
            ax.hist([*shown, rest], bins=edges, stacked=True, color=[*GROUPS[: len(shown)], RANDOM],
                    label=[*labels, f"others: {len(rest)}" if len(rest) else "_"],
                    rasterized=True)  # fmt: skip
            if marks and name in marks:
                ax.axvline(marks[name][i], color="black", ls=":", lw=1.5)
            ax.legend(fontsize=8, handlelength=0.8, labelspacing=0.2, borderaxespad=0.1)
            ax.set_yticks([])
            ax.grid(False)
        axes[0, j].set_title(name)
        axes[-1, j].set_xlabel(xlabel)
        axes[-1, j].locator_params(axis="x", nbins=5)
    for ax, title in zip(axes[:, 0], titles, strict=True):
        ax.set_ylabel(title)
    return fig


def angles(
    tables: Mapping[str, np.ndarray], groups: Mapping[str, Sequence[object]], *, label: str
) -> Figure:
    """Matrices of pairwise angles side by side, on one scale; lines between groups.

    Args:
        tables: title -> (n, n), in degrees.
        groups: title -> n group names, equal ones next to each other.
        label: of the colour bar.
    """
    fig, axes = plt.subplots(1, len(tables), squeeze=False, layout="constrained",
                             figsize=(3.6 * len(tables) + 0.9, 3.6))  # fmt: skip
    high = max(float(table.max()) for table in tables.values())
    for ax, (title, table) in zip(axes[0], tables.items(), strict=True):
        drawn = ax.imshow(table, cmap="cividis", vmin=0, vmax=high)
        names = np.asarray(groups[title])
        starts = np.r_[0, np.flatnonzero(names[1:] != names[:-1]) + 1, len(names)]
        for at in starts[1:-1]:
            ax.axhline(at - 0.5, color="white", lw=1)
            ax.axvline(at - 0.5, color="white", lw=1)
        wide = [(a, b) for a, b in zip(starts, starts[1:], strict=False) if b - a > len(names) / 25]
        ax.set_xticks([(a + b - 1) / 2 for a, b in wide])
        ax.set_xticklabels([f"→ {names[a]}" for a, _ in wide], fontsize=9)
        ax.set(title=title, yticks=[])
        ax.grid(False)
    fig.colorbar(drawn, ax=list(axes[0]), label=label)
    return fig


class Slice(NamedTuple):
    """A plane cut: values (H, W), the lowest ordinate first; bool (H, W), which points are allowed;
    left, right, bottom, top; and points (P, 2), the first of which is where the cut was made."""

    values: np.ndarray
    inside: np.ndarray
    extent: Extent
    points: np.ndarray


def slices(panels: Mapping[str, Mapping[str, Slice]], *, label: str) -> Figure:
    """Plane cuts through a loss: row -> column -> cut, each on a grey scale of its own.

    The edge of the allowed set is drawn, what lies outside is pale. The first point is a dot, the
    others are crosses. `label` is that of the colour bars.
    """
    columns = list(next(iter(panels.values())))
    fig, axes = plt.subplots(len(panels), len(columns), squeeze=False, layout="constrained",
                             figsize=(3.9 * len(columns), 3.2 * len(panels)))  # fmt: skip
    for i, row in enumerate(panels):
        for ax, column in zip(axes[i], columns, strict=True):
            cut = panels[row][column]
            allowed = np.where(cut.inside, cut.values, np.nan)
            drawn = ax.imshow(cut.values, origin="lower", extent=cut.extent, cmap="Greys_r",
                              vmin=np.nanmin(allowed), vmax=np.nanmax(allowed),
                              interpolation="none")  # fmt: skip
            veil = np.zeros((*cut.inside.shape, 4))
            veil[~cut.inside] = (1, 1, 1, 0.75)
            ax.imshow(veil, origin="lower", extent=cut.extent, interpolation="none")
            for values, levels, color, width in ((cut.inside, [0.5], OTHER, 1.5),
                                                 (allowed, 7, FAINT, 0.5)):  # fmt: skip
                lines = ax.contour(values, levels=levels, extent=cut.extent, colors=color,
                                   linewidths=width)  # fmt: skip
                lines.set_rasterized(True)  # Its vertices would make the file heavy.
            ax.plot(*cut.points[0], "o", color=THEORY, mec="white", ms=7, zorder=3)
            ax.plot(*cut.points[1:].T, "X", color=THEORY, mec="white", ms=9, ls="", zorder=3)
            ax.set(xticks=[], yticks=[], aspect="equal")
            ax.grid(False)
            fig.colorbar(drawn, ax=ax, label=label, shrink=0.85)
        axes[i, 0].set_ylabel(row)
    for ax, column in zip(axes[0], columns, strict=True):
        ax.set_title(column)
    return fig
