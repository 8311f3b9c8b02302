"""Take sphinx-thebe out of the pages: Jupyter Book 1 loads it always, and it names unpkg.com."""

from docutils import nodes


def without_thebe_files(app, pagename, templatename, context, doctree):
    for key in ("script_files", "css_files"):
        context[key][:] = [
            item
            for item in context.get(key, [])
            if "thebe"
            not in f"{getattr(item, 'filename', item)}{getattr(item, 'attributes', '')}".lower()
        ]


def without_thebe_config(app, doctree, docname):
    for raw in list(doctree.findall(nodes.raw)):
        if raw.parent is doctree and "<script" in raw.astext():
            doctree.remove(raw)


def setup(app):
    app.connect("html-page-context", without_thebe_files, priority=900)
    app.connect("doctree-resolved", without_thebe_config, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
