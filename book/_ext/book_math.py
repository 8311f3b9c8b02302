"""Math drawn by the KaTeX that lies in book/_static/katex: no CDN, no Node.

Inline and displayed formulas keep their TeX source in the page; `book-math.js`
replaces it when the page has loaded. Numbering and `{eq}` are Sphinx's own.
A formula that is nothing but `\\eqref{label}` becomes such a reference, so that
a notebook can use the spelling that Jupyter and Colab understand.
"""

import json
import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.util.math import get_node_equation_number

EQREF = re.compile(r"\\eqref\{([^}]+)\}")
NUMBERED = re.compile(r"\\(begin|end)\{(equation|align|gather|alignat|multline)\}")


def visit_math(self, node):
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate nohighlight"))
    self.body.append(self.encode(node.astext()) + "</span>")
    raise nodes.SkipNode


def visit_displaymath(self, node):
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    tex = node.astext().strip()
    tex = NUMBERED.sub(r"\\\1{\2*}", tex)  # Sphinx numbers, KaTeX must not
    if r"\\" in tex and not tex.startswith(r"\begin{"):
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    self.body.append(f'<div class="tex">{self.encode(tex)}</div>')
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def link_eqrefs(app, doctree):
    for node in list(doctree.findall(nodes.math)):
        match = EQREF.fullmatch(node.astext().strip())
        if match:
            label = match.group(1)
            reference = pending_xref(
                "",
                nodes.Text(f"({label})"),
                refdomain="math",
                reftype="eq",
                reftarget=label,
                refdoc=app.env.docname,
                refwarn=True,
            )
            reference.line, reference.source = node.line, node.source
            node.replace_self(reference)


def load_katex(app, pagename, templatename, context, doctree):
    if doctree is None or not any(
        doctree.findall(lambda n: isinstance(n, (nodes.math, nodes.math_block)))
    ):
        return
    app.add_css_file("katex/katex.min.css")
    app.add_js_file(None, body=f"const bookMacros = {json.dumps(app.config.book_math_macros)}")
    app.add_js_file("katex/katex.min.js", loading_method="defer")
    app.add_js_file("book-math.js", loading_method="defer")


def setup(app):
    app.add_html_math_renderer("katex", (visit_math, None), (visit_displaymath, None))
    app.add_config_value("book_math_macros", {}, "html")
    app.connect("doctree-read", link_eqrefs)
    app.connect("html-page-context", load_katex)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
