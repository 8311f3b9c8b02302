"""Every line of "When something is wrong": what is refused, in which words, and what is left."""

import errno
import importlib
import math
import resource
import sys
import warnings
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from helpers import digits, uniform01
from torch import nn

from advlearn import data, models, storage, zoo
from advlearn.attacks import fgsm, pgd
from advlearn.data import Dataset, load
from advlearn.evaluation import accuracy, worst_case
from advlearn.threats import L1, L2, Linf
from advlearn.training import fit, natural


def example(n=6):
    x = uniform01(n, 1, 4, 4, dtype=torch.float32)
    return models.linear((1, 4, 4), 3), x, torch.arange(n) % 3


# --- radii --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps, message", [
    (8, r"Linf\(eps=8\): eps is outside \[0, 1\], pixel units are \[0, 1\], did you mean 8/255\?"),
    (76.5, r"Linf\(eps=76.5\): .* did you mean 76.5/255\?"),
    (torch.tensor([0.1, 8.0]), r"Linf\(eps=8\): .* did you mean 8/255\?"),
    (-0.1, r"Linf\(eps=-0.1\): eps must be a finite number, 0 or larger"),
    (torch.tensor([0.1, -0.2]), r"Linf\(eps=-0.2\): eps must be a finite number, 0 or larger"),
    (math.nan, r"Linf\(eps=nan\): eps must be a finite number"),
    (torch.tensor([0.1, math.nan]), r"Linf\(eps=nan\): eps must be a finite number"),
    (math.inf, r"Linf\(eps=inf\): eps must be a finite number"),
    (torch.zeros(3, 1), r"Linf: eps has shape \(3, 1\), allowed are a number or one value per example"),
    ("0.3", r"Linf: eps='0.3' is str, allowed are a number or a tensor"),
    (None, r"Linf: eps=None is NoneType, allowed are a number or a tensor"),
    ([0.1, 0.2], r"Linf: eps=\[0.1, 0.2\] is list, allowed are a number or a tensor"),
])  # fmt: skip
def test_radius(eps, message):
    with pytest.raises(ValueError, match=message):
        Linf(eps)


def test_radii_that_are_fine():
    for eps in (0, 1, 8 / 255, np.float32(0.1), np.float64(0.1), torch.tensor(0.3), torch.zeros(5)):
        Linf(eps)
    for kind in (L2, L1):
        assert kind(8).eps == 8
        with pytest.raises(ValueError, match=rf"{kind.__name__}\(eps=-1\): eps must be a finite number"):
            kind(-1)


# --- images and labels --------------------------------------------------------------------------


def spoiled(x, i, value):
    x = x.clone()
    x[i, 0, 1, 1] = value
    return x


BAD_EXAMPLES = {
    "0 to 255": (lambda x, y: (x * 255, y), r"x: image 0 has values from .* to .*, pixel units are \[0, 1\], divide by 255\?"),
    "one image 0 to 255": (lambda x, y: (spoiled(x, 4, 255), y), r"x: image 4 has values from .* to 255.*divide by 255\?"),
    "slightly above 1": (lambda x, y: (spoiled(x, 2, 1.1), y), r"x: image 2 has values from .* to 1.1, pixel units are \[0, 1\]$"),
    "normalised": (lambda x, y: (spoiled(x, 3, -0.42), y), r"x: image 3 has values from -0.42"),
    "NaN": (lambda x, y: (spoiled(x, 5, math.nan), y), r"x: image 5 has values from nan to nan"),
    "infinite": (lambda x, y: (spoiled(x, 1, math.inf), y), r"x: image 1 has values from .* to inf"),
    "uint8": (lambda x, y: ((x * 255).byte(), y), r"x: type torch.uint8, allowed are floating types.*Dataset.tensors\(\)"),
    "no channels": (lambda x, y: (x[:, 0], y), r"x: shape \(6, 4, 4\), it must be \(N, C, H, W\)"),
    "no images": (lambda x, y: (x[:0], y[:0]), r"x: shape \(0, 1, 4, 4\).*N of 1 or more"),
    "numpy images": (lambda x, y: (x.numpy(), y), r"x: ndarray, it must be a torch.Tensor"),
    "a list of labels": (lambda x, y: (x, y.tolist()), r"y: list, it must be a torch.Tensor"),
    "int32 labels": (lambda x, y: (x, y.int()), r"y: type torch.int32 and shape \(6,\), it must be int64 and \(6,\)"),
    "one-hot labels": (lambda x, y: (x, nn.functional.one_hot(y)), r"y: type torch.int64 and shape \(6, 3\), it must be int64 and \(6,\)"),
    "too few labels": (lambda x, y: (x, y[:5]), r"shape \(5,\), it must be int64 and \(6,\)"),
    "label too large": (lambda x, y: (x, y + (torch.arange(6) == 4) * 5), r"y: label 6 at index 4, allowed are 0 to 2"),
    "label negative": (lambda x, y: (x, y - 1 * (torch.arange(6) == 3)), r"y: label -1 at index 3, allowed are 0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("judge", ["accuracy", "worst_case"])
@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_images_and_labels(case, judge):
    f, x, y = example()
    spoil, message = BAD_EXAMPLES[case]
    x, y = spoil(x, y)
    with pytest.raises(ValueError, match=message):
        accuracy(f, x, y) if judge == "accuracy" else worst_case(f, x, y, Linf(0.1), [fgsm])


class NanAt(nn.Module):
    """NaN logits for the images whose first pixel is above a threshold."""

    def __init__(self, threshold, value=math.nan):
        super().__init__()
        self.f, self.threshold, self.value = models.linear((1, 4, 4), 3), threshold, value

    def forward(self, x):
        hit = x[:, 0, 0, 0] > self.threshold
        return self.f(x).masked_fill(hit[:, None], self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("judge", [accuracy, lambda f, x, y: worst_case(f, x, y, Linf(0.1), [fgsm]),
                                   lambda f, x, y: worst_case(f, x, y, Linf(0.1), [fgsm], votes=3)])  # fmt: skip
def test_nan_logits(judge, value):
    _, x, y = example()
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.1, 0.9])
    with pytest.raises(ValueError, match="f: logits of image 3 are not finite"):
        judge(NanAt(0.5, value), x, y)


def test_nan_logits_under_attack():
    """argmax of NaN is a class too: it must not count as fooled, or as correct."""
    _, x, _ = example()
    x[:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.1, 0.45, 0.1, 0.2])
    f = NanAt(0.5)
    y = f(x).argmax(1)

    def brighter(f, x, y, threat, *, start):
        return (x + 0.1).clamp(max=1)

    with pytest.raises(ValueError, match="f: logits of image 3 under attack 'brighter' are not finite"):
        worst_case(f, x, y, Linf(0.1), [brighter], batch_size=2)


@pytest.mark.parametrize("f, message", [
    (lambda x: x.flatten(1)[:, 0], r"f: returned shape \(6,\), it must be \(6, K\)"),
    (lambda x: torch.zeros(1, 3), r"f: returned shape \(1, 3\), it must be \(6, K\)"),
])  # fmt: skip
def test_shape_of_the_logits(f, message):
    _, x, y = example()
    with pytest.raises(ValueError, match=message):
        accuracy(f, x, y)


# --- arguments of the judge and of fit ----------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    ({"attacks": fgsm}, r"attacks: function, allowed are a list of attacks or a dict name -> attack"),
    ({"attacks": partial(pgd, steps=1)}, r"attacks: partial, allowed are a list"),
    ({"attacks": ["fgsm"]}, r"attacks: 'str' is str, not a function"),
    ({"attacks": {"a": None}}, r"attacks: 'a' is NoneType, not a function"),
    ({"votes": 0}, r"votes=0, it must be 1 or more"),
    ({"batch_size": 0}, r"batch_size=0, it must be 1 or more"),
    ({"index": torch.arange(5)}, r"index has shape \(5,\) for 6 images"),
    ({"threat": Linf(torch.zeros(7))}, r"threat.eps has shape \(7,\) for 6 images"),
])  # fmt: skip
def test_arguments_of_worst_case(change, message):
    f, x, y = example()
    arguments = {"threat": Linf(0.1), "attacks": [fgsm]} | change
    with pytest.raises(ValueError, match=message):
        worst_case(f, x, y, **arguments)


def training_set(**change):
    base = load("digits", "train").subset(64)
    return Dataset(**{k: change.get(k, getattr(base, k)) for k in base.__dataclass_fields__})


def broken_labels(value, at):
    labels = training_set().labels.clone()
    labels[at] = value
    return training_set(labels=labels)


@pytest.mark.parametrize("change, message", [
    ({"batch_size": 0}, r"fit: batch_size=0, allowed are 1 to 64 \(the data\)"),
    ({"batch_size": 65}, r"fit: batch_size=65, allowed are 1 to 64 \(the data\)"),
    ({"epochs": 0}, r"fit: epochs=0, lr=0.002, both must be positive"),
    ({"lr": -1.0}, r"fit: epochs=1, lr=-1.0, both must be positive"),
    ({"data": broken_labels(10, 40)}, r"y: label 10 at index 40, allowed are 0 to 9"),
    ({"data": broken_labels(-100, 41)}, r"y: label -100 at index 41, allowed are 0 to 9"),
    ({"model": nn.Flatten(0)}, r"f: returned shape"),
    ({"objective": lambda model, x, y, state: (model(x).sum(1) * math.nan, state)},
     r"fit: the loss of epoch 1 is nan; a smaller lr or a ramp"),
])  # fmt: skip
def test_arguments_of_fit(change, message):
    arguments = {"model": models.mlp((1, 8, 8), (8,)), "data": training_set(), "objective": natural(),
                 "epochs": 1, "batch_size": 32, "progress": False} | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fit(**arguments)


def test_a_diverged_epoch_is_not_written(tmp_path):
    path, calls = tmp_path / "t.safetensors", []

    def diverges(model, x, y, state):
        calls.append(0)
        losses, state = natural()(model, x, y, state)
        return (losses * math.nan if len(calls) == 3 else losses), state

    with pytest.raises(ValueError, match="the loss of epoch 2 is nan"):
        fit(models.mlp((1, 8, 8), (8,)), training_set(), diverges, epochs=3, batch_size=32,
            checkpoint=path, progress=False)  # fmt: skip
    from safetensors.torch import load_file

    assert all(v.isfinite().all() for v in load_file(path).values())


# --- files: whole or not at all -----------------------------------------------------------------


@contextmanager
def disk_full_after(size):
    """No file may grow beyond `size` bytes, as on a full disk (EFBIG in place of ENOSPC).

    Nor may Python write what it compiles meanwhile: it takes a cut .pyc for a whole one
    (CPython gh-126606), and every later import of that module, in any process, ends in EOFError.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = kept


def test_a_full_disk_leaves_no_cut_bytecode(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "long_module.py").write_text("x = " + repr("long" * 100) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("long_module", None)
    with disk_full_after(200):
        assert importlib.import_module("long_module").x == "long" * 100
    del sys.modules["long_module"]
    assert not (tmp_path / "__pycache__").exists()


def write_weights(path):
    zoo.save_weights(models.mlp((1, 8, 8), (100,)), path)


def write_training(path):
    fit(models.mlp((1, 8, 8), (100,)), training_set(), natural(), epochs=1, batch_size=32,
        checkpoint=path, progress=False)  # fmt: skip


def write_data(path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8), np.zeros(100, np.uint8)
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        data.np.savez_compressed(file, x_train=x, y_train=y, x_test=x, y_test=y)


WRITERS = {"weights": write_weights, "training": write_training, "data": write_data}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(tmp_path, writer, old):
    path = tmp_path / "folder" / "file.safetensors"
    if old:
        if writer == "training":  # an earlier state of the same training
            with pytest.raises(KeyboardInterrupt):
                interrupted = natural()

                def stop(model, x, y, state):
                    raise KeyboardInterrupt

                stop.description = interrupted.description
                fit(models.mlp((1, 8, 8), (100,)), training_set(), stop, epochs=1, batch_size=32,
                    checkpoint=path, progress=False)  # fmt: skip
        else:
            WRITERS[writer](path)
    before = path.read_bytes() if old else None
    with disk_full_after(8000), pytest.raises(Exception, match=r"(?i)file too large|no space"):
        WRITERS[writer](path)
    assert [p.name for p in path.parent.iterdir()] == ([path.name] if old else [])
    assert not old or path.read_bytes() == before
    WRITERS[writer](path)
    assert path.is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("when", ["before", "half", "flush"])
def test_atomic(tmp_path, monkeypatch, error, when):
    target = tmp_path / "new" / "file"

    def write(text):
        with storage.atomic(target) as temporary:
            assert temporary.parent == target.parent, "a rename between disks is not atomic"
            if text != "whole" and when == "before":
                raise error
            temporary.write_text(text[: len(text) // 2])
            assert not target.exists() or target.read_text() == "whole"
            if text != "whole" and when == "half":
                raise error
            temporary.write_text(text)

    def full(fd):
        raise error

    for expected in ([], ["file"]):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            if when == "flush":
                patch.setattr(storage.os, "fsync", full)
            write("other")
        assert [p.name for p in target.parent.iterdir()] == expected
        write("whole")
        assert target.read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o644


def test_move_aside_keeps_the_file(tmp_path):
    path = tmp_path / "a.npz"
    for content in ("one", "two"):
        path.write_text(content)
        with pytest.warns(UserWarning, match="a.npz is damaged; kept as a.npz.damaged"):
            aside = storage.move_aside(path)
        assert aside.read_text() == content and not path.exists()


def test_hash_of_a_large_file(tmp_path):
    import hashlib

    content = np.random.default_rng(0).bytes(3 * 2**20 + 17)
    (tmp_path / "f").write_bytes(content)
    assert storage.sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_places_in_a_clone_and_elsewhere(tmp_path, monkeypatch):
    assert storage.in_clone() and storage.shipped() == storage.cache()
    monkeypatch.setattr(storage, "_PACKAGE", tmp_path / "site-packages" / "advlearn")
    monkeypatch.setattr(storage, "_CLONE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert not storage.in_clone()
    assert storage.shipped() == tmp_path / "site-packages" / "advlearn" / "_data"
    assert storage.cache() == tmp_path / "home" / "advlearn"


def test_commit_is_that_of_the_clone_alone(monkeypatch):
    from advlearn import provenance

    assert {"date", "commit", "hardware", "torch", "python"} == provenance.stamp().keys()
    monkeypatch.setattr(storage, "in_clone", lambda: False)
    assert provenance.commit() is None


def test_ordinary_use_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = zoo.load_or_train("digits-small-natural", progress=False)
        x, y = digits(20).tensors()
        worst_case(f, x, y, L2(0.5), [fgsm, partial(pgd, steps=2, step_size=0.1)])
        fit(models.mlp((1, 8, 8), (8,)), training_set(), natural(), epochs=1, batch_size=32, progress=False)
