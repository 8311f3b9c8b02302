"""Relabelled training sets: what is in them, what is refused, and what an interrupt leaves."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import digits, same_state, state_of
from torch import nn

from advlearn import models, parts, relabelled, zoo
from advlearn.attacks import pgd
from advlearn.evaluation import accuracy, worst_case
from advlearn.losses import cross_entropy
from advlearn.relabelled import inverted, next_class, noisy, random_targets, renamed, toward
from advlearn.robustfeatures import ARCHITECTURES, agreement, robustness, scatter, trained, transfer
from advlearn.tensors import norms
from advlearn.threats import L2, Linf

THREAT = L2(1.0)


@pytest.fixture(scope="module")
def natural():
    return zoo.load_or_train("digits-small-natural", progress=False)


@pytest.fixture(scope="module")
def images():
    return digits(600, "train")


@pytest.fixture(scope="module")
def random_set(natural, images):
    return toward(natural, images, random_targets(images), THREAT, steps=10)


# --- targets ------------------------------------------------------------------------------------


def test_random_targets_are_wrong_uniform_and_keyed(images):
    t = random_targets(images)
    assert t.dtype == torch.int64 and (t != images.labels).all()
    shift = ((t - images.labels) % 10).bincount(minlength=10)
    assert shift[0] == 0 and (shift[1:] > 35).all() and (shift[1:] < 105).all(), "600 / 9 = 67 each"
    rows = torch.tensor([5, 3, 100])
    assert torch.equal(random_targets(images.take(rows)), t[rows]), "a subset draws the same"
    assert not torch.equal(random_targets(images, 1), t)


def test_next_class(images):
    t = next_class(images)
    assert torch.equal(t[images.labels < 9], images.labels[images.labels < 9] + 1)
    assert (t[images.labels == 9] == 0).all()


# --- the sets -----------------------------------------------------------------------------------


def test_toward_is_targeted_pgd_rounded(natural, images, random_set):
    x, t = images.tensors()[0], random_targets(images)
    z = pgd(natural, x, t, THREAT, steps=10, step_size=0.25, loss=lambda v, y: -cross_entropy(v, y))
    z8 = (255 * z).round().to(torch.uint8)
    assert (random_set.images != z8).float().mean() < 1e-3, "up to rounding in batches"
    assert torch.equal(random_set.labels, t) and torch.equal(random_set.index, images.index)
    assert random_set.images.dtype == torch.uint8 and random_set.name.startswith("digits, toward ")
    moved = norms(random_set.tensors()[0] - x, 2)
    assert moved.max() <= 1 + 64**0.5 / 510 and moved.mean() > 0.9


def test_the_attack_reaches_its_target_and_noise_does_not(natural, images, random_set):
    assert accuracy(natural, *random_set.tensors()) > 0.5
    control = noisy(images, random_set.labels, THREAT)
    assert accuracy(natural, *control.tensors()) < 0.05
    lengths = norms(control.tensors()[0] - images.tensors()[0], 2)
    assert (lengths - 1).abs().max() <= 64**0.5 / 510, "noise of the attack's size, also at the box"
    same = renamed(images, random_set.labels)
    assert torch.equal(same.images, images.images) and torch.equal(same.labels, random_set.labels)


def check_relabelled(natural, images, made):
    """What D_rand must be: near the originals, wrongly labelled, and of the label to the network."""
    assert (made.labels != images.labels).all(), "a label is right"
    assert norms(made.tensors()[0] - images.tensors()[0], 2).max() <= 1 + 64**0.5 / 510, "too far"
    assert accuracy(natural, *made.tensors()) > 0.4, "the network does not see the label"
    assert torch.equal(made.index, images.index), "another order"


def test_planted_mistakes_are_caught(natural, images, random_set, monkeypatch):
    check_relabelled(natural, images, random_set)
    few = images.take(torch.arange(200))
    make = partial(toward, natural, few, random_targets(few), THREAT, steps=10)
    check_relabelled(natural, few, make())
    with pytest.raises(AssertionError, match="a label is right"):
        check_relabelled(natural, few, replace(make(), labels=few.labels))
    with pytest.raises(AssertionError, match="does not see"):
        check_relabelled(natural, few, noisy(few, random_targets(few), THREAT))
    with pytest.raises(AssertionError, match="another order"):
        check_relabelled(natural, few, replace(make(), index=few.index.flip(0)))
    with monkeypatch.context() as planted, pytest.raises(AssertionError, match="too far"):
        planted.setattr(L2, "project", lambda self, z, x: z.clamp(0, 1))
        check_relabelled(natural, few, make(step_size=0.5))
    with monkeypatch.context() as planted, pytest.raises(AssertionError, match="does not see"):
        planted.setattr(relabelled, "cross_entropy", lambda v, t: -cross_entropy(v, t))
        check_relabelled(natural, few, make())


def test_inverted(natural, images):
    few = images.take(torch.arange(60))
    robust = zoo.load_or_train("digits-small-pgd", progress=False)
    made = inverted(robust, few, steps=60)
    assert torch.equal(made.labels, few.labels) and made.name.startswith("digits, inverted ")
    assert accuracy(robust, *made.tensors()) > 0.9, "the label is that of the target, not of the start"
    start = inverted(robust, few, steps=0)
    assert (start.images != few.images).flatten(1).any(1).all(), "it never starts at the image itself"
    rows = [int((few.images == z).flatten(1).all(1).nonzero()[0]) for z in start.images]
    assert sorted(rows) == list(range(60)), "each image is the start of one"
    near = inverted(robust, few, threat=L2(0.5), steps=20)
    assert norms(near.tensors()[0] - start.tensors()[0], 2).max() <= 0.5 + 64**0.5 / 510
    grey = inverted(natural, few, start="noise", steps=0).tensors()[0]
    assert abs(float(grey.mean()) - 0.5) < 0.02


def test_the_network_and_the_images_are_left_alone(natural, images):
    few = images.take(torch.arange(20))
    before, random, pixels = state_of(natural), torch.get_rng_state(), few.images.clone()
    toward(natural, few, next_class(few), THREAT, steps=2)
    inverted(natural, few, steps=2)
    assert same_state(state_of(natural), before) and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(few.images, pixels) and torch.equal(few.labels, images.labels[:20])


def test_hashes_tell_recipes_apart(natural, images):
    few = images.take(torch.arange(20))
    make = partial(toward, natural, few, next_class(few), THREAT, steps=1)
    name = make().name
    assert make().name == name
    other = zoo.load_or_train("digits-small-pgd", progress=False)
    names = {name, make(step_size=0.1).name, toward(natural, few, next_class(few), L2(0.9), steps=1).name,
             toward(natural, few, random_targets(few), THREAT, steps=1).name,
             toward(other, few, next_class(few), THREAT, steps=1).name,
             toward(natural, images.take(torch.arange(1, 21)), next_class(images)[1:21], THREAT, steps=1).name}  # fmt: skip
    assert len(names) == 6


# --- what is refused ----------------------------------------------------------------------------


def test_refused_networks(images):
    t = next_class(images)
    colour, ten = models.small_conv((3, 8, 8)), models.small_conv((1, 8, 8))
    for build in (lambda f: toward(f, images, t, THREAT), lambda f: inverted(f, images)):
        with pytest.raises(ValueError, match=r"does not take images \(1, 8, 8\) of digits"):
            build(colour)
        with pytest.raises(ValueError, match=r"does not take images \(1, 8, 8\) of digits"):
            build(models.small_conv())
        with pytest.raises(ValueError, match="the network tells 12 classes apart, digits has 10"):
            build(models.small_conv((1, 8, 8), classes=12))
        with pytest.raises(ValueError, match="the network tells 3 classes apart"):
            build(models.small_conv((1, 8, 8), classes=3))
    with torch.no_grad():
        ten[-1].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits of image 0 are not finite"):
        toward(ten, images, t, THREAT)


def test_refused_targets(natural, images):
    t = next_class(images)
    t[7] = images.labels[7]
    for build in (partial(toward, natural, images), partial(noisy, images), lambda t, _: renamed(images, t)):
        with pytest.raises(ValueError, match=rf"the target of image 7 is its label, {int(t[7])};"):
            build(t, THREAT)
        with pytest.raises(ValueError, match=r"targets: they must be int64, one per image, \(600,\)"):
            build(t[:5], THREAT)
        with pytest.raises(ValueError, match="targets: they must be int64"):
            build(t.float(), THREAT)
        with pytest.raises(ValueError, match="label 10 at index 3, allowed are 0 to 9"):
            build(torch.where(torch.arange(600) == 3, 10, next_class(images)), THREAT)


def test_other_bad_input(natural, images):
    with pytest.raises(ValueError, match="inverted: start='grey' for 600 images"):
        inverted(natural, images, start="grey")
    with pytest.raises(ValueError, match="inverted: start='image' for 1 images"):
        inverted(natural, images.take(torch.arange(1)))
    with pytest.raises(ValueError, match="has a radius per image"):
        toward(natural, images, next_class(images), L2(torch.ones(600)))


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "SIZE", 16)


def test_an_interrupted_build_resumes(natural, images, tmp_path, monkeypatch, small_parts):
    few, folder = images.take(torch.arange(40)), tmp_path / "D"
    make = partial(toward, natural, few, next_class(few), THREAT, steps=2)
    whole, put, made = make(), parts.put, []

    def stop_at_the_second(folder, i, part):
        if i == 1:
            raise KeyboardInterrupt
        put(folder, i, part)

    monkeypatch.setattr(parts, "put", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(folder=folder)
    assert sorted(p.name for p in folder.iterdir()) == ["part-0000.safetensors", "recipe.json"]
    with pytest.raises(ValueError, match="is not finished: part 1 of 3 is missing"):
        parts.read(folder)
    monkeypatch.setattr(parts, "put", lambda *args: (made.append(args[1]), put(*args)))
    again = make(folder=folder)
    assert made == [1, 2], "the finished part is not made again"
    read = parts.read(folder)
    for found in (again, read, make(folder=folder)):
        assert found.name == whole.name and found.classes == few.classes
        for key in ("images", "labels", "index"):
            assert torch.equal(getattr(found, key), getattr(whole, key)), key
    assert made == [1, 2], "a finished build is read"
    about = json.loads((folder / "recipe.json").read_text())
    assert about["recipe"]["network"] == relabelled.fingerprint(natural)
    assert {"date", "commit", "torch", "sha256"} <= about.keys()
    assert about["recipe"] | {"kind": "toward", "eps": 1.0, "norm": "ℓ2", "steps": 2} == about["recipe"]


def test_a_damaged_part_is_made_again(natural, images, tmp_path, small_parts):
    few, folder = images.take(torch.arange(40)), tmp_path / "D"
    make = partial(toward, natural, few, next_class(few), THREAT, steps=2, folder=folder)
    whole = make()
    (folder / "part-0001.safetensors").write_bytes(b"half a fi")
    with pytest.warns(UserWarning, match="part-0001.safetensors is damaged"):
        assert torch.equal(make().images, whole.images)
    assert torch.equal(parts.read(folder).images, whole.images)


def test_refused_folders(natural, images, tmp_path):
    few, folder = images.take(torch.arange(20)), tmp_path / "D"
    noisy(few, next_class(few), THREAT, folder=folder)
    with pytest.raises(ValueError, match="already holds another recipe: its seed is 0, asked for is 1$"):
        noisy(few, next_class(few), THREAT, seed=1, folder=folder)
    with pytest.raises(ValueError, match="its kind is 'noisy', asked for is 'toward'; its network is None"):
        toward(natural, few, next_class(few), THREAT, folder=folder)
    with pytest.raises(ValueError, match="its images is .*, asked for is "):
        changed = replace(few, images=255 - few.images)
        noisy(changed, next_class(few), THREAT, folder=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds other files; name an empty folder"):
        noisy(few, next_class(few), THREAT, folder=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for wrong in (tmp_path / "mine", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no training set"):
            parts.read(wrong)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json is damaged"):
        parts.read(folder)


# --- the experiments ----------------------------------------------------------------------------


def always(k):
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        f[1].weight.zero_()
        f[1].bias.copy_(torch.nn.functional.one_hot(torch.tensor(k), 10).float())
    return f


def test_agreement_counts_both_labels():
    test = digits(200)
    found = agreement(always(3), test)
    assert found["true"] == float((test.labels == 3).double().mean())
    assert found["next"] == float((test.labels == 2).double().mean()) and found["n"] == 200
    low, high = found["true_interval"]
    assert low < found["true"] < high
    assert agreement(always(0), test)["next"] == float((test.labels == 9).double().mean())


def test_transfer_counts_carried_successes(natural):
    test = digits(100)
    attack = partial(pgd, steps=10, step_size=0.05)
    own = transfer(natural, natural, test, Linf(0.2), attack)
    x, y = test.tensors()
    found = worst_case(natural, x, y, Linf(0.2), [attack], index=test.index)
    assert own["success"] == 1 and own["n"] == int((found.fooled_by == 0).sum())
    none = transfer(natural, natural, test, Linf(0.0), attack)
    assert none["n"] == 0 and (none["low"], none["high"]) == (0, 1)
    stubborn = transfer(natural, always(3), test, Linf(0.2), attack)
    assert stubborn["success"] == 0 and 0 < stubborn["n"] <= int((y == 3).sum())
    assert stubborn["clean"] == float((y == 3).double().mean())


def test_robustness_uses_a_random_start_and_the_index(natural):
    test = digits(60)
    found = robustness(natural, test, {"a": Linf(0.1), "b": L2(0.5)}, steps=5)
    attack = partial(pgd, steps=5, step_size=0.05)
    again = worst_case(natural, *test.tensors(), Linf(0.1), [attack], index=test.index)
    assert found["a"].accuracy == again.accuracy and str(found["b"].threat) == "ℓ2, ε = 0.5"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_fit_the_data(name, images):
    few = images.take(torch.arange(64))
    before = torch.get_rng_state()
    f = trained(few, ARCHITECTURES[name], epochs=1, batch_size=32, seed=1)
    assert f(few.tensors()[0]).shape == (64, 10) and not f.training
    assert torch.equal(before, torch.get_rng_state())


def test_scatter(natural, images, random_set):
    rows = scatter(natural, images, {"D_rand": random_set}, digits(100), THREAT, partial(pgd, steps=5, step_size=0.4),
                   architectures={"linear": {"name": "linear"}}, epochs=5, batch_size=32)  # fmt: skip
    assert rows.keys() == {"linear"}
    assert rows["linear"].keys() == {"success", "low", "high", "n", "clean", "D_rand_true", "D_rand_next"}
    assert rows["linear"]["clean"] > 0.6


def test_wrong_labels_everywhere_and_yet_it_generalises(natural, random_set, images):
    """The chapter's experiment, small: every label is wrong to the eye, the true test set is learnt.

    Planted: the same images with the noise in place of the attack teach nothing of the sort.
    """
    train = partial(trained, architecture={"name": "small_conv"}, epochs=25, batch_size=32, seed=1)
    test = digits()
    assert agreement(train(random_set), test)["true_interval"][0] > 0.2
    assert agreement(train(noisy(images, random_set.labels, THREAT)), test)["true_interval"][1] < 0.1
