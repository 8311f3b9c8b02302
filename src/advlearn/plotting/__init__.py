"""Figures: arrays in, matplotlib `Figure` out. No function here calls a model."""

from advlearn.plotting.images import Slider, filters, image_grid, strips
from advlearn.plotting.landscapes import Slice, angles, bundles, hills, slices
from advlearn.plotting.lines import along_direction, curves, histograms, labelled, panels, runs
from advlearn.plotting.planes import ellipses, heatmaps, regions, separations, surface
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

__all__ = ["FAINT", "NATURAL", "OTHER", "PALETTE", "RANDOM", "ROBUST", "THEORY", "Slice",
           "Slider", "along_direction", "angles", "bundles", "curves", "ellipses", "filters",
           "heatmaps", "hills", "histograms", "image_grid", "labelled", "panels", "regions", "runs",
           "separations", "slices", "strips", "style", "surface"]  # fmt: skip
