"""`{api}`: the public names of a module, read from its source without importing it.

The book is built where torch is not installed, so nothing is imported: the
module is parsed, and each public function or class is shown with its signature
and its docstring, word for word.
"""

import ast
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def public(tree):
    """Public top-level functions and classes in the order of the source."""
    for item in tree.body:
        if isinstance(item, (ast.FunctionDef, ast.ClassDef)) and not item.name.startswith("_"):
            yield item


def signature(item, prefix=""):
    if isinstance(item, ast.ClassDef):
        fields = [
            f"{f.target.id}: {ast.unparse(f.annotation)}"
            + (f" = {ast.unparse(f.value)}" if f.value else "")
            for f in item.body
            if isinstance(f, ast.AnnAssign) and not f.target.id.startswith("_")
        ]
        return f"class {item.name}" + (f"({', '.join(fields)})" if fields else "")
    returns = f" -> {ast.unparse(item.returns)}" if item.returns else ""
    return f"{prefix}{item.name}({ast.unparse(item.args)}){returns}"


def code(text):
    block = nodes.literal_block(text, text, classes=["api-signature"])
    block["language"] = "python"
    return block


def entry(item):
    box = nodes.container(classes=["api-entry"])
    box.append(code(signature(item)))
    doc = ast.get_docstring(item)
    if doc:
        box.append(nodes.literal_block(doc, doc, classes=["api-doc"], language="text"))
    if isinstance(item, ast.ClassDef):
        methods = [m for m in public(item) if isinstance(m, ast.FunctionDef)]
        for method in methods:
            box.append(code(signature(method, prefix=f"{item.name}.")))
            doc = ast.get_docstring(method)
            if doc:
                box.append(nodes.literal_block(doc, doc, classes=["api-doc"], language="text"))
    return box


class Api(SphinxDirective):
    """`{api} attacks/gradient`: one section for src/advlearn/attacks/gradient.py."""

    required_arguments = 1

    def run(self):
        name = self.arguments[0]
        base = Path(self.env.srcdir, "src/advlearn")
        paths = [p for p in (base / f"{name}.py", base / name / "__init__.py") if p.exists()]
        paths += sorted(p for p in (base / name).glob("[a-z]*.py"))
        if not paths:
            raise self.error(f"src/advlearn has no module {name!r}")
        trees = [ast.parse(p.read_text(encoding="utf8")) for p in paths]
        for path in paths:
            self.env.note_dependency(str(path))
        doc = ast.get_docstring(trees[0]) or ""
        out = [nodes.paragraph("", " ".join(doc.split("\n\n")[0].split()))]
        return out + [entry(item) for tree in trees for item in public(tree)]


def setup(app):
    app.add_directive("api", Api)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
