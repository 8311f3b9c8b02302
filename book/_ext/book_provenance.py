"""Where a page's outputs come from, and what the chapters cost.

A reference run stores `metadata.advlearn = {profile, commit, torch, device,
date, minutes, ...}` in the notebook. It is shown at the foot of the page, and
`{chapter-timings}` collects the minutes of all notebooks of the book.
"""

import json
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


def metadata(path):
    """The `advlearn` part of a notebook's metadata, empty where there is none."""
    notebook = json.loads(Path(path).read_text(encoding="utf8"))
    return notebook.get("metadata", {}).get("advlearn") or {}


def title(path):
    """The first heading of a notebook."""
    notebook = json.loads(Path(path).read_text(encoding="utf8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return Path(path).stem


def minutes(value):
    try:
        value = float(value)
    except (TypeError, ValueError):
        return "–"
    return f"{value * 60:.0f} s" if value < 1 else f"{value:.1f} min"


def sentence(meta):
    parts = [f"profile {meta['profile']}" if meta.get("profile") else ""]
    parts += [str(meta.get("date", ""))[:10], str(meta.get("device", ""))]
    parts += [f"PyTorch {meta['torch']}" if meta.get("torch") else ""]
    parts += [f"commit {str(meta['commit'])[:10]}" if meta.get("commit") else ""]
    parts += [minutes(meta["minutes"]) if meta.get("minutes") else ""]
    return "Outputs of this page: " + " · ".join(p for p in parts if p) + "."


def add_foot(app, doctree):
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    meta = metadata(path)
    text = sentence(meta) if meta else "The outputs of this page carry no record of their run."
    foot = nodes.paragraph("", text, classes=["provenance"])
    sections = list(doctree.findall(nodes.section))
    (sections[0] if sections else doctree).append(foot)


class ChapterTimings(SphinxDirective):
    """A table of all notebooks named in the table of contents, with their minutes."""

    def run(self):
        rows = ["| chapter | time | profile | device | date |", "|---|---|---|---|---|"]
        found = sorted(d for d in self.env.found_docs if d.startswith("chapters/"))
        for docname in sorted(found, key=lambda d: (Path(d).name, d)):
            path = Path(self.env.doc2path(docname))
            if path.suffix != ".ipynb":
                continue
            self.env.note_dependency(str(path))
            meta = metadata(path)
            rows.append(
                f"| [{title(path)}](/{docname}.ipynb) | {minutes(meta.get('minutes'))} "
                f"| {meta.get('profile', '–')} | {meta.get('device', '–')} "
                f"| {str(meta.get('date', '–'))[:10]} |"
            )
        node = nodes.container()
        self.state.nested_parse(
            StringList(rows, source="chapter-timings"), self.content_offset, node
        )
        return node.children


def setup(app):
    app.connect("doctree-read", add_foot)
    app.add_directive("chapter-timings", ChapterTimings)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
