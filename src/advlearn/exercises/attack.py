"""`check_attack`: the properties of a right attack, and the mistakes that break them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advlearn import models
from advlearn.attacks import Attack
from advlearn.exercises.mistakes import gradient, likely_mistakes, step
from advlearn.exercises.report import Claims, Report, Unusable, examine
from advlearn.losses import margin
from advlearn.tensors import generator, norms
from advlearn.threats import L1, L2, Linf, Threat

SHAPE, EPS, UNUSUAL = (1, 4, 4), 0.25, 20140612
THREATS = {"linf": Linf, "l2": L2, "l1": L1}
ABOVE = "follows from the optimum that is missed above"


def examples(low: float, high: float, n: int = 12, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Images with values from `low` to `high`, clamped to [0, 1], and labels 0, 1, 0, …"""
    x = low + (high - low) * torch.rand(n, *SHAPE, generator=generator(3), dtype=torch.float64)
    return x.clamp(0, 1).to(dtype), torch.arange(n) % 2


def linear(scale: float = 1.0) -> nn.Sequential:
    """Three classes of which the last is hopeless: a two-class problem, whose optimum is known."""
    f = models.linear(SHAPE, 3).eval()
    weight = scale * torch.randn(3, 16, generator=generator(5))
    f[1].weight.data, f[1].bias.data = weight, -0.5 * weight.sum(1) - torch.tensor([0.0, 0, 60])
    return f


def network(dropout: float = 0.0) -> nn.Sequential:
    """A small network with layers that behave differently in train mode."""
    f = models.mlp(SHAPE, (32, 32), 3, seed=1)
    for p in f.parameters():
        p.data *= 2
    f.insert(1, nn.BatchNorm1d(16))
    return f.append(nn.Dropout(dropout)).eval()


@dataclass(frozen=True)
class _AttackCase:
    """The properties of an attack; every method makes fresh images and a fresh network."""

    attack: Attack
    kind: type[Threat]
    targeted: bool

    def run(self, f: nn.Module, x: Tensor, y: Tensor, eps: float = EPS) -> Tensor:
        z = self.attack(f, x, y, self.kind(eps), start=None)
        if not isinstance(z, Tensor) or z.shape != x.shape:
            got = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise Unusable(f"returns {got} instead of the images x + δ, shape {tuple(x.shape)}")
        return z

    def gain(self, f: nn.Module, z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What the attacker wins, (N,)."""
        with torch.no_grad():
            return (margin(f(z), y) - margin(f(x), y)) * (-1 if self.targeted else 1)

    def returns_images(self) -> str | None:
        x, y = examples(-0.5, 1.5)
        z = self.run(network(), x, y)
        if z.requires_grad:
            return "the result carries a graph (requires_grad): detach it"
        return None if z.isfinite().all() else "the result has values that are not finite"

    def keeps_inputs(self) -> str | None:
        x, y = examples(-0.5, 1.5)
        x_before, y_before = x.clone(), y.clone()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(UNUSUAL)
            self.run(network(), x, y)
            reseeded = torch.initial_seed() != UNUSUAL
        if not torch.equal(x.detach(), x_before):
            return "x was edited in place (+=, add_, clamp_): work on a new tensor"
        if not torch.equal(y, y_before):
            return "y was edited in place"
        if x.requires_grad or x.grad is not None:
            return "x.requires_grad is left on: differentiate with respect to x.detach().clone()"
        return "torch.manual_seed reseeds everyone's draws, use a generator" if reseeded else None

    def keeps_network(self) -> str | None:
        f, (x, y) = network(), examples(-0.5, 1.5)
        before = {k: v.clone() for k, v in f.state_dict().items()}
        self.run(f, x, y)
        if any(m.training for m in f.modules()):
            return "the network is left in train mode"
        if any(p.grad is not None for p in f.parameters()):
            return ("the weights hold gradients (.grad) now: backward() fills them, "
                    "torch.autograd.grad(loss, x) does not")  # fmt: skip
        if not all(p.requires_grad for p in f.parameters()):
            return "the weights have lost requires_grad: put it back, or use `with frozen(f):`"
        changed = any(not torch.equal(v, before[k]) for k, v in f.state_dict().items())
        return "weights or buffers of the network were changed" if changed else None

    def keeps_mode(self) -> str | None:
        f, (x, y) = network(dropout=0.5).train(), examples(-0.5, 1.5)
        f[1].eval()  # A frozen normalisation layer, as in fine-tuning.
        f[2].register_forward_hook(lambda m, *_: seen.append(m.training))
        seen, modes = [], [m.training for m in f.modules()]
        self.run(f, x, y)
        if any(seen):
            return ("dropout and batch statistics are active during the attack: "
                    "use eval mode inside, e.g. `with frozen(f):`")  # fmt: skip
        if [m.training for m in f.modules()] != modes:
            return "the network came in train mode and left in eval mode: restore every module"
        return None

    def in_ball(self) -> str | None:
        eps = 0.01
        f, (x, y) = network(), examples(-0.5, 1.5)
        delta = (self.run(f, x, y, eps) - x).detach().double()
        ratio = float(norms(delta, self.kind.p).max()) / eps
        if ratio <= 1 + 1e-4:
            return None
        if ratio > 20:
            return (f"moves {ratio:.0f} ε far: ε is in units of [0, 1] pixels, "
                    "is it multiplied by 255?")  # fmt: skip
        moved = delta.abs()[delta.abs() > eps / 2]
        if self.kind is not Linf and len(moved) and abs(float(moved.median()) - eps) < 1e-5:
            return f"every pixel moves by ε: that is the ℓ∞ step, its {self.kind.symbol} norm is not ε"
        return (f"moves {ratio:.2f} ε far: the ball is around x, project x + δ back into it "
                "after the last step")  # fmt: skip

    def in_box(self) -> str | None:
        x, y = examples(-0.5, 1.5)
        z = self.run(network(), x, y).detach()
        low, high = float(z.min()), float(z.max())
        inside = low >= -1e-6 and high <= 1 + 1e-6
        return None if inside else f"pixels from {low:.2f} to {high:.2f}: clamp x + δ to [0, 1]"

    def nothing_at_zero(self) -> str | None:
        x, y = examples(-0.5, 1.5)
        moved = float((self.run(network(), x, y, 0.0) - x).detach().abs().max())
        return f"a pixel moves by {moved:.2g} although ε = 0" if not moved < 1e-6 else None

    def optimum(self) -> str | None:
        f, (x, y) = linear(), examples(0.4, 0.6)
        z = self.run(f, x, y)
        best = step(f, x, y, self.kind(EPS), self.targeted)
        reached = self.gain(f, z, x, y) / self.gain(f, best, x, y)
        if (reached > 0.999).all():
            return None
        for message, wrong in likely_mistakes(f, x, y, self.kind(EPS), self.targeted).items():
            if torch.allclose(z, wrong, atol=1e-5) or torch.allclose(z, wrong.clamp(0, 1), atol=1e-5):
                return message
        return (f"reaches {100 * float(reached.min()):.0f} % of the largest change within ε: "
                f"this is not the steepest {self.kind.symbol} step")  # fmt: skip

    def moves_what_can_move(self) -> str | None:
        f, (x, y) = linear(), examples(0.4, 0.6)
        g = gradient(f, x, y, self.targeted)
        large = g.abs() >= g.abs().flatten(1).topk(4).values[:, -1].view(-1, 1, 1, 1)
        x = torch.where(large, (g > 0).to(x), x)  # The largest gradients push out of the box.
        gain = self.gain(f, self.run(f, x, y), x, y)
        best = self.gain(f, step(f, x, y, self.kind(EPS), self.targeted), x, y)
        stuck = "ε is spent on pixels at 0 or 1 that cannot move further: leave them out first"
        wasted = not (gain > 0.999 * best).all()
        return (ABOVE if self.optimum() else stuck) if wasted else None

    def grows(self) -> str | None:
        f, (x, y) = linear(), examples(0.4, 0.6)
        results = [self.run(f, x, y, eps) for eps in (EPS / 2, EPS, 1.0)]
        if torch.equal(results[0], results[1]):
            return "the same result for every ε: a number in place of threat.eps?"
        gains = torch.stack([self.gain(f, z, x, y).mean() for z in results])
        weaker = bool((gains[1:] < gains[:-1] - 1e-5).any())
        return (ABOVE if self.optimum() else "a larger ε is weaker here") if weaker else None

    def batch(self) -> str | None:
        f, (x, y) = network(), examples(-0.5, 1.5)
        x[0] = 0.4 + 0.2 * x[0]
        whole = self.run(f, x, y)
        parts = torch.cat([self.run(f, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
        same = torch.allclose(whole, parts, atol=1e-4)
        return None if same else ("an image's result depends on the others in the batch: look for "
                                  "a min, max, norm, mean or `if` over the whole batch")  # fmt: skip

    def double(self) -> str | None:
        f, (x, y) = network().double(), examples(-0.5, 1.5, dtype=torch.float64)
        z = self.run(f, x, y)
        return None if z.dtype == x.dtype else f"returns {z.dtype} for images of {x.dtype}"

    def flat(self) -> str | None:
        x, y = examples(-0.5, 1.5)
        z = self.run(linear(scale=0.0), x, y)
        return None if z.isfinite().all() else "0 / 0: divide by max(norm, tiny)"

    def sure(self) -> str | None:
        f, (x, _) = linear(scale=40.0), examples(0.3, 0.7, 64)
        y = f(x).argmax(1)
        with torch.no_grad():
            lead = -margin(f(x), y)
        rows = (lead > 17) & (lead < 35) & (y < 2)
        x, y = x[rows], y[rows]
        gain = self.gain(f, self.run(f, x, y, 0.1), x, y)
        best = self.gain(f, step(f, x, y, self.kind(0.1), self.targeted), x, y)
        rounding = ("in float32 the gradient of F.cross_entropy is rounding error once f is sure, "
                    "advlearn.losses.cross_entropy keeps it")  # fmt: skip
        lost = not (gain > 0.999 * best).all()
        return (ABOVE if self.optimum() else rounding) if lost else None

    def beats_noise(self) -> str | None:
        f, (x, _) = network(), examples(-0.5, 1.5, 64)
        y = f(x).argmax(1) if not self.targeted else (f(x).argmax(1) + 1) % 3
        gain = self.gain(f, self.run(f, x, y, 0.1), x, y)
        threat = self.kind(0.1)
        draws = [threat.ascend(torch.randn(x.shape, generator=generator(i)), x, x) for i in range(9)]
        noise = [self.gain(f, threat.project(x + 0.1 * d, x), x, y).mean() for d in draws]
        ahead = float(gain.mean()) > 2 * float(max(noise))
        hint = "random steps of this size do as well: is this the gradient of the loss of f at x?"
        return None if ahead else ABOVE if self.optimum() else hint

    def claims(self) -> Claims:
        return [
            ("returns finite, detached images", self.returns_images),
            ("leaves x and y as they are", self.keeps_inputs),
            ("leaves the network as it is", self.keeps_network),
            ("eval mode inside, the old mode after", self.keeps_mode),
            (f"stays in the {self.kind.symbol} ball", self.in_ball),
            ("stays in [0, 1]", self.in_box),
            ("ε = 0 gives x back", self.nothing_at_zero),
            ("reaches the optimum on a linear network", self.optimum),
            ("wastes nothing on pixels at the box", self.moves_what_can_move),
            ("a larger ε is never weaker on a linear network", self.grows),
            ("treats every image by itself", self.batch),
            ("keeps float64", self.double),
            ("survives a zero gradient", self.flat),
            ("works on a network that is sure", self.sure),
            ("beats random noise", self.beats_noise),
        ]


def check_attack(attack: Attack, norm: str = "linf", *, targeted: bool = False) -> Report:
    """Try an attack `attack(f, x, y, threat, *, start=None) -> z` for the properties of a right one.

    Args:
        attack: the reader's function.
        norm: "linf", "l2" or "l1".
        targeted: `y` is the class to be reached, instead of the one to be left.
    """
    if norm not in THREATS:
        raise ValueError(f"check_attack: norm={norm!r}, allowed are {', '.join(THREATS)}")
    return examine(attack, claims_of(attack, THREATS[norm], targeted=targeted))


def claims_of(attack: Attack, kind: type[Threat], *, targeted: bool = False) -> Claims:
    """The properties that `check_attack` tries, for checkers that try more."""
    return _AttackCase(attack, kind, targeted).claims()
