"""Networks of unknown make, one of them honest, and the checker of the reader's verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from advlearn import models
from advlearn.attacks import pgd
from advlearn.defences import Quantised, RandomResized, Saturated
from advlearn.evaluation import predict
from advlearn.exercises.report import Report, examine
from advlearn.tensors import Keyed
from advlearn.threats import Threat

HONEST, MASKED = "honest", "masked"
Verdict = Callable[[nn.Module, Tensor, Tensor, Threat], str]


class Unknown(nn.Module):
    """A network that does not say what is inside. Looking is allowed, but measuring teaches more."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside.eval()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)

    def __repr__(self) -> str:
        return "Unknown network"


class _Decoy(nn.Module):
    """Answers of one network, gradients of another, which was never trained."""

    def __init__(self, model: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        device = next(model.parameters()).device
        self.model, self.other = model, models.mlp(shape, (50,), seed=7).to(device)

    def forward(self, x: Tensor) -> Tensor:
        other = self.other(x)
        return self.model(x).detach() + other - other.detach()


class _Rounded(nn.Module):
    """Logits rounded to two decimals."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (100 * self.model(x)).round() / 100


def unknown_networks(natural: nn.Module, robust: nn.Module) -> dict[str, Unknown]:
    """Three networks made of these two: two hide their gradients, one does not."""
    return {"A": Unknown(Quantised(natural)), "B": Unknown(robust), "C": Unknown(Saturated(natural))}


@dataclass(frozen=True)
class _Trial:
    """A network, the network inside it that decides, and what to try if the verdict is wrong."""

    claim: str
    f: nn.Module
    inside: nn.Module
    truth: str
    hint: str = ""


def trials(networks: Mapping[str, nn.Module], shape: Sequence[int]) -> list[_Trial]:
    """The three unknown networks, and further ones that the reader does not see.

    Args:
        networks: "natural", "robust" and at least one more that hides nothing.
        shape: (C, H, W) of the images.
    """
    natural, robust, *more = networks.values()
    a, b, c = unknown_networks(natural, robust).values()
    differences = "its gradient is 0 almost everywhere, larger differences are not"
    return [
        _Trial("network A", a, natural, MASKED, differences),
        _Trial("network B", b, robust, HONEST, "what survives is no fraud by itself"),
        _Trial("network C", c, natural, MASKED,
               "the cross-entropy's gradient is 0 in float32, the margin's is not"),
        _Trial("a hidden one: natural", natural, natural, HONEST,
               "a network that falls hides nothing"),
        *(_Trial(f"a hidden one: another natural network, #{i + 1}", f, f, HONEST,
                 "a network that falls hides nothing") for i, f in enumerate(more)),
        _Trial("a hidden one: random", Unknown(RandomResized(natural)), natural, MASKED,
               "it answers differently at every call"),
        _Trial("a hidden one: rounded answers", Unknown(_Rounded(more[0])), more[0], MASKED,
               differences),
        _Trial("a hidden one: foreign gradients", Unknown(_Decoy(natural, shape)), natural, MASKED,
               "its gradient is not 0, but leads nowhere: ask an attack that uses none"),
    ]  # fmt: skip


def accuracies(trial: _Trial, x: Tensor, y: Tensor, threat: Threat) -> tuple[float, float]:
    """After PGD-40 on the network as it stands, and after PGD-40 on the network inside."""
    start = threat.sample(x, Keyed(5, torch.arange(len(y), device=y.device)))
    attack = partial(pgd, steps=40, step_size=2.5 * threat.eps / 40, start=start)
    return tuple(float((predict(trial.f, attack(f, x, y, threat)).argmax(1) == y).double().mean())
                 for f in (trial.f, trial.inside))  # fmt: skip


def check_verdict(
    verdict: Verdict, networks: Mapping[str, nn.Module], x: Tensor, y: Tensor, threat: Threat
) -> Report:
    """Try `verdict(f, x, y, threat)`, "honest" or "masked", on the three unknown networks and more.

    Masked is a network whose accuracy after plain PGD is not to be believed, because it hides its
    gradient. One that falls, and one that stands for good reasons, are honest.

    Args:
        verdict: the reader's function.
        networks: "natural" and "robust", as given to `unknown_networks`, and others to hide.
        x, y, threat: what is handed to the reader's function.
    """
    answers: list[str] = []

    def tries(trial: _Trial) -> Callable[[], str | None]:
        def test() -> str | None:
            answer = verdict(trial.f, x, y, threat)
            answers.append(answer)
            if answer not in (HONEST, MASKED):
                return f"answers {answer!r}, allowed are {HONEST!r} and {MASKED!r}"
            if answer == trial.truth:
                return None
            plain, inside = (100 * share for share in accuracies(trial, x, y, threat))
            found = f"PGD-40 leaves {plain:.0f} %"
            if trial.truth == MASKED:
                found += f", with the gradients of the network inside {inside:.0f} %"
            return f"you say {answer!r}: {found}; {trial.hint}"

        return test

    def both() -> str | None:
        return f"the verdict is always {answers[0]!r}" if len(set(answers)) == 1 else None

    claims = [(trial.claim, tries(trial)) for trial in trials(networks, x.shape[1:])]
    return examine(verdict, [*claims, ("tells networks apart", both)])
