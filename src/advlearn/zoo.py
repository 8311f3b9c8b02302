"""Named networks: recipe, checkpoint, and the measured numbers that belong to it.

`load_or_train(name)` reads the shipped checkpoint, or trains the network where none is shipped.
A checkpoint is a safetensors file and a manifest (JSON) with its SHA-256, architecture, recipe,
seed, minutes, hardware, and accuracies with their protocol. Trained on the training images less
the last 5,000, which are for choosing; never on test images.

`python -m advlearn.zoo NAME[@SEED] ...` trains, measures and stores checkpoints in
`data/checkpoints`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import metadata
from pathlib import Path

import torch
from torch import nn

from advlearn import data, models, provenance, storage, training
from advlearn.attacks import Attack, fgsm, pgd
from advlearn.evaluation import Result, worst_case
from advlearn.threats import L2, Linf, Threat


@dataclass(frozen=True)
class Recipe:
    """How a network is made and measured.

    Attributes:
        data: data set; its last `held_out` training images are kept for choosing.
        architecture: for `models.build`.
        objective: makes the training objective.
        epochs, batch_size, lr: of `training.fit`.
        threat, attacks: the measurement of the manifest; copies, with a seed other than 0, face
            the first two attacks only.
        minutes: about how long training takes on two CPU cores.
        precision: of `training.fit`; "bf16-mixed" for the networks that would take long.
    """

    data: str
    architecture: Mapping[str, object]
    objective: Callable[[], training.Objective]
    epochs: int
    minutes: float
    threat: Threat
    attacks: Mapping[str, Attack]
    batch_size: int = 128
    lr: float = 2e-3
    held_out: int = 5000
    precision: str = "32-true"


_MNIST, _DIGITS, _CIFAR = Linf(0.3), Linf(0.2), L2(0.5)
_PGD40, _PGD100 = (partial(pgd, steps=n, step_size=0.01) for n in (40, 100))
_NATURAL = {"FGSM": fgsm, "PGD-40": _PGD40}
_ROBUST = {"FGSM": fgsm, **{f"PGD-100 #{i + 1}": _PGD100 for i in range(20)}}
_L2 = {"FGSM": fgsm, "PGD-40": partial(pgd, steps=40, step_size=0.125)}
_COPY = dict(list(_ROBUST.items())[:2])
_SMALL = {"name": "small_conv"}
_SMALL_DIGITS = {"name": "small_conv", "shape": (1, 8, 8)}


def _mnist_pgd() -> training.Objective:
    return training.adversarial(_MNIST, partial(pgd, steps=5), step_size=0.1, ramp=0.3)


def _digits_pgd() -> training.Objective:
    return training.adversarial(_DIGITS, partial(pgd, steps=5), step_size=0.07, ramp=0.3)


RECIPES = {
    "mnist-small-natural": Recipe(
        "mnist", _SMALL, training.natural, 6, 0.4, _MNIST, _NATURAL),
    "mnist-small-pgd": Recipe(
        "mnist", _SMALL, _mnist_pgd, 12, 5, _MNIST, _ROBUST),
    "mnist-small-l2": Recipe(
        "mnist", _SMALL, partial(training.adversarial, L2(2.0), partial(pgd, steps=5),
                                 step_size=0.8, ramp=0.3), 6, 2.5, L2(2.0), _L2),
    "mnist-pooled-pgd": Recipe(
        "mnist", {"name": "madry_mnist", "width": 4}, _mnist_pgd, 6, 6, _MNIST, _COPY),
    "mnist-mlp-natural": Recipe(
        "mnist", {"name": "mlp"}, training.natural, 6, 0.3, _MNIST, _NATURAL),
    "mnist-madry-natural": Recipe(
        "mnist", {"name": "madry_mnist"}, training.natural, 4, 4, _MNIST, _NATURAL, lr=1e-3),
    "digits-small-natural": Recipe(
        "digits", _SMALL_DIGITS, training.natural, 40, 0.1, _DIGITS, _NATURAL, 32, held_out=200),
    "digits-small-pgd": Recipe(
        "digits", _SMALL_DIGITS, _digits_pgd, 60, 0.3, _DIGITS, _ROBUST, 32, held_out=200),
    "digits-pooled-pgd": Recipe(
        "digits", {"name": "madry_mnist", "shape": (1, 8, 8), "width": 4}, _digits_pgd, 60, 0.5,
        _DIGITS, _COPY, 32, held_out=200),
    "digits-mlp-natural": Recipe(
        "digits", {"name": "mlp", "shape": (1, 8, 8), "hidden": (64,)}, training.natural, 40, 0.1,
        _DIGITS, _NATURAL, 32, held_out=200),
    "cifar-five-natural": Recipe(
        "cifar10", {"name": "five_conv"}, training.natural, 6, 5, _CIFAR, _L2,
        precision="bf16-mixed"),
    "cifar-five-pgd": Recipe(
        "cifar10", {"name": "five_conv"},
        partial(training.adversarial, _CIFAR, partial(pgd, steps=3), step_size=0.25, ramp=0.3),
        10, 15, _CIFAR, _L2, precision="bf16-mixed"),
}  # fmt: skip


def names() -> list[str]:
    """The names that `load_or_train` knows."""
    return list(RECIPES)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"zoo: name={name!r}, allowed are {', '.join(RECIPES)}")
    return RECIPES[name]


def _folder() -> Path:
    return storage.shipped() / "checkpoints"


def _stem(name: str, seed: int) -> str:
    return f"{name}-seed{seed}" if seed else name


def manifest(name: str, seed: int = 0) -> dict[str, object] | None:
    """What is recorded with the shipped checkpoint, None where none is shipped."""
    _recipe(name)
    path = _folder() / f"{_stem(name, seed)}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None


def load_or_train(
    name: str,
    *,
    seed: int = 0,
    retrain: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> nn.Sequential:
    """A trained network in eval mode.

    Shipped is seed 0, of some networks seed 1 too. Any other is trained here, once: the result
    stays in the cache (with `retrain=True` it is trained anew). An interrupted training goes on
    where it stopped.

    Args:
        name: one of `names()`.
        seed: of weights, order and random starts.
        retrain: train even if there is a checkpoint.
        device: where the network goes, and is trained.
        progress: say what is done and show a bar.

    Raises:
        ValueError: unknown name; a checkpoint that is damaged and cannot be fetched again.
    """
    recipe, shipped = _recipe(name), manifest(name, seed)
    if shipped and not retrain:
        return load_weights(_checked(name, shipped), shipped["architecture"]).to(device)
    mine = storage.cache() / "retrained" / f"{_stem(name, seed)}.safetensors"
    if mine.is_file() and not retrain:
        try:
            return load_weights(mine, recipe.architecture).to(device)
        except ValueError:
            storage.move_aside(mine)
    if progress:
        print(f"Training {name} (seed {seed}): about {recipe.minutes:g} min on two CPU cores.")
    model = train(name, seed=seed, device=device, progress=progress)[0]
    save_weights(model, mine)
    return model


def train(
    name: str, *, seed: int = 0, device: str | torch.device = "cpu", progress: bool = True
) -> tuple[nn.Sequential, training.History]:
    """Train the named network by its recipe, from random weights. Resumes if interrupted."""
    recipe = _recipe(name)
    images, kept = data.load(recipe.data, "train", device).split_off(recipe.held_out)
    model = models.build({**recipe.architecture, "seed": seed}).to(device)
    quick = _PGD40 if recipe.objective in (_mnist_pgd, _digits_pgd) else fgsm
    unfinished = storage.cache() / "retrained" / f".{_stem(name, seed)}.training.safetensors"
    history = training.fit(
        model, images, recipe.objective(), epochs=recipe.epochs, batch_size=recipe.batch_size,
        lr=recipe.lr, validate=training.held_out(kept.subset(1000), recipe.threat, quick),
        checkpoint=unfinished, seed=seed, precision=recipe.precision, progress=progress,
    )  # fmt: skip
    unfinished.unlink(missing_ok=True)
    return model.eval(), history


def measured_by(name: str, seed: int = 0) -> dict[str, Attack]:
    """The attacks of the manifest: all of the recipe for seed 0, the first two for a copy."""
    return dict(list(_recipe(name).attacks.items())[: 2 if seed else None])


def measure(name: str, model: nn.Module, seed: int = 0, progress: bool = False) -> Result:
    """The attacks of `measured_by` on all test images."""
    recipe = _recipe(name)
    test = data.load(recipe.data, "test", next(model.parameters()).device)
    attacks = measured_by(name, seed)
    return worst_case(model, *test.tensors(), recipe.threat, attacks, progress=progress)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    with storage.atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()},
                  temporary)  # fmt: skip


def load_weights(path: str | Path, architecture: Mapping[str, object]) -> nn.Sequential:
    """A network in eval mode from a safetensors file; nothing is ever unpickled.

    Raises:
        ValueError: not a safetensors file (a pickled `.pt`, say), or of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = models.build(architecture)
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}). Pickled checkpoints are "
                         "refused: unpickling runs whatever code the file holds.") from error
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {dict(architecture)}: {error}") from error
    return model.eval()


def _checked(name: str, shipped: Mapping[str, object]) -> Path:
    """The checkpoint's path once its hash agrees; a damaged one is moved aside, fetched again."""
    path = _folder() / str(shipped["file"])
    if path.is_file() and storage.sha256(path) == shipped["sha256"]:
        return path
    fetched = storage.cache() / "fetched" / str(shipped["file"])
    if fetched.is_file() and storage.sha256(fetched) == shipped["sha256"]:
        return fetched
    if path.is_file():
        with suppress(PermissionError):  # The package's folder may be read-only.
            storage.move_aside(path)
    return _fetch(name, fetched, str(shipped["sha256"]))


def _fetch(name: str, target: Path, sha256: str) -> Path:
    import pooch

    about = metadata("advlearn")
    urls = dict(entry.split(", ", 1) for entry in about.get_all("Project-URL") or [])
    url = f"{urls.get('Repository')}/raw/v{about['Version']}/data/checkpoints/{target.name}"
    try:
        return Path(pooch.retrieve(url, f"sha256:{sha256}", target.name, target.parent))
    except Exception as error:  # requests' errors, or pooch's ValueError for a wrong hash
        raise ValueError(
            f"The checkpoint {name!r} is missing or damaged and could not be fetched from {url}: "
            f"{error}. Train it yourself: zoo.load_or_train({name!r}, retrain=True)."
        ) from error


def _ship(name: str, seed: int = 0) -> None:
    recipe, stem = _recipe(name), _stem(name, seed)
    made = provenance.stamp("cpu")  # Now: the commit that runs, not one that comes meanwhile.
    began = time.perf_counter()
    model, history = train(name, seed=seed)
    minutes = (time.perf_counter() - began) / 60
    result = measure(name, model, seed, progress=True)
    fgsm_only = worst_case(model, *data.load(recipe.data, "test").tensors(), recipe.threat, [fgsm])
    whole = recipe.data == "digits" or result.n == 10_000  # A local copy may hold fewer.
    folder = storage.shipped() / "checkpoints"
    save_weights(model, folder / f"{stem}.safetensors")  # Last, so that the manifest fits it.
    text = {
        "name": name, "file": f"{stem}.safetensors",
        "sha256": storage.sha256(folder / f"{stem}.safetensors"),
        "architecture": recipe.architecture, "data": recipe.data, "seed": seed,
        "recipe": {"objective": recipe.objective().description, "epochs": recipe.epochs,
                   "batch_size": recipe.batch_size, "lr": recipe.lr, "optimizer": "Adam",
                   "precision": recipe.precision, "held_out": f"last {recipe.held_out} training images"},
        "minutes": round(minutes, 2), **made,
        "measured": {"images": f"{'all' if whole else 'the first'} {result.n} test images",
                     "fgsm": fgsm_only.to_dict(), "worst_case": result.to_dict(), "trace": result.trace},
        "history": history.rows,
    }  # fmt: skip
    with storage.atomic(folder / f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(text, indent=1, default=list, ensure_ascii=False) + "\n",
                             encoding="utf8")  # fmt: skip
    print(f"{stem}: {minutes:.1f} min, FGSM {fgsm_only.accuracy:.4f}, {result}")


if __name__ == "__main__":
    for _argument in sys.argv[1:]:
        _name, _, _seed = _argument.partition("@")
        _ship(_name, int(_seed or 0))
