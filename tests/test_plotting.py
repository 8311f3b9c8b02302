"""What a figure must not do: hide a name."""

import itertools

import matplotlib.pyplot as plt
import pytest

from advlearn import plotting


@pytest.mark.parametrize("second", [(840, 78.8), (800, 80.0), (840, 78.5), (360, 0.0)])
def test_names_of_neighbouring_points_do_not_overlap(second):
    points = {"natural": (120, 0.0), "PGD-5": (360, 79.0), "mixture": (840, 78.5), "TRADES": second}
    fig = plotting.labelled(points, xlabel="gradients", ylabel="accuracy")
    fig.canvas.draw()
    (ax,) = fig.axes
    boxes = {t.get_text(): t.get_window_extent() for t in ax.texts}
    assert boxes.keys() == points.keys()
    for a, b in itertools.combinations(boxes, 2):
        assert not boxes[a].overlaps(boxes[b]), f"{a} and {b}"
    plt.close(fig)
