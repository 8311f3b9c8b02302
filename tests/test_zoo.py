import functools
import hashlib
import http.server
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import digits
from safetensors.torch import save_file

from advlearn import models, storage, zoo
from advlearn.attacks import fgsm
from advlearn.evaluation import accuracy, worst_case

SHIPPED = sorted(path.stem for path in (storage.shipped() / "checkpoints").glob("*.json"))
NAME = "digits-mlp-natural"


def split(stem):
    name, _, seed = stem.partition("-seed")
    return name, int(seed or 0)


def test_something_is_shipped():
    assert {"digits-small-natural", "digits-small-pgd", "mnist-small-natural"} <= set(SHIPPED)
    files = {p.name for p in (storage.shipped() / "checkpoints").iterdir() if p.suffix != ".damaged"}
    assert files == {f"{stem}{end}" for stem in SHIPPED for end in (".json", ".safetensors")}


@pytest.mark.parametrize("stem", SHIPPED)
def test_shipped_checkpoint_and_its_manifest(stem):
    name, seed = split(stem)
    about = zoo.manifest(name, seed)
    path = storage.shipped() / "checkpoints" / about["file"]
    recipe = zoo.RECIPES[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]
    assert path.stat().st_size < 2**20 or recipe.architecture["name"] == "madry_mnist"
    assert (about["name"], about["seed"], about["data"]) == (name, seed, recipe.data)
    assert about["architecture"] == json.loads(json.dumps(recipe.architecture))
    assert about["recipe"]["objective"] == recipe.objective().description
    assert (about["recipe"]["epochs"], about["recipe"]["lr"]) == (recipe.epochs, recipe.lr)
    assert {"minutes", "date", "hardware", "torch", "measured", "history"} <= about.keys()
    assert len(about["history"]) == recipe.epochs
    measured = about["measured"]
    assert measured["worst_case"]["threat"] == str(recipe.threat)
    attacks = list(recipe.attacks)[: 2 if seed else None]
    assert measured["worst_case"]["attacks"] == attacks and len(attacks) > 1
    trace = measured["trace"]
    assert len(trace) == 1 + len(attacks) and all(a >= b for a, b in zip(trace, trace[1:], strict=False))
    assert trace[1] == measured["fgsm"]["accuracy"], "the first attack is FGSM"
    before = torch.get_rng_state()
    model = zoo.load_or_train(name, seed=seed, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in model.modules())
    if recipe.data != "digits":
        shape = models.CIFAR_SHAPE if recipe.data == "cifar10" else models.MNIST_SHAPE
        assert model(torch.zeros(2, *shape)).shape == (2, 10)
        return
    x, y = digits().tensors()
    one = 1 / len(y) + 1e-9  # another processor may round one image to the other side
    assert abs(accuracy(model, x, y) - measured["fgsm"]["clean_accuracy"]) <= one
    assert abs(worst_case(model, x, y, recipe.threat, [fgsm]).accuracy - trace[1]) <= 2 * one


def test_a_robust_network_is_robust():
    natural, robust = (zoo.manifest(f"digits-small-{kind}")["measured"]["worst_case"]
                       for kind in ("natural", "pgd"))  # fmt: skip
    assert robust["low"] > natural["high"]


def test_unknown_name():
    for call in (zoo.load_or_train, zoo.manifest, zoo.train):
        with pytest.raises(ValueError, match="zoo: name='resnet', allowed are mnist-small-natural, "):
            call("resnet")
    assert zoo.names() == list(zoo.RECIPES)


# --- damaged files ----------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A copy of one shipped checkpoint, an empty cache, and no network unless a test gives one."""
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    (shipped / "checkpoints").mkdir(parents=True)
    for end in ("json", "safetensors"):
        shutil.copy(storage.shipped() / "checkpoints" / f"{NAME}.{end}", shipped / "checkpoints")
    monkeypatch.setattr(storage, "shipped", lambda: shipped)
    monkeypatch.setattr(storage, "cache", lambda: cache)
    return shipped / "checkpoints" / f"{NAME}.safetensors", cache


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of the book's address; returns its folder."""
    folder = tmp_path / "web"
    files = folder / "raw" / "v7.8.9" / "data" / "checkpoints"
    files.mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        class About(dict):
            def get_all(self, key):
                return ["Homepage, http://127.0.0.1:9",
                        f"Repository, http://127.0.0.1:{running.server_port}"]  # fmt: skip

        monkeypatch.setattr(zoo, "metadata", lambda name: About(Version="7.8.9"))
        yield files
        running.shutdown()


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(bytes(raw))


DAMAGE = {
    "one byte": flip_a_byte,
    "half a file": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def loaded_right(model):
    x, y = digits().tensors()
    return accuracy(model, x, y) == zoo.manifest(NAME)["measured"]["fgsm"]["clean_accuracy"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_moved_aside_and_fetched_again(places, server, damage):
    path, cache = places
    shutil.copy(path, server)
    DAMAGE[damage](path)
    if damage == "missing":
        model = zoo.load_or_train(NAME, progress=False)
    else:
        with pytest.warns(UserWarning, match=r"mlp-natural.safetensors is damaged; kept as .*\.damaged"):
            model = zoo.load_or_train(NAME, progress=False)
        assert path.with_name(path.name + ".damaged").is_file()
    assert loaded_right(model) and not path.exists()
    shutil.rmtree(server)  # from now on the fetched copy is used
    assert loaded_right(zoo.load_or_train(NAME, progress=False))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_without_a_network(places, damage):
    path, cache = places
    DAMAGE[damage](path)
    message = (rf"The checkpoint '{NAME}' is missing or damaged and could not be fetched from http.*"
               rf"Train it yourself: zoo.load_or_train\('{NAME}', retrain=True\)")  # fmt: skip
    for _ in range(2):  # and it is not used the second time either
        with pytest.raises(ValueError, match=message):
            if damage != "missing" and path.is_file():
                with pytest.warns(UserWarning, match="is damaged"):
                    zoo.load_or_train(NAME, progress=False)
            else:
                zoo.load_or_train(NAME, progress=False)


def test_what_is_fetched_is_checked_too(places, server):
    path, cache = places
    flip_a_byte(path)
    shutil.copy(path, server)
    with pytest.raises(ValueError, match="missing or damaged"), pytest.warns(UserWarning):
        zoo.load_or_train(NAME, progress=False)
    assert not [p for p in cache.rglob("*") if p.is_file()], "the wrong file is not kept"


def test_a_damaged_copy_of_an_earlier_fetch_is_fetched_again(places, server):
    path, cache = places
    shutil.copy(path, server)
    path.unlink()
    zoo.load_or_train(NAME, progress=False)
    (fetched,) = [p for p in cache.rglob("*.safetensors")]
    flip_a_byte(fetched)
    assert loaded_right(zoo.load_or_train(NAME, progress=False))
    assert storage.sha256(fetched) == zoo.manifest(NAME)["sha256"]


def test_a_read_only_package_folder_is_no_obstacle(places, server, monkeypatch):
    path, _ = places
    shutil.copy(path, server)
    flip_a_byte(path)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "move_aside", denied)
    assert loaded_right(zoo.load_or_train(NAME, progress=False))


# --- pickles ----------------------------------------------------------------------------------


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def plant(path, kind, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch.save":
        torch.save({"0.weight": Bomb(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(target)))


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_never_unpickled(tmp_path, kind):
    path, target = tmp_path / "network.safetensors", tmp_path / "unpickled"
    plant(path, kind, target)
    architecture = zoo.RECIPES[NAME].architecture
    with pytest.raises(ValueError, match="is not a safetensors file .* Pickled checkpoints are refused"):
        zoo.load_weights(path, architecture)
    assert not target.exists()
    with pytest.raises((ValueError, OSError)):
        zoo.load_weights(tmp_path / "missing.safetensors", architecture)
    if kind == "pickle":  # the plant works: whoever unpickles it is caught
        pickle.loads(path.read_bytes())
        assert target.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_in_place_of_a_shipped_checkpoint(places, server, tmp_path, kind):
    path, target = places[0], tmp_path / "unpickled"
    shutil.copy(path, server)
    plant(path, kind, target)
    with pytest.warns(UserWarning, match="damaged"):
        model = zoo.load_or_train(NAME, progress=False)
    assert loaded_right(model) and not target.exists()


def test_a_manifest_that_vouches_for_a_pickle(places, tmp_path):
    path, target = places[0], tmp_path / "unpickled"
    plant(path, "pickle", target)
    about = json.loads(path.with_suffix(".json").read_text("utf8")) | {"sha256": storage.sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="Pickled checkpoints are refused"):
        zoo.load_or_train(NAME, progress=False)
    assert not target.exists()


@pytest.mark.parametrize("tensors", [
    {"a": torch.zeros(2)}, models.linear((1, 8, 8)).state_dict(),
    models.mlp((1, 8, 8), (63,)).state_dict(),
])  # fmt: skip
def test_weights_of_another_architecture(tmp_path, tensors):
    save_file(dict(tensors), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit {'name': 'mlp'"):
        zoo.load_weights(tmp_path / "w.safetensors", zoo.RECIPES[NAME].architecture)


# --- training -----------------------------------------------------------------------------------


@pytest.fixture
def quick(places, monkeypatch):
    """A recipe of two epochs; counts how often `fit` runs."""
    from dataclasses import replace

    monkeypatch.setitem(zoo.RECIPES, NAME, replace(zoo.RECIPES[NAME], epochs=2))
    calls, fit = [], zoo.training.fit

    def counting(model, data, *args, **options):
        calls.append((data, options))
        return fit(model, data, *args, **options)

    monkeypatch.setattr(zoo.training, "fit", counting)
    return places, calls


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_network_that_is_not_shipped_is_trained_once(quick, capsys):
    (path, cache), calls = quick
    a = zoo.load_or_train(NAME, seed=3)
    assert "Training digits-mlp-natural (seed 3): about 0.1 min" in capsys.readouterr().out
    assert not any(m.training for m in a.modules())
    assert same(a, zoo.load_or_train(NAME, seed=3)) and len(calls) == 1
    assert [p.name for p in (cache / "retrained").iterdir()] == [f"{NAME}-seed3.safetensors"]
    again = zoo.load_or_train(NAME, seed=3, retrain=True, progress=False)
    assert len(calls) == 2 and same(a, again), "the same seed, the same network"
    assert not same(a, zoo.load_or_train(NAME, seed=4, progress=False))
    assert capsys.readouterr().out == ""


def test_training_never_sees_test_or_held_out_images(quick):
    (_, _), calls = quick
    zoo.load_or_train(NAME, retrain=True, progress=False)
    data, options = calls[0]
    recipe = zoo.RECIPES[NAME]
    everything = zoo.data.load(recipe.data, "train")
    assert data.split == "train" and len(data) == len(everything) - recipe.held_out
    assert int(data.index.max()) == len(everything) - recipe.held_out - 1


def test_retraining_leaves_the_shipped_checkpoint(quick):
    (path, cache), calls = quick
    before = path.read_bytes()
    other = zoo.load_or_train(NAME, retrain=True, progress=False)
    assert path.read_bytes() == before and len(calls) == 1
    assert loaded_right(zoo.load_or_train(NAME, progress=False)) and not same(
        other, zoo.load_or_train(NAME, progress=False))  # fmt: skip


def test_an_interrupted_training_of_the_zoo_goes_on(quick, monkeypatch):
    (path, cache), _ = quick
    whole = zoo.load_or_train(NAME, seed=3, progress=False)
    shutil.rmtree(cache)
    held_out = zoo.training.held_out

    def stop_in_the_second_epoch(*args):
        validate, count = held_out(*args), []

        def counted(model):
            count.append(0)
            if len(count) == 2:
                raise KeyboardInterrupt
            return validate(model)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(zoo.training, "held_out", stop_in_the_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            zoo.load_or_train(NAME, seed=3, progress=False)
    assert [p.suffixes for p in (cache / "retrained").iterdir()] == [[".training", ".safetensors"]]
    assert same(whole, zoo.load_or_train(NAME, seed=3, progress=False))
    assert [p.name for p in (cache / "retrained").iterdir()] == [f"{NAME}-seed3.safetensors"]


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1])])
def test_a_damaged_retrained_network_is_trained_again(quick, content):
    (path, cache), calls = quick
    a = zoo.load_or_train(NAME, seed=3, progress=False)
    mine: Path = cache / "retrained" / f"{NAME}-seed3.safetensors"
    mine.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        b = zoo.load_or_train(NAME, seed=3, progress=False)
    assert same(a, b) and len(calls) == 2 and mine.with_name(mine.name + ".damaged").is_file()
