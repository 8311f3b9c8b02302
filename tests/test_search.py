"""What random search promises: it only asks, every question is allowed, and it asks as published."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import Opposed, digits, uniform01
from torch import nn

from advlearn import zoo
from advlearn.attacks import search, square, toward
from advlearn.evaluation import predict
from advlearn.losses import cross_entropy, margin
from advlearn.tensors import Keyed, generator, norms
from advlearn.threats import L1, L2, Linf

THREATS, IDS = [Linf(0.2), L2(1.0)], ["linf", "l2"]


class Asked(nn.Module):
    """Remembers what the network is asked, and refuses to be differentiated."""

    def __init__(self, f):
        super().__init__()
        self.f, self.queries = f, []

    def forward(self, x):
        assert not torch.is_grad_enabled() and not x.requires_grad
        self.queries.append(x.clone())
        return torch.from_numpy(self.f(x).numpy())  # no gradient comes back through numpy


class Stubborn(nn.Module):
    """Right whatever is shown, with a loss that never moves: every proposal is refused."""

    def forward(self, x):
        return torch.tensor([[1.0, 0.0]], dtype=x.dtype).repeat(len(x), 1)


def network(name):
    return zoo.load_or_train(name, progress=False)


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_only_asks_inside_the_set_and_no_more_often_than_told(threat):
    x, y = digits(60).tensors()
    asked = Asked(network("digits-small-natural"))
    z = square(asked, x, y, threat, queries=40)
    assert 30 < len(asked.queries) <= 40 and len(asked.queries[0]) == 60
    for query in asked.queries:
        assert ((0 <= query) & (query <= 1)).all()
        # Every image is one of ours, changed by at most ε.
        near = torch.stack([norms(query - image, threat.p) for image in x]).amin(0)
        assert (near <= threat.eps * (1 + 1e-5)).all()
    left = int((predict(asked.f, z).argmax(1) == y).sum())
    assert len(asked.queries[-1]) <= left + 5 < 50, "what is fooled is asked again"


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_what_is_fooled_is_left_alone(threat):
    """The first wrong prediction ends the search: the point returned is the last one asked."""
    x, y = digits(40).tensors()
    asked = Asked(network("digits-small-natural"))
    z = square(asked, x, y, threat, queries=60)
    with torch.no_grad():
        wrong = predict(asked.f, z).argmax(1) != y
    for i in wrong.nonzero()[:, 0].tolist():
        hits = [q for q in asked.queries for image in q if torch.equal(image, z[i])]
        assert len(hits) == 1
    assert wrong.any()


def noise(threat, x, seed):
    """Points as far out as the threat allows, random otherwise."""
    sample = threat.sample(x, generator(seed)) - x
    return threat.project(x + (sample.sign() * threat.eps if threat.p == math.inf else
                               sample * (threat.eps / norms(sample, 2)).view(-1, 1, 1, 1)), x)  # fmt: skip


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
@pytest.mark.parametrize("name", ["digits-small-natural", "digits-small-pgd"])
def test_finds_more_than_noise_with_the_same_number_of_queries(name, threat):
    f, (x, y) = network(name), digits(150).tensors()
    stands = predict(f, x).argmax(1) == y
    for seed in range(200):
        stands &= predict(f, noise(threat, x, seed)).argmax(1) == y
    z = square(f, x, y, threat, queries=200)
    left = (predict(f, z).argmax(1) == y).double().mean()
    assert left < stands.double().mean() - 0.05, f"Square leaves {left:.3f}, noise {stands.double().mean():.3f}"


def test_schedule_as_published():
    published = {0: 1, 10: 1, 11: 2, 50: 2, 51: 4, 200: 4, 201: 8, 500: 8, 501: 16, 1000: 16, 1001: 32,
                 2000: 32, 2001: 64, 4000: 64, 4001: 128, 6000: 128, 6001: 256, 8000: 256, 8001: 512,
                 9999: 512}  # fmt: skip
    assert {i: 0.8 / search.covered(i, 10_000) for i in published} == published
    assert {i: 0.3 / search.covered(i, 10_000, 0.3) for i in published} == pytest.approx(published)
    assert [0.8 / search.covered(i, 1000) for i in (0, 1, 2, 5, 6, 20, 21, 999)] == [1, 1, 2, 2, 4, 4, 8, 512]


def changed(z, x):
    """Bounding box of the pixels that differ: top, bottom, left, right (inclusive)."""
    differ = (z != x).any(0)
    rows, columns = differ.any(1).nonzero()[:, 0], differ.any(0).nonzero()[:, 0]
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def test_squares_of_the_published_size_everywhere(monkeypatch):
    """On a network that refuses all, the start stays and the squares can be seen one by one."""
    asked, queries, rest, numbers, paint = Asked(Stubborn()), 400, [], [], search._paint
    monkeypatch.setattr(search, "_paint", lambda *a: numbers.append(a[-1]) or rest.append(paint(*a)) or rest[-1])
    x = torch.full((3, 2, 14, 11), 0.5, dtype=torch.float64)
    start = uniform01(3, 2, 14, 11)
    square(asked, x, torch.zeros(3, dtype=torch.long), Linf(0.1), queries=queries, start=start)
    first, *shown = asked.queries
    news = [torch.stack([z for z, b in zip(q, first, strict=True) if not torch.equal(z, b)] or [first[0, :0]])
            for q in rest]  # fmt: skip
    news = [q for q in news if q.numel()]
    assert len(news) == len(shown) and all(map(torch.equal, news, shown)), "asked what it knew, or asked twice"
    assert torch.equal(first, first[:, :, :1].expand_as(first)), "stripes"
    assert torch.allclose((first - 0.5).abs(), torch.full_like(x, 0.1)) and len(rest) == queries - 1
    assert first.std(dim=(0, 3)).min() > 0 and first.std(dim=(1, 3)).min() > 0
    assert torch.cat(numbers)[:, :2].unique(dim=0).shape == (3 * (queries - 1), 2), "numbers used twice"
    seen, colours = [], set()
    for i, query in enumerate(rest):
        side = min(max(round(math.sqrt(0.8 * 14 * 11 / 2 ** sum(25 * i > t for t in search.HALVED_AT))), 1), 11)
        assert torch.allclose((query - 0.5).abs(), torch.full_like(x, 0.1)), "a pixel between −ε and ε"
        for z, before in zip(query, first, strict=True):
            if not torch.equal(z, before):
                top, bottom, left, right = changed(z, before)
                assert bottom - top < side and right - left < side
                window = z[:, top : bottom + 1, left : right + 1]
                for channel, old in zip(window, before[:, top : bottom + 1, left : right + 1], strict=True):
                    assert torch.equal(channel, old) or channel.amin() == channel.amax(), "one sign per channel"
                if (bottom - top, right - left) == (side - 1, side - 1):
                    colours.add(tuple((window.amax((1, 2)) > 0.5).tolist()))
                seen.append((top, bottom, left, right))
    tops, bottoms, lefts, rights = map(set, zip(*seen, strict=True))
    assert 0 in tops and 13 in bottoms and 0 in lefts and 10 in rights, "an edge is never reached"
    assert len(colours) == 4, "the channels' signs are not independent"
    boxes = [[changed(z, b) for z, b in zip(q, first, strict=True) if not torch.equal(z, b)] for q in rest[-50:]]
    assert any(len(set(row)) > 1 for row in boxes), "all examples get the same square"


# --- ℓ2, written once more from the paper, one image at a time ----------------------------------


def bump(height, width):
    """Equation (2) of the paper, with r and s counted from 1."""
    n = max(height, width) // 2
    value = np.zeros((height, width))
    for r in range(1, height + 1):
        for s in range(1, width + 1):
            m = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
            value[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
    return value / np.linalg.norm(value)


def eta(side):
    halves = [bump(side // 2, side)] if side > 1 else []
    value = np.concatenate([*halves, -bump(side - side // 2, side)])
    return value / np.linalg.norm(value)


def shifted(z, x, eps, side, u):
    """Algorithm 3 of the paper for one image: numpy arrays (C, H, W), u in (0, 1)."""
    d, (channels, height, width) = (z - x).copy(), x.shape
    room = np.array([height, width, height, width]) - side + 1
    r1, s1, r2, s2 = np.floor(u[:4] * room).astype(int)
    one, two = np.s_[r1 : r1 + side, s1 : s1 + side], np.s_[r2 : r2 + side, s2 : s2 + side]
    unused = max(eps**2 - (d**2).sum(), 0)
    bumps = eta(side).T if u[4] < 0.5 else eta(side)
    for c in range(channels):
        union = np.zeros((height, width), dtype=bool)
        union[one] = union[two] = True
        available = math.sqrt((d[c][union] ** 2).sum() + unused / channels)
        new = np.sign(u[5 + c] - 0.5) * bumps + d[c][one] / max(np.linalg.norm(d[c][one]), 1e-300)
        d[c][two] = 0
        d[c][one] = new / np.linalg.norm(new) * available
    return np.clip(x + d * eps / np.linalg.norm(d), 0, 1)


@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 9)])
def test_l2_step_equals_the_algorithm(shape, side):
    x = uniform01(20, *shape).mul(3).sub(1).clamp(0, 1)  # a third of the pixels black, a third white
    threat = L2(0.7)
    z = search._tiles(x, threat, Keyed((0, 0), torch.arange(20)))
    for seed in (1, 2):
        u = uniform01(20, 5 + shape[0], seed=seed)
        ours = search._shift(z, x, threat, side, u)
        by_hand = [shifted(*pair, 0.7, side, row)
                   for *pair, row in zip(z.numpy(), x.numpy(), u.numpy(), strict=True)]  # fmt: skip
        np.testing.assert_allclose(ours.numpy(), np.stack(by_hand), atol=1e-12)
        z = ours


def test_l2_squares_are_odd_and_at_least_three_wide(monkeypatch):
    sides, window = [], search._window
    monkeypatch.setattr(search, "_window", lambda u, side, x: sides.append(side) or window(u, side, x))
    x = torch.full((2, 1, 28, 28), 0.5)
    square(Stubborn(), x, torch.zeros(2, dtype=torch.long), L2(0.4), queries=1000)
    wanted = [max(round(math.sqrt(0.8 * 784 / 2**k)), 3) // 2 * 2 + 1 for k in range(10)]
    assert sides[::2] == sides[1::2] and sorted(set(sides)) == sorted(set(wanted)) and wanted[:3] == [25, 19, 13]


@pytest.mark.parametrize("shape, side", [((2, 28, 28), 5), ((1, 8, 8), 1), ((1, 12, 17), 2), ((1, 3, 3), 1)])
def test_l2_start_is_made_of_tiles(shape, side):
    x = torch.full((30, *shape), 0.5, dtype=torch.float64)
    d = search._tiles(x, L2(0.3), Keyed(0, torch.arange(30))) - x
    assert torch.allclose(norms(d, 2), torch.tensor(0.3, dtype=torch.float64))
    _, height, width = shape
    top, left, upright, signs = (height % side) // 2, (width % side) // 2, set(), set()
    tile = eta(side) / math.sqrt(shape[0] * (height // side) * (width // side)) * 0.3
    for i in range(height // side):
        for j in range(width // side):
            at = np.s_[top + i * side : top + (i + 1) * side, left + j * side : left + (j + 1) * side]
            for found in d[(slice(None), slice(None), *at)].flatten(0, 1).numpy():
                fits = [(turned, sign) for turned in (0, 1) for sign in (-1, 1)
                        if np.allclose(found, sign * (tile.T if turned else tile))]  # fmt: skip
                assert fits
                upright.add(fits[0][0])
                signs.add(fits[0][1])
    assert signs == {-1, 1} and upright == ({0, 1} if side > 1 else {0})


def test_l2_search_uses_the_whole_radius_where_no_pixel_is_at_the_box():
    x = torch.full((10, 1, 8, 8), 0.5, dtype=torch.float64)
    asked = Asked(Opposed((1, 8, 8)))
    square(asked, x, torch.zeros(10, dtype=torch.long), L2(0.4), queries=50)
    for query in asked.queries:
        assert torch.allclose(norms(query - 0.5, 2), torch.tensor(0.4, dtype=torch.float64))


# --- randomness, losses, arguments --------------------------------------------------------------


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_the_start_is_the_key_of_the_search(threat):
    f, (x, y) = network("digits-small-pgd"), digits(30).tensors()
    run = partial(square, f, x, y, threat, queries=30)
    one, two = (threat.sample(x, generator(seed)) for seed in (0, 1))
    assert torch.equal(run(start=one), run(start=one.clone()))
    assert not torch.equal(run(start=one), run(start=two))
    assert not torch.equal(run(start=one), run(start=one, seed=1))
    assert not torch.equal(run(start=one, queries=1), run(start=one, seed=1, queries=1))
    assert torch.equal(run(), run(start=x)), "without a start the image is the key"


@pytest.mark.parametrize("threat", THREATS, ids=IDS)
def test_every_example_searches_by_itself(threat):
    """Others that are fooled, and leave, change nothing for those that stand."""
    f, (x, y) = network("digits-small-natural").double(), digits(40).tensors()
    x = x.double()
    whole = square(f, x, y, threat, queries=150)
    order = torch.randperm(40, generator=generator(0))
    parts = torch.cat([square(f, x[rows], y[rows], threat, queries=150) for rows in order.split(9)])
    assert torch.allclose(parts[order.argsort()], whole, rtol=0, atol=1e-9)


def test_keeps_what_raises_the_loss():
    """Whichever loss is given: the point returned is never worse than the first."""
    f, (x, y) = network("digits-small-pgd"), digits(40).tensors()
    for loss in (margin, cross_entropy):
        reached = [loss(predict(f, square(f, x, y, Linf(0.1), loss=loss, queries=n)), y) for n in (1, 50)]
        assert (reached[1] >= reached[0]).all() and reached[1].mean() > reached[0].mean() + 0.03


def test_a_wrong_prediction_is_kept_whatever_the_loss_says():
    f, (x, y) = network("digits-small-natural"), digits(60).tensors()
    right = [(predict(f, square(f, x, y, Linf(0.3), queries=n, loss=lambda logits, y: 0 * logits[:, 0])).argmax(1)
              == y).sum() for n in (1, 100)]  # fmt: skip
    assert right[1] < right[0] - 5


def test_toward_stops_at_any_wrong_class_and_sees_each_example_with_its_own_target():
    f, (x, y) = network("digits-small-natural"), digits(60).tensors()
    logits = predict(f, x).scatter(1, y[:, None], -torch.inf)
    second = logits.topk(2).indices[:, 1]
    z = toward(2, partial(square, queries=300), margin)(f, x, y, Linf(0.2), start=None)
    plain = square(f, x, y, Linf(0.2), queries=300)
    after, other = predict(f, z), predict(f, plain)
    assert (after.argmax(1) != y).double().mean() > 0.5
    # Closer to its target than the untargeted search is, on average.
    assert -margin(after, second).mean() < -margin(other, second).mean() or (
        (after.argmax(1) == second).sum() > (other.argmax(1) == second).sum())  # fmt: skip


@pytest.mark.parametrize("threat", [L1(3.0), None, "ball"])
def test_refuses_other_threats(threat):
    x, y = digits(2).tensors()
    with pytest.raises(ValueError, match="square: threat=.*, allowed are Linf and L2"):
        square(Stubborn(), x, y, threat)
