"""`{recorded-runs}`: every recorded run in data/results/*.json as a table, whatever is there.

A record is a JSON object. Single values are shown as provenance, a list of
objects as a table, an object of values as a table of two columns. The papers'
numbers (papers.json) are shown elsewhere.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

SKIP = {"papers.json"}


def short(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(short(v) for v in value[:6]) + (", …" if len(value) > 6 else "")
    if isinstance(value, dict):
        return "; ".join(f"{k} {short(v)}" for k, v in value.items())
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text[:10] if len(text) == 40 and all(c in "0123456789abcdef" for c in text) else text


def grid(rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(short(row[c]) if c in row else "" for c in columns) + " |"


def markdown(name, record):
    """One record as lines of Markdown."""
    single = {k: v for k, v in record.items() if not isinstance(v, (dict, list))}
    yield f"**{record.get('title', name)}**"
    yield ""
    if single:
        yield " · ".join(f"{k}: {short(v)}" for k, v in single.items() if k != "title")
        yield ""
    for key, value in record.items():
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            rows = value
        elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
            rows = [{key: k, **v} for k, v in value.items()]
        elif isinstance(value, dict) and value:
            rows = [{key: k, "value": v} for k, v in value.items()]
        else:
            continue
        yield from grid(rows)
        yield ""


class RecordedRuns(SphinxDirective):
    def run(self):
        folder = Path(self.env.srcdir, "data/results")
        lines = []
        for path in sorted(folder.glob("*.json")) if folder.exists() else []:
            self.env.note_dependency(str(path))
            if path.name not in SKIP:
                lines += [*markdown(path.stem, json.loads(path.read_text(encoding="utf8"))), ""]
        if not lines:
            lines = ["No recorded run is part of this version yet."]
        node = nodes.container(classes=["recorded-runs"])
        self.state.nested_parse(StringList(lines, source="recorded-runs"), self.content_offset, node)
        return [node]


def setup(app):
    app.add_directive("recorded-runs", RecordedRuns)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
