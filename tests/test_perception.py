"""Gradients and inversions as measured in chapter 7, on networks with known answers."""

import json
import math

import pytest
import torch
from torch import nn

from advlearn import models, perception, results, storage
from advlearn.data import load
from advlearn.tensors import generator, norms


def test_gradient_of_a_linear_network_is_its_weight():
    weight = torch.randn(784, generator=generator(0))
    f = nn.Sequential(nn.Flatten(), nn.Linear(784, 2, bias=False))
    with torch.no_grad():
        f[1].weight.copy_(torch.stack([torch.zeros(784), weight]))
    x = torch.rand(5, 1, 28, 28, generator=generator(1))
    y = torch.tensor([0, 1, 0, 1, 0])
    g = perception.gradients(f, x, y, batch_size=2)
    assert g.dtype == torch.float64 and g.shape == x.shape
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])  # The loss rises against the label.
    wanted = signs[:, None] * (weight / weight.norm())
    assert torch.allclose(g.flatten(1), wanted.double(), atol=1e-6)
    assert f[1].weight.dtype == torch.float32  # The caller's network stays as it was.


def test_gradient_survives_where_float32_rounds_it_off():
    f = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        f[1].weight.copy_(torch.tensor([[200.0, 0, 0, 0], [0, 0, 0, 0]]))
    x = torch.ones(1, 1, 2, 2)
    g = perception.gradients(f, x, torch.tensor([0]))
    assert norms(g, 2).item() == pytest.approx(1)  # softmax(−200) is below float32's smallest number.


def test_smoothness_tells_level_columns_and_checkerboards_apart():
    side = torch.arange(8)
    level = torch.ones(8, 8)
    striped = (1.0 - 2 * (side % 2)).expand(8, 8)  # Changes along a row, level down a column.
    board = striped * striped.T
    pictures = perception.unit(torch.stack([level, striped, board])[:, None].double())
    row, column = perception.smoothness(pictures)
    assert torch.allclose(row, torch.tensor([7, -7, -7]).double() / 8)
    assert torch.allclose(column, torch.tensor([7, 7, -7]).double() / 8)


def test_way_out_goes_to_the_nearest_of_another_class():
    pool = torch.tensor([[0.1, 0.0], [0.5, 0.0], [0.0, 0.4], [0.0, 0.3]]).view(4, 1, 1, 2)
    labels = torch.tensor([0, 1, 1, 0])
    x, y = torch.zeros(2, 1, 1, 2), torch.tensor([0, 1])
    way = perception.way_out(x, y, pool, labels).flatten(1)
    assert torch.allclose(way, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())
    own, control = perception.cosines(way.view(2, 1, 1, 2), way.view(2, 1, 1, 2))
    assert own.tolist() == [1, 1] and control.tolist() == [0, 0]
    assert perception.cosines(-way, way)[0].tolist() == [-1, -1], "away is not towards"
    with pytest.raises(ValueError, match="image 1 of class 1"):
        perception.way_out(x, torch.tensor([0, 1]), pool[1:3], labels[1:3])


def test_read_back_reports_what_the_walk_did():
    f = models.mlp((1, 8, 8), hidden=(200,), seed=0)
    x = load("digits").tensors()[0]
    z, found = perception.read_back(f, x[:4], x[4:8], steps=60, step_size=0.1, rectified=False)
    assert found["distance"] < 0.1 * found["distance_before"]
    assert found["off_before"] == pytest.approx(float(norms(x[:4] - x[4:8], 2).mean()), abs=1e-5)
    assert found["off"] == pytest.approx(float(norms(z - x[:4], 2).mean()), abs=1e-5)
    assert found["moved"] == pytest.approx(float(norms(z - x[4:8], 2).mean()), abs=1e-5)
    assert found["off"] < found["off_before"]  # 200 numbers of 64 pixels tell the image.


def test_pictures_come_back_and_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "shipped", lambda: tmp_path)
    assert results.recorded_images("some") == {}
    first = torch.rand(2, 3, 4, 4, generator=generator(0))
    results.store_images("some", {"first": first, "over": torch.full((1, 1, 2, 2), 1.2)})
    results.store_images("some", {"second": torch.zeros(1, 1, 2, 2)})
    found = results.recorded_images("some")
    assert set(found) == {"first", "over", "second"}
    assert (found["first"] - first).abs().max() <= 0.5 / 255 + 1e-6
    assert found["over"].max() == 1 and not math.isnan(float(found["second"].sum()))
    before = (tmp_path / "results" / "some.safetensors").read_bytes()
    results.store_images("some", {})
    assert (tmp_path / "results" / "some.safetensors").read_bytes() == before


def test_runs_left_to_their_chapter_say_so_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "shipped", lambda: tmp_path)
    for tabled in (False, True):
        results.store("some", [{"profile": "cpu", "seed": 0, "values": {}}], tabled=tabled)
        file = json.loads((tmp_path / "results" / "some.json").read_text("utf8"))
        assert file.get("tabled", True) is tabled and len(results.recorded("some")) == 1
