"""One look, and one colour per thing through the whole book (Okabe & Ito, for colour-blind readers)."""

from __future__ import annotations

import matplotlib as mpl

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
