"""How fast are the attacks? One table, ours beside other libraries, measured in one run.

    make bench                           # twenty minutes of one quiet core
    make bench ARGS="--quick"            # two and a half
    make bench ARGS="--threads 2"
    make bench ARGS="--only 1"           # one of the parts
    make bench ARGS="--only 5 --threads 2"   # time to robustness; over an hour, only when asked for

What is measured, on the CPU:

1. PGD-40 relative to 40 bare input gradients (forward and backward pass to the input, weights
   frozen, nothing else) of the same network. Every attack runs between two blocks of bare gradients
   and is divided by their mean; the order is drawn anew in every round; the figure is the median
   over rounds, in brackets the quartiles. Bare gradients are taken at a random point of the ball:
   clean MNIST is mostly black, pooling and ReLU find that easier, and no attack stays there. What
   a gradient at the clean images costs is measured too, and printed below the table.
2. 20 restarts on a natural network: `worst_case` against a peer run 20 times on every image, an
   image being lost when any run fools the network.
3. `models.fast` against the plain network, and whether verdicts change when it is attacked instead.
4. Auto-PGD, the Square Attack and all of AutoAttack beside torchattacks', with the papers' settings on
   the same images: robust accuracy, and time.
5. Time to robustness (bench/time_to_robustness.py): the small network trained from random weights and
   judged on all test images by PGD-100 with 20 restarts and by the standard evaluation.

With one thread, times are the process's own CPU time, so that other work on the machine counts
little; with more threads they are wall-clock time and need a quiet machine. The first runs warm up
and do not count. A library that is missing or fails costs its column and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import time_to_robustness as robustness
import torch
import torch.nn.functional as F
from peers import PEERS, Attack, versions
from strong import PARTS, beside_peer, networks
from table import Row, print_table
from torch import Tensor, nn

from advlearn import data, models, provenance, storage, zoo
from advlearn.attacks import on, pgd
from advlearn.evaluation import predict, worst_case
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy
from advlearn.tensors import frozen, generator
from advlearn.threats import L1, L2, Linf

EPS, STEP_SIZE, BATCH, RESTARTS = 0.3, 0.01, 256, 20
CLEAN = "bare gradients at the clean images"


class Clock:
    """CPU time of this process with one thread, wall-clock time with more."""

    def __init__(self, threads: int) -> None:
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.name = "CPU time" if threads == 1 else "wall-clock time"

    def __call__(self, run: Callable[[], object]) -> float:
        began = self.now()
        run()
        return self.now() - began


def has_mnist() -> bool:
    folders = [storage.cache(), Path(os.environ.get("ADVLEARN_DATA") or storage.cache())]
    return any((folder.expanduser() / "mnist.npz").is_file() for folder in folders)


def images(n: int) -> tuple[Tensor, Tensor, str]:
    """n MNIST test images where MNIST is at hand, else noise of that shape."""
    if has_mnist():
        return *data.load("mnist", "test").subset(n).tensors(), "MNIST test images"
    gen = generator(0)
    return (torch.rand(n, 1, 28, 28, generator=gen), torch.randint(10, (n,), generator=gen),
            "uniform noise")  # fmt: skip


def bare(model: nn.Module, x: Tensor, y: Tensor, n: int) -> None:
    """n input gradients and nothing else."""
    with frozen(model):
        for _ in range(n):
            z = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)


def spread(values: list[float]) -> Row:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"value": middle, "low": low, "high": high, "runs": len(values)}


def beside_bare(clock: Clock, model: nn.Module, x: Tensor, y: Tensor, attacks: dict[str, Attack],
                steps: int, rounds: int) -> tuple[Row, float]:  # fmt: skip
    """Cost of every attack in units of `steps` bare gradients; milliseconds of one of those."""
    block = max(1, steps // 4)
    reference = partial(bare, model, Linf(EPS).sample(x, generator(0)), y, block)
    reference()
    attacks = {**attacks, CLEAN: lambda x, y: bare(model, x, y, steps) or x}
    cells: Row = {}
    for name, attack in list(attacks.items()):  # Warm up, and see that the attack does its work.
        try:
            reached = cross_entropy(predict(model, attack(x, y)), y)
            cells[name] = {"loss": float(reached.mean())}
        except Exception as error:
            cells[name] = {"failed": f"{type(error).__name__}: {error}"}
            del attacks[name]
    ratios: dict[str, list[float]] = {name: [] for name in attacks}
    blocks = [clock(reference)]
    for _ in range(rounds):
        for name in random.sample(list(attacks), len(attacks)):
            spent = clock(partial(attacks[name], x, y))
            blocks.append(clock(reference))
            ratios[name].append(spent / (blocks[-2] + blocks[-1]) * 2 * block / steps)
    for name, values in ratios.items():
        cells[name] |= spread(values)
    return cells, 1e3 * statistics.median(blocks) / block


def pgd_cost(clock: Clock, name: str, model: nn.Module, goal: float, steps: int,
             rounds: int) -> list[Row]:  # fmt: skip
    """Section 1 for one network."""
    model.eval()
    x, y, kind = images(BATCH)

    def ours(threat, step_size):
        return lambda x, y: pgd(model, x, y, threat, steps=steps, step_size=step_size)

    attacks, missing = {"ours": ours(Linf(EPS), STEP_SIZE)}, {}
    for peer in PEERS:
        try:
            attacks[peer.name] = peer.make(model, EPS, STEP_SIZE, steps)
        except Exception as error:
            missing[peer.name] = {"failed": f"{type(error).__name__}: {error}"}
    cells, ms = beside_bare(clock, model, x, y, attacks, steps, rounds)
    clean = cells.pop(CLEAN)["value"]
    notes = (f"in units of {steps} bare gradients, {ms:.1f} ms each ({clean:.2f} at the clean "
             f"images); {BATCH} {kind}; in brackets the quartiles")
    rows = [{"what": f"PGD-{steps} ℓ∞, {name}", "cells": cells | missing,
             "goal": f"≤ {goal}", "met": cells["ours"]["value"] <= goal, "clean": clean,
             "notes": notes}]  # fmt: skip
    others = {"ℓ2": ours(L2(2.0), 0.1), "ℓ1": ours(L1(10.0), 0.5)}
    cells, _ = beside_bare(clock, model, x, y, others, steps, max(1, rounds // 2))
    return rows + [{"what": f"PGD-{steps} {norm}, {name}",
                    "cells": {"ours": cells[norm]}} for norm in others]  # fmt: skip


def restarts(clock: Clock, eps: float, n: int, goal: float | None) -> Row:
    """Section 2: `worst_case` against torchattacks' PGD run 20 times, on a natural network."""
    mnist = has_mnist() and zoo.manifest("mnist-small-natural")
    network = "mnist-small-natural" if mnist else "digits-small-natural"
    model = zoo.load_or_train(network)
    test = data.load(zoo.RECIPES[network].data, "test").subset(n)
    (x, y), attack = test.tensors(), partial(pgd, steps=40, step_size=STEP_SIZE)

    def ours():
        return worst_case(model, x, y, Linf(eps), [attack] * RESTARTS, index=test.index)

    worst_case(model, x[:BATCH], y[:BATCH], Linf(eps), [attack])  # Warm up.
    result, seconds = ours(), []
    cells: Row = {"ours": {"accuracy": result.accuracy}}
    row: Row = {"what": f"{RESTARTS} restarts, ε {eps}, {network}", "cells": cells,
                "unit": "s", "notes": f"{len(y)} test images, PGD-40 with random starts"}
    try:
        peer = PEERS[0].make(model, eps, STEP_SIZE, 40, random_start=True)
        stands, theirs = predict(model, x).argmax(1) == y, 0.0
        peer(x[:BATCH], y[:BATCH])

        def restart():
            for rows in torch.arange(len(y)).split(BATCH):
                image = peer(x[rows], y[rows])
                stands[rows] &= predict(model, image).argmax(1) == y[rows]

        for i in range(RESTARTS):
            if i % 7 == 0:  # Ours between theirs, three times.
                seconds.append(clock(ours))
            theirs += clock(restart)
        cells[PEERS[0].name] = {"value": theirs, "accuracy": float(stands.double().mean())}
    except Exception as error:
        cells[PEERS[0].name] = {"failed": f"{type(error).__name__}: {error}"}
        seconds, goal = [clock(ours) for _ in range(3)], None
    cells["ours"] |= spread(seconds)
    if "value" in cells[PEERS[0].name]:
        row["speedup"] = theirs / cells["ours"]["value"]
        row["notes"] += f"; {row['speedup']:.1f} times faster"
        no_weaker = cells["ours"]["accuracy"] <= cells[PEERS[0].name]["accuracy"]
        if goal:
            row |= {"goal": f"≥ {goal:g} times", "met": row["speedup"] >= goal and no_weaker}
    return row


def fast_model(clock: Clock, name: str, model: nn.Module, goal: float | None,
               rounds: int) -> Row:  # fmt: skip
    """Section 3: input gradients of `models.fast(model)` against those of `model`."""
    x, y, kind = images(BATCH)
    pair = {"plain": model.eval(), "fast": models.fast(model)}

    def gradient(f):
        with frozen(f):
            return input_grad(lambda z: cross_entropy(f(z), y), x)

    times: dict[str, list[float]] = {which: [] for which in pair}
    signs = [gradient(f).sign() for f in pair.values()]  # Warm up, and compare.
    for _ in range(4 * rounds):
        for which, f in pair.items():
            times[which].append(clock(partial(gradient, f)))
    ratio = spread([plain / fast for plain, fast in zip(*times.values(), strict=True)])
    bf16 = models._has_bf16(x.device)
    same = float((signs[0] == signs[1]).double().mean())
    row = {"what": f"models.fast, {name}", "unit": "times faster", "cells": {"ours": ratio},
           "notes": f"input gradients of {BATCH} {kind}, {100 * same:.1f} % of the signs agree"}
    if not bf16:
        row["notes"] += "; this processor has no bf16"
    elif goal:
        row |= {"goal": f"≥ {goal}", "met": ratio["value"] >= goal}
    return row


def fast_verdicts(n: int) -> Row:
    """Section 3: attack the fast network, judge the plain one; how many verdicts change?"""
    mnist = has_mnist() and zoo.manifest("mnist-small-pgd")
    network = "mnist-small-pgd" if mnist else "digits-small-pgd"
    model, recipe = zoo.load_or_train(network), zoo.RECIPES[network]
    test = data.load(recipe.data, "test").subset(n)
    attack = partial(pgd, steps=40, step_size=recipe.threat.eps / 30)
    plain, fast = (
        worst_case(model, *test.tensors(), recipe.threat, attacks, index=test.index)
        for attacks in ([attack] * 2, [on(models.fast(model), attack)] * 2)
    )
    same = int((plain.correct == fast.correct).sum())
    return {"what": f"models.fast attacked, {network}", "unit": "verdicts equal",
            "cells": {"ours": {"value": same / plain.n}},
            "notes": f"{same} of {plain.n} agree; accuracy {100 * plain.accuracy:.1f} % by attacks "
                     f"on the plain network, {100 * fast.accuracy:.1f} % on the fast one, PGD-40, "
                     "2 restarts"}  # fmt: skip


def time_to_robustness(threads: int, quick: bool) -> Row:
    """Section 5: seconds of training, and how robust the network is then."""
    asked = ["--threads", str(threads), *(["--epochs", "1"] if quick else ["--test"]),
             *([] if has_mnist() else ["--data", "digits"])]  # fmt: skip
    line = robustness.measure(robustness.parser().parse_args(asked))
    worst = {k: v for k, v in line["values"].items() if isinstance(v, float) and k != "clean"}
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in worst.items())
    row = {"what": "time to robustness", "unit": "s", "notes": f"{line['images']} {line['profile']} "
           f"images, clean {100 * line['values']['clean']:.2f} %, {shown}",
           "cells": {"ours": {"value": line["seconds"], "accuracy": min(worst.values())}}}  # fmt: skip
    if line["profile"] == "test" and has_mnist():
        met = line["seconds"] <= 300 and all(
            value >= goal for value, goal in zip(worst.values(), (0.91, 0.90), strict=True))  # fmt: skip
        row |= {"goal": "≤ 300 s, ≥ 91 % and ≥ 90 %", "met": met}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="PGD-10, few rounds, few images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="rounds on the small network (default 10)")
    parser.add_argument("--only", type=int, choices=(1, 2, 3, 4, 5), help="one part of the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # The peers': nothing of theirs can be changed here.
    logging.disable(logging.WARNING)
    random.seed(0)
    steps, rounds, n = (10, 3, 256) if args.quick else (40, 10, 1000)
    size = (200, 25, 500) if args.quick else (1000, 100, 5000)  # images, steps, queries
    rounds, clock = args.rounds or rounds, Clock(args.threads)

    about = {**provenance.stamp("cpu"), "threads": args.threads, "clock": clock.name,
             "cores": os.cpu_count(), "load_before": os.getloadavg(), "peers": versions()}
    print(f"{about['hardware']} used of {about['cores']}, {clock.name}, torch {about['torch']}, "
          f"Python {about['python']}")
    print(", ".join(f"{name} {v}" for name, v in about["peers"].items()))
    load = about["load_before"][0]
    print(f"load average {load:.1f}" + (": the machine is busy" if load > 0.5 else ""), flush=True)

    paper, small = models.madry_mnist(), models.small_conv()
    sections = {1: [
        partial(pgd_cost, clock, "paper's network", paper, 1.05, steps, max(3, rounds // 3)),
        partial(pgd_cost, clock, "small network", small, 1.08, steps, rounds),
    ], 2: [
        partial(restarts, clock, 0.3, n, 10),
        *([] if args.quick else [partial(restarts, clock, 0.1, n // 2, None)]),
    ], 3: [
        partial(fast_model, clock, "paper's network", paper, 1.3, rounds),
        partial(fast_model, clock, "small network", small, None, rounds),
        partial(fast_verdicts, n),
    ], 4: [
        partial(beside_peer, clock, network, what, *size)
        for network in networks(has_mnist()) for what in PARTS
    ], 5: [partial(time_to_robustness, args.threads, args.quick)]}  # fmt: skip
    todo = [section for number, part in sections.items()
            if args.only == number or args.only is None and number < 5 for section in part]  # fmt: skip
    rows: list[Row] = []
    for i, section in enumerate(todo):
        print(f"\r{i + 1} of {len(todo)} …", end="", flush=True)
        done = section()
        rows += done if isinstance(done, list) else [done]
    about["load_after"] = os.getloadavg()
    print("\r" + " " * 20)
    print_table(rows)
    print(f"load average at the end {about['load_after'][0]:.1f}")

    name = f"{about['date']}-{args.threads}-threads{'-quick' * args.quick}"
    name += f"-part-{args.only}.json" if args.only else ".json"
    path = Path(__file__).resolve().parents[1] / "_build" / "bench" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False) + "\n",
                    encoding="utf8")  # fmt: skip
    print(f"written to {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    main()
