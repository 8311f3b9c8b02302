"""Figures: arrays in, matplotlib `Figure` out. No function here calls a model."""

from advlearn.plotting.images import Slider, image_grid, strips
from advlearn.plotting.lines import along_direction, curves, histograms, runs
from advlearn.plotting.planes import heatmaps, regions, surface
from advlearn.plotting.style import (
    FAINT,
    NATURAL,
    OTHER,
    PALETTE,
    RANDOM,
    ROBUST,
    THEORY,
    style,
)

__all__ = ["FAINT", "NATURAL", "OTHER", "PALETTE", "RANDOM", "ROBUST", "THEORY", "Slider",
           "along_direction", "curves", "heatmaps", "histograms", "image_grid", "regions", "runs",
           "strips", "style", "surface"]  # fmt: skip
