"""The checkers of chapter 6's exercises accept what is right and name every planted mistake."""

import math
from statistics import NormalDist

import pytest
import torch
from scipy.optimize import linprog, minimize
from scipy.stats import binom

from advlearn.exercises import (
    check_ceiling,
    check_critical,
    check_draw,
    check_exact,
    check_learn,
    check_needed,
    check_stop,
    check_turn,
    checkpoints,
    few,
    gaussian,
    odds,
    overfitting_runs,
    twins,
    weak,
)
from advlearn.tensors import generator


def stub(*args, **kwargs):
    raise NotImplementedError


def named(check, wrong, message):
    report = check(wrong)
    assert not report and message in str(report), report


# --- draw ---------------------------------------------------------------------------------------


def drawn(n, p, eta, d, gen, *, one=0.5, swap=False, coin=False, follow=False, spread=1.0,
          shared=False, rows=False, same=False, between=False):  # fmt: skip
    """The distribution, with one part replaced."""
    u = torch.rand(n, generator=gen, dtype=torch.float64)
    y = torch.where(u < one, 1.0, -1.0).double()
    v = torch.rand(n, generator=gen, dtype=torch.float64)
    p = p + (1 - p) / 2 if coin else p
    x1 = torch.where((v < p) != swap, y, -y)
    z = torch.randn(1 if rows else n, 1 if shared else d, generator=gen, dtype=torch.float64)
    if same:
        z = torch.special.ndtri(v)[:, None].expand(n, d)
    if between:
        z = (z + z.roll(1, 0)) / math.sqrt(2)
    x = eta * (x1 if follow else y)[:, None] + spread * z.expand(n, d)
    return torch.cat([x1[:, None], x], 1), y


def by_classes(n, p, eta, d, gen):
    """Another way: numbers of a Bernoulli law, and features first."""
    z = torch.randn(d + 1, n, generator=gen, dtype=torch.float64).T
    y = 2 * torch.bernoulli(torch.full((n,), 0.5, dtype=torch.float64), generator=gen) - 1
    x = z + eta * y[:, None]
    x[:, 0] = y * (2 * torch.bernoulli(torch.full_like(y, p), generator=gen) - 1)
    return x, y


def option(**options):
    return lambda *arguments: drawn(*arguments, **options)


def from_global(n, p, eta, d, gen):
    x, y = drawn(n, p, eta, d, gen)
    x[:, 1:] = eta * y[:, None] + torch.randn(n, d, dtype=torch.float64)
    return x, y


def only_where_positive(n, p, eta, d, gen):
    x, y = drawn(n, p, eta, d, gen)
    x[y < 0, 0] = -1
    return x, y


DRAWS = {
    "of the labels are 1, it is ½": option(one=0.6),
    "yours has 1 − p": option(swap=True),
    "a coin for the rest": option(coin=True),
    "where y = -1, p is 85%": only_where_positive,
    "the weak features follow x₁": option(follow=True),
    "know nothing of y": lambda n, p, eta, d, gen: drawn(n, p, 0.0, d, gen),
    "feature 2: y x has the mean": lambda n, p, eta, d, gen: drawn(n, p, 2 * eta, d, gen),
    "it is their average that has 1/d": option(spread=3**-0.5),
    "has the variance 4": option(spread=2.0),
    "all weak features share one noise": option(shared=True),
    "has the variance 0": option(rows=True),
    "whether x₁ = y come from the same draw": option(same=True),
    "neighbouring examples share": option(between=True),
    "global random state": from_global,
    "one seed give two samples": lambda n, p, eta, d, gen: drawn(
        n, p, eta, d, generator(len(SEEN.append(0) or SEEN))),
    "every generator gives the same": lambda n, p, eta, d, gen: drawn(n, p, eta, d, generator(3)),
    "x₁ is y or −y": lambda *a: (lambda x, y: (x + 0.5, y))(*drawn(*a)),
    "labels [0.0, 1.0]": lambda *a: (lambda x, y: (x, (y > 0).double()))(*drawn(*a)),
    "wanted float64": lambda *a: (lambda x, y: (x.float(), y))(*drawn(*a)),
    "wanted (n, d + 1)": lambda *a: (lambda x, y: (x[:, 1:], y))(*drawn(*a)),
}  # fmt: skip
SEEN = []


@pytest.mark.parametrize("right", [drawn, by_classes])
def test_a_right_sample_passes(right):
    assert check_draw(right), check_draw(right)


@pytest.mark.parametrize("message", DRAWS)
def test_a_wrong_sample_is_named(message):
    named(check_draw, DRAWS[message], message)


# --- the exact accuracy -------------------------------------------------------------------------


def by_cases(w, p, eta, eps):
    """Written from the definition, one value of x₁ at a time."""
    reach = eps * w.abs().sum()
    total = 0.0
    for first, share in ((1.0, p), (-1.0, 1 - p)):
        mean = first * w[0] + eta * w[1:].sum() - reach
        if (w[1:] == 0).all():
            total += share * float(mean > 0)
        else:
            total += share * float(torch.special.ndtr(mean / w[1:].square().sum().sqrt()))
    return total


def without_limit(w, p, eta, eps):
    """Divides by 0 for x₁ alone, and tensors then say the right thing."""
    mean, spread = eta * w[1:].sum() - eps * w.abs().sum(), w[1:].norm()
    return p * torch.special.ndtr((mean + w[0]) / spread) + (1 - p) * torch.special.ndtr(
        (mean - w[0]) / spread
    )


def changes_w(w, p, eta, eps):
    value = odds.exact(w, p, eta, eps)
    w.mul_(2)
    return value


EXACTS = odds._EXACT_MISTAKES | {
    "what was handed over has been changed": changes_w,
    "wanted a number": lambda *a: None,
    "the average of 100 weak features, no attack: 0.5, it is 0.99379": lambda *a: 0.5,
}


def test_the_closed_form_against_the_attacked_sample():
    """Every ℓ∞ attacker's best on a linear classifier is x − ε y sign(w); 200,000 examples."""
    gen = generator(5)
    for p, eta, eps, d in ((0.9, 0.3, 0.2, 12), (0.7, 0.1, 0.05, 40), (0.8, 0.5, 0.7, 3)):
        x, y = drawn(200_000, p, eta, d, gen)
        w = torch.randn(d + 1, generator=gen, dtype=torch.float64) + 0.3
        right = y * ((x - eps * y[:, None] * w.sign()) @ w) > 0
        share, error = float(right.double().mean()), 0.5 / math.sqrt(len(y))
        assert abs(share - odds.exact(w, p, eta, eps)) < 4 * error


def test_a_right_accuracy_passes():
    for right in (odds.exact, by_cases, without_limit):
        assert check_exact(right), check_exact(right)


@pytest.mark.parametrize("message", EXACTS)
def test_a_wrong_accuracy_is_named(message):
    named(check_exact, EXACTS[message], message)


# --- turn the weak features ---------------------------------------------------------------------


def changes_x(x, y, eta):
    x[:, 1:] -= 2 * eta * y[:, None]
    return x


def shuffled(x, y, eta):
    """The right law for each feature alone, by other examples' noise: leaves the ball."""
    z = weak.turned(x, y, eta)
    for sign in (1, -1):
        z[y == sign, 1:] = z[y == sign, 1:].flip(0)
    return z


TURNS = weak._TURN_MISTAKES | {
    "has been changed": changes_x,
    "moves by ": shuffled,
    "wanted (800, 10)": lambda x, y, eta: weak.turned(x, y, eta)[:, 1:],
    "where y = 1 has mean": lambda x, y, eta: weak.turned(x, y, eta, size=1.5),
    "x₁ moves: leave it": lambda x, y, eta: torch.cat(
        [x[:, :1] * 0.9, weak.turned(x, y, eta)[:, 1:]], 1),
}  # fmt: skip


def test_a_right_turn_passes():
    def by_rows(x, y, eta):
        return torch.stack(
            [
                torch.cat([a[:1], a[1:] - 2 * eta])
                if b > 0
                else torch.cat([a[:1], a[1:] + 2 * eta])
                for a, b in zip(x, y, strict=True)
            ]
        )

    for right in (weak.turned, by_rows):
        assert check_turn(right), check_turn(right)


@pytest.mark.parametrize("message", TURNS)
def test_a_wrong_turn_is_named(message):
    named(check_turn, TURNS[message], message)


def test_after_the_turn_robust_accuracy_obeys_the_bound_for_every_classifier():
    """p/(1−p)·δ and the sharper ceiling, on the twins, for readers of all features."""
    p, eta = 0.8, 0.4
    x, y = twins(40_000, 5, p, eta)
    after = weak.turned(x, y, eta)
    for strength in (0.0, 0.3, 1.0, 3.0, 20.0):
        for shift in (0.0, 0.5):

            def correct(z, strength=strength, shift=shift):
                return float(
                    (y * (z[:, 1:].mean(1) + strength * z[:, 0] + shift) > 0).double().mean()
                )

            error, left = 1 - correct(x), correct(after)
            assert left <= odds.ceiling(error, p) + 0.01 <= p / (1 - p) * error + 0.01 + 1e-9


# --- the best bound -----------------------------------------------------------------------------


def by_programming(delta, p):
    done = linprog([-p, p - 1], [[1 - p, p]], [delta], bounds=[(0, 1), (0, 1)])
    return -done.fun


def test_a_right_ceiling_passes():
    for right in (odds.ceiling, by_programming):
        assert check_ceiling(right), check_ceiling(right)


@pytest.mark.parametrize("message", odds._CEILING_MISTAKES)
def test_a_wrong_ceiling_is_named(message):
    named(check_ceiling, odds._CEILING_MISTAKES[message], message)


def test_the_ceiling_is_reached_in_the_limit():
    """Where the weak features say y for certain: with x₁ = 1, answer 1 if their average is ...

    above t: A falls while B = 0, all errors where x₁ ≠ y. Below t: B falls while A = 1.
    """
    p, s, cdf = 0.8, 40.0, NormalDist().cdf  # s = η√d
    reached = []
    for t in torch.linspace(-3, 3, 25).tolist():
        for a, b in ((cdf(-t), cdf(t - 2 * s)), (cdf(t + 2 * s), cdf(-t))):
            error, left = (1 - p) * a + p * b, p * a + (1 - p) * b
            assert left == pytest.approx(odds.ceiling(error, p), abs=1e-9)
            reached.append(error)
    assert min(reached) < 0.01 and max(reached) > 0.99


# --- where the weak features are dropped --------------------------------------------------------


def by_search(p, eta, d):
    """The best c by a fine search, ε by bisection; no derivative."""

    def better(eps):
        c, width = 0.0, 1.5
        value = odds.accuracy
        for points in (800, *[12] * 8):
            grid = [max(0.0, c + width * k / points) for k in range(-points, points + 1)]
            c, width = max(grid, key=lambda k: value(k, p, eta, d, eps)), 2 * width / points
        return value(c, p, eta, d, eps) > p + 1e-15

    low, high = 0.0, eta
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if better(middle) else (low, middle)
    return high


CRITICALS = odds._CRITICAL_MISTAKES | {
    "η = 0.1, d = 10,000: 0.05, it is 0.0928307": lambda p, eta, d: eta / 2,
    "stopped with ZeroDivisionError": lambda p, eta, d: 1 / (eta - eta),
}


@pytest.mark.parametrize("p, eta, d", [(0.9, 0.4, 16), (0.55, 0.5, 30), (0.8, 0.3, 6)])
def test_beyond_the_critical_eps_no_weights_at_all_beat_the_first_feature(p, eta, d):
    """All w, by an optimiser from many starts; the symmetric mixture is not assumed."""
    eps = odds.critical(p, eta, d)
    gen = generator(7)

    def best(eps):
        found = []
        for _ in range(6):
            start = torch.rand(d + 1, generator=gen, dtype=torch.float64) + 0.1
            start[0] = start[0] * d * 0.3
            done = minimize(
                lambda w: -odds.exact(torch.from_numpy(w.copy()), p, eta, eps),
                start.numpy(),
                method="L-BFGS-B",
                options={"maxiter": 60},
            )
            found.append(-done.fun)
        return max(found)

    assert best(eps - 0.01) > p + 1e-5 and best(eps + 1e-3) <= p + 1e-9


def test_a_right_critical_eps_passes():
    for right in (odds.critical, by_search):
        assert check_critical(right), check_critical(right)


@pytest.mark.parametrize("message", CRITICALS)
def test_a_wrong_critical_eps_is_named(message):
    named(check_critical, CRITICALS[message], message)


# --- how many examples --------------------------------------------------------------------------


def one_by_one(x, y, theta, sigma, eps, beta):
    total = torch.zeros_like(theta)
    for n, (image, label) in enumerate(zip(x, y, strict=True), 1):
        total = total + label * image
        margin = total @ theta - eps * total.abs().sum()
        if NormalDist().cdf(-float(margin / (sigma * total.norm()))) <= beta:
            return n
    return None


def changes_examples(x, y, *rest):
    x.mul_(y[:, None])
    return few.smallest(x, torch.ones_like(y), *rest)


NEEDEDS = few._NEEDED_MISTAKES | {
    "what was handed over has been changed": changes_examples,
    "wanted a whole number": lambda *a: 1.5,
    "there are 20 examples, and no n is enough": lambda *a: few.smallest(*a) or len(a[0]) + 1,
    "never: after 20 examples": lambda *a: few.smallest(*a) or len(a[0]),
    "None, but after 5 examples": lambda *a: None,
}


def test_the_error_of_an_average_against_new_attacked_images():
    d, sigma, eps = 50, 2.0, 0.3
    x, y, theta = gaussian(d, 3, sigma, 4)
    w = (y[:, None] * x).mean(0)
    gen = generator(9)
    z = theta + sigma * torch.randn(100_000, d, generator=gen, dtype=torch.float64)
    wrong = float((((z - eps * w.sign()) @ w) <= 0).double().mean())
    assert wrong == pytest.approx(float(few.errors(x, y, theta, sigma, eps)[-1]), abs=0.006)
    assert 0.02 < wrong < 0.98


def test_a_right_number_passes():
    for right in (few.smallest, one_by_one):
        assert check_needed(right), check_needed(right)


@pytest.mark.parametrize("message", NEEDEDS)
def test_a_wrong_number_is_named(message):
    named(check_needed, NEEDEDS[message], message)


# --- one example --------------------------------------------------------------------------------


def behind(front, change=lambda x, y: y * x):
    """A linear classifier of one example behind a front end."""
    return lambda x, y: lambda z: front(z) @ change(x, y)


def changes_example(x, y):
    x.mul_(y)
    return lambda z: z.sign() @ x


LEARNS = {
    "a linear classifier loses ε‖w‖₁ = 0.3 d": behind(lambda z: z),
    "still beyond ±0.1: where does": behind(lambda z: 2 * (z > 0.5).double() - 1),
    "still beyond ±0.01: where does": behind(lambda z: (20 * z).tanh()),
    "it shows −θ": behind(torch.sign, lambda x, y: x),
    "wrong sign": behind(torch.sign, lambda x, y: -y * x),
    "does the front end give 0 and 1": behind(lambda z: (z > 0).double()),
    "1 % is allowed": behind(torch.sign, lambda x, y: y * x * (torch.arange(len(x)) < 300)),
    "has been changed": changes_example,
    "wanted one score per image": lambda x, y: lambda z: z.sign() * x,
}


def test_a_front_end_rescues():
    for right in (behind(torch.sign), behind(lambda z: (z > 0).double() - 0.5),
                  lambda x, y: lambda z: y * ((z > 0) == (x > 0)).double().sum(1) - y * len(x) / 2):  # fmt: skip
        assert check_learn(right), check_learn(right)


@pytest.mark.parametrize("message", LEARNS)
def test_a_wrong_classifier_is_named(message):
    named(check_learn, LEARNS[message], message)


def test_the_exact_error_of_one_example_and_a_threshold():
    """P(Bin(d, ½ + 2τ²) ≤ d/2): averaged over examples and images all agreements are independent."""
    d, tau, wrong, trials = 51, 0.2, 0, 0
    for seed in range(400):
        x, y = few.bernoulli(101, torch.ones(d).double(), tau, seed)
        w = y[0] * x[0]
        wrong += int((y[1:] * (x[1:] @ w) <= 0).sum())
        trials += 100
    assert wrong / trials == pytest.approx(binom.cdf(d // 2, d, 0.5 + 2 * tau**2), abs=0.012)


# --- early stopping -----------------------------------------------------------------------------


def best(values, epochs):
    return max(range(epochs), key=values)


def stops(run):
    epoch = best(run.validation, run.epochs)
    return epoch, run.test(epoch)


def smoothed(run):
    v = torch.tensor([run.validation(e) for e in range(run.epochs)])
    v = torch.nn.functional.avg_pool1d(v[None], 3, 1, 1, count_include_pad=False)[0]
    return int(v.argmax()), run.test(int(v.argmax()))


def keeps(rule):
    def stop(run):
        epoch = rule(run)
        return epoch, run.test(epoch)

    return stop


def mixed(run):
    epoch = best(run.validation, run.epochs)
    return epoch, run.test(run.epochs - 1)


STOPS = {message: keeps(rule) for message, rule in checkpoints._CHOICES.items()} | {
    "asked 61 times": lambda run: (lambda e: (e, run.test(e)))(best(run.test, run.epochs)),
    "it was chosen for being large": lambda run: (lambda e: (e, run.validation(e)))(
        best(run.validation, run.epochs)),
    "reports the training accuracy": lambda run: (lambda e: (e, run.training(e)))(
        best(run.validation, run.epochs)),
    "asks the test images at epoch 59": mixed,
    "points against the best checkpoint": keeps(lambda run: 20),
    "the reported accuracy is": lambda run: (best(run.validation, run.epochs), 0.4),
    "wanted are two": lambda run: 3,
    "epoch 60, there are 0 to 59": lambda run: (60, 0.4),
    "wanted a share": lambda run: (3, 40.0),
}  # fmt: skip


def test_the_runs_are_what_they_are_said_to_be():
    over, plain = overfitting_runs(60), overfitting_runs(60, overfits=False)
    falls = [float(r.truth.max() - r.truth[-1]) for r in over]
    assert min(falls) > 0.005 and sum(falls) / 60 > 0.03
    assert all(int(r.truth.argmax()) == r.epochs - 1 for r in plain)
    gaps = torch.tensor(
        [[r.validation(e) - float(r.truth[e]) for e in range(r.epochs)] for r in over]
    )
    assert abs(float(gaps.mean())) < 0.004 and 0.012 < float(gaps[:, 30:].std()) < 0.019
    assert over[0].test(5) == overfitting_runs(1)[0].test(5)
    with pytest.raises(ValueError, match="epoch=-1, allowed are 0 to 59"):
        over[0].validation(-1)


@pytest.mark.parametrize("right", [stops, smoothed])
def test_a_right_rule_passes(right):
    report = check_stop(right)
    assert report and "reported minus true" in str(report), report


@pytest.mark.parametrize("message", STOPS)
def test_a_wrong_rule_is_named(message):
    named(check_stop, STOPS[message], message)


# --- stubs --------------------------------------------------------------------------------------

CHECKS = {"draw": check_draw, "exact": check_exact, "turn": check_turn, "ceiling": check_ceiling,
          "critical": check_critical, "needed": check_needed, "learn": check_learn,
          "stop": check_stop}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_stub_gets_a_false_report_that_says_what_is_missing(check):
    report = check(stub)
    assert not report
    assert "put your code in place of `raise NotImplementedError` in `stub`" in str(report)
