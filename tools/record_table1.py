"""Record the paper's Table 1 on the robust MNIST network (chapters 2 and 3), all 10,000 test images.

`python tools/record_table1.py white` attacks the network itself, twenty minutes on two CPU cores;
`black` crafts on a copy (A′) and on another architecture (B), fifteen minutes. The rows are stored
in `data/results/02_pgd_table1.json` and `03_minimax_table1.json`.
"""

import argparse
import time
from functools import partial

from advlearn import data, results, zoo
from advlearn.attacks import Attack, fgsm, on, pgd, toward
from advlearn.evaluation import worst_case
from advlearn.losses import cw, margin
from advlearn.models import Classifier
from advlearn.threats import Linf

EPS, STEP_SIZE, RESTARTS = 0.3, 0.01, 20
NETWORK = "mnist-small-pgd"
SOURCES = {"copy": (NETWORK, 1), "other": ("mnist-pooled-pgd", 0)}
PGD40, PGD100 = (partial(pgd, steps=n, step_size=STEP_SIZE) for n in (40, 100))
CW, CWPLUS = [partial(PGD40, loss=margin)], [partial(PGD40, loss=cw(50))]


def white() -> dict[str, list[Attack]]:
    """Key of a row -> the attacks whose worst case it is; step size and restarts are the paper's."""
    return {
        "fgsm": [fgsm], "pgd40x20": RESTARTS * [PGD40], "pgd100x20": RESTARTS * [PGD100],
        "targeted_likely": [toward(1, PGD40)],
        "targeted_all": [toward(k, PGD40) for k in range(1, 10)], "cw": CW, "cwplus": CWPLUS,
    }  # fmt: skip


def black(copy: Classifier, other: Classifier) -> dict[str, list[Attack]]:
    """The rows whose images are crafted on another network."""
    rows = {
        "copy_fgsm": (copy, [fgsm]), "copy_pgd40": (copy, [PGD40]),
        "copy_pgd100x20": (copy, RESTARTS * [PGD100]),
        "copy_cw": (copy, CW), "copy_cwplus": (copy, CWPLUS),
        "other_fgsm": (other, [fgsm]), "other_pgd40": (other, [PGD40]),
        "other_cwplus": (other, CWPLUS),
    }  # fmt: skip
    return {key: [on(source, a) for a in attacks] for key, (source, attacks) in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("white", "black"))
    parser.add_argument("seeds", nargs="*", type=int, default=[0], help="of the attacked network")
    args = parser.parse_args()
    test = data.load("mnist")
    for seed in args.seeds:
        f = zoo.load_or_train(NETWORK, seed=seed)
        sources = {key: zoo.load_or_train(name, seed=seed + more)
                   for key, (name, more) in SOURCES.items()} if args.part == "black" else {}  # fmt: skip
        began, values = time.perf_counter(), {}
        for key, attacks in (black(**sources) if sources else white()).items():
            r = worst_case(f, *test.tensors(), Linf(EPS), attacks, index=test.index)
            values |= {"natural": r.clean_accuracy, key: r.accuracy}
            if key in ("pgd40x20", "pgd100x20"):  # The first restart is the row with one.
                values[key.removesuffix("x20")] = r.trace[1]
            print(seed, key, r, f"{r.seconds:.0f} s", flush=True)
        minutes = (time.perf_counter() - began) / 60
        name = "03_minimax_table1" if sources else "02_pgd_table1"
        results.record(name, "cpu", seed, values, minutes, images=len(test), eps=EPS,
                       step_size=STEP_SIZE, network=NETWORK,
                       **{key: name for key, (name, _) in SOURCES.items() if sources})  # fmt: skip


if __name__ == "__main__":
    main()
