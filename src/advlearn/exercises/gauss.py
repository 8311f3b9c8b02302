r"""Checkers for the exercises of chapter 7 on Gaussian data: x given y = ±1 is N(yμ, Σ).

Usefulness and robust usefulness as in Ilyas et al., arXiv:1905.02175, §2; the robust covariance
is that of their §4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from advlearn.exercises.report import Report, Unusable, ask, examine
from advlearn.tensors import generator


def problem(seed: int, d: int = 5) -> tuple[Tensor, Tensor]:
    """A mean (d,) and a covariance (d, d) with correlations, float64."""
    gen = generator(seed)
    a = torch.randn(d, d, generator=gen, dtype=torch.float64)
    return torch.randn(d, generator=gen, dtype=torch.float64), a @ a.T / d + 0.05 * torch.eye(d)


def _named(
    asked: Mapping[int, Tensor], mistakes: Mapping[str, Callable], given: Mapping[int, tuple]
) -> str | None:
    """The mistake whose answers are the given ones, on all arguments."""
    for message, mistake in mistakes.items():
        if all(torch.allclose(answer, mistake(*given[n]), rtol=1e-6, atol=1e-9, equal_nan=True)
               for n, answer in asked.items()):  # fmt: skip
            return message
    return None


# --- usefulness -------------------------------------------------------------------------------


def useful(
    mu: Tensor,
    sigma: Tensor,
    w: Tensor,
    eps: float,
    *,
    spread: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda m, s, w: s + m * m,
    scale: Callable[[Tensor], Tensor] = torch.sqrt,
    reach: Callable[[Tensor], Tensor] = torch.linalg.vector_norm,
    sign: int = 1,
) -> Tensor:
    """(ρ, γ) of the feature w·x, normalised to variance 1; the options plant mistakes."""
    mean = w @ mu
    size = scale(spread(mean, w @ sigma @ w, w))
    return torch.stack([mean, mean - sign * eps * reach(w)]) / size


_USEFUL: dict[str, Callable[..., Tensor]] = {
    "the feature is not normalised: divide by its standard deviation": partial(
        useful, spread=lambda m, s, w: torch.ones_like(m)),
    "that is the variance within a class: over both classes it is wᵀΣw + (wᵀμ)²": partial(
        useful, spread=lambda m, s, w: s),
    "the norm of w is not the standard deviation of w·x": partial(
        useful, spread=lambda m, s, w: w @ w),
    "divided by the variance: take its root": partial(useful, scale=lambda v: v),
    "the attacker helps: y f(x) falls by ε‖w‖": partial(useful, sign=-1),
    "the attacker is missing in γ": partial(useful, sign=0),
    "ε‖w‖₁ belongs to the ℓ∞ ball: here it is ℓ2": partial(useful, reach=lambda w: w.abs().sum()),
    "w·x moves by ε‖w‖₂, not by ε": partial(useful, reach=lambda w: w.new_ones(())),
    "ε is divided by the standard deviation as well: the shift belongs to the same feature":
        lambda mu, sigma, w, eps: torch.stack([useful(mu, sigma, w, 0.0)[0],
                                               useful(mu, sigma, w, 0.0)[0] - eps * w.norm()]),
    "ρ and γ are exchanged": lambda *a: useful(*a).flip(0),
    "the correlations of Σ are missing": lambda mu, sigma, w, eps: useful(
        mu, sigma.diag().diag(), w, eps),
    "useful is what goes along with y: keep the sign of wᵀμ": lambda mu, sigma, w, eps:
        useful(mu * (w @ mu).sign(), sigma, w, eps),
}  # fmt: skip


def check_useful(usefulness: Callable[[Tensor, Tensor, Tensor, float], object]) -> Report:
    """Try `usefulness(mu, sigma, w, eps)`: ρ and γ of the feature w·x, float64, ℓ2, no box.

    ρ = E[y f(x)], γ = E[min over ‖δ‖₂ ≤ ε of y f(x + δ)], f = w·x divided by the root of its
    variance over both classes. Wanted to six digits.
    """
    given = {n: (*problem(n), torch.randn(5, generator=generator(70 + n), dtype=torch.float64), eps)
             for n, eps in enumerate((0.3, 0.05, 1.0, 0.5))}  # fmt: skip
    asked: dict[int, Tensor] = {}

    def answers() -> dict[int, Tensor]:
        if not asked:
            for n, arguments in given.items():
                pair = ask(usefulness, *arguments)
                if not isinstance(pair, (tuple, list, Tensor)) or len(pair) != 2:
                    raise Unusable("wanted are two numbers, ρ and γ")
                asked[n] = torch.tensor([float(v) for v in pair], dtype=torch.float64)
        return asked

    def right(which: int) -> str | None:
        bad = {n: a for n, a in answers().items()
               if not torch.allclose(a[which], useful(*given[n])[which], rtol=1e-6, atol=1e-9)}  # fmt: skip
        if not bad:
            return None
        n, answer = next(iter(bad.items()))
        return _named(asked, _USEFUL, given) or (
            f"{answer[which]:.6g}, it is {useful(*given[n])[which]:.6g}")  # fmt: skip

    return examine(usefulness, [("ρ, the usefulness", lambda: right(0)),
                                ("γ, the robust usefulness", lambda: right(1))])  # fmt: skip


_DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "μ would be the most useful if all directions had the same variance": lambda mu, sigma: mu,
    "Σμ prefers noise: divide by the variance": lambda mu, sigma: sigma @ mu,
    "the correlations of Σ count: solve Σw = μ": lambda mu, sigma: mu / sigma.diag(),
    "Σ⁻¹ elementwise is not the inverse": lambda mu, sigma: (1 / sigma) @ mu,
    "that is the direction of least variance: the mean along it counts as well":
        lambda mu, sigma: torch.linalg.eigh(sigma)[1][:, 0],
}  # fmt: skip


def check_most_useful(most_useful: Callable[[Tensor, Tensor], Tensor]) -> Report:
    """Try `most_useful(mu, sigma)`: the w, of any length, whose w·x has the largest ρ."""
    given = {n: problem(n) for n in range(10, 14)}
    asked: dict[int, Tensor] = {}

    def found() -> dict[int, Tensor]:
        if not asked:
            for n, (mu, sigma) in given.items():
                w = ask(most_useful, mu, sigma)
                if not isinstance(w, Tensor) or w.shape != mu.shape or not w.double().norm() > 0:
                    raise Unusable("wanted is a w of the shape of μ, not 0")
                asked[n] = w.double() / w.double().norm()
        return asked

    def largest() -> str | None:
        def rho(n: int, w: Tensor) -> float:
            return float(useful(*given[n], w, 0.0)[0])

        best = {n: rho(n, torch.linalg.solve(sigma, mu)) for n, (mu, sigma) in given.items()}
        if all(rho(n, w) > best[n] - 1e-7 for n, w in found().items()):
            return None
        if all(rho(n, -w) > best[n] - 1e-7 for n, w in asked.items()):
            return "minus the best: it goes against y"
        for message, direction in _DIRECTIONS.items():
            others = {n: direction(*given[n]) for n in asked}
            if all(abs(float(w @ others[n])) > (1 - 1e-9) * float(others[n].norm())
                   for n, w in asked.items()):  # fmt: skip
                return message
        n = next(iter(asked))
        return f"ρ = {rho(n, asked[n]):.4f}, another direction has {best[n]:.4f}"

    return examine(most_useful, [("no direction is more useful", largest)])


# --- the robust covariance --------------------------------------------------------------------


def root(m: Tensor) -> Tensor:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def robust(
    sigma: Tensor,
    lam: float,
    *,
    sqrt: Callable[[Tensor], Tensor] = root,
    sign: int = 1,
    ridge: float = 1.0,
    square: Callable[[Tensor], Tensor] = lambda s: s @ s,
    quarter: float = 0.25,
    half: float = 0.5,
) -> Tensor:
    """½Σ + I/λ + √(Σ/λ + ¼Σ²); the options plant mistakes."""
    eye = torch.eye(len(sigma), dtype=sigma.dtype)
    return half * sigma + ridge * eye / lam + sign * sqrt(sigma / lam + quarter * square(sigma))


def robust_likelihood(s: Tensor, sigma: Tensor, lam: float) -> Tensor:
    """E max over δ of −log N(x + δ; μ, S) − (λ/2)‖δ‖², but for a constant; needs λS − I > 0."""
    eye = torch.eye(len(s), dtype=s.dtype)
    return 0.5 * torch.logdet(s) + 0.5 * lam * torch.trace(torch.linalg.solve(lam * s - eye, sigma))


_COVARIANCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "the root is taken of every entry: wanted is the matrix R with R R = M": partial(
        robust, sqrt=lambda m: m.abs().sqrt()),
    "the root is taken of every entry, and of negative ones: wanted is the matrix R with R R = M":
        partial(robust, sqrt=torch.sqrt),
    "the other root of the quadratic equation: there λΣ_r − I is negative": partial(robust, sign=-1),
    "I/λ is missing": partial(robust, ridge=0.0),
    "Σ² is Σ Σ, not every entry squared": partial(robust, square=torch.square),
    "¼Σ², not Σ²": partial(robust, quarter=1.0),
    "½Σ, not Σ": partial(robust, half=1.0),
    "λ stands where 1/λ belongs": lambda sigma, lam: robust(sigma, 1 / lam),
    "the penalty is (λ/2)‖δ‖², not λ‖δ‖²": lambda sigma, lam: robust(sigma, 2 * lam),
    "that is Σ + I/λ, noise of the variance 1/λ: an adversary does more":
        lambda sigma, lam: sigma + torch.eye(len(sigma), dtype=sigma.dtype) / lam,
    "Σ itself: the adversary is missing": lambda sigma, lam: sigma,
    "the correlations of Σ are missing": lambda sigma, lam: robust(sigma.diag().diag(), lam),
    "that is the inverse of Σ_r": lambda sigma, lam: torch.linalg.inv(robust(sigma, lam)),
}  # fmt: skip


def check_robust_covariance(robust_covariance: Callable[[Tensor, float], Tensor]) -> Report:
    """Try `robust_covariance(sigma, lam)`: Σ_r (d, d), float64, for Σ (d, d) and λ > 0.

    Wanted is the minimum of the robust likelihood: its gradient, by automatic differentiation, has
    to vanish, and the adversary must have a best δ (λΣ_r − I positive definite).
    """
    given = {n: (problem(20 + n)[1], lam) for n, lam in enumerate((0.3, 2.0, 10.0, 1000.0))}
    asked: dict[int, Tensor] = {}

    def answers() -> dict[int, Tensor]:
        if not asked:
            for n, arguments in given.items():
                s = ask(robust_covariance, *arguments)
                if not isinstance(s, Tensor) or s.shape != arguments[0].shape:
                    raise Unusable("wanted is a matrix of the shape of Σ")
                if s.dtype != torch.float64:
                    raise Unusable(f"{s.dtype}, wanted float64")
                asked[n] = s.detach()
        return asked

    def named(fallback: str) -> str:
        return _named(answers(), _COVARIANCES, given) or fallback

    def bounded() -> str | None:
        for n, s in answers().items():
            if not torch.allclose(s, s.T, atol=1e-9):
                return named("a covariance is symmetric")
            if not torch.linalg.eigvalsh(given[n][1] * s)[0] > 1:
                return named("λΣ_r − I is not positive: the adversary's gain has no bound")
        return None

    def stationary() -> str | None:
        for n, answer in answers().items():
            s = answer.clone().requires_grad_()
            (g,) = torch.autograd.grad(robust_likelihood(s, *given[n]), s)
            if not g.norm() * answer.norm() < 1e-6:
                return named(f"the gradient of the robust likelihood has the length {g.norm():.2g}")
        return None

    return examine(robust_covariance, [
        ("the adversary has a best δ", bounded),
        ("the robust likelihood is stationary", stationary),
    ])  # fmt: skip
