"""Draw the README's picture, `book/_static/teaser.png`, on MNIST test images picked by seed 0."""

from pathlib import Path

from advlearn import data, plotting, zoo
from advlearn.attacks import fgsm
from advlearn.evaluation import predict
from advlearn.tensors import generator
from advlearn.threats import Linf

EPS = 0.15


def main() -> None:
    f, test = zoo.load_or_train("mnist-small-natural"), data.load("mnist").subset(6)
    x, y = test.tensors()
    threat = Linf(EPS)
    coin = threat.project(x + EPS * (threat.sample(x, generator(0)) - x).sign(), x)
    rows = {"image": x, "± ε by a coin": coin, "± ε by the\ngradient (FGSM)": fgsm(f, x, y, threat)}
    captions, wrong = {}, {}
    for name, images in rows.items():
        confidence, label = predict(f, images).softmax(1).max(1)
        captions[name] = [f"{k}   {100 * p:.0f} %" for k, p in zip(label, confidence, strict=True)]
        wrong[name] = (label != y).tolist()
    fig = plotting.strips(rows, captions, wrong)
    fig.savefig(Path(__file__).parents[1] / "book/_static/teaser.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
