"""What figures must show, and must not do: hide a name."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from advlearn import plotting


@pytest.mark.parametrize("second", [(840, 78.8), (800, 80.0), (840, 78.5), (360, 0.0)])
def test_names_of_neighbouring_points_do_not_overlap(second):
    points = {"natural": (120, 0.0), "PGD-2": (360, 79.0), "PGD-5": (720, 81.5),
              "mixture": (840, 78.5), "TRADES": second}
    fig = plotting.labelled(points, xlabel="gradients", ylabel="accuracy")
    fig.canvas.draw()
    (ax,) = fig.axes
    boxes = {t.get_text(): t.get_window_extent() for t in ax.texts}
    assert boxes.keys() == points.keys()
    for a, b in itertools.combinations(boxes, 2):
        assert not boxes[a].overlaps(boxes[b]), f"{a} and {b}"
    plt.close(fig)


def inside(box, frame):
    return frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1


def test_names_stay_inside_where_there_is_no_free_place():
    points = {f"network {i}": (0.0, 0.0) for i in range(12)} | {"far": (1.0, 1.0)}
    fig = plotting.labelled(points, xlabel="x", ylabel="y")
    fig.canvas.draw()
    (ax,) = fig.axes
    boxes = [t.get_window_extent() for t in ax.texts]
    assert all(inside(box, ax.get_window_extent()) for box in boxes)
    free = [b for i, b in enumerate(boxes[:12]) if not b.count_overlaps(boxes[:i])]
    assert len(free) >= 4, "names that find a place do not lie on each other"
    plt.close(fig)


def test_curves_take_abscissae_of_their_own():
    x = {"a": [0, 1], "b": [5, 6]}
    fig = plotting.curves(x, {"a": [1, 2], "b": ([1, 2], [0, 1], [2, 3])}, xlabel="x", ylabel="y")
    (ax,) = fig.axes
    assert [line.get_xdata().tolist() for line in ax.lines] == [[0, 1], [5, 6]]
    (band,) = ax.collections
    assert band.get_paths()[0].get_extents().bounds == (5, 0, 1, 3)
    plt.close(fig)


def test_names_of_crowded_points_in_panels_do_not_overlap():
    crowd = {"width 64": (33.6, 25.3), "width 32": (28.1, 23.5), "width 16": (22.3, 15.4),
             "width 8": (5.7, 12.7), "pooled conv": (9.6, 4.0), "small conv": (4.1, 3.1),
             "linear": (6.8, 3.0), "MLP": (9.6, 1.2)}  # fmt: skip
    fig = plotting.labelled({"a": crowd, "b": crowd, "c": crowd, "d": crowd}, xlabel="x", ylabel="y")
    fig.canvas.draw()
    for ax in fig.axes:
        frame = ax.get_window_extent()
        boxes = {t.get_text(): t.get_window_extent() for t in ax.texts}
        for a, b in itertools.combinations(boxes, 2):
            assert not boxes[a].overlaps(boxes[b]), f"{a} and {b}"
        assert all(inside(box, frame) for box in boxes.values())
    plt.close(fig)


def test_named_points_in_panels():
    panels = {"one": {"a": (0, 0), "b": (1, 1)}, "two": {"a": (5, 5)}, "three": {"c": (0, 1)}}
    fig = plotting.labelled(panels, xlabel="x", ylabel="y")
    assert [ax.get_title() for ax in fig.axes] == list(panels), "the fourth place stays empty"
    assert [[t.get_text() for t in ax.texts] for ax in fig.axes] == [["a", "b"], ["a"], ["c"]]
    assert [ax.get_ylabel() for ax in fig.axes] == ["y", "", "y"]
    assert len({line.get_color() for ax in fig.axes for line in ax.lines}) == 1
    plt.close(fig)


def test_the_boundary_of_two_gaussians_is_where_both_are_as_likely():
    mu, sigma = np.array([1.0, 0.3]), np.array([[1.0, 0.2], [0.2, 0.3]])
    fig = plotting.ellipses({"a": (mu, sigma)}, np.eye(2), np.array([1, -1]))
    (ax,) = fig.axes
    *_, boundary = ax.lines
    assert np.allclose(boundary.get_xydata() @ np.linalg.solve(sigma, mu), 0)
    assert len(np.unique(boundary.get_xydata(), axis=0)) == 2
    ellipse = ax.lines[1].get_xydata() - mu
    assert np.allclose((ellipse * np.linalg.solve(sigma, ellipse.T).T).sum(1), 1)
    (arrow,) = ax.texts
    way = np.array(arrow.xy) - np.array(arrow.xyann)
    across = np.linalg.solve(sigma, mu)
    assert np.isclose(way @ across, -np.linalg.norm(way) * np.linalg.norm(across))
