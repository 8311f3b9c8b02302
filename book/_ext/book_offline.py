"""Keep the built book small and free of everything that lies elsewhere.

* sphinx-thebe is part of Jupyter Book 1 and would name unpkg.com on every page:
  its files are taken out of the pages.
* The theme brings all of Font Awesome (1.5 MB of script, 90 kB of rules). The
  book uses some twenty icons: after the build, the script is replaced by one
  that knows just these, cut out of the original.
"""

import json
import re
from pathlib import Path

from sphinx.util import logging

log = logging.getLogger(__name__)

ICON_CLASS = re.compile(r"fa-([a-z0-9]+(?:-[a-z0-9]+)*)")
ICON_DATA = re.compile(
    r'(?:"([a-z0-9-]+)"|([a-z][a-z0-9]*)):\[(\d+),(\d+),(\[[^\]]*\]),"[0-9a-f]+","([^"]+)"\]'
)
ICON_RULE = re.compile(
    r"\.fa-[a-z0-9-]+::?before(?:,\.fa-[a-z0-9-]+::?before)*"
    r'\{(?:content|--fa):"[^"]*"\}'
)
LOADER = """/* Icons of Font Awesome Free (https://fontawesome.com), CC BY 4.0, only those used here. */
(function () {
  const icons = %s;
  const families = ["fa-solid", "fas", "fa-brands", "fab", "fa-regular", "far", "fa"];
  function draw(root) {
    for (const i of root.querySelectorAll(families.map((f) => `.${f}:not(svg)`).join())) {
      const name = [...i.classList].map((c) => c.replace(/^fa-/, "")).find((c) => icons[c]);
      if (!name) continue;
      const [w, h, d] = icons[name];
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const { name, value } of i.attributes) svg.setAttribute(name, value);
      svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
      svg.setAttribute("aria-hidden", "true");
      svg.classList.add("book-icon");
      svg.innerHTML = `<path fill="currentColor" d="${d}"></path>`;
      i.replaceWith(svg);
    }
  }
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", () => draw(document));
  } else {
    draw(document);
  }
})();
"""


def without_thebe(app, pagename, templatename, context, doctree):
    for key in ("script_files", "css_files"):
        context[key][:] = [
            item
            for item in context.get(key, [])
            if "thebe" not in (str(getattr(item, "filename", item)) + str(getattr(item, "attributes", ""))).lower()
        ]


def fewer_icons(app, error):
    script = Path(app.outdir, "_static/scripts/fontawesome.js")
    if error or app.builder.format != "html" or not script.exists():
        return
    source = script.read_text(encoding="utf8")
    known, aliases = {}, {}
    for quoted, bare, width, height, others, path in ICON_DATA.findall(source):
        name = quoted or bare
        known.setdefault(name, []).append((int(width), int(height), path))
        for alias in re.findall(r'"([a-z0-9-]+)"', others):
            aliases[alias] = name
    if not known:
        if not source.startswith("/* Icons of"):
            log.warning("no icons found in %s: the page keeps the whole script", script.name)
        return
    used = set()
    pages = [*Path(app.outdir).rglob("*.html"), *Path(app.outdir, "_static/scripts").glob("*theme.js")]
    for page in pages:
        used.update(ICON_CLASS.findall(page.read_text(encoding="utf8")))
    # An outlined and a filled icon can share a name; the filled one comes last.
    icons = {n: known[aliases.get(n, n)][-1] for n in sorted(used) if aliases.get(n, n) in known}
    script.write_text(LOADER % json.dumps(icons), encoding="utf8")
    for sheet in Path(app.outdir, "_static/styles").glob("pydata-sphinx-theme.css"):
        sheet.write_text(ICON_RULE.sub("", sheet.read_text(encoding="utf8")), encoding="utf8")
    for leftover in Path(app.outdir, "_static").rglob("*.js.map"):
        leftover.unlink()


def setup(app):
    app.connect("html-page-context", without_thebe, priority=900)
    app.connect("build-finished", fewer_icons)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
