import os
import pickle
import types

import numpy as np
import pytest
import torch

from advlearn import data, storage
from advlearn.data import CLASSES, load
from advlearn.tensors import generator


def arrays(n=20, shape=(28, 28), seed=0):
    rng = np.random.default_rng(seed)
    return {f"{key}_{part}": value for part in ("train", "test") for key, value in
            (("x", rng.integers(0, 256, (n, *shape), dtype=np.uint8)),
             ("y", (np.arange(n) % 10).astype(np.uint8)))}  # fmt: skip


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **content)


class Torchvision:
    """In place of torchvision's MNIST and the rest: counts, and gives arrays or an error."""

    def __init__(self, content=None, error=None):
        self.content, self.error, self.calls = content, error, []

    def __call__(self, root, train, download):
        self.calls.append((root, train, download))
        if self.error:
            raise self.error
        part = "train" if train else "test"
        x, y = self.content[f"x_{part}"], self.content[f"y_{part}"]
        as_torch = x.ndim == 3  # as torchvision: tensors for MNIST, an array and a list for CIFAR
        return types.SimpleNamespace(data=torch.from_numpy(x) if as_torch else x,
                                     targets=torch.from_numpy(y).long() if as_torch else y.tolist())


@pytest.fixture
def places(tmp_path, monkeypatch):
    """(the reader's folder, the cache), both empty, and no download unless a test gives one."""
    monkeypatch.setenv("ADVLEARN_DATA", str(tmp_path / "mine"))
    monkeypatch.setattr(storage, "cache", lambda: tmp_path / "cache")
    offline(monkeypatch, OSError("Network is unreachable"))
    return tmp_path / "mine", tmp_path / "cache"


def offline(monkeypatch, error):
    return online(monkeypatch, None, error)


def online(monkeypatch, content, error=None):
    import torchvision.datasets

    source = Torchvision(content, error)
    for name in ("MNIST", "FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(torchvision.datasets, name, source)
    return source


def equals(dataset, content, split="test"):
    x = content[f"x_{split}"]
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return np.array_equal(dataset.images, x) and dataset.labels.tolist() == content[f"y_{split}"].tolist()


# --- digits and the Dataset -------------------------------------------------------------------


def test_digits_are_embedded(places):
    train, test = load("digits", "train"), load("digits")
    assert (len(train), len(test)) == (1437, 360) and train.shape == test.shape == (1, 8, 8)
    assert test.split == "test" and test.name == "digits" and test.classes == tuple("0123456789")
    for part in (train, test):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert part.images.min() == 0 and part.images.max() == 255 and part.images.is_contiguous()
        assert part.labels.unique().tolist() == list(range(10))
        assert part.index.tolist() == list(range(len(part)))
    rows = {row.numpy().tobytes() for row in train.images}
    shared = sum(row.numpy().tobytes() in rows for row in test.images)
    assert shared <= 2, "training and test images overlap"


def test_images_stay_uint8_until_the_batch():
    test = load("digits")
    x, y = test.tensors()
    assert x.dtype == torch.float32 and float(x.min()) == 0 and float(x.max()) == 1
    assert torch.equal(x, test.images.float() / 255) and torch.equal(y, test.labels)
    sizes = []
    for bx, by, index in test.batches(100):
        assert bx.dtype == torch.float32
        assert torch.equal(bx, x[index]) and torch.equal(by, y[index])
        sizes.append(len(by))
    assert sizes == [100, 100, 100, 60] and test.images.dtype == torch.uint8


def test_shuffled_batches():
    test = load("digits")
    index = torch.cat([i for _, _, i in test.batches(50, generator(1))])
    assert index.sort().values.tolist() == list(range(360)) and index.tolist() != list(range(360))
    assert torch.equal(index, torch.cat([i for _, _, i in test.batches(70, generator(1))]))
    for x, y, i in test.subset(60).batches(25, generator(1)):
        assert torch.equal(x, test.tensors()[0][i]) and torch.equal(y, test.labels[i])


def test_subset_is_a_fixed_permutation():
    test = load("digits")
    hundred, ten = test.subset(100), test.subset(10)
    assert torch.equal(hundred.index[:10], ten.index), "a smaller subset begins the larger one"
    assert ten.index.tolist() == [44, 173, 113, 138, 235, 214, 19, 7, 2, 234]
    assert len(set(hundred.index.tolist())) == 100
    assert torch.equal(hundred.images, test.images[hundred.index])
    assert torch.equal(hundred.labels, test.labels[hundred.index])
    assert test.subset(10, seed=1).index.tolist() != ten.index.tolist()
    assert len(test.subset(10_000)) == 360
    again = hundred.subset(5)
    assert torch.equal(again.images, test.images[again.index]), "index means the full split"


def test_split_off_only_and_take():
    train = load("digits", "train")
    most, last = train.split_off(200)
    assert torch.equal(torch.cat([most.index, last.index]), train.index) and len(last) == 200
    assert torch.equal(last.images, train.images[-200:])
    for n in (0, -3, 1437, 5000):
        with pytest.raises(ValueError, match=f"split_off: n={n}, allowed are 1 to 1436"):
            train.split_off(n)
    pair = train.only(3, 7)
    assert pair.labels.unique().tolist() == [3, 7]
    assert len(pair) == int(((train.labels == 3) | (train.labels == 7)).sum())
    assert torch.equal(pair.images, train.images[pair.index])
    assert torch.equal(train.take(train.labels == 3).index, train.only(3).index)


# --- where files come from --------------------------------------------------------------------

NAMES = {"mnist": (28, 28), "fashion_mnist": (28, 28), "cifar10": (32, 32, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_search_order(places, monkeypatch, name):
    mine, cache = places
    of = {place: arrays(shape=NAMES[name], seed=i) for i, place in enumerate(("mine", "cache", "net"))}
    source = online(monkeypatch, of["net"])
    fetched = load(name)
    assert equals(fetched, of["net"]) and (cache / f"{name}.npz").is_file()
    assert [train for _, train, download in source.calls if download] == [True, False]
    assert equals(load(name, "train"), of["net"], "train") and len(source.calls) == 2, "fetched once"
    save(cache / f"{name}.npz", of["cache"])
    assert equals(load(name), of["cache"])
    save(mine / f"{name}.npz", of["mine"])
    assert equals(load(name), of["mine"]) and equals(load(name, "train"), of["mine"], "train")
    monkeypatch.delenv("ADVLEARN_DATA")
    assert equals(load(name), of["cache"])
    assert fetched.shape == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))
    assert fetched.images.is_contiguous() and fetched.classes == CLASSES[name] and len(source.calls) == 2


def test_labels_as_a_column_and_of_any_integer_type(places):
    content = arrays(shape=(32, 32, 3))
    save(places[0] / "cifar10.npz", content | {"y_test": content["y_test"].astype(np.int32)[:, None]})
    assert equals(load("cifar10"), content)


def test_a_home_folder_in_the_variable(places, monkeypatch):
    content = arrays()
    save(places[0] / "mnist.npz", content)
    monkeypatch.setenv("HOME", str(places[0].parent))
    monkeypatch.setenv("ADVLEARN_DATA", "~/mine")
    assert equals(load("mnist"), content)


@pytest.mark.parametrize("set_to", [None, "folder"])
@pytest.mark.parametrize("error", [OSError("Network is unreachable"),
                                   RuntimeError("Error downloading train-images-idx3-ubyte.gz")])  # fmt: skip
def test_without_a_network(places, monkeypatch, error, set_to):
    mine, cache = places
    offline(monkeypatch, error)
    if set_to is None:
        monkeypatch.delenv("ADVLEARN_DATA")
    with pytest.raises(FileNotFoundError) as caught:
        load("mnist")
    text = str(caught.value)
    for part in ("data set 'mnist'", "$ADVLEARN_DATA/mnist.npz", str(cache / "mnist.npz"), str(error),
                 "By hand: put mnist.npz", "x_train, y_train, x_test, y_test", 'profile="smoke"',
                 f"ADVLEARN_DATA is {mine if set_to else 'not set'}"):  # fmt: skip
        assert part in text
    assert not list(cache.rglob("*.npz")) and not list(cache.rglob("*.part"))
    assert len(load("digits")) == 360, "smoke needs no network"


def test_bad_names():
    with pytest.raises(ValueError, match="load: name='imagenet', allowed are digits, mnist, fashion_mnist, cifar10"):
        load("imagenet")
    with pytest.raises(ValueError, match="load: split='val', allowed are 'train' and 'test'"):
        load("digits", "val")


# --- damaged files ----------------------------------------------------------------------------


def with_bytes(change):
    def damage(path, target):
        raw = bytearray(path.read_bytes())
        path.write_bytes(bytes(change(raw)))

    return damage


def noise_in_the_middle(raw):
    for i in range(len(raw) // 2, len(raw) // 2 + 60):
        raw[i] ^= 0x5A
    return raw


def other_arrays(**change):
    def damage(path, target):
        save(path, {k: v for k, v in (arrays() | change).items() if v is not None})

    return damage


def as_npy(path, target):
    with path.open("wb") as file:
        np.save(file, arrays()["x_test"])


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def as_pickle(path, target):
    path.write_bytes(pickle.dumps(Bomb(target)))


def objects_inside(path, target):
    save(path, arrays() | {"x_test": np.array([Bomb(target)] * 20, dtype=object)})


X = arrays()["x_test"]
DAMAGE = {
    "empty": with_bytes(lambda raw: b""),
    "half a file": with_bytes(lambda raw: raw[: len(raw) // 2]),
    "noise inside": with_bytes(noise_in_the_middle),
    "unknown compression": with_bytes(lambda raw: raw.replace(b"\x08\x00", b"\x63\x00")),
    "a web page": with_bytes(lambda raw: b"<html>404 Not Found</html>"),
    "a plain array": as_npy,
    "a pickle": as_pickle,
    "pickled objects": objects_inside,
    "an array missing": other_arrays(x_test=None),
    "floats": other_arrays(x_test=X / 255),
    "flat images": other_arrays(x_test=X.reshape(20, -1)),
    "channels first": other_arrays(x_test=X[:, None]),
    "too few labels": other_arrays(y_test=np.arange(19)),
    "a label too large": other_arrays(y_test=np.arange(20)),
    "a negative label": other_arrays(y_test=np.full(20, -1)),
    "labels that are no integers": other_arrays(y_test=np.full(20, 0.5)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_file_is_moved_aside_and_fetched_again(places, monkeypatch, damage, tmp_path):
    _, cache = places
    content, path = arrays(seed=3), cache / "mnist.npz"
    source = online(monkeypatch, content)
    save(path, arrays())
    DAMAGE[damage](path, tmp_path / "unpickled")
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match="mnist.npz is damaged; kept as mnist.npz.damaged"):
        assert equals(load("mnist"), content)
    assert len(source.calls) == 2 and (cache / "mnist.npz.damaged").read_bytes() == damaged
    assert equals(load("mnist"), content) and len(source.calls) == 2
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_the_reader_is_refused_and_untouched(places, monkeypatch, damage, tmp_path):
    mine, cache = places
    source, path = online(monkeypatch, arrays()), mine / "mnist.npz"
    save(path, arrays())
    DAMAGE[damage](path, tmp_path / "unpickled")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=str(path)):
        load("mnist")
    assert path.read_bytes() == before and not source.calls and not cache.exists()
    assert [p.name for p in mine.iterdir()] == ["mnist.npz"] and not (tmp_path / "unpickled").exists()


def test_a_damaged_cache_file_without_a_network(places):
    _, cache = places
    save(cache / "mnist.npz", arrays())
    (cache / "mnist.npz").write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FileNotFoundError, match="not at hand"):
        load("mnist")
    with pytest.raises(FileNotFoundError, match="not at hand"):
        load("mnist")


def test_messages_name_the_label_and_the_file(places):
    labels = np.arange(20) % 10
    labels[7] = 12
    path = places[0] / "mnist.npz"
    save(path, arrays() | {"y_test": labels})
    with pytest.raises(ValueError, match=r"mnist.npz: y_test has label 12 at index 7, allowed are 0 to 9"):
        load("mnist")
    save(path, arrays() | {"x_test": X / 255})
    with pytest.raises(ValueError, match=r"x_test has type float64 and shape \(20, 28, 28\).*expected are uint8"):
        load("mnist")


def test_a_file_that_may_not_be_read_is_not_called_damaged(places, monkeypatch):
    _, cache = places
    save(cache / "mnist.npz", arrays())

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", denied)
    with pytest.raises(PermissionError):
        load("mnist")
    assert (cache / "mnist.npz").is_file()


def test_an_interrupted_or_failed_conversion_leaves_nothing(places, monkeypatch):
    _, cache = places
    online(monkeypatch, arrays())
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def stop(file, error=error, **content):
            file.write(b"PK half a file")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(data.np, "savez_compressed", stop)
            with pytest.raises(type(error)):
                load("mnist")
        assert not [p for p in cache.iterdir() if p.is_file()]
    assert len(load("mnist")) == 20
