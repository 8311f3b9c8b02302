"""Numbers as data: what the papers report, what runs of the book recorded, what you just measured.

`data/results/papers.json` holds the papers' numbers with their protocols. `data/results/NAME.json`
holds the recorded runs of one chapter: profile, seed, provenance and headline numbers of each.
"""

from __future__ import annotations

import html
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advlearn import provenance, storage
from advlearn.evaluation import interval

HEADLINE = "application/vnd.advlearn.headline+json"
AGREED = 0.02  # How far a value may be from recorded ones that are all the same.


def _read(name: str) -> dict[str, object]:
    path = storage.shipped() / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}


def papers() -> dict[str, dict[str, object]]:
    """The papers' numbers: key -> {value (in %), protocol, cite, where, verified}."""
    return {entry["key"]: entry for entry in _read("papers").get("numbers", [])}


def recorded(name: str, profile: str | None = None, **wanted: object) -> list[dict[str, object]]:
    """The recorded runs of a chapter, e.g. recorded("01_fgsm", "cpu"); newest last.

    `wanted` are fields that a run must have, e.g. kind="D_rand"; a field that a run lacks is None.
    """
    runs = _read(name).get("runs", [])
    return [run for run in runs if profile in (None, run["profile"])
            and all(run.get(field) == value for field, value in wanted.items())]  # fmt: skip


def over_seeds(name: str, key: str, n: int | None = None, **wanted: object) -> tuple[str, int]:
    """A recorded share in %, as text, and how many runs it comes from.

    "45.1 [43.9, 46.0]" is the mean and the range over seeds. A single seed shows no spread; with
    its number `n` of test images it gets "45.1 ± 1.4", half the width of the 95 % interval over
    images. `wanted` chooses the runs as in `recorded`; two of one seed are an error.
    """
    runs = [run for run in recorded(name, **wanted) if key in run["values"]]
    if len({run["seed"] for run in runs}) < len(runs):
        raise ValueError(f"{name}, {wanted}: several runs of one seed; say more of what is wanted")
    values = [100 * run["values"][key] for run in runs]
    if not values:
        return "not recorded yet", 0
    text = f"{statistics.fmean(values):.1f}"
    if len(values) > 1:
        text += f" [{min(values):.1f}, {max(values):.1f}]"
    elif n is not None:
        low, high = interval(round(values[0] * n / 100), n)
        text += f" ± {50 * (high - low):.1f}"
    return text, len(values)


def store(
    name: str, runs: Sequence[Mapping[str, object]], by: Sequence[str] = ("profile", "seed"), *,
    tabled: bool = True,
) -> None:  # fmt: skip
    """Store runs in `data/results/NAME.json`, sorted by the fields named in `by`.

    A run replaces an earlier one that agrees with it in all of these fields; a field that a run
    does not have counts as None. With `tabled=False` the book's page of results leaves them to
    their chapter.
    """

    def place(run: Mapping[str, object]) -> list[tuple]:
        return [(run.get(field) is not None, run.get(field)) for field in by]

    new = [place(run) for run in runs]
    runs = [run for run in recorded(name) if place(run) not in new] + list(runs)
    path = storage.shipped() / "results" / f"{name}.json"
    with storage.atomic(path) as temporary:
        record = ({} if tabled else {"tabled": False}) | {"runs": sorted(runs, key=place)}
        text = json.dumps(record, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf8")


def store_images(name: str, images: Mapping[str, Tensor]) -> None:
    """Store pictures beside recorded numbers, with 8 bits a pixel: `data/results/NAME.safetensors`.

    Args:
        images: key -> (N, C, H, W) in [0, 1]; keys that were there before and are not among these
            stay.
    """
    from safetensors.torch import save_file

    path = _pictures(name)
    new = {key: (255 * x).round().clamp(0, 255).to(torch.uint8).cpu() for key, x in images.items()}
    new = {key: (255 * x).round().to(torch.uint8) for key, x in recorded_images(name).items()} | new
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.atomic(path) as temporary:
        save_file({key: new[key].contiguous() for key in sorted(new)}, temporary)


def recorded_images(name: str) -> dict[str, Tensor]:
    """The pictures of `store_images`, float32 in [0, 1]; empty where none are recorded."""
    from safetensors.torch import load_file

    path = _pictures(name)
    return {key: x / 255 for key, x in load_file(path).items()} if path.is_file() else {}


def _pictures(name: str) -> Path:
    return storage.shipped() / "results" / f"{name}.safetensors"


def record(
    name: str, profile: str, seed: int, values: Mapping[str, object], minutes: float, **more: object
) -> None:
    """Store one run, made here and now; it replaces an earlier one of the same profile and seed."""
    run = {"profile": profile, "seed": seed, "minutes": round(minutes, 2), **provenance.stamp(),
           **more, "values": dict(values)}  # fmt: skip
    store(name, [run])


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval, mean ± t · s / √m (Student); NaN for a single seed."""
    m, mean = len(values), statistics.fmean(values)
    half = student(0.05, m - 1) * statistics.stdev(values) / math.sqrt(m) if m > 1 else math.nan
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Band:
    """Where another seed's value should fall: prediction intervals from recorded seeds.

    Attributes:
        mean: over the recorded seeds.
        low, high: the 95 % interval of this number alone. Of twenty numbers one falls outside by
            chance.
        far: how far from the mean the number may be if *all* numbers of a run are to stay within
            as much, with 95 % (Bonferroni's correction). `value in band` asks for that.
        seeds: how many were recorded.
    """

    mean: float
    low: float
    high: float
    far: float
    seeds: int

    def __contains__(self, value: float) -> bool:
        return abs(value - self.mean) <= self.far + 1e-12


def band(runs: Sequence[Mapping[str, object]], key: str) -> Band | None:
    """Student's prediction intervals of `key` over recorded runs; None with fewer than three.

    mean ± t · s · √(1 + 1/m) for m seeds: for one more seed, not for the mean. None as well while
    a run is being recorded ($ADVLEARN_RECORDING): a band must not choose the runs that make it.
    Seeds that all agree, say at 0 %, do not show how far another may be: `AGREED` is allowed then.
    """
    values = [float(run["values"][key]) for run in runs if key in run["values"]]
    m = len(values)
    if m < 3 or os.environ.get("ADVLEARN_RECORDING"):
        return None
    mean, s = statistics.fmean(values), statistics.stdev(values) * math.sqrt(1 + 1 / m)
    numbers = max(len(run["values"]) for run in runs)
    half, far = (student(0.05 / k, m - 1) * s for k in (1, numbers))
    far = far or AGREED
    return Band(mean, mean - half, mean + half, far, m)


def student(tail: float, dof: int) -> float:
    """The t with P(|T| > t) = tail for Student's T with `dof` = 1, 2, … degrees of freedom.

    By bisection of the finite series for integer degrees (Abramowitz and Stegun, 26.7.3 and 4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        cos, sin = math.cos(angle), math.sin(angle)
        term, total = (cos if dof % 2 else 1.0), 0.0
        for j in range(dof % 2, dof - 1, 2):
            total, term = total + term, term * cos * cos * (j + 1) / (j + 2)
        inside = 2 / math.pi * (angle + sin * total) if dof % 2 else sin * total
        low, high = (angle, high) if inside < 1 - tail else (low, angle)
    return math.sqrt(dof) * math.tan(low)


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
            book = percent(b.mean)
            if b.low < b.high:
                book = percent(b.mean, (max(0, b.low), min(1, b.high)))
                inside = "yes" if b.low <= row.value <= b.high else "NO"
        lines.append([row.label, paper, book, percent(row.value, row.interval), inside])
    book = f"book [band], {max(seeds)} seeds" if seeds else "book [band]"
    return Table(["", "paper", book, "you [95 %]", "in band"], lines, caption)
