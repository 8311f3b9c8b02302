"""Distributions on which robust accuracy is known exactly: what robustness costs, and why.

`Twofold`: one robust feature and many weak ones, Tsipras et al., arXiv:1805.12152. The Gaussian
and the Bernoulli model: Schmidt et al., arXiv:1804.11285. Linear classifiers sign(w·x), y = ±1,
attacks of ℓ∞ size ε without a box, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def normal_cdf(t: float) -> float:
    """Φ(t), the probability that a standard normal number is at most t."""
    return 0.5 * math.erfc(-t / math.sqrt(2))


def expected_hinge(m: float, s: float) -> float:
    r"""$\mathbb{E}\max(0, m + sZ) = m\,\Phi(m/s) + s\,\varphi(m/s)$ for a standard normal Z."""
    if s == 0:
        return max(0.0, m)
    t = m / s
    return m * normal_cdf(t) + s * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Twofold:
    r"""One feature that is right with probability p, and d weak ones, $x_i \sim N(\eta y, 1)$.

    $$x_1 = \pm y \text{ with } P(x_1 = y) = p, \qquad x_2, \dots, x_{d+1} \sim N(\eta y, 1)$$

    Tsipras et al., arXiv:1805.12152. A classifier is described by a, the weight of x₁, and b, the
    ℓ2 norm of the weights of the weak features, which are equal: b / √d each.

    Args:
        p: in [1/2, 1).
        eta: η > 0.
        d: number of weak features.

    Raises:
        ValueError: p, η or d is outside its range.
    """

    p: float
    eta: float
    d: int

    def __post_init__(self) -> None:
        if not 0.5 <= self.p < 1:
            raise ValueError(f"Twofold: p={self.p}, it must be in [1/2, 1)")
        if not self.eta > 0:
            raise ValueError(f"Twofold: eta={self.eta}, it must be positive")
        if self.d < 1:
            raise ValueError(f"Twofold: d={self.d}, at least one weak feature is needed")

    def sample(self, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        """n examples: x, (n, d + 1) with x₁ first, and y = ±1, (n,)."""
        y = signs(n, 0.5, gen)
        strong = y * signs(n, self.p, gen)
        weak = self.eta * y[:, None] + torch.randn(n, self.d, generator=gen, dtype=torch.float64)
        return torch.cat([strong[:, None], weak], 1), y

    def weights(self, a: float, b: float) -> Tensor:
        """The classifier (a, b) as a vector, (d + 1,)."""
        w = torch.full((self.d + 1,), b / math.sqrt(self.d), dtype=torch.float64)
        w[0] = a
        return w

    def strength(self, eps: float) -> float:
        r"""$k = \sqrt d\,(\eta - \varepsilon)$: what an attack leaves of the weak features together.

        The mean of their normalised sum, in standard deviations.
        """
        return math.sqrt(self.d) * (self.eta - eps)

    def accuracy(self, a: float, b: float, eps: float = 0.0) -> float:
        r"""Robust accuracy of the classifier (a, b), exactly; with ε = 0 the standard one.

        $$p\,\Phi\bigl(\tfrac{a(1-\varepsilon)}{b} + k\bigr)
          + (1 - p)\,\Phi\bigl(k - \tfrac{a(1+\varepsilon)}{b}\bigr)$$
        """
        right, wrong = a * (1 - eps), -a * (1 + eps)
        if b == 0:
            return self.p * (right > 0) + (1 - self.p) * (wrong > 0)
        k = self.strength(eps)
        return self.p * normal_cdf(right / b + k) + (1 - self.p) * normal_cdf(wrong / b + k)

    def loss(self, a: float, b: float, eps: float = 0.0) -> float:
        r"""Expected adversarial hinge loss, $\mathbb{E}\max(0, 1 - y\,w^\top x + \varepsilon\|w\|_1)$."""
        k = self.strength(eps)
        return (self.p * expected_hinge(1 - a * (1 - eps) - b * k, b)
                + (1 - self.p) * expected_hinge(1 + a * (1 + eps) - b * k, b))  # fmt: skip

    def soft_margin(self, eps: float = 0.0) -> tuple[float, float]:
        """The (a, b) of smallest adversarial hinge loss with a² + b² ≤ 1: a convex problem."""

        def over_a(b: float) -> tuple[float, float]:
            a = _ternary(lambda a: self.loss(a, b, eps), math.sqrt(max(0.0, 1 - b * b)))
            return self.loss(a, b, eps), a

        b = _ternary(lambda b: over_a(b)[0], 1.0)
        return over_a(b)[1], b

    def best(self, eps: float = 0.0) -> float:
        r"""The largest robust accuracy of *any* classifier.

        For ε < η, with $k$ of `strength` and $\ell = \log\frac{p}{1-p}$,
        $p\,\Phi(k + \frac{\ell}{2k}) + (1-p)\,\Phi(k - \frac{\ell}{2k})$; for η ≤ ε < 1 it is p;
        for 1 ≤ ε < η, where x₁ tells nothing under attack, it is Φ(k); for ε ≥ max(1, η) it is
        1/2, a coin's.
        """
        k, odds = self.strength(eps), math.log(self.p / (1 - self.p))
        p = self.p if eps < 1 else 0.5
        if k <= 0:
            return p
        shift = odds / (2 * k) if eps < 1 else 0.0
        return p * normal_cdf(k + shift) + (1 - p) * normal_cdf(k - shift)


def _ternary(f: Callable[[float], float], high: float, steps: int = 40) -> float:
    """The minimiser of a convex function on [0, high]; 0 itself where it is as good."""
    low, top = 0.0, high
    for _ in range(steps):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if f(left) <= f(right) else (left, high)
    return min((0.0, (low + high) / 2, top), key=f)


def signs(n: int | tuple[int, ...], p: float, gen: torch.Generator) -> Tensor:
    """Numbers ±1 that are +1 with probability p."""
    shape = (n,) if isinstance(n, int) else n
    return 1.0 - 2.0 * (torch.rand(shape, generator=gen, dtype=torch.float64) >= p).double()


def robust_error(w: Tensor, theta: Tensor, sigma: float | Tensor, eps: float = 0.0) -> Tensor:
    r"""ℓ∞ robust error of sign(w·x) where $x \sim N(y\theta, \sigma^2 I)$, exactly.

    $$\Phi\Bigl(-\frac{w^\top\theta - \varepsilon\|w\|_1}{\sigma\|w\|_2}\Bigr)$$

    Args:
        w, theta: (..., d). A zero w answers nothing and has error 1/2.
        sigma: standard deviation of every coordinate.
    """
    length = w.norm(dim=-1)
    margin = (w * theta).sum(-1) - eps * w.abs().sum(-1)
    return torch.special.ndtr(torch.where(length > 0, -margin / (sigma * length), 0.0))


def shrink(w: Tensor, eps: float) -> Tensor:
    """Soft threshold: every coordinate moves towards 0 by ε, and stops there."""
    return w.sign() * (w.abs() - eps).clamp(min=0)


def posterior(n: float, sigma: float) -> tuple[float, float]:
    r"""What n samples tell about θ ~ N(0, I) in the Gaussian model.

    Given the mean $\bar z$ of the $y_i x_i$, $\theta \sim N(\mu, s^2 I)$ with
    $\mu = \frac{n}{n + \sigma^2}\bar z$ and $s^2 = \frac{\sigma^2}{n + \sigma^2}$; over the samples,
    $\mu \sim N(0, v I)$ with $v = \frac{n}{n + \sigma^2}$.

    Returns:
        (v, s²).
    """
    return n / (n + sigma**2), sigma**2 / (n + sigma**2)


def gaussian_learners(
    d: int, n: float, sigma: float, eps: float, *, draws: int, gen: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Expected robust errors of three learners over θ ~ N(0, I), given what they have seen.

    With $\mu, v, s^2$ of `posterior`, a classifier w has
    $\Phi\bigl(-(w^\top\mu - \varepsilon\|w\|_1) / (\sqrt{\sigma^2 + s^2}\,\|w\|)\bigr)$ in the mean over
    the posterior. The mean learner takes w = μ, the best of all learners μ with a soft threshold.

    Returns:
        standard error of the mean learner, its robust error, and the best robust error, each
        (draws,): one value per draw of μ, whose mean over draws is the expected error.
    """
    v, rest = posterior(n, sigma)
    mu = math.sqrt(v) * torch.randn(draws, d, generator=gen, dtype=torch.float64)
    s = math.sqrt(sigma**2 + rest)
    return (robust_error(mu, mu, s), robust_error(mu, mu, s, eps),
            robust_error(shrink(mu, eps), mu, s, eps))  # fmt: skip


def gaussian_lower(d: int, n: float, sigma: float, eps: float) -> float:
    r"""No learner has a smaller expected robust error over θ ~ N(0, I):
    $\frac12\bigl(1 - 2\Phi(-\varepsilon\sqrt{1 + \sigma^2/n})\bigr)^d$."""
    outside = 2 * normal_cdf(-eps * math.sqrt(1 + sigma**2 / n))
    return 0.5 * math.exp(d * math.log1p(-outside))


def gaussian_upper(d: int, n: float, sigma: float, eps: float) -> tuple[float, float]:
    r"""Theorem 21 of Schmidt et al.: robust error of the mean learner, and with what probability.

    $$\exp\bigl(-\tfrac{d(\rho - \varepsilon)^2}{2\sigma^2}\bigr), \quad
      \rho = \frac{2\sqrt n - 1}{2\sqrt n + 4\sigma}$$

    with probability at least $1 - 2e^{-d / (8(\sigma^2 + 1))}$ for every θ of norm √d; 1 if ρ ≤ ε.
    """
    rho = (2 * math.sqrt(n) - 1) / (2 * math.sqrt(n) + 4 * sigma)
    error = math.exp(-d * (rho - eps) ** 2 / (2 * sigma**2)) if rho > eps else 1.0
    return error, 1 - 2 * math.exp(-d / (8 * (sigma**2 + 1)))


def bernoulli_error(w: Tensor, theta: Tensor, tau: float, eps: float = 0.0) -> Tensor:
    r"""ℓ∞ robust error of sign(w·x) where $x_i = y\theta_i$ with probability 1/2 + τ, else −yθ_i.

    By the normal approximation of the sum, which is good when no weight dominates:
    $\Phi\bigl(-(2\tau w^\top\theta - \varepsilon\|w\|_1) / (\sqrt{1 - 4\tau^2}\,\|w\|_2)\bigr)$.
    """
    return robust_error(w, 2 * tau * theta, math.sqrt(1 - 4 * tau**2), eps)
