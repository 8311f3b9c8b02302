"""Record chapter 6's robust overfitting on CIFAR-10, one CPU core.

`python tools/record_overfit.py l2 0 1`: PGD training on few images for long, in the ball named, for
each seed. A run of `data/results/06_overfit_cifar10.json` holds every epoch, and the best and the
last network on the test images and on held-out training images that chose nothing.
"""

import argparse
import time
from functools import partial

from advlearn import data, provenance, results
from advlearn.attacks import pgd
from advlearn.evaluation import paired, worst_case
from advlearn.threats import L2, Linf
from advlearn.tradeoff import HELD_OUT, overfit
from advlearn.training import drops

THREATS = {"l2": L2(0.5), "linf": Linf(8 / 255)}
STEPS, RAMP, CHOSEN_ON, OTHERS = 3, 0.05, 400, 4000
DROPS = (0.5, 0.75)  # As in the paper, which has 200 epochs of 50,000 images.


def judged(networks: dict, images: data.Dataset, threat: Linf | L2, seed: int) -> dict[str, float]:
    """Accuracies of both networks, and best less last with its paired 95 % interval."""
    walk = partial(pgd, steps=20, step_size=threat.eps / 8)
    found = {name: worst_case(f, *images.tensors(), threat, [walk], seed=seed, index=images.index)
             for name, f in networks.items()}  # fmt: skip
    values = {f"{name}{key}": v for name, r in found.items()
              for key, v in (("", r.accuracy), ("_clean", r.clean_accuracy))}  # fmt: skip
    fall = paired(found["best"].correct, found["last"].correct)
    return values | dict(zip(("fall", "fall_low", "fall_high"), fall, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("norm", choices=THREATS)
    parser.add_argument("seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=80)
    args = parser.parse_args()
    threat, test = THREATS[args.norm], data.load("cifar10", "test")
    for seed in args.seeds:
        began = time.perf_counter()
        history, networks = overfit(
            args.images, args.epochs, seed, dataset="cifar10", architecture={"name": "five_conv"},
            threat=threat, steps=STEPS, ramp=RAMP, n=CHOSEN_ON, batch_size=128,
            schedule=drops(*DROPS), precision="bf16-mixed")  # fmt: skip
        held_out = data.load("cifar10", "train").split_off(HELD_OUT["cifar10"])[1]
        others = held_out.subset(CHOSEN_ON + OTHERS, seed).split_off(OTHERS)[1]
        values = {f"{prefix}{key}": v for prefix, images in (("", test), ("others_", others))
                  for key, v in judged(networks, images, threat, seed).items()}  # fmt: skip
        run = {"profile": "cpu", "seed": seed, "threat": str(threat), "images": args.images,
               "epochs": args.epochs, "minutes": round((time.perf_counter() - began) / 60, 2),
               **provenance.stamp("cpu"), "network": "five_conv", "batch_size": 128, "lr": 0.002,
               "drops": DROPS, "steps": STEPS, "ramp": RAMP, "precision": "bf16-mixed",
               "chosen_on": CHOSEN_ON, "test": len(test), "others": OTHERS, "values": values,
               "history": history}  # fmt: skip
        results.store("06_overfit_cifar10", [run], ("profile", "threat", "images", "epochs", "seed"),
                      tabled=False)  # fmt: skip
        print(args.norm, seed, {k: round(v, 4) for k, v in values.items()}, run["minutes"], flush=True)


if __name__ == "__main__":
    main()
