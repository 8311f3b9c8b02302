"""Record chapter 7's experiments on relabelled and robustified training sets, one CPU core.

`python tools/record_features.py PART [SEED ...]`. Parts: `mnist` (D_rand, D_det and their controls,
3 minutes a seed; --images and --eps for other sizes), `cifar` (the same on CIFAR-10, 10 minutes a
set), `pair` (dog against cat, 5 minutes), `robustified` (D_R and D_NR, 5 minutes),
`cifar-robustified` (15 minutes), `transfer` (5 minutes), `cifar-transfer` (20 minutes),
`perception` (gradients, inversions and units on CIFAR-10, 10 minutes). Every trained network is one
run of `data/results/07_PART.json`, stored when it is there; pictures lie beside it.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import torch

from advlearn import attacks, data, models, perception, provenance, relabelled, results, zoo
from advlearn.attacks import on, pgd
from advlearn.data import Dataset
from advlearn.evaluation import predict
from advlearn.relabelled import next_class, random_targets
from advlearn.robustfeatures import agreement, robustness, scatter, trained
from advlearn.tensors import generator, norms
from advlearn.threats import L2, Linf

NATURAL = {"mnist": "mnist-small-natural", "cifar10": "cifar-five-natural"}
ROBUST = {"mnist": "mnist-small-l2", "cifar10": "cifar-five-pgd"}  # Both in ℓ2.
ONLOOKER = {"mnist": "mnist-small-pgd", "cifar10": "cifar-five-pgd"}
ARCHITECTURES = {"mnist": {"name": "small_conv"}, "cifar10": {"name": "five_conv"}}
CIFAR_ARCHITECTURES = {
    "linear": {"name": "linear"}, "MLP": {"name": "mlp"}, "small conv": {"name": "small_conv"},
    "pooled conv": {"name": "madry_mnist", "width": 4},
    **{f"five conv, width {w}": {"name": "five_conv", "width": w} for w in (8, 16, 32, 64)},
}  # fmt: skip
PRECISION = {"mnist": "32-true", "cifar10": "bf16-mixed"}
THREATS = {"mnist": {"linf_0.1": Linf(0.1), "linf_0.2": Linf(0.2), "linf_0.3": Linf(0.3),
                     "l2_1": L2(1), "l2_2": L2(2)},
           "cifar10": {"l2_0.25": L2(0.25), "l2_0.5": L2(0.5)}}  # fmt: skip
GRADIENT_LIMIT = 0.1  # Of a pixel of a gradient of length 1, in pictures.
STEPS = 20  # Of the attacks that relabel, each of size 2.5 ε / 20.


def training_images(dataset: str, n: int, seed: int) -> Dataset:
    """Training images, none of the last 5,000."""
    return data.load(dataset, "train").split_off(5000)[0].subset(n, seed)


def keep(name: str, seed: int, began: float, values: dict, tabled: bool = True, **fields) -> None:
    """Store one run, known by profile, seed, kind and size."""
    run = {"profile": "cpu", "seed": seed, "minutes": round((time.perf_counter() - began) / 60, 2),
           **provenance.stamp("cpu"), **fields, "values": values}  # fmt: skip
    results.store(name, [run], ("profile", "seed", "kind", "architecture", "images", "eps", "epochs"),
                  tabled=tabled)  # fmt: skip
    print(name, seed, fields.get("kind", ""), fields.get("architecture", ""),
          {k: round(v, 4) for k, v in values.items()}, f"{run['minutes']} min", flush=True)  # fmt: skip


def seen(made: Dataset, original: Dataset, who: dict) -> dict[str, float]:
    """How the images were moved, and what networks say of them: label, class, label after class."""
    x = made.tensors()[0]
    values = {"moved": float(norms(x - original.tensors()[0], 2).mean())}
    for name, f in who.items():
        logits = predict(f, x)
        second = logits.scatter(1, original.labels[:, None], -torch.inf).argmax(1)
        for what, found in {"label": logits.argmax(1) == made.labels,
                            "class": logits.argmax(1) == original.labels,
                            "second": second == made.labels}.items():  # fmt: skip
            values[f"{name}_says_{what}"] = float(found.double().mean())
    return values


def learned(made: Dataset, dataset: str, seed: int, epochs: int) -> dict[str, float]:
    """Standard training on `made`, and accuracy on true images: clean, on y + 1, and under PGD."""
    f = trained(made, ARCHITECTURES[dataset], seed=100 + seed, epochs=epochs,
                precision=PRECISION[dataset])  # fmt: skip
    tests = {"": data.load(dataset, "test")}
    if dataset == "cifar10":
        tests["held_out_"] = data.load(dataset, "train").split_off(5000)[1]
    values = {f"{prefix}{key}": share for prefix, test in tests.items()
              for key, share in agreement(f, test).items() if key in ("true", "next")}  # fmt: skip
    few = tests[""].subset(1000)
    for name, r in robustness(f, few, THREATS[dataset], seed=seed).items():
        values |= {"clean_1000": r.clean_accuracy, name: r.accuracy}
    return values


def protocol(dataset: str) -> dict[str, object]:
    """What all runs of a data set have in common."""
    cifar = dataset == "cifar10"
    return {"network": NATURAL[dataset], "trains": ARCHITECTURES[dataset]["name"],
            "batch_size": 128, "lr": 0.002, "augmentation": "none",
            "test": "the first 1,000 test images; held_out_*: the last 5,000 training images"
            if cifar else "all 10,000 test images",
            "robust": "PGD-40, steps of 2.5 eps / 40, one random start, 1,000 test images"}  # fmt: skip


def relabel(dataset: str, seed: int, n: int, eps: float, epochs: int, kinds: list[str]) -> None:
    """D_rand, D_det and the controls."""
    natural = zoo.load_or_train(NATURAL[dataset])
    onlooker = {"onlooker": zoo.load_or_train(ONLOOKER[dataset])}
    images, threat = training_images(dataset, n, seed), L2(eps)
    source = natural if dataset == "mnist" else models.fast(natural)
    toward = partial(relabelled.toward, source, images, threat=threat, steps=STEPS)
    random, following = random_targets(images, seed), next_class(images)
    build = {"D_rand": lambda: toward(random), "D_det": lambda: toward(following),
             "noise, random labels": lambda: relabelled.noisy(images, random, threat, seed=seed),
             "noise, y + 1": lambda: relabelled.noisy(images, following, threat, seed=seed),
             "labels y + 1": lambda: relabelled.renamed(images, following),
             "original": lambda: images}  # fmt: skip
    for kind in kinds or build:
        began = time.perf_counter()
        made = build[kind]()
        building = time.perf_counter() - began
        values = seen(made, images, {"source": natural, **onlooker}) | learned(made, dataset, seed, epochs)
        values["build_seconds"] = round(building, 1)
        keep(f"07_relabelled_{dataset}", seed, began, values, kind=kind, images=n, eps=eps, norm="l2",
             steps=STEPS, step_size=2.5 * eps / STEPS, epochs=epochs, **protocol(dataset))  # fmt: skip


def pair(seed: int, eps: float, epochs: int) -> None:
    """Dog against cat, as in the slides: the other class is the only wrong one."""
    two = {part: binary(images) for part, images in
           zip(("train", "held out"), data.load("cifar10", "train").split_off(5000), strict=True)}  # fmt: skip
    options = {"epochs": epochs, "precision": PRECISION["cifar10"]}
    began = time.perf_counter()
    natural = trained(two["train"], ARCHITECTURES["cifar10"], seed=seed, **options)
    images, threat = two["train"], L2(eps)
    other = 1 - images.labels
    build = {"original": lambda: images,
             "other class": lambda: relabelled.toward(models.fast(natural), images, other, threat,
                                                      steps=STEPS),
             "noise, other class": lambda: relabelled.noisy(images, other, threat, seed=seed),
             "labels exchanged": lambda: relabelled.renamed(images, other)}  # fmt: skip
    for kind in build:
        made = build[kind]()
        f = trained(made, ARCHITECTURES["cifar10"], seed=100 + seed, **options)
        said = agreement(f, two["held out"])
        values = seen(made, images, {"source": natural}) | {"held_out_true": said["true"], "n": said["n"]}
        values["source"] = agreement(natural, two["held out"])["true"]
        keep("07_pair_cifar10", seed, began, values, kind=kind, images=len(images), eps=eps, norm="l2",
             steps=STEPS, step_size=2.5 * eps / STEPS, epochs=epochs, trains="five_conv",
             batch_size=128, lr=0.002, augmentation="none",
             test="cats and dogs of the last 5,000 training images")  # fmt: skip
        began = time.perf_counter()


def binary(images: Dataset) -> Dataset:
    """The cats and dogs among CIFAR-10 images, as classes 0 and 1."""
    some = images.only(3, 5)
    return replace(some, labels=(some.labels == 5).long(), classes=("cat", "dog"))


def robustify(dataset: str, seed: int, n: int, epochs: int, steps: int, kinds: list[str]) -> None:
    """D_R and D_NR, both also with the walk kept near its start, beside the original images."""
    natural, robust = (zoo.load_or_train(names[dataset]) for names in (NATURAL, ROBUST))
    images, near = training_images(dataset, n, seed), {"mnist": L2(2), "cifar10": L2(1)}[dataset]
    step_size = {"mnist": 0.1, "cifar10": 0.3}[dataset]
    inverted = partial(relabelled.inverted, data=images, steps=steps, step_size=step_size, seed=seed)
    build = {"original": lambda: images, "D_R": lambda: inverted(robust),
             "D_NR": lambda: inverted(natural), "D_NR, near": lambda: inverted(natural, threat=near),
             "D_R, near": lambda: inverted(robust, threat=near),
             "starts": lambda: inverted(natural, steps=0)}  # fmt: skip
    if dataset == "mnist":  # Its threshold filters are flat at black and white.
        build["D_R, linf network"] = lambda: inverted(zoo.load_or_train("mnist-small-pgd"))
    for kind in kinds or build:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dataset == "cifar10"):
            made = build[kind]()
        values = seen(made, images, {"natural": natural, "robust": robust})
        values["moved"] = float(norms(made.tensors()[0] - build["starts"]().tensors()[0], 2).mean())
        values |= learned(made, dataset, seed, epochs)
        keep(f"07_robustified_{dataset}", seed, began, values, kind=kind, images=n, epochs=epochs,
             steps=steps, step_size=step_size, near=str(near), robust_network=ROBUST[dataset],
             **protocol(dataset))  # fmt: skip


def transfer(dataset: str, seed: int, n: int, eps: float, epochs: int) -> None:
    """Transfer of attacks on the natural network against what each architecture learns from it."""
    source, images = zoo.load_or_train(NATURAL[dataset]), training_images(dataset, n, seed)
    threat, test = L2(eps), data.load("mnist").subset(2000)
    options: dict = {"seed": 100 + seed, "epochs": epochs}
    if dataset == "cifar10":
        test = data.load(dataset, "train").split_off(5000)[1].subset(2000)
        options |= {"architectures": CIFAR_ARCHITECTURES, "precision": PRECISION[dataset]}
    attacked = source if dataset == "mnist" else models.fast(source)
    attack = on(attacked, partial(pgd, steps=STEPS, step_size=2.5 * eps / STEPS))
    began = time.perf_counter()
    sets = {kind: relabelled.toward(attacked, images, targets, threat, steps=STEPS)
            for kind, targets in {"D_det": next_class(images),
                                  "D_rand": random_targets(images, seed)}.items()}  # fmt: skip
    rows = scatter(source, images, sets, test, threat, attack, **options)
    for name, values in rows.items():
        keep(f"07_transfer_{dataset}", seed, began, values, architecture=name, images=n, eps=eps,
             norm="l2", steps=STEPS, epochs=epochs, network=NATURAL[dataset],
             test=f"2,000 {'test' if dataset == 'mnist' else 'held-out training'} images; success: "
             "of those both get right and that fool the source")  # fmt: skip


def perceive(seed: int, n: int, steps: int) -> None:
    """Gradients of n CIFAR-10 test images, inversions of 100 of them, and single units."""
    began, units, few = time.perf_counter(), torch.arange(3), 100
    networks = {kind: zoo.load_or_train(names["cifar10"])
                for kind, names in {"natural": NATURAL, "robust": ROBUST}.items()}  # fmt: skip
    test = data.load("cifar10").subset(n, seed)
    x, y = test.tensors()
    pool = data.load("cifar10", "train").split_off(5000)[0].tensors()
    way = perception.way_out(x[:500], y[:500], *pool)
    target, start = x[:few], x[few : 2 * few]
    begun = {"image": start, "noise": attacks.noise(target, generator(seed))}
    pictures = {"target": target[:6], "start": start[:6]}
    other_class = x[y != y[0]][:1]
    for name, f in networks.items():
        values = {"clean": float((predict(f, x).argmax(1) == y).double().mean())}
        g = perception.gradients(f, x, y)
        pictures[f"{name}, gradient"] = 0.5 + g[:8] / (2 * GRADIENT_LIMIT)
        said = dict(zip(("row", "column"), perception.smoothness(g), strict=True))
        said |= dict(zip(("other_class", "control"), perception.cosines(g[:500], way), strict=True))
        for key, value in said.items():
            values |= {key: float(value.mean()), f"{key}_se": float(value.std()) / len(value) ** 0.5}
        other = networks["robust" if name == "natural" else "natural"]
        for where, first in begun.items():
            z, found = perception.read_back(f, target, first, steps=steps, step_size=0.2,
                                            rectified=True)  # fmt: skip
            for who, h in {"own": f, "other": other}.items():
                found[who] = float((predict(h, z).argmax(1) == predict(h, target).argmax(1))
                                   .double().mean())  # fmt: skip
            values |= {f"from_{where}_{key}": value for key, value in found.items()}
            pictures[f"{name}, from {where}"] = z[:6]
        pictures[f"{name}, walk"] = attacks.interpolate(
            f, x[:1], other_class, 7, steps=steps // 2, step_size=0.2)[:, 0]  # fmt: skip
        values |= {f"walk_class_{i}": int(c) for i, c in
                   enumerate(predict(f, pictures[f"{name}, walk"]).argmax(1).tolist())}  # fmt: skip
        R = models.features(f, rectified=False)
        active = predict(R, x)[:, units]
        grey = attacks.noise(x[:3], generator(seed))
        up, down = (attacks.excite(f, grey, units, steps=steps, step_size=0.2, sign=sign)
                    for sign in (1, -1))  # fmt: skip
        pictures |= {f"{name}, noise up": up, f"{name}, noise down": down,
                     f"{name}, test largest": x[active.argmax(0)],
                     f"{name}, test smallest": x[active.argmin(0)]}  # fmt: skip
        reach = predict(R, up)[units, units] / active.amax(0)
        values |= {f"unit_{i}_reach": float(v) for i, v in enumerate(reach)}
        z = attacks.excite(f, x[:1].expand(3, -1, -1, -1), units, threat=L2(2.0), steps=steps,
                           step_size=0.1)  # fmt: skip
        pictures[f"{name}, changed 0"] = torch.cat([x[:1], z])
        values |= {f"changed_0_class_{j}": int(c)
                   for j, c in enumerate(predict(f, z).argmax(1).tolist())}  # fmt: skip
        values |= {f"class_{i}": int(c) for i, c in enumerate(y[:8].tolist())}
        values |= {f"says_{i}": int(c) for i, c in enumerate(predict(f, x[:8]).argmax(1).tolist())}
        keep("07_perception_cifar10", seed, began, values, kind=name, images=n, inverted=few,
             steps=steps, step_size=0.2, network={"natural": NATURAL, "robust": ROBUST}[name]["cifar10"],
             gradient_limit=GRADIENT_LIMIT, tabled=False, test="test images, drawn by the seed")  # fmt: skip
    if seed == 0:
        results.store_images("07_perception_cifar10", pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("mnist", "cifar", "robustified", "cifar-robustified",
                                         "transfer", "cifar-transfer", "perception", "pair"))  # fmt: skip
    parser.add_argument("seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--images", type=int, help="training images")
    parser.add_argument("--eps", type=float, help="ℓ2 radius of the relabelling attack")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--steps", type=int, help="of the inversion")
    parser.add_argument("--kinds", nargs="*", default=[], help="training sets; default all")
    args = parser.parse_args()
    n, eps, epochs, steps = {
        "mnist": (10_000, 2.0, 10, 0), "cifar": (20_000, 0.5, 8, 0), "transfer": (5000, 2.0, 10, 0),
        "robustified": (4000, 0, 15, 200), "cifar-robustified": (10_000, 0, 30, 100),
        "cifar-transfer": (20_000, 0.5, 10, 0), "perception": (1000, 0, 0, 400), "pair": (0, 0.5, 20, 0),
    }[args.part]  # fmt: skip
    n, eps, epochs = args.images or n, args.eps or eps, args.epochs or epochs
    dataset = "cifar10" if args.part.startswith("cifar") else "mnist"
    for seed in args.seeds:
        if args.part.endswith("transfer"):
            transfer(dataset, seed, n, eps, epochs)
        elif args.part == "pair":
            pair(seed, eps, epochs)
        elif args.part == "perception":
            perceive(seed, n, args.steps or steps)
        elif args.part.endswith("robustified"):
            robustify(dataset, seed, n, epochs, args.steps or steps, args.kinds)
        else:
            relabel(dataset, seed, n, eps, epochs, args.kinds)


if __name__ == "__main__":
    main()
