"""Numbers as data: what the papers report, what runs of the book recorded, what you just measured.

`data/results/papers.json` holds the papers' numbers with their protocols. `data/results/NAME.json`
holds the recorded runs of one chapter: profile, seed, provenance and headline numbers of each.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from advlearn import provenance, storage

HEADLINE = "application/vnd.advlearn.headline+json"
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _read(name: str) -> dict[str, object]:
    path = storage.shipped() / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}


def papers() -> dict[str, dict[str, object]]:
    """The papers' numbers: key -> {value (in %), protocol, cite, where, verified}."""
    return {entry["key"]: entry for entry in _read("papers").get("numbers", [])}


def recorded(name: str, profile: str | None = None) -> list[dict[str, object]]:
    """The recorded runs of a chapter, e.g. recorded("01_fgsm", "cpu"); newest last."""
    runs = _read(name).get("runs", [])
    return [run for run in runs if profile in (None, run["profile"])]


def store(
    name: str, runs: Sequence[Mapping[str, object]], by: Sequence[str] = ("profile", "seed")
) -> None:
    """Store runs in `data/results/NAME.json`, sorted by the fields named in `by`.

    A run replaces an earlier one that agrees with it in all of these fields; a field that a run
    does not have counts as None.
    """

    def place(run: Mapping[str, object]) -> list[tuple]:
        return [(run.get(field) is not None, run.get(field)) for field in by]

    new = [place(run) for run in runs]
    runs = [run for run in recorded(name) if place(run) not in new] + list(runs)
    path = storage.shipped() / "results" / f"{name}.json"
    with storage.atomic(path) as temporary:
        text = json.dumps({"runs": sorted(runs, key=place)}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf8")


def record(
    name: str, profile: str, seed: int, values: Mapping[str, object], minutes: float, **more: object
) -> None:
    """Store one run, made here and now; it replaces an earlier one of the same profile and seed."""
    run = {"profile": profile, "seed": seed, "minutes": round(minutes, 2), **provenance.stamp(),
           **more, "values": dict(values)}  # fmt: skip
    store(name, [run])


@dataclass(frozen=True)
class Band:
    """Where another seed's value should fall: a 95 % prediction interval from recorded seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def band(runs: Sequence[Mapping[str, object]], key: str) -> Band | None:
    """Student's prediction interval of `key` over recorded runs; None with fewer than three.

    mean ± t · s · √(1 + 1/m) for m seeds: the interval for one more seed, not for the mean.
    """
    values = [float(run["values"][key]) for run in runs if key in run["values"]]
    m = len(values)
    if m < 3:
        return None
    mean, s = statistics.fmean(values), statistics.stdev(values)
    half = _T975[min(m - 1, len(_T975)) - 1] * s * math.sqrt(1 + 1 / m)
    return Band(mean, mean - half, mean + half, m)


@dataclass(frozen=True)
class Headline:
    """The numbers of a run, in a form that `make run` collects into its summary."""

    values: Mapping[str, float]

    def __repr__(self) -> str:
        return "\n".join(f"{key} = {value:.4g}" for key, value in self.values.items())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict:
        return {"text/plain": repr(self), HEADLINE: {k: float(v) for k, v in self.values.items()}}


def headline(values: Mapping[str, float]) -> Headline:
    """Show the headline numbers of a run; `make run` and `make reference` read them."""
    return Headline(dict(values))


@dataclass(frozen=True)
class Row:
    """One line of a paper · book · you table. Accuracies are shares in [0, 1].

    Attributes:
        label: what is measured.
        key: name of the value in the recorded runs.
        value: this run's number.
        interval: its 95 % interval over test images, or None.
        paper: key of the paper's number, or None.
    """

    label: str
    key: str
    value: float
    interval: tuple[float, float] | None = None
    paper: str | None = None


class Table:
    """Rows of text that show as an HTML table in a notebook and as plain text elsewhere."""

    def __init__(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = ""
    ) -> None:
        self.head, self.rows, self.caption = list(head), [list(row) for row in rows], caption

    def _repr_html_(self) -> str:
        def cells(tag: str, row: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        body = "".join(cells("td", row) for row in self.rows)
        return (f'<table class="advlearn">{caption}<thead>{cells("th", self.head)}</thead>'
                f"<tbody>{body}</tbody></table>")

    def __repr__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in lines) for i in range(len(self.head))]
        text = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                for row in lines]  # fmt: skip
        return "\n".join([self.caption, *text] if self.caption else text)


def percent(value: float, interval: tuple[float, float] | None = None) -> str:
    """0.0361, (0.0326, 0.0399) -> "3.6 % [3.3, 4.0]"."""
    text = f"{100 * value:.1f} %"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def compare(
    rows: Sequence[Row], runs: Sequence[Mapping[str, object]], caption: str = ""
) -> Table:
    """The paper · book · you table.

    "Book" is the mean over recorded seeds with the band in which another seed's value should
    fall; "you" is this run, with its 95 % interval over test images.
    """
    reported, lines, seeds = papers(), [], set()
    for row in rows:
        paper = "–"
        if row.paper:
            entry = reported[row.paper]
            paper = f"{entry['value']:g} %" + ("" if entry["verified"] else " (not verified)")
        b, book, inside = band(runs, row.key), "–", "–"
        if b is not None:
            seeds.add(b.seeds)
            book = percent(b.mean, (max(0, b.low), min(1, b.high)))
            inside = "yes" if row.value in b else "NO"
        lines.append([row.label, paper, book, percent(row.value, row.interval), inside])
    book = f"book [band], {max(seeds)} seeds" if seeds else "book [band]"
    return Table(["", "paper", book, "you [95 %]", "in band"], lines, caption)
