"""Record where PGD ends from very many random starts, on five test images per network (chapter 4).

`python tools/record_restarts.py 100000 mnist-small-natural mnist-small-pgd` wants a GPU: it is
120 million gradients. Adds to `data/results/04_landscape_restarts.json`.
"""

import sys
import time

import torch

from advlearn import data, results, zoo
from advlearn.attacks import pgd
from advlearn.evaluation import largest_gap, predict
from advlearn.losses import cross_entropy
from advlearn.tensors import Keyed
from advlearn.threats import Linf

EPS = {"digits": 0.2, "mnist": 0.3, "cifar10": 8 / 255}
IMAGES, BATCH, BINS = 5, 10_000, 60


def ends(f, x, y, index, threat, runs: int, steps: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Final losses and likeliest wrong classes of `runs` runs on one image: both (runs,)."""
    losses, classes = [], []
    for rows in torch.arange(runs, device=x.device).split(BATCH):
        one, label = x.expand(len(rows), -1, -1, -1), y.expand(len(rows))
        z = threat.sample(one, Keyed((0, int(index)), rows))
        for count, size in ((steps, threat.eps / 30), (20, threat.eps / 150)):
            z = pgd(f, one, label, threat, steps=count, step_size=size, start=z)
        logits = predict(f, z, BATCH)
        losses.append(cross_entropy(logits, label))
        classes.append(logits.scatter(1, label[:, None], -torch.inf).argmax(1))
    return torch.cat(losses), torch.cat(classes)


def summary(losses: torch.Tensor, classes: torch.Tensor) -> tuple[dict, dict]:
    """Numbers of one image, and its histogram, one list of counts per wrong class."""
    v = losses.double().cpu()
    low, high = float(v.min()), float(v.max())
    numbers = {"mean": float(v.mean()), "spread": float(v.std() / v.mean()), "low": low,
               "high": high, "p_high": largest_gap(v), "p_low": largest_gap(-v),
               "classes": len(classes.unique())}  # fmt: skip
    counts = {int(k): torch.histc(v[classes.cpu() == k], BINS, low, high).int().tolist()
              for k in classes.unique()}  # fmt: skip
    return numbers, {"low": low, "high": high, "counts": counts}


def main(runs: int, names: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        dataset = name.split("-")[0]
        f, threat = zoo.load_or_train(name, device=device), Linf(EPS[dataset])
        test = data.load(dataset, "test", device).subset(IMAGES)
        (x, y), began, values, pictures = test.tensors(), time.perf_counter(), {}, []
        for i in range(IMAGES):
            found = ends(f, x[i : i + 1], y[i : i + 1], test.index[i], threat, runs)
            numbers, picture = summary(*found)
            values |= {f"{key}_{i + 1}": value for key, value in numbers.items()}
            pictures.append(picture)
            print(name, i + 1, numbers, flush=True)
        results.record("04_landscape_restarts", name, 0, values, (time.perf_counter() - began) / 60,
                       runs=runs, eps=threat.eps, histograms=pictures)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
