"""The judge: accuracy, and accuracy under the worst of many attacks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from advlearn.attacks.combine import Attack, name_of
from advlearn.checks import check_examples, check_logits
from advlearn.models import Classifier
from advlearn.progress import bar
from advlearn.tensors import Keyed, frozen
from advlearn.threats import Threat

_Z95 = 1.959963984540054
STANDS, MISTAKE = -1, -2  # Codes of `Result.fooled_by` beside the positions of attacks.


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion. It stays in [0, 1] and is right near 0 and 1."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"interval: {successes} successes in {trials} trials")
    p, z2 = successes / trials, _Z95**2
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """mean(a) − mean(b) with its 95 % interval, for verdicts on the same examples.

    Args:
        a, b: bool, (N,): correct or not, of two networks or under two attacks.

    Returns:
        (difference, low, high). Pairing removes the variation that both share.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"paired: shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                         "both must be (N,) with N of 2 or more")
    d = a.double() - b.double()
    half = _Z95 * float(d.std()) / math.sqrt(len(d))
    return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half


@dataclass(frozen=True, eq=False)
class Result:
    """What `worst_case` found.

    Attributes:
        correct: bool, (N,): right on the image and after every attack.
        fooled_by: int64, (N,): position of the first attack that fooled the network, −1 if none
            did, −2 where the unperturbed image is misclassified already.
        x_adv: (N, C, H, W): the image that fooled the network, else the unperturbed one.
        names: names of the attacks, in their order.
        trace: accuracy before any attack and after each, length 1 + number of attacks.
        threat, seed: as given.
        seconds: wall-clock time.
    """

    correct: Tensor
    fooled_by: Tensor
    x_adv: Tensor
    names: tuple[str, ...]
    trace: tuple[float, ...]
    threat: Threat
    seed: int
    seconds: float

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """Share of examples that every attack left correct."""
        return self.trace[-1]

    @property
    def clean_accuracy(self) -> float:
        """Share of unperturbed examples classified correctly."""
        return self.trace[0]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `accuracy`."""
        return interval(int(self.correct.sum()), self.n)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON: protocol and outcome, without images."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "low": low, "high": high, "n": self.n,
                "clean_accuracy": self.clean_accuracy, "threat": str(self.threat),
                "attacks": list(self.names), "seed": self.seed,
                "seconds": round(self.seconds, 2)}  # fmt: skip

    def __repr__(self) -> str:
        low, high = self.interval
        return (f"{100 * self.accuracy:.2f} % [{100 * low:.2f}, {100 * high:.2f}] of {self.n} "
                f"images survive {len(self.names)} attack{'s' * (len(self.names) != 1)} "
                f"({self.threat}; clean {100 * self.clean_accuracy:.2f} %)")


def predict(f: Classifier, x: Tensor, batch_size: int = 256) -> Tensor:
    """Logits in eval mode and full precision, without gradients: (N, C, H, W) -> (N, K)."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, it must be 1 or more")
    with frozen(f), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return torch.cat([f(part) for part in x.split(batch_size)])


def accuracy(f: Classifier, x: Tensor, y: Tensor, batch_size: int = 256) -> float:
    """Share of correct predictions, float32, eval mode.

    Args:
        f: classifier, (N, C, H, W) -> (N, K).
        x, y: images in [0, 1] and labels (N,).

    Raises:
        ValueError: images outside [0, 1], wrong types or shapes, labels out of range, NaN logits.
    """
    check_examples(x, y)
    logits = predict(f, x, batch_size)
    check_logits(logits, y)
    return float((logits.argmax(1) == y).double().mean())


def worst_case(
    f: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    attacks: Sequence[Attack] | Mapping[str, Attack],
    *,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int = 256,
    votes: int = 1,
    progress: bool = False,
) -> Result:
    """Accuracy under the worst of several attacks: an example survives if it survives them all.

    Every attack gets the same threat and a random start from it, and is run only on the examples
    that still stand. It has succeeded where the prediction is wrong (never where the loss is
    larger); what it returns is checked to lie in the threat's set. Restarts are repeated entries.
    The start of example i in entry r depends on (seed, r, index[i]) alone, so neither batch size
    nor survivors change it.

    Args:
        f: classifier, (N, C, H, W) -> (N, K). Judged in eval mode, float32.
        x, y: images in [0, 1] and labels (N,).
        threat: what the attacks may do.
        attacks: a list, or a dict name -> attack, of `attack(f, x, y, threat, *, start) -> z`.
        seed: of the random starts.
        index: key of every example's starts, int64 (N,), e.g. `Dataset.index`; default 0 … N−1.
        batch_size: examples per call of an attack.
        votes: judge by the majority of this many predictions, for networks that are random.
        progress: show a bar.

    Raises:
        ValueError: wrong arguments (images outside [0, 1], NaN logits, ...); an attack that
            returns something outside the set, not finite or of another shape; a network whose
            prediction does not repeat, unless `votes` is larger than 1.
    """
    began = time.perf_counter()
    check_examples(x, y)
    named = _named(attacks)
    index = torch.arange(len(y), device=y.device) if index is None else index
    _check_settings(y, threat, index, votes)
    logits = predict(f, x, batch_size)
    check_logits(logits, y)
    if votes == 1:
        _check_repeats(f, x, logits, batch_size)

    standing = _vote(f, x, votes, batch_size, logits=logits) == y
    fooled_by = torch.where(standing, STANDS, MISTAKE)
    x_adv, trace = x.clone(), [float(standing.double().mean())]
    shown = bar(named, "worst case", "attack", progress)
    for position, (name, attack) in enumerate(shown):
        left = standing.nonzero()[:, 0]
        for rows in left.split(batch_size) if len(left) else ():
            start = threat.take(rows).sample(x[rows], Keyed((seed, position), index[rows]))
            z = attack(f, x[rows], y[rows], threat.take(rows), start=start)
            # From here on fresh copies: an attack that edits its arguments must not move the judge.
            x_rows, threat_rows = x[rows], threat.take(rows)
            z = _check_attack(name, z, x_rows, threat_rows, rows)
            image = threat_rows.render(z, x_rows).clamp(0, 1)
            fooled = _vote(f, image, votes, batch_size, name=name, rows=rows) != y[rows]
            hit = rows[fooled]
            x_adv[hit], fooled_by[hit], standing[hit] = image[fooled], position, False
        trace.append(float(standing.double().mean()))
        shown.set_postfix_str(f"{100 * trace[-1]:.2f} % stand")
    return Result(standing, fooled_by, x_adv, tuple(name for name, _ in named), tuple(trace),
                  threat, seed, time.perf_counter() - began)  # fmt: skip


def _named(attacks: Sequence[Attack] | Mapping[str, Attack]) -> list[tuple[str, Attack]]:
    if isinstance(attacks, Mapping):
        named = list(attacks.items())
    elif isinstance(attacks, Sequence):
        named = [(name_of(attack), attack) for attack in attacks]
    else:
        raise ValueError(f"attacks: {type(attacks).__name__}, allowed are a list of attacks or a "
                         "dict name -> attack (one attack is [attack])")
    for name, attack in named:
        if not callable(attack):
            raise ValueError(f"attacks: {name!r} is {type(attack).__name__}, not a function")
    return named


def _vote(f: Classifier, x: Tensor, votes: int, batch_size: int, *, logits: Tensor | None = None,
          name: str = "", rows: Tensor | None = None) -> Tensor:  # fmt: skip
    if votes == 1 and logits is not None:
        return logits.argmax(1)
    verdicts = []
    for _ in range(votes):
        logits = predict(f, x, batch_size)
        bad = ~logits.isfinite().all(1)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(f"f: logits of image {i if rows is None else int(rows[i])}"
                             f"{f' under attack {name!r}' if name else ''} are not finite")
        verdicts.append(logits.argmax(1))
    return torch.stack(verdicts).mode(0).values


# --- checks, at the entrance and nowhere else -----------------------------------------------


def _check_repeats(f: Classifier, x: Tensor, logits: Tensor, batch_size: int) -> None:
    n = min(len(x), 4 * batch_size)
    again = predict(f, x[:n], batch_size)
    if not torch.allclose(again, logits[:n], rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        raise ValueError("f: two predictions of the same images differ. A random network must be "
                         "judged by votes (votes=n), else restarts only count lucky draws")


def _check_settings(y: Tensor, threat: Threat, index: Tensor, votes: int) -> None:
    if votes < 1:
        raise ValueError(f"votes={votes}, it must be 1 or more")
    for name, value in (("index", index), ("threat.eps", getattr(threat, "eps", None))):
        if isinstance(value, Tensor) and (name == "index" or value.ndim) and len(value) != len(y):
            raise ValueError(f"{name} has shape {tuple(value.shape)} for {len(y)} images")


def _check_attack(name: str, z: Tensor, x: Tensor, threat: Threat, rows: Tensor) -> Tensor:
    if not isinstance(z, Tensor) or z.shape != x.shape:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"attack {name!r} returned {got}, expected shape {tuple(x.shape)}")
    z = z.detach().to(x)
    bad = ~threat.contains(z, x)
    if bad.any():
        i = int(bad.nonzero()[0])
        what = "is not finite" if not z[i].isfinite().all() else f"leaves the set ({threat})"
        raise ValueError(f"attack {name!r}: its output for image {int(rows[i])} {what}")
    return z
