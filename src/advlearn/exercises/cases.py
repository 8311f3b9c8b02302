"""A function of numbers, tried on named arguments, with what the usual mistakes would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real

from torch import Tensor

from advlearn.exercises.report import Unusable, ask

Number = Callable[..., float]


@dataclass
class Cases:
    """The reader's function, the truth and the mistakes on the same arguments.

    A mistake is named if it agrees with the reader's function on *all* arguments.
    """

    asked: Number
    truth: Number
    mistakes: Mapping[str, Number]
    arguments: Mapping[str, tuple]
    tol: float = 1e-7
    answers: dict[str, float] = field(default_factory=dict)

    def told(self, name: str) -> float:
        """What the reader's function says, asked once."""
        if name not in self.answers:
            value = ask(self.asked, *self.arguments[name])
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, bool) or not isinstance(value, Real):
                raise Unusable(f"returns {type(value).__name__}, wanted a number")
            self.answers[name] = float(value)
        return self.answers[name]

    def right(self, *names: str) -> Callable[[], str | None]:
        """The claim that the function is right on these arguments."""

        def test() -> str | None:
            bad = [n for n in names if self._off(n, self.truth)]
            if not bad:
                return None
            for message, mistake in self.mistakes.items():
                if not any(self._off(n, mistake) for n in self.arguments):
                    return message
            told, true = self.told(bad[0]), self.truth(*_copy(self.arguments[bad[0]]))
            return f"{bad[0]}: {told:.6g}, it is {true:.6g}"

        return test

    def _off(self, name: str, other: Number) -> bool:
        return not abs(self.told(name) - other(*_copy(self.arguments[name]))) <= self.tol


def _copy(arguments: tuple) -> tuple:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
