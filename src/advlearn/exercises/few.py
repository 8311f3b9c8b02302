"""Checkers for the exercises of chapter 6 on learning from few examples.

The Gaussian and the Bernoulli model of Schmidt et al., arXiv:1804.11285.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from advlearn.exercises.report import Report, Unusable, ask, examine
from advlearn.tensors import generator

# --- the Gaussian model: how many examples ----------------------------------------------------

Problem = tuple[Tensor, Tensor, Tensor, float, float, float]
Needed = Callable[[Tensor, Tensor, Tensor, float, float, float], "int | None"]


def errors(
    x: Tensor,
    y: Tensor,
    theta: Tensor,
    sigma: float,
    eps: float,
    *,
    start: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y[:, None] * x,
    reach: Callable[[Tensor], Tensor] = lambda w: w.abs().sum(1),
    signal: Callable[[Tensor, Tensor], Tensor] = lambda w, theta: w @ theta,
    noise: Callable[[Tensor, float], Tensor] = lambda w, sigma: sigma * w.norm(dim=1),
) -> Tensor:
    """Robust errors of the averages of 1, …, N examples, (N,); the options plant mistakes."""
    w = start(x, y).cumsum(0) / torch.arange(1, len(x) + 1).to(x)[:, None]
    return torch.special.ndtr((eps * reach(w) - signal(w, theta)) / noise(w, sigma))


def _first(reached: Tensor) -> int | None:
    at = reached.nonzero()
    return int(at[0]) + 1 if len(at) else None


def smallest(
    x: Tensor, y: Tensor, theta: Tensor, sigma: float, eps: float, beta: float, **options: Callable
) -> int | None:
    """The first n at which the robust error is at most β; None if there is none."""
    return _first(errors(x, y, theta, sigma, eps, **options) <= beta)


def _halved(
    x: Tensor, y: Tensor, theta: Tensor, sigma: float, eps: float, beta: float
) -> int | None:
    """Bisection, as if the error always fell."""
    reached = errors(x, y, theta, sigma, eps) <= beta
    low, high = 0, len(x)
    if not reached[-1]:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached[middle - 1] else (middle, high)
    return high


def _shifted(by: int) -> Needed:
    def needed(*problem: object) -> int | None:
        n = smallest(*problem)
        return None if n is None else n + by

    return needed


def _option(**options: Callable) -> Needed:
    return lambda *problem: smallest(*problem, **options)


_NEEDED_MISTAKES: dict[str, Needed] = {
    "the attacker is missing: that is for the standard error": lambda x, y, theta, sigma, eps, beta:
        smallest(x, y, theta, sigma, 0.0, beta),
    "y w·x falls by ε‖w‖₁ in the ℓ∞ ball; ε‖w‖₂ belongs to ℓ2": _option(
        reach=lambda w: w.norm(dim=1)),
    "the attacker moves each pixel against its own weight: Σ|w|, not Σw": _option(
        reach=lambda w: w.sum(1)),
    "w·x moves by ε‖w‖₁, not by ε": _option(reach=lambda w: torch.ones(len(w)).to(w)),
    "examples with y = −1 show −θ: average y x, not x": _option(start=lambda x, y: x),
    "w·x has the mean y w·θ: with signs in θ that is not Σw": _option(
        signal=lambda w, theta: w.sum(1)),
    "w·θ, not ‖w‖₂²: the noise that w has learned is no signal": _option(
        signal=lambda w, theta: w.square().sum(1)),
    "the noise of w·x is σ‖w‖₂: σ is missing": _option(noise=lambda w, sigma: w.norm(dim=1)),
    "the noise of w·x is σ‖w‖₂: ‖w‖₂ is missing": _option(
        noise=lambda w, sigma: torch.full((len(w),), sigma).to(w)),
    "σ² is the variance: divide by σ": _option(noise=lambda w, sigma: sigma**2 * w.norm(dim=1)),
    "σ/√n is the noise of w; new images have all of σ": _option(
        noise=lambda w, sigma: sigma * w.norm(dim=1) / torch.arange(1, len(w) + 1).to(w).sqrt()),
    "that is the last n that fails": _shifted(-1),
    "one example more than needed": _shifted(1),
    "the error does not always fall with n: bisection may miss the smallest n": _halved,
}  # fmt: skip


def gaussian(d: int, n: int, sigma: float, seed: int, signs: bool = True) -> tuple[Tensor, ...]:
    """(x, y, θ): n examples x = yθ + σz with θ = ±1 in all d pixels, float64."""
    gen = generator(seed)
    theta = torch.where(torch.rand(d, generator=gen) < (0.9 if signs else 2), 1.0, -1.0).double()
    y = torch.where(torch.rand(n, generator=gen) < 0.5, 1.0, -1.0).double()
    x = y[:, None] * theta + sigma * torch.randn(n, d, generator=gen, dtype=torch.float64)
    return x, y, theta


@cache
def _problems() -> dict[str, Problem]:
    """Name -> training examples in their order, θ, σ, ε, β."""

    def drawn(d: int, n: int, sigma: float, eps: float, beta: float, seed: int) -> Problem:
        return (*gaussian(d, n, sigma, seed), sigma, eps, beta)

    # The second and third image undo the first: 1 is enough, 2 and 3 are not, 4 are again.
    theta = torch.tensor([1.0, -1.0, 1.0, 1.0]).double()
    x = torch.tensor([1.0, -1.2, -0.5, 1.0, 1.0, 1.0]).double()[:, None] * theta
    return {
        "no attack": drawn(100, 40, 2.5, 0.0, 0.01, 1),
        "ε = 0.3": drawn(400, 60, 3.0, 0.3, 0.01, 2),
        "ε = 0.6": drawn(400, 120, 3.0, 0.6, 0.01, 3),
        "ε = 0.6, another draw": drawn(900, 120, 3.5, 0.6, 0.05, 4),
        "small noise": drawn(300, 80, 0.8, 0.5, 0.001, 7),
        "six pixels": drawn(6, 60, 1.0, 0.4, 0.1, 1),
        "twelve pixels": drawn(12, 60, 1.5, 0.4, 0.12, 4),
        "an error that rises": (x, torch.ones(6).double(), theta, 0.5, 0.2, 0.05),
        "never": drawn(50, 20, 4.0, 0.95, 0.01, 6),
    }


def check_needed(needed: Needed) -> Report:
    """Try `needed(x, y, theta, sigma, eps, beta) -> n`, the first n examples that are enough.

    The classifier is sign(w·x), w the mean of the first n of y_i x_i; enough means a robust error of
    at most β for new x ~ N(yθ, σ²I) in the ℓ∞ ball of radius ε, exactly; None if no n is.
    x (N, d), y (N,) = ±1 and θ (d,), float64.
    """
    problems = _problems()
    answers: dict[str, int | None] = {}

    def told(name: str) -> int | None:
        if name not in answers:
            n = ask(needed, *problems[name])
            if n is not None and (isinstance(n, bool) or int(n) != n):
                raise Unusable(f"returns {n!r}, wanted a whole number or None")
            answers[name] = None if n is None else int(n)
        return answers[name]

    def right(*names: str) -> Callable[[], str | None]:
        def test() -> str | None:
            bad = [n for n in names if told(n) != smallest(*problems[n])]
            if not bad:
                return None
            for message, mistake in _NEEDED_MISTAKES.items():
                if all(told(n) == mistake(*problems[n]) for n in problems):
                    return message
            return _why(bad[0], told(bad[0]), problems[bad[0]])

        return test

    names = list(problems)
    return examine(needed, [
        ("without an attack", right(names[0])), ("under attack", right(*names[1:7])),
        ("an error that rises and falls again", right(names[7])), ("never enough", right(names[8])),
    ])  # fmt: skip


def _why(name: str, n: int | None, problem: Problem) -> str:
    *rest, beta = problem
    found = errors(*rest)
    true = smallest(*problem)
    if n is None:
        return f"{name}: None, but after {true} examples the robust error is {found[true - 1]:.4f}"
    if not 1 <= n <= len(found):
        return f"{name}: {n}, there are {len(found)} examples" + (
            "" if true else ", and no n is enough: then the answer is None"
        )
    return f"{name}: after {n} examples the robust error is {found[n - 1]:.4f}, β is {beta:g}" + (
        f", and {true} are enough" if true is not None and true < n else ""
    )


# --- the Bernoulli model: one example ---------------------------------------------------------

Learn = Callable[[Tensor, float], Callable[[Tensor], Tensor]]
PIXELS, TAU = 2_000, 0.15
EPSES = (0.3, 0.9, 0.99)


def bernoulli(n: int, theta: Tensor, tau: float, seed: int) -> tuple[Tensor, Tensor]:
    """(x, y): n examples of x_i = yθ_i with probability ½ + τ, else −yθ_i, float64."""
    gen = generator(seed)
    y = torch.where(torch.rand(n, generator=gen) < 0.5, 1.0, -1.0).double()
    kept = torch.rand(n, len(theta), generator=gen) < 0.5 + tau
    return y[:, None] * theta * torch.where(kept, 1.0, -1.0).double(), y


class _OneExample:
    """What the reader learns from one example each of several θ, and asks of new images."""

    def __init__(self, learn: Learn, draws: int = 8, images: int = 120) -> None:
        self.learn, self.seeds, self.images = learn, range(draws), images
        self.kept: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Mapping]] = []
        self.failed = False

    def learned(self) -> list:
        if not self.kept:
            kept = []
            for seed in self.seeds:
                gen = generator(seed + 650)
                theta = torch.where(torch.rand(PIXELS, generator=gen) < 0.8, 1.0, -1.0).double()
                x, y = bernoulli(self.images + 2, theta, TAU, seed)
                own = int((y == (1 if seed % 2 else -1)).nonzero()[0])  # Both labels in turn.
                f = ask(self.learn, x[own], float(y[own]))
                rest = torch.arange(len(x)) != own
                kept.append((f, x[rest], y[rest], {"w": y[own] * x[own], "theta": theta}))
            self.kept = kept
        return self.kept

    def answers(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        scores = f(x.clone())
        if not isinstance(scores, Tensor) or scores.shape != x.shape[:1]:
            raise Unusable(f"the classifier returns {getattr(scores, 'shape', type(scores).__name__)}"
                           f", wanted one score per image, ({len(x)},)")  # fmt: skip
        return scores > 0

    def clean(self) -> str | None:
        wrong = {1: [], -1: []}
        constant = 0
        for seed, (f, x, y, _) in zip(self.seeds, self.learned(), strict=True):
            said = self.answers(f, x)
            wrong[1 if seed % 2 else -1].append(float((said != (y > 0)).double().mean()))
            constant += bool(said.float().mean() > 0.98 or said.float().mean() < 0.02)
        plus, minus = (sum(v) / len(v) for v in (wrong[1], wrong[-1]))
        if (plus + minus) / 2 <= 0.01:
            return None
        self.failed = True
        if constant > len(self.seeds) / 2:
            return ("nearly all images get the same answer: does the front end give 0 and 1? Then "
                    "the sum is not 0 for an image that says nothing")  # fmt: skip
        if minus > 0.9 and plus < 0.1:
            return "wrong where the example has y = −1: it shows −θ"
        if min(plus, minus) > 0.9:
            return "wrong sign: nearly all images are wrong"
        return f"{(plus + minus) / 2:.1%} of the images are wrong, 1 % is allowed"

    def under(self, eps: float) -> Callable[[], str | None]:
        def test() -> str | None:
            if self.failed:
                raise Unusable("not tried: first what fails above")
            worst = {}
            for f, x, y, know in self.learned():
                noise = torch.randn(x.shape, generator=generator(66), dtype=torch.float64).sign()
                moves = {"against the example's own pixels": -y[:, None] * know["w"],
                         "against θ": -y[:, None] * know["theta"], "towards 0": -x, "noise": noise,
                         "towards 0 where pixels are right":
                             torch.where(x * y[:, None] * know["w"] > 0, -x, torch.zeros_like(x))}  # fmt: skip
                for name, move in moves.items():
                    bad = float((self.answers(f, x + eps * move) != (y > 0)).double().mean())
                    worst[name] = worst.get(name, 0.0) + bad / len(self.learned())
            name = max(worst, key=worst.get)
            if worst[name] <= 0.01:
                return None
            self.failed = True
            return f"{worst[name]:.1%} wrong when pixels move by ε {name}; " + (
                f"a linear classifier loses ε‖w‖₁ = {eps:g} d, and y w·x is about 4τ²d = "
                f"{4 * TAU**2:.2g} d" if eps < 0.5 else
                f"a pixel of ±1 is still beyond ±{1 - eps:.2g}: where does the front end decide?")  # fmt: skip

        return test


def check_learn(learn: Learn) -> Report:
    """Try `learn(x, y) -> f`: from one example (d,) of the Bernoulli model, a robust classifier.

    f: (N, d) -> scores (N,), positive for y = 1; at most 1 % wrong on new images, for d = 2,000 and
    τ = 0.15, also when all pixels have moved by ε < 1.
    """
    trial = _OneExample(learn)
    return examine(learn, [
        ("right on new images", trial.clean),
        *((f"right under attacks of ε = {eps:g}", trial.under(eps)) for eps in EPSES),
    ])  # fmt: skip
