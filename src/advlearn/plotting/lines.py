"""Curves, runs and histograms."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from advlearn.plotting.style import FAINT, PALETTE, RANDOM


def curves(
    x: Sequence[float] | Mapping[str, Sequence[float]],
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
        x: common abscissae, or name -> abscissae.
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
        at = x[name] if isinstance(x, Mapping) else x
        ax.plot(at, y, color=color, ls=line, marker="o" if name in dots else "", label=name)
        if limits:
            ax.fill_between(at, *limits, color=color, alpha=0.2, lw=0)
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


def runs(
    panels: Mapping[str, Sequence[np.ndarray]],
    *,
    colors: Mapping[str, str],
    titles: Sequence[str],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Many runs per panel as thin lines: one row per name, with an axis of its own, and columns.

    Args:
        panels: name -> one array (runs, T) per column.
        titles: of the columns.
    """
    n = len(titles)
    fig, axes = plt.subplots(len(panels), n, sharex=True, sharey="row", squeeze=False,
                             layout="constrained", dpi=90,
                             figsize=(2.1 * n + 0.6, 1.9 * len(panels) + 0.4))  # fmt: skip
    for row, (name, columns) in zip(axes, panels.items(), strict=True):
        for ax, lines in zip(row, columns, strict=True):
            ax.plot(np.asarray(lines).T, color=colors[name], lw=0.8, alpha=0.6, rasterized=True)
        row[0].set_ylabel(f"{name}\n{ylabel}")
        row[0].set_ylim(bottom=0)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    fig.supxlabel(xlabel, fontsize=11)
    return fig


def panels(
    x: Sequence[float] | Sequence[Sequence[float]],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str = "",
    colors: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    ylim: tuple[float, float] | None = None,
    doubling: bool = False,
) -> Figure:
    """Named curves in panels side by side, at most two in a row.

    Args:
        x: common abscissae, or one sequence per panel.
        curves: title -> name -> y.
        colors: name -> colour; others follow the palette.
        dashed: names drawn dashed.
        doubling: the common abscissae lie on a logarithmic axis, each marked with its value.
    """
    columns = min(len(curves), 2)
    lines = -(-len(curves) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.1 * columns, 2.9 * lines), squeeze=False,
                             layout="constrained", sharey=ylim is not None)  # fmt: skip
    several = len(x) == len(curves) and isinstance(x[0], (Sequence, np.ndarray))
    for i, (ax, (title, named)) in enumerate(zip(axes.flat, curves.items(), strict=False)):
        for color, (name, y) in zip(itertools.cycle(PALETTE), named.items(), strict=False):
            ax.plot(x[i] if several else x, y, color=(colors or {}).get(name, color), label=name,
                    ls="--" if name in dashed else "-", marker="o")  # fmt: skip
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel if i % columns == 0 else "")
        if ylim:
            ax.set_ylim(*ylim)
        if doubling:
            ax.set_xscale("log", base=2)
            ax.set_xticks(x, [str(value) for value in x])
        ax.legend(fontsize=9)
    return fig


def labelled(
    points: Mapping[str, tuple[float, float]] | Mapping[str, Mapping[str, tuple[float, float]]], *,
    xlabel: str, ylabel: str,
) -> Figure:  # fmt: skip
    """Named points in the plane, each with its name beside it, inside the frame.

    A name stands where nothing else does; where there is no such place, where it hides least.

    Args:
        points: name -> (x, y); or title -> name -> (x, y), in panels, two in a row.
    """
    if isinstance(next(iter(points.values())), Mapping):
        rows = -(-len(points) // 2)
        fig, grid = plt.subplots(rows, 2, figsize=(8.2, 3.1 * rows), squeeze=False, layout="constrained")
        titled = dict(zip(points, grid.flat, strict=False))
        for title, ax in titled.items():
            ax.set_title(title)
        for ax in grid.flat[len(points):]:
            ax.remove()
    else:
        fig, ax = plt.subplots(layout="constrained")
        points, titled = {"": points}, {"": ax}
    for title, ax in titled.items():
        colors = itertools.cycle(PALETTE if len(points) == 1 else PALETTE[:1])
        for color, at in zip(colors, points[title].values(), strict=False):
            ax.plot(*at, "o", color=color, ms=7)
        ax.margins(x=0.2, y=0.12)
        left = ax.get_subplotspec().is_first_col()
        ax.set(xlabel=xlabel, ylabel=ylabel if left else "")
    fig.canvas.draw()  # Only now is it known where a name would stand.
    for title, ax in titled.items():
        _name(ax, points[title])
    return fig


PLACES = ((7, 4, "left"), (7, -12, "left"), (-7, 4, "right"), (-7, -12, "right"), (0, 8, "center"),
          (0, -16, "center"), (9, 16, "left"), (9, -24, "left"))  # Of a name, seen from its point.


def _name(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the names beside points that are drawn already."""
    frame, taken = ax.get_window_extent(), [
        Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in ax.transData.transform([*points.values()])]
    for name, at in points.items():
        text = ax.annotate(name, at, xytext=(7, 4), textcoords="offset points", fontsize=9)
        hidden = {}
        for place in PLACES:
            text.set(position=place[:2], ha=place[2])
            box = text.get_window_extent()
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            hidden[place] = (not inside, box.count_overlaps(taken))
        best = min(hidden, key=hidden.get)  # The first of the best.
        text.set(position=best[:2], ha=best[2])
        taken.append(text.get_window_extent())
