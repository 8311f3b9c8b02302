"""Checkers for the exercises of chapter 3 on label leaking and TRADES."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advlearn import models, training
from advlearn.attacks import fgsm, pgd
from advlearn.evaluation import predict
from advlearn.exercises.report import Report, Unusable, examine
from advlearn.gradients import input_grad
from advlearn.losses import cross_entropy, kl_divergence
from advlearn.tensors import Keyed, frozen, generator, normal
from advlearn.threats import Linf
from advlearn.training.state import State

# --- label leaking ----------------------------------------------------------------------------

LEAK = Linf(0.3)


class Scored(nn.Module):
    """Two classes from a score of one pixel: logits (0, s(a)). Images (N, 1, 1, 1) -> (N, 2)."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        s = self.score(z.flatten(1)[:, 0])
        if not isinstance(s, Tensor) or s.shape != z.shape[:1]:
            raise Unusable(f"returns {getattr(s, 'shape', type(s).__name__)}, wanted one score "
                           "per pixel, (N,)")  # fmt: skip
        return F.pad(s[:, None], (1, 0))


def coin_images(n: int = 400) -> tuple[Tensor, Tensor]:
    """One pixel between 0.4 and 0.6, and a label thrown by a coin: (n, 1, 1, 1), (n,)."""
    a = 0.4 + 0.2 * torch.rand(n, generator=generator(1))
    return a.view(-1, 1, 1, 1), torch.randint(0, 2, (n,), generator=generator(2))


def check_leak(score: Callable[[Tensor], Tensor]) -> Report:
    """Try `score(a) -> s`, (N,) -> (N,), of which FGSM believes that labels of a coin are known.

    The classifier has logits (0, s(a)); a is between 0.4 and 0.6, ε is 0.3. Under FGSM it must be
    right always, under PGD-40 almost never.
    """
    f, (x, y) = Scored(score), coin_images()
    walk = partial(pgd, steps=40, step_size=LEAK.eps / 20)

    def right(z: Tensor) -> float:
        return float((predict(f, z).argmax(1) == y).double().mean())

    def function() -> str | None:
        a = torch.linspace(0, 1, 201)
        with torch.no_grad():
            f(a.view(-1, 1, 1, 1))
            whole, again = score(a), score(a)
            single = torch.cat([score(v.view(1)) for v in a])
        watched = score(a.clone().requires_grad_()).detach()
        if not whole.isfinite().all():
            return "some scores are not finite"
        if not (torch.equal(whole, again) and torch.allclose(whole, watched)):
            return "the score of a pixel is not always the same: it depends on a alone"
        alone = torch.allclose(whole, single, atol=1e-5)
        return None if alone else "a pixel's score depends on the others in the batch"

    def slope() -> str | None:
        a = x.flatten().double()
        with torch.no_grad():
            change = (score(a + 1e-5) - score(a - 1e-5)) / 2e-5
        told = input_grad(score, a)
        differ = (change - told).abs() > 1e-2 * (1 + change.abs())
        return None if differ.double().mean() < 0.02 else (
            "autograd's slope is not that of the score: no detach, round or argmax")

    def leaks() -> str | None:
        with frozen(f):
            told = input_grad(lambda z: f(z)[:, 1], x)
        reached = right(fgsm(f, x, y, LEAK))
        if reached == 1:
            return None
        if float((told == 0).double().mean()) > 0.5:
            return "the slope is 0 at the images: FGSM has no direction, and cannot tell the label"
        if reached < 0.1:
            return ("FGSM always succeeds: where it lands, the score has gone on as the slope "
                    "promised; it must have turned")  # fmt: skip
        return (f"right on {100 * reached:.0f} % after FGSM: does the slope have one sign on "
                "[0.4, 0.6], and the score one sign on [0.1, 0.3] and the other on [0.7, 0.9]?")

    def falls() -> str | None:
        start = LEAK.sample(x, generator(5))
        left = max(right(walk(f, x, y, LEAK, start=z)) for z in (start, None))
        return None if left <= 0.02 else (
            f"right on {100 * left:.0f} % after PGD-40: on the way to where FGSM lands, the score "
            "must first go where the slope promised")  # fmt: skip

    return examine(score, [
        ("is a function of the pixel", function), ("has the slope that it shows", slope),
        ("is right on every image after FGSM", leaks),
        ("is wrong on almost every image after PGD-40", falls),
    ])  # fmt: skip


# --- TRADES -----------------------------------------------------------------------------------

TRADES = {"beta": 3.0, "steps": 4, "step_size": 0.03}
_SET = Linf(0.1)


class _Modes(nn.Module):
    """A network that remembers in which mode it was asked for an input's gradient, and for weights'."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.mlp((1, 4, 4), (32, 32), 3, seed=1).double()
        for p in self.body.parameters():
            p.data *= 2
        self.attacked: list[bool] = []
        self.learned: list[bool] = []

    def forward(self, z: Tensor) -> Tensor:
        inner = z.is_leaf and z.requires_grad
        if torch.is_grad_enabled():
            (self.attacked if inner else self.learned).append(self.training)
        return self.body(z)


def _trades_case() -> tuple[Tensor, Tensor, State]:
    x = 0.2 + 0.6 * torch.rand(10, 1, 4, 4, generator=generator(3), dtype=torch.float64)
    return x, torch.arange(10) % 3, State(0.5, Keyed((0, 0), torch.arange(10)))


def _flawed_trades(f: nn.Module, x: Tensor, y: Tensor, start: Tensor, kind: str) -> Tensor:
    """TRADES with one mistake."""
    beta, options = TRADES["beta"], {k: v for k, v in TRADES.items() if k != "beta"}
    with torch.no_grad():
        target = f(x)
    swapped = kind in ("inner", "both")
    inner = (lambda z, p: kl_divergence(p, z)) if swapped else kl_divergence
    if kind == "label":
        z = pgd(f, x, y, _SET, start=start, **options)
    else:
        z = pgd(f, x, target, _SET, start=x if kind == "centre" else start, loss=inner, **options)
    clean, moved = f(x), f(z)
    reference = clean.detach() if kind == "detached" else clean
    kl = (kl_divergence(clean, moved) if kind in ("outer", "both")
          else kl_divergence(moved, reference))  # fmt: skip
    natural = cross_entropy(moved if kind == "attacked" else clean, y)
    if kind == "only":
        return beta * kl
    if kind == "share":
        return (1 - beta) * natural + beta * kl
    return natural + (1 if kind == "unweighted" else 1 / beta if kind == "inverse" else beta) * kl


_TRADES_MISTAKES = {
    "both": "KL has its arguments the other way round, inside and outside: it is KL(f(x) ‖ f(z))",
    "outer": "the outer KL has its arguments the other way round: it is KL(f(x) ‖ f(z))",
    "inner": "the attack maximises KL the other way round: it is KL(f(x) ‖ f(z))",
    "detached": "f(x) is held in the outer KL: the gradient flows into both of its arguments",
    "label": "the attack maximises the cross-entropy: TRADES' inner problem does not know y",
    "centre": "the attack begins at x, where KL has no slope: begin at start",
    "attacked": "the first term is the loss of z: it is the loss of x",
    "unweighted": "β is missing",
    "inverse": "the factor is 1/β: the published form of the code multiplies KL by β",
    "share": "the loss of x has the factor 1 − β: it is 1",
    "only": "the loss of x is missing",
}


def check_trades(trades: Callable[..., Tensor]) -> Report:
    r"""Try `trades(f, x, y, threat, *, beta, steps, step_size, start) -> losses`, (N,).

    $$L(f(x), y) + \beta \max_{z \in S(x)} \mathrm{KL}(f(x)\,\|\,f(z))$$

    Zhang et al., arXiv:1901.08573. Losses and their gradients are held against
    `training.trades`; the network is given in train mode.
    """
    x, y, state = _trades_case()
    start = _SET.project(x + 0.001 * normal(x, state.keys), x)

    def gradient(f: nn.Module, losses: Tensor) -> Tensor:
        found = torch.autograd.grad(losses.mean(), list(f.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    def run() -> tuple[_Modes, Tensor]:
        f = _Modes().train()
        losses = trades(f, x.clone(), y, _SET, start=start.clone(), **TRADES)
        if not isinstance(losses, Tensor) or losses.shape != y.shape:
            got = getattr(losses, "shape", type(losses).__name__)
            raise Unusable(f"returns {got}, wanted one loss per image, (N,): the mean is the loop's")
        if not losses.requires_grad:
            raise Unusable("the losses have no graph: frozen(f) and no_grad are for the attack only")
        return f, losses

    def modes() -> str | None:
        f, _ = run()
        if not f.training:
            return "the network is left in eval mode"
        if any(f.attacked):
            return "the attack sees train mode: use eval mode inside, e.g. `with frozen(f):`"
        if not all(f.learned[-2:]):
            return "the losses are taken in eval mode: frozen(f) is for the attack only"
        left = any(p.grad is not None for p in f.parameters())
        return "the weights hold gradients (.grad) now: the loop calls backward()" if left else None

    def equal() -> str | None:
        f, losses = run()
        objective = training.trades(_SET, partial(pgd, steps=TRADES["steps"]), TRADES["beta"],
                                    step_size=TRADES["step_size"])  # fmt: skip
        g = _Modes().train()
        truth, _ = objective(g, x, y, state)
        slopes = gradient(f, losses)
        if _close(losses, truth) and _close(slopes, gradient(g, truth)):
            return None
        for kind, message in _TRADES_MISTAKES.items():
            h = _Modes().train()
            wrong = _flawed_trades(h, x, y, start, kind)
            if _close(losses, wrong) and _close(slopes, gradient(h, wrong)):
                return message
        return ("the losses are right, their gradients are not: is something held that should "
                "move?" if _close(losses, truth) else "the losses are not those of the equation")

    return examine(trades, [
        ("attacks in eval mode, learns in train mode", modes),
        ("losses and gradients are those of training.trades", equal),
    ])  # fmt: skip


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def trades_floor(beta: float) -> float:
    r"""The least TRADES loss of an image on which some z ∈ S(x) is wrong, on a fine grid.

    $$\min_a\; -\log a + \beta\,\mathrm{kl}(a\,\|\,\tfrac12)\,[a > \tfrac12]$$
    """
    a = torch.linspace(0.5, 1, 200_001, dtype=torch.float64)
    divergence = math.log(2) + torch.xlogy(a, a) + torch.xlogy(1 - a, 1 - a)
    return float((beta * divergence - a.log()).min())


def check_promise(promise: Callable[[float], float]) -> Report:
    """Try `promise(beta) -> c`: TRADES loss T promises that at most the share T / c falls.

    The largest such c is wanted, to 0.0001.
    """
    betas = (0.0, 0.5, 1.0, 6.0, 100.0)

    def explains() -> str | None:
        told = {beta: float(promise(beta)) for beta in betas}
        truth = {beta: trades_floor(beta) for beta in betas}
        bad = [beta for beta in betas if not abs(told[beta] - truth[beta]) < 1e-4]
        if not bad:
            return None
        for message, wrong in {
            "log 2 is the constant of the adversarial cross-entropy: here the loss of z does "
            "not appear": lambda b: math.log(2),
            "only networks that are sure of x, p_y = 1, are looked at":
                lambda b: b * math.log(2),
            "the smaller of the two ends, p_y = 1/2 and p_y = 1: between them the loss is smaller":
                lambda b: min(1, b) * math.log(2),
        }.items():  # fmt: skip
            if all(abs(told[beta] - wrong(beta)) < 1e-4 for beta in bad):
                return message
        beta = bad[0]
        if told[beta] > truth[beta]:
            return (f"β = {beta:g}: an image can fall with a TRADES loss of {truth[beta]:.4f}, "
                    f"and you promise {told[beta]:.4f}")  # fmt: skip
        return f"β = {beta:g}: {truth[beta]:.4f} holds too, more than your {told[beta]:.4f}"

    return examine(promise, [("the largest constant, for β from 0 to 100", explains)])
