"""Record FGSM on the paper's own MNIST network, naturally trained (chapter 1).

`python tools/record_paper_network.py 0 1 2` trains and attacks these seeds, about two minutes each
on two CPU cores, and stores `data/results/01_fgsm_paper_network.json`.
"""

import sys
import time
from functools import partial

import torch.nn.functional as F

from advlearn import data, results, zoo
from advlearn.attacks import fgsm
from advlearn.evaluation import worst_case
from advlearn.threats import Linf

EPS = 0.3


def main() -> None:
    x, y = data.load("mnist").tensors()
    usual = partial(fgsm, loss=partial(F.cross_entropy, reduction="none"))
    for seed in map(int, sys.argv[1:]):
        began = time.perf_counter()
        f = zoo.load_or_train("mnist-madry-natural", seed=seed, retrain=True)
        minutes = (time.perf_counter() - began) / 60
        judged = {"fgsm_usual": usual, "fgsm": fgsm}
        found = {key: worst_case(f, x, y, Linf(EPS), [attack]) for key, attack in judged.items()}
        values = {key: r.accuracy for key, r in found.items()}
        values["clean"] = found["fgsm"].clean_accuracy
        results.record("01_fgsm_paper_network", "cpu", seed, values, minutes, images=len(y), eps=EPS)
        print(seed, values, f"{minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main()
