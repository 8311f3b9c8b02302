"""Record chapter 7's experiments on relabelled and robustified training sets.

`python tools/record_features.py PART [SEED ...]`, on one CPU core: `mnist` (D_rand, D_det and their
controls; 3 minutes a seed; `--eps`, `--images` for other sizes), `robustified` (D_R and D_NR; 5
minutes), `transfer` (5 minutes), `cifar` (20 minutes), `cifar-robustified` (15 minutes). Adds to
`data/results/07_*.json`.
"""

import argparse
import time
from functools import partial

from advlearn import data, models, provenance, relabelled, results, zoo
from advlearn.attacks import pgd
from advlearn.data import Dataset
from advlearn.evaluation import accuracy, interval, predict
from advlearn.relabelled import next_class, random_targets
from advlearn.robustfeatures import agreement, robustness, scatter, trained
from advlearn.tensors import norms
from advlearn.threats import L2, Linf

SMALL, FIVE = {"name": "small_conv"}, {"name": "five_conv"}
THREATS = {"mnist": {"linf_0.1": Linf(0.1), "linf_0.2": Linf(0.2), "linf_0.3": Linf(0.3),
                     "l2_1": L2(1), "l2_2": L2(2)},
           "cifar10": {"l2_0.25": L2(0.25), "l2_0.5": L2(0.5)}}  # fmt: skip


def train_images(name: str, n: int, seed: int) -> Dataset:
    """Training images, none of the last 5,000."""
    return data.load(name, "train").split_off(5000)[0].subset(n, seed)


def keep(name: str, seed: int, values: dict, began: float, by: tuple[str, ...] = (), **more) -> None:
    minutes = round((time.perf_counter() - began) / 60, 2)
    run = {"profile": "cpu", "seed": seed, "minutes": minutes, **provenance.stamp("cpu"), **more}
    results.store(name, [{**run, "values": values}], ("profile", "seed", *by))


def judged(f, tests: dict[str, Dataset], name: str) -> dict[str, object]:
    """Shares of y and y + 1 on each set of true images, with 95 % intervals."""
    found = {}
    for prefix, test in tests.items():
        said = agreement(f, test)
        found |= {f"{name}_{prefix}{key}": said[key] for key in ("true", "next")}
    print(name, {k: round(v, 4) for k, v in found.items()}, flush=True)
    return found


def moved(made: Dataset, original: Dataset) -> float:
    """Mean ℓ2 distance of the images from those they were made from."""
    return float(norms(made.tensors()[0] - original.tensors()[0], 2).mean())


def relabel(dataset, source, onlooker, seed, n, eps, steps, architecture, epochs, quick=None,
            kinds=("rand", "det", "noise", "renamed"), **options):  # fmt: skip
    """D_rand, D_det and the controls: build, train in the standard way, ask on true images."""
    began, images = time.perf_counter(), train_images(dataset, n, seed)
    tests = {"": data.load(dataset, "test")}
    if dataset == "cifar10":
        tests["held_out_"] = data.load(dataset, "train").split_off(5000)[1]
    random, following, threat = random_targets(images, seed), next_class(images), L2(eps)
    attack = partial(relabelled.toward, quick or source, images, threat=threat, steps=steps)
    build = {"rand": lambda: attack(targets=random), "det": lambda: attack(targets=following),
             "noise": lambda: relabelled.noisy(images, random, threat, seed=seed),
             "noise_det": lambda: relabelled.noisy(images, following, threat, seed=seed),
             "renamed": lambda: relabelled.renamed(images, following)}  # fmt: skip
    values = {}
    for kind in kinds:
        start = time.perf_counter()
        made = build[kind]()
        built = time.perf_counter() - start
        x, t = made.tensors()
        values |= {f"{kind}_hit": accuracy(source, x, t), f"{kind}_moved": moved(made, images)}
        if onlooker is not None:
            said = predict(onlooker, x).argmax(1)
            values |= {f"{kind}_onlooker_true": float((said == images.labels).double().mean()),
                       f"{kind}_onlooker_target": float((said == t).double().mean())}
        f = trained(made, architecture, seed=100 + seed, epochs=epochs, **options)
        values |= judged(f, tests, kind)
        values |= {f"{kind}_build_seconds": round(built, 1),
                   f"{kind}_train_seconds": round(time.perf_counter() - start - built, 1)}
        if kind in ("rand", "det"):
            small = tests[""].subset(1000)
            values |= {f"{kind}_{k}": r.accuracy
                       for k, r in robustness(f, small, THREATS[dataset], seed=seed).items()}
        print(kind, f"hit {values[f'{kind}_hit']:.3f}, {built:.0f} s to build,",
              f"{time.perf_counter() - start:.0f} s in all", flush=True)
    return values, began


def mnist(seed: int, n: int, eps: float, kinds: tuple[str, ...]) -> None:
    values, began = relabel("mnist", zoo.load_or_train("mnist-small-natural"),
                            zoo.load_or_train("mnist-small-pgd"), seed, n, eps, 20, SMALL, 10,
                            kinds=kinds)  # fmt: skip
    keep("07_relabelled_mnist", seed, values, began, ("images", "eps"), images=n, eps=eps,
         norm="l2", steps=20, step_size=2.5 * eps / 20, epochs=10, batch_size=128,
         network="mnist-small-natural", onlooker="mnist-small-pgd", test="all 10,000 test images",
         robust="PGD-40, one random start, 1,000 test images")  # fmt: skip


def cifar(seed: int, n: int, eps: float, kinds: tuple[str, ...], epochs: int) -> None:
    source = zoo.load_or_train("cifar-five-natural")
    for kind in kinds:  # One at a time: each is stored when it is there.
        values, began = relabel("cifar10", source, None, seed, n, eps, 20, FIVE, epochs,
                                quick=models.fast(source), kinds=(kind,), lr=2e-3,
                                precision="bf16-mixed")  # fmt: skip
        keep("07_relabelled_cifar", seed, values, began, ("images", "eps", "kind", "epochs"),
             kind=kind, images=n, eps=eps, norm="l2", steps=20, step_size=2.5 * eps / 20,
             epochs=epochs, batch_size=128, augmentation="none", network="cifar-five-natural",
             test="the first 1,000 test images; held_out: the last 5,000 training images",
             robust="PGD-40, one random start, 1,000 test images")  # fmt: skip


def robustified(seed: int, dataset: str, n: int, epochs: int, steps: int) -> None:
    """D_R and D_NR (also with the walk kept near its start), beside the original images."""
    began, images = time.perf_counter(), train_images(dataset, n, seed)
    prefix, architecture = ("mnist-small", SMALL) if dataset == "mnist" else ("cifar-five", FIVE)
    options = {} if dataset == "mnist" else {"precision": "bf16-mixed"}
    natural, robust = (zoo.load_or_train(f"{prefix}-{kind}") for kind in ("natural", "pgd"))
    test = data.load(dataset).subset(1000)
    near = {"mnist": L2(3), "cifar10": L2(1)}[dataset]
    build = {
        "original": lambda: images,
        "robust": lambda: relabelled.inverted(robust, images, steps=steps, seed=seed),
        "nonrobust": lambda: relabelled.inverted(natural, images, steps=steps, seed=seed),
        "nonrobust_near": lambda: relabelled.inverted(natural, images, threat=near, steps=steps,
                                                      seed=seed),
    }  # fmt: skip
    values = {}
    for kind, make in build.items():
        made = make()
        f = trained(made, architecture, seed=100 + seed, epochs=epochs, **options)
        x = made.tensors()[0]
        values |= {f"{kind}_seen_by_{who}": accuracy(g, x, images.labels)
                   for who, g in (("natural", natural), ("robust", robust))}  # fmt: skip
        values[f"{kind}_clean_all"] = agreement(f, data.load(dataset))["true"]
        for key, r in robustness(f, test, THREATS[dataset], seed=seed).items():
            values |= {f"{kind}_clean": r.clean_accuracy, f"{kind}_{key}": r.accuracy}
        print(kind, {k: round(v, 3) for k, v in values.items() if k.startswith(kind)},
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    keep(f"07_robustified_{'mnist' if dataset == 'mnist' else 'cifar'}", seed, values, began,
         ("images",), images=n, epochs=epochs, steps=steps, step_size=0.1, near=str(near),
         natural=f"{prefix}-natural", robust=f"{prefix}-pgd",
         test="PGD-40, one random start, 1,000 test images; clean_all: every test image at hand",
         intervals={k: interval(round(1000 * v), 1000) for k, v in values.items()
                    if "_l2_" in k or "_linf_" in k or k.endswith("_clean")})  # fmt: skip


def transfer(seed: int, n: int, eps: float) -> None:
    """Transfer of attacks on the natural network against what each architecture learns from it."""
    began, images = time.perf_counter(), train_images("mnist", n, seed)
    source = zoo.load_or_train("mnist-small-natural")
    threat, test = L2(eps), data.load("mnist").subset(2000)
    for kind, targets in {"det": next_class(images), "rand": random_targets(images, seed)}.items():
        made = relabelled.toward(source, images, targets, threat, steps=20)
        attack = partial(pgd, steps=20, step_size=2.5 * eps / 20)
        rows = scatter(source, images, made, test, threat, attack, seed=100 + seed)
        for name, row in rows.items():
            print(kind, name, {k: round(v, 3) for k, v in row.items()}, flush=True)
        keep("07_transfer_mnist", seed, rows, began, ("kind", "eps"), kind=kind, images=n, eps=eps,
             norm="l2", steps=20, step_size=2.5 * eps / 20, epochs=10,
             network="mnist-small-natural", test="2,000 test images")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("mnist", "robustified", "transfer", "cifar",
                                         "cifar-robustified"))  # fmt: skip
    parser.add_argument("seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--images", type=int, help="training images")
    parser.add_argument("--eps", type=float, help="ℓ2 radius")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kinds", default="rand,det,noise,renamed")
    args = parser.parse_args()
    kinds = tuple(args.kinds.split(","))
    for seed in args.seeds:
        if args.part == "mnist":
            mnist(seed, args.images or 10_000, args.eps or 2.0, kinds)
        elif args.part == "cifar":
            cifar(seed, args.images or 20_000, args.eps or 0.5, kinds, args.epochs or 8)
        elif args.part == "transfer":
            transfer(seed, args.images or 5000, args.eps or 2.0)
        else:
            dataset, n, steps = (("mnist", 4000, 200) if args.part == "robustified"
                                 else ("cifar10", 5000, 100))  # fmt: skip
            robustified(seed, dataset, args.images or n, args.epochs or 15, args.steps or steps)


if __name__ == "__main__":
    main()
