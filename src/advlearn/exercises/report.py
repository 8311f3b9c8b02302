"""What a checker returns: the properties that were tried, and what is likely wrong."""

from __future__ import annotations

import html
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

UNWRITTEN, AGAIN = "not written yet", "the same problem as above"


@dataclass(frozen=True)
class Finding:
    """One property: what is claimed, what is wrong ("" if it holds), and a remark."""

    claim: str
    problem: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """The properties that were tried. True if there are some and all hold."""

    subject: str
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return bool(self.findings) and not any(f.problem for f in self.findings)

    def _lines(self) -> list[str]:
        return [f"{'✗' if f.problem else '✓'} {f.claim}"
                + "".join(f": {text}" for text in (f.problem, f.remark) if text not in ("", UNWRITTEN))
                for f in self.findings]  # fmt: skip

    def _title(self) -> str:
        failed = sum(bool(f.problem) for f in self.findings)
        if any(f.problem == UNWRITTEN for f in self.findings):
            return f"{self.subject}: {UNWRITTEN}"
        return f"{self.subject}: " + (f"{failed} of {len(self.findings)} properties fail" if failed
                                      else "all properties hold")  # fmt: skip

    def __repr__(self) -> str:
        return "\n  ".join([self._title(), *self._lines()])

    def _repr_html_(self) -> str:
        text = "<br>".join(html.escape(line) for line in self._lines())
        text = re.sub("`([^`]+)`", r"<code>\1</code>", text)
        return f"<p><strong>{html.escape(self._title())}</strong><br>{text}</p>"


Claims = Sequence[tuple[str, Callable[[], str | None]]]


class Unusable(Exception):
    """What the reader's function returned cannot be examined; the message says why."""


def ask(function: Callable[..., object], *given: object, **options: object) -> object:
    """The reader's answer. Tensors are handed over as copies, which have to stay as they were."""
    copies = [a.clone() if isinstance(a, Tensor) else a for a in given]
    answer = function(*copies, **options)
    if any(isinstance(a, Tensor) and not a.equal(b) for a, b in zip(copies, given, strict=True)):
        raise Unusable("what was handed over has been changed")
    return answer


def examine(subject: object, claims: Claims) -> Report:
    """Try every claim; its test returns what is wrong, or nothing. Errors are findings too."""
    name = getattr(subject, "__name__", type(subject).__name__)
    findings: list[Finding] = []
    for claim, test in claims:
        try:
            problem = test() or ""
        except NotImplementedError:
            todo = f"put your code in place of `raise NotImplementedError` in `{name}`"
            return Report(name, (Finding(todo, UNWRITTEN),))
        except Unusable as error:
            problem = str(error)
        except Exception as error:
            problem = f"stopped with {type(error).__name__}{_where(error)}: {error}"
        again = problem and any(f.problem == problem for f in findings)
        findings.append(Finding(claim, AGAIN if again else problem))
    if findings and findings[0].problem and all(f.problem == AGAIN for f in findings[1:]):
        findings = [Finding("runs", findings[0].problem)]  # One mistake, said once.
    return Report(name, tuple(findings))


def _where(error: Exception) -> str:
    """The first line outside this folder: the reader's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if Path(f.filename).parent != Path(__file__).parent]  # fmt: skip
    return f" at `{frames[0].line}`" if frames and frames[0].line else ""
