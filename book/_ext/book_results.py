"""Tables made from the numbers under data/ when the book is built.

`{paper-table} Table 1`  rows of data/results/papers.json whose `where` is "Table 1"
`{trained-networks}`     the manifests in data/checkpoints
`{recorded-runs}`        every other data/results/*.json, one table per chapter, or per sweep

What is not there is not shown, and the page says so.
"""

import json
import re
from collections import Counter
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

PAPERS = "data/results/papers.json"

# What a recorded value is: an accuracy, unless the label says otherwise. One that ends in % is
# recorded as a fraction.
LABELS = {
    "clean": "clean, %",
    "fgsm_usual": "FGSM, loss as usual, %",
    "fgsm": "FGSM, rounding removed, %",
    "fgsm_half": "FGSM at ε/2, rounding removed, %",
    "coin": "coin, %",
    "l2_equal_half": "ℓ2 step as long as FGSM's at ε/2, %",
    "robust_fgsm": "robust network, FGSM, rounding removed, %",
    "not_monotone_natural": "natural network: images on which success comes and goes",
    "not_monotone_robust": "robust network: images on which success comes and goes",
    "target_1_reached": "images that one targeted step turns into a 1, %",
    "target_8_reached": "images that one targeted step turns into an 8, %",
    "natural": "robust network, no attack, %",
    "pgd40": "PGD, 40 steps, %",
    "pgd100": "PGD, 100 steps, %",
    "pgd40x20": "PGD, 40 steps, 20 restarts, %",
    "pgd100x20": "PGD, 100 steps, 20 restarts, %",
    "targeted_likely": "PGD, 40 steps, targeted at the likeliest wrong class, %",
    "targeted_all": "PGD, 40 steps, targeted at each of the nine wrong classes, %",
    "cw": "CW: PGD, 40 steps, margin loss, %",
    "cwplus": "CW+: PGD, 40 steps, CW loss with κ = 50, %",
    "audit_natural": "audit of the natural network, %",
    "audit_robust": "audit of the robust network, %",
    "audit_saturated": "audit of the saturated network, %",
    "audit_quantised": "audit of the quantised network, %",
    "audit_resized": "audit of the resized network, %",
    "right_again_convolutional": "convolutional network: right again if brightness must stay, "
    "ℓ2, ε = 1, %",
    "right_again_MLP": "MLP: right again if brightness must stay, ℓ2, ε = 1, %",
    "left_by_1_runs": "40 gradients as 1 run of PGD-40, %",
    "left_by_2_runs": "40 gradients as 2 runs of PGD-20, %",
    "left_by_4_runs": "40 gradients as 4 runs of PGD-10, %",
    "left_by_8_runs": "40 gradients as 8 runs of PGD-5, %",
    "digits_fgsm_clean": "digits, ε = 0.3, FGSM-trained: clean, %",
    "digits_fgsm_fgsm": "digits, ε = 0.3, FGSM-trained: FGSM, %",
    "digits_fgsm_pgd20": "digits, ε = 0.3, FGSM-trained: PGD, 20 steps, %",
    "digits_pgd5_clean": "digits, ε = 0.3, PGD-5-trained: clean, %",
    "digits_pgd5_fgsm": "digits, ε = 0.3, PGD-5-trained: FGSM, %",
    "digits_pgd5_pgd20": "digits, ε = 0.3, PGD-5-trained: PGD, 20 steps, %",
}
LABELS |= {
    f"race_{key}_{kind}": f"{training}: {what}, %"
    for key, training in {
        "natural": "natural training", "fgsm": "FGSM training",
        "fgsm_rs": "FGSM training, random start", "free": "free training",
        "pgd2": "PGD-2 training", "pgd5": "PGD-5 training", "mixture": "mixture",
        "trades": "TRADES", "regularised": "gradient regularisation",
    }.items()
    for kind, what in {"clean": "clean", "fgsm": "FGSM", "pgd40": "PGD-40"}.items()
} | {"standard": "robust network, standard evaluation, %"} | {
    f"{source}_{key}": f"crafted on {name}: {what}, %"
    for source, name in {"copy": "a copy", "other": "another architecture"}.items()
    for key, what in {
        "fgsm": "FGSM", "pgd40": "PGD, 40 steps", "pgd100x20": "PGD, 100 steps, 20 restarts",
        "cw": "CW", "cwplus": "CW+, κ = 50",
    }.items()
}  # fmt: skip
LABELS |= {
    f"digits_runs_{r}": f"digits, robust network: {r} run{'s' * (r > 1)} of PGD-10, %"
    for r in (1, 10, 40)
}
LABELS |= {f"budget_{t}": f"1,000 gradients as runs of {t} steps, %" for t in (5, 10, 20, 40, 100)} | {
    "together": "all runs of the grid and the standard evaluation, %",
    "spread_natural": "natural network: spread of the final losses, %",
    "spread_robust": "robust network: spread of the final losses, %",
    "sent_higher_natural": "natural network: images (of 5) on which targeted runs end highest",
    "sent_higher_robust": "robust network: images (of 5) on which targeted runs end highest",
    "square_above": "robust network, ℓ2: images (of 5) on which Square ends above all runs",
    "angle_natural": "natural network: mean angle between ends, degrees",
    "angle_robust": "robust network: mean angle between ends, degrees",
}  # fmt: skip
LABELS |= {
    f"{key}_{i}": f"image {i}: {what}"
    for i in range(1, 6)
    for key, what in {
        "mean": "mean final loss", "spread": "spread, %", "low": "lowest", "high": "highest",
        "p_high": "p, highest run", "p_low": "p, lowest run", "classes": "wrong classes reached",
    }.items()
}  # fmt: skip
LABELS |= {
    f"capacity_{key}_{width}_{kind}": f"{training}, width {width}: {what}"
    for key, training in {
        "natural": "natural training", "fgsm": "FGSM training", "pgd": "PGD training",
        "ramp": "PGD training with a ramp",
    }.items()
    for width in (1, 2, 4, 8, 16)
    for kind, what in {
        "natural": "clean, %", "fgsm": "FGSM, %", "pgd": "PGD-40, %", "loss": "loss under PGD-40",
        "transfer": "PGD-40 made on another seed, %",
    }.items()
} | {
    "balls_units": "16 balls in the plane: hidden units of the smallest network that keeps them",
    "balls_convicted": "16 balls: larger networks whose training failed",
    "pairs_without_box": "digits, ε = 0.3: pairs whose class means differ nowhere by more than 2 ε",
}  # fmt: skip
LABELS |= {
    "eps_useful_not_robust": "μ = (1, 0.2), Σ = diag(1, 0.01): ε from which Σ⁻¹μ is not robustly useful",
    "eps_x1_beats_average": "p = 0.95, η = 0.1, 10,000 weak features: ε from which x₁ alone beats their average",
}  # fmt: skip

LABELS |= {
    "natural_clean": "natural network: clean, %", "robust_clean": "robust network: clean, %",
    "robust_pgd": "robust network: PGD, %", "overfit_best": "robust overfitting: best checkpoint, PGD, %",
    "overfit_last": "robust overfitting: last checkpoint, PGD, %",
    "twofold_gap": "toy: largest distance of trained classifiers from the formula, %",
    "gaussian_gap": "Gaussian model: largest distance of learned errors from the curve",
} | {
    f"eps_{eps:02d}_{kind}": f"trained at ε = {eps / 100:g}: {what}, %"
    for eps in (0, 5, 10, 20, 30, 40)
    for kind, what in {"natural": "clean", "pgd_low": "PGD, small ε", "pgd_high": "PGD, large ε"}.items()
} | {
    f"beta_{beta}_{kind}": f"TRADES, β = {beta}: {what}, %"
    for beta in ("0.3", "1", "6")
    for kind, what in {"natural": "clean", "pgd_high": "PGD, large ε"}.items()
}  # fmt: skip

LABELS |= {
    "rand_true": "trained on D_rand: true labels, %", "rand_noise": "trained on noise with D_rand's labels: true labels, %",
    "det_true": "trained on D_det: true labels, %", "det_next": "trained on D_det: labels y + 1, %",
    "original_l2": "trained on the originals: PGD, ℓ2, %", "robustified_l2": "trained on D_R: PGD, ℓ2, %",
    **{f"{key}_{kind}": f"{kind} network: {what}, %" for kind in ("natural", "robust") for key, what in {
        "gradient_on_strokes": "gradient on strokes", "smoothed": "votes under noise, attack on the network",
        "smoothed_through": "votes under noise, attack through the noise"}.items()},
    "nonrobust_l2": "trained on D_NR: PGD, ℓ2, %", "near_l2": "trained on D_NR kept near its start: PGD, ℓ2, %",
}  # fmt: skip

# A cell of a sweep: what was trained and how, the columns before these, is what it is about.
CELL_LABELS = {
    "natural": "no attack, %", "fgsm": "FGSM, %", "pgd": "PGD, %", "top": "commonest answer, %",
    "loss": "training loss", "pgd_loss": "loss under PGD", "pgd_low": "PGD, small ε, %",
    "pgd_high": "PGD, large ε, %", "train": "PGD, training images, %",
}  # fmt: skip
# Chapter 7: a network trained on some training set, and what the images of that set are.
CELL_LABELS |= {
    "true": "says y, %", "next": "says y + 1, %", "clean_1000": "no attack, 1,000 images, %",
    "held_out_true": "says y, held-out images, %", "held_out_next": "says y + 1, held-out images, %",
    "moved": "mean ℓ2 length of the change", "build_seconds": "seconds to build",
    **{f"{who}_says_{what}": f"{name} says the {what}, %"
       for who, name in {"source": "attacked network", "onlooker": "robust network",
                         "natural": "natural network", "robust": "robust network"}.items()
       for what in ("label", "class")},
    **{f"linf_{eps}": f"PGD, ℓ∞, ε = {eps}, %" for eps in (0.1, 0.2, 0.3)},
    **{f"l2_{eps}": f"PGD, ℓ2, ε = {eps}, %" for eps in (0.25, 0.5, 1, 2)},
    "success": "transfer, %", "low": "low, %", "high": "high, %", "n": "images",
    "clean": "accuracy, %", **{f"D_{d}_{key}": f"D_{d}: says {what}, %" for d in ("det", "rand")
                               for key, what in {"true": "y", "next": "y + 1"}.items()},
}  # fmt: skip
RUN = {"profile", "seed", "minutes", "date", "commit", "hardware", "torch", "python", "values"}


def percent(value):
    return f"{100 * value:.1f}"


def short(value):
    """A recorded value in a table cell: up to four significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(short(v) for v in value)
    if isinstance(value, dict):
        return "; ".join(f"{k} {short(v)}" for k, v in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def grid(header, rows, align=""):
    marks = {"r": "--:", "l": "---"}
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(marks[a] for a in align.ljust(len(header), "l")) + "|"
    for row in rows:
        yield "| " + " | ".join(short(cell) for cell in row) + " |"


def paper_rows(numbers, where):
    chosen = [n for n in numbers if n["where"] == where and n.get("verified")]
    columns = [("attack", "l"), ("steps", "r"), ("restarts", "r"), ("source", "l")]
    columns = [(c, a) for c, a in columns if {n[c] for n in chosen} - {None, 1}]
    strongest = min((n["value"] for n in chosen if n["source"] == "A"), default=None)
    for n in chosen:
        row = [n["attack"] if n["attack"] != "none" else "none (clean)"]
        single = "PGD" not in n["attack"] and "CW" not in n["attack"]
        row += [None if single and c != "source" else n[c] for c, _ in columns[1:]]
        row += [f"{n['value']:.1f}"]
        row = [
            re.sub("^A nat$", "A<sub>nat</sub>", cell) if isinstance(cell, str) else cell
            for cell in row
        ]
        if n["value"] == strongest and n["source"] == "A":
            row = [f"**{short(cell)}**" if cell is not None else None for cell in row]
        yield row
    return [c for c, _ in columns] + ["accuracy, %"], "".join(a for _, a in columns) + "r"


def drain(generator):
    """The rows that a generator yields and the value that it returns."""
    rows = []
    while True:
        try:
            rows.append(next(generator))
        except StopIteration as end:
            return rows, end.value


def attack_names(names):
    counted = Counter(re.sub(r" #\d+$", "", name) for name in names)
    return ", ".join(name if k == 1 else f"{name} × {k}" for name, k in counted.items())


def network_row(m):
    fgsm, worst = m["measured"]["fgsm"], m["measured"]["worst_case"]
    return [
        m["name"] + (f", seed {m['seed']}" if m["seed"] else ""),
        worst["threat"].replace(", ε =", ""),
        percent(worst["clean_accuracy"]),
        percent(fgsm["accuracy"]),
        f"{percent(worst['accuracy'])} [{percent(worst['low'])}, {percent(worst['high'])}]",
        attack_names(worst["attacks"]),
        f"{m['minutes']:.1f}",
    ]


def run_row(key, runs):
    label = LABELS.get(key, f"`{key}`")
    values = [r["values"].get(key) for r in runs]
    if label.endswith("%"):
        values = [v if v is None else f"{100 * v:.2f}" for v in values]
    return [label, *values]


def runs_table(name, runs):
    heads = [f"{r['profile']}, seed {r['seed']}" for r in runs]
    keys = list(dict.fromkeys(k for r in runs for k in r["values"]))
    rows = [run_row(key, runs) for key in keys]
    rows.append(["minutes", *(r.get("minutes") for r in runs)])
    profiles = {r["profile"] for r in runs}
    same = f", profile `{profiles.pop()}`" if len(profiles) == 1 else ""
    yield f"**{name}**{same}"
    yield ""
    if same:
        heads = [f"seed {r['seed']}" for r in runs]
    yield from grid(["value", *heads], rows, "l" + "r" * len(runs))
    yield ""
    yield from origin_lines(heads, runs)


def sweep_table(name, runs):
    """One row for all seeds of a cell: the parameters that differ, mean values, minutes."""
    fields = dict.fromkeys(["profile", *(k for r in runs for k in r if k not in RUN)])
    differ = [k for k in fields if len({json.dumps(r.get(k)) for r in runs}) > 1]
    keys = list(dict.fromkeys(k for r in runs for k in r["values"]))
    labels = [CELL_LABELS.get(key, f"`{key}`") for key in keys]
    cells = {}
    for r in runs:
        cells.setdefault(tuple(short(r.get(k)) for k in differ), []).append(r)
    rows = []
    for cell, same in cells.items():
        values = [[r["values"][k] for r in same if k in r["values"]] for k in keys]
        means = [sum(v) / len(v) if v else None for v in values]
        shown = [m if m is None or "%" not in label else f"{100 * m:.1f}"
                 for label, m in zip(labels, means, strict=True)]  # fmt: skip
        rows.append([*cell, *shown, len(same), sum(r["minutes"] for r in same)])
    yield f"**{name}**, means over seeds"
    yield ""
    heads = [*(f"`{k}`" for k in differ), *labels, "seeds", "minutes, all seeds"]
    yield from grid(heads, rows, "l" * len(differ) + "r" * (len(labels) + 2))
    yield ""
    yield from origin_lines([f"seed {r['seed']}" for r in runs], runs)


def is_sweep(runs):
    return max(Counter((r["profile"], r["seed"]) for r in runs).values()) > 1


def origin_lines(heads, runs):
    """Where the runs come from, each origin once."""
    origins = {}
    for head, r in zip(heads, runs, strict=True):
        parts = [
            r.get("hardware"),
            f"PyTorch {r.get('torch')}",
            f"commit {r.get('commit')}",
            r.get("date"),
        ]
        origins.setdefault(" · ".join(str(p) for p in parts), {})[head] = None
    for origin, which in origins.items():
        yield f"{'; '.join(which)}: {origin}."
        yield ""


class Lines(SphinxDirective):
    def show(self, lines, classes=()):
        node = nodes.container(classes=["from-data", *classes])
        self.state.nested_parse(
            StringList(list(lines), source=self.name), self.content_offset, node
        )
        return [node]

    def read(self, path):
        self.env.note_dependency(str(path))
        return json.loads(Path(path).read_text(encoding="utf8"))

    def files(self, folder):
        return sorted(Path(self.env.srcdir, folder).glob("*.json"))


class PaperTable(Lines):
    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"name": directives.unchanged, "caption": directives.unchanged}

    def run(self):
        numbers = self.read(Path(self.env.srcdir, PAPERS))["numbers"]
        rows, (header, align) = drain(paper_rows(numbers, self.arguments[0]))
        if not rows:
            raise self.error(f"no number in {PAPERS} comes from {self.arguments[0]!r}")
        return self.show(
            [f":::{{table}} {self.options['caption']}", f":name: {self.options['name']}", "",
             *grid(header, rows, align), ":::"]
        )  # fmt: skip


class TrainedNetworks(Lines):
    def run(self):
        manifests = [self.read(path) for path in self.files("data/checkpoints")]
        if not manifests:
            return self.show(["No trained network is part of this version yet."])
        header = ["network", "norm, ε", "clean", "FGSM", "all attacks [95 %]", "attacks", "min"]
        origins = dict.fromkeys(
            f"{m['hardware']}, PyTorch {m['torch']}, {m['date']}" for m in manifests
        )
        return self.show(
            [
                *grid(header, map(network_row, manifests), "llrrrlr"),
                "",
                "Trained on: " + "; ".join(origins) + ".",
            ]
        )


class RecordedRuns(Lines):
    def run(self):
        lines = []
        for path in self.files("data/results"):
            if path.name == Path(PAPERS).name:
                continue
            record = self.read(path)
            if record.get("tabled", "runs" in record):
                shape = sweep_table if is_sweep(record["runs"]) else runs_table
                lines += shape(path.stem, record["runs"])
        return self.show(lines or ["No recorded run is part of this version yet."])


def setup(app):
    app.add_directive("paper-table", PaperTable)
    app.add_directive("trained-networks", TrainedNetworks)
    app.add_directive("recorded-runs", RecordedRuns)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
