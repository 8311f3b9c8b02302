"""Record the white-box rows of the paper's Table 1 on the robust MNIST network (chapter 2).

`python tools/record_table1.py 0 1 2` attacks the networks of these seeds on all 10,000 test images,
about twenty minutes each on two CPU cores, and stores `data/results/02_pgd_table1.json`.
"""

import sys
import time
from functools import partial

from advlearn import data, results, zoo
from advlearn.attacks import fgsm, pgd, toward
from advlearn.evaluation import worst_case
from advlearn.losses import cw, margin
from advlearn.threats import Linf

EPS, STEP_SIZE, RESTARTS = 0.3, 0.01, 20


def attacks() -> dict[str, list]:
    """Key of a row -> the attacks whose worst case it is; step size and restarts are the paper's."""
    pgd40, pgd100 = (partial(pgd, steps=n, step_size=STEP_SIZE) for n in (40, 100))
    return {
        "fgsm": [fgsm], "pgd40x20": RESTARTS * [pgd40], "pgd100x20": RESTARTS * [pgd100],
        "targeted_likely": [toward(1, pgd40)],
        "targeted_all": [toward(k, pgd40) for k in range(1, 10)],
        "cw": [partial(pgd40, loss=margin)], "cwplus": [partial(pgd40, loss=cw(50))],
    }  # fmt: skip


def main() -> None:
    test = data.load("mnist")
    for seed in map(int, sys.argv[1:]):
        f = zoo.load_or_train("mnist-small-pgd", seed=seed)
        began, values = time.perf_counter(), {}
        for key, listed in attacks().items():
            r = worst_case(f, *test.tensors(), Linf(EPS), listed, index=test.index)
            values |= {"natural": r.clean_accuracy, key: r.accuracy}
            if key.endswith("x20"):  # The first restart is the row with one.
                values[key.removesuffix("x20")] = r.trace[1]
            print(seed, key, r, f"{r.seconds:.0f} s", flush=True)
        minutes = (time.perf_counter() - began) / 60
        results.record("02_pgd_table1", "cpu", seed, values, minutes, images=len(test), eps=EPS,
                       step_size=STEP_SIZE, network="mnist-small-pgd")


if __name__ == "__main__":
    main()
