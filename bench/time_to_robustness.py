"""How soon is a network robust? Training from random weights, timed, then the strongest attacks.

    python bench/time_to_robustness.py --objective pgd --epochs 4    # to choose: validation images
    python bench/time_to_robustness.py --test                        # once, at the end: an hour
    python bench/time_to_robustness.py --data digits --epochs 20 --images 100

The small network on MNIST, ε = 0.3, in this process alone. The defaults are what was chosen, on the
last 5,000 training images, which are not trained on: by PGD-100, Auto-PGD toward the two most
likely wrong classes and the Square Attack, on `--images` of them. `--test` judges all test images by PGD-100 with 20
restarts and by the standard evaluation. Seconds are those of `fit`, from random weights to the last
step, the data in memory; nothing is validated meanwhile. Processor seconds are printed too: on a
busy machine the wall clock says little. `--record` keeps the numbers in `data/results`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import lightning_fabric  # noqa: F401 (`fit` would import it on the clock)
import torch

from advlearn import data, losses, models, provenance, storage, zoo
from advlearn.attacks import Attack, apgd, pgd, square, standard_attack, toward
from advlearn.evaluation import worst_case
from advlearn.losses import dlr_targeted
from advlearn.threats import Linf
from advlearn.training import Objective, adversarial, fgsm_training, fit, free, trades, trapezoid

HELD_OUT = {"mnist": 5000, "digits": 200}


def parser() -> argparse.ArgumentParser:
    """All that may be chosen; the defaults are what was chosen."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = options.add_argument
    add("--data", choices=HELD_OUT, default="mnist")
    add("--eps", type=float, default=0.3, help="that is judged")
    add("--train-eps", type=float, default=0.32, help="of the training")
    add("--width", type=float, default=1, help="of small_conv")
    add("--objective", choices=("pgd", "trades", "fgsm", "free"), default="pgd")
    add("--steps", type=int, default=1, help="of the inner attack")
    add("--step-size", type=float, default=0.1, help="of the inner attack and of free")
    add("--resume", action=argparse.BooleanOptionalAction, default=True,
        help="pgd: start where the attack of the epoch before ended")  # fmt: skip
    add("--loss", choices=("cross_entropy", "margin", "dlr"), default="cross_entropy",
        help="inside, for pgd")  # fmt: skip
    add("--beta", type=float, default=6.0, help="of trades")
    add("--replays", type=int, default=1, help="of free")
    add("--ramp", type=float, default=0.3, help="share of the training over which ε grows")
    add("--epochs", type=int, default=36)
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.0)
    add("--warmup", type=float, default=0.05, help="of the learning rate")
    add("--decay-from", type=float, default=0.5, help="of the learning rate")
    add("--average", type=float, default=0.0, help="decay of the moving average of the weights")
    add("--precision", default="32-true")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--images", type=int, default=1000, help="a random sample of the validation images")
    add("--test", action="store_true", help="judge all test images; never to choose by")
    add("--label", default="", help="how a table calls it")
    add("--save", type=Path, help="keep the weights in this .safetensors file")
    add("--record", action="store_true", help="keep the numbers in data/results")
    return options


def objective(args: argparse.Namespace) -> Objective:
    """What the arguments say is minimised."""
    threat, ramp = Linf(args.train_eps), args.ramp
    attack = partial(pgd, steps=args.steps)
    if args.objective == "fgsm":
        return fgsm_training(threat, ramp=ramp)
    if args.objective == "free":
        return free(threat, step_size=args.step_size, ramp=ramp)
    if args.objective == "trades":
        return trades(threat, attack, args.beta, step_size=args.step_size, ramp=ramp)
    if args.loss != "cross_entropy":
        attack = partial(attack, loss=getattr(losses, args.loss))
    return adversarial(threat, attack, step_size=args.step_size, ramp=ramp, resume=args.resume)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Train, judge, say so: arguments, provenance, seconds and accuracies."""
    torch.set_num_threads(args.threads)
    images, kept = data.load(args.data, "train").split_off(HELD_OUT[args.data])
    model = models.small_conv(images.shape, args.width, seed=args.seed)
    about = {**provenance.stamp("cpu"), "load_before": os.getloadavg()[0]}
    wall, cpu = time.perf_counter(), time.process_time()
    fit(model, images, objective(args), epochs=args.epochs, batch_size=args.batch_size,
        replays=args.replays, lr=args.lr, weight_decay=args.weight_decay,
        schedule=trapezoid(args.warmup, args.decay_from), average=args.average,
        seed=args.seed, precision=args.precision)  # fmt: skip
    seconds = {"seconds": round(time.perf_counter() - wall, 1),
               "cpu_seconds": round(time.process_time() - cpu, 1)}  # fmt: skip
    print(f"{seconds['seconds']} s of training, {seconds['cpu_seconds']} s of processor time, "
          f"{about['hardware']}, load {about['load_before']:.1f} before", flush=True)

    if args.save:
        zoo.save_weights(model, args.save)
    judged = data.load(args.data, "test") if args.test else kept.subset(args.images)
    which, values = "test" if args.test else "validation", {}
    for name, attacks in judges(args.test).items():
        result = worst_case(model.eval(), *judged.tensors(), Linf(args.eps), attacks,
                            index=judged.index, progress=True)  # fmt: skip
        print(f"{which} images, {name}: {result}", flush=True)
        values |= {name: result.accuracy, f"{name} interval": result.interval,
                   f"{name} trace": result.trace, "clean": result.clean_accuracy}  # fmt: skip
    asked = {k: v for k, v in vars(args).items() if k not in ("save", "record")}
    line = {"profile": which, "asked": asked, **about, **seconds, "images": len(judged),
            "values": values}  # fmt: skip
    if args.record:
        keep(line)
    return line


def judges(test: bool) -> dict[str, list[Attack]]:
    """Name -> the attacks whose worst case counts; the quick judge is for choosing."""
    pgd100, climb = partial(pgd, steps=100, step_size=0.01), partial(apgd, steps=100)
    if test:
        return {"PGD-100 × 20": 20 * [pgd100], "standard evaluation": list(standard_attack().values())}
    aimed = [toward(k, climb, between=dlr_targeted) for k in (1, 2)]
    return {"PGD-100": [pgd100], "PGD-100, Auto-PGD toward 2": [pgd100, *aimed],
            "and Square": [pgd100, *aimed, partial(square, queries=2000)]}  # fmt: skip


def keep(line: dict[str, object]) -> None:
    """Store the line; it replaces an earlier one with the same arguments."""
    path = storage.shipped() / "results" / "time_to_robustness.json"
    lines = json.loads(path.read_text(encoding="utf8"))["runs"] if path.is_file() else []
    lines = [old for old in lines if old["asked"] != line["asked"]] + [line]
    with storage.atomic(path) as temporary:
        temporary.write_text(json.dumps({"tabled": False, "runs": lines}, indent=1, ensure_ascii=False) + "\n",
                             encoding="utf8")  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())))
