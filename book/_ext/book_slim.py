"""Make the built book small: only the icons and the style rules that its pages use.

The theme brings all of Font Awesome (1.5 MB of script) and all of Bootstrap (0.4 MB of rules).
After the build, the script is replaced by one that knows just the icons found in the pages, and
rules for classes that no page and no script names are taken out of the style sheets. Search
scripts stay on the search page only. Matplotlib writes six decimals of a 72nd of an inch, a name and
a group for every line, and every style in full: figures keep one decimal, the names that something
refers to, the groups that say something, and a style once. Its pictures carry palettes of 256 colours
with opacities, or an opaque channel: they are written anew with what they use, pixel for pixel the
same. Words of code that have no colour of their own need no element of their own.
"""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

from PIL import Image
from sphinx.util import logging

log = logging.getLogger(__name__)

ICON_CLASS = re.compile(r"fa-([a-z0-9]+(?:-[a-z0-9]+)*)")
ICON_DATA = re.compile(
    r'(?:"([a-z0-9-]+)"|([a-z][a-z0-9]*)):\[(\d+),(\d+),(\[[^\]]*\]),"[0-9a-f]+","([^"]+)"\]'
)
SHEETS = ("styles/pydata-sphinx-theme.css", "sphinx-design.min.css", "mystnb.*.css")
ICON_GLYPH = re.compile(r"\.fa-[\w-]+::?before")  # drawn as SVG instead
# Classes that scripts put together from parts.
KEPT = re.compile(r"(bs-|tooltip|show|fade|collaps|dropdown|modal|offcanvas|pst-|togg)")
SEARCH_SCRIPT = re.compile(
    r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>'
)
# Names, punctuation and spaces in code: they have the colour of the code around them (custom.css).
UNCOLOURED = re.compile(r'<span class="[npw]">([^<]*)</span>')
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


def icon_script(source, used):
    """The small replacement of the theme's script; None if the icons cannot be found in it."""
    known, aliases = {}, {}
    for quoted, bare, width, height, others, path in ICON_DATA.findall(source):
        name = quoted or bare
        # An outlined and a filled icon can share a name; the filled one comes last.
        known[name] = (int(width), int(height), path)
        aliases.update(dict.fromkeys(re.findall(r'"([a-z0-9-]+)"', others), name))
    icons = {n: known[aliases.get(n, n)] for n in sorted(used) if aliases.get(n, n) in known}
    return LOADER % json.dumps(icons) if icons else None


def blocks(css):
    """(prelude, body) of every rule at the top level of a style sheet."""
    start = depth = 0
    for i, char in enumerate(css):
        if char == "{":
            depth += 1
            if depth == 1:
                prelude, opened = css[start:i], i + 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                yield prelude, css[opened:i]
                start = i + 1


def split_selectors(prelude):
    return re.split(r",(?![^()]*\))", prelude)


def needed(selector, used):
    if ICON_GLYPH.search(selector):
        return False
    if "\\" in selector or ":is(" in selector or ":where(" in selector:
        return True
    classes = re.findall(r"\.(-?[_a-zA-Z][\w-]*)", re.sub(r":(?:not|has)\([^()]*\)", "", selector))
    return all(c in used or KEPT.match(c) for c in classes)


def fewer_rules(css, used):
    """The style sheet without the rules that can match nothing in the book."""
    out = []
    for prelude, body in blocks(css):
        notice, prelude = re.match(
            r"((?:\s|/\*.*?\*/|@(?:charset|import)[^;]*;)*)(.*)", prelude, re.S
        ).groups()
        out += re.findall(r"/\*!.*?\*/", notice, re.S)
        if prelude.startswith(("@media", "@supports", "@layer", "@container")):
            inner = fewer_rules(body, used)
            out += [prelude + "{" + inner + "}"] if inner else []
        elif prelude.startswith("@font-face") and "Font Awesome" in body:
            continue
        elif prelude.startswith("@"):
            out.append(prelude + "{" + body + "}")
        else:
            kept = [s for s in split_selectors(prelude) if needed(s, used)]
            out += [",".join(kept) + "{" + body + "}"] if kept else []
    return "".join(out)


def plainer(svg):
    """A figure with one decimal in its coordinates, and without what nothing refers to."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'( (?:d|x|y|points|transform)=")(translate[^"]*|[^"(]*)(")', _one_decimal, svg)
    svg = re.sub(r'( d=")([^"]*)', lambda m: m[1] + _short_path(m[2]), svg)
    svg = re.sub(r'(data:image/png;base64,)([\w+/=\s]+)(?=")', _fewer_channels, svg)
    svg = _placed(_without_bare_groups(_shared_styles(_short_names(svg))))
    return _joined(re.sub(r"\n\s*", "\n", svg.replace("<g/>", "")))


def _fewer_channels(match):
    """A PNG without the channels that say nothing, and with a palette where that is smaller."""
    found = base64.b64decode(match[2])
    image = Image.open(io.BytesIO(found))
    if image.mode == "P":  # Matplotlib's have 256 colours and 256 opacities, whatever they use.
        image = image.convert("RGBA")
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    if image.mode == "RGB":
        red, *others = (channel.tobytes() for channel in image.split())
        image = image.convert("L") if others == [red, red] else image
    tried = [image]
    if image.mode == "RGB" and (colours := image.getcolors(256)):
        palette = image.quantize(len(colours))
        tried += [palette] if palette.convert("RGB").tobytes() == image.tobytes() else []
    return match[1] + base64.b64encode(min([found, *map(_png, tried)], key=len)).decode()


def _png(image):
    image.save(buffer := io.BytesIO(), "PNG", optimize=True)
    return buffer.getvalue()


def _one_decimal(match):
    before, scale, after = match[2].partition("scale")  # A glyph's scale is a small number.
    rounded = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), before)
    return (
        match[1]
        + re.sub(r"\s+", " ", rounded).strip()
        + (" " + scale + after if scale else "")
        + match[3]
    )


def _short_path(path):
    """A command that repeats is not said again, and `M` goes on as `L`."""
    out, goes_on = [], None
    for command, numbers in re.findall(r"([a-zA-Z])([^a-zA-Z]*)", path):
        out.append((" " if command == goes_on else command) + numbers.strip())
        goes_on = "L" if command == "M" else command if command in "LQC" else None
    return "".join(out).replace(" -", "-")


def _short_names(svg):
    """The ids that something refers to, as i0, i1, …; the others are left out."""
    names = {name: f"i{n}" for n, name in enumerate(dict.fromkeys(re.findall(r"#([\w-]+)", svg)))}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", svg)
    return re.sub(r'(href="#|url\(#)([\w-]+)', lambda m: m[1] + names[m[2]], svg)


def _shared_styles(svg):
    """A style that several elements have is a rule of the figure's style sheet."""
    if "</style>" not in svg:
        return svg
    counts = Counter(re.findall(r' style="([^"]*)"', svg))
    names = {s: f"s{n}" for n, s in enumerate(s for s, count in counts.items() if count > 1)}
    svg = re.sub(
        r' style="([^"]*)"', lambda m: f' class="{names[m[1]]}"' if m[1] in names else m[0], svg
    )
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return svg.replace("</style>", rules + "</style>", 1)


def _without_bare_groups(svg):
    """Groups that say nothing of what is in them are left out."""
    parts, opened = re.split(r"(<g(?:\s[^>]*)?>|</g>)", svg), []
    for i, part in enumerate(parts):
        if part.startswith("<g") and not part.endswith("/>"):
            opened.append(i)
        elif part == "</g>" and parts[start := opened.pop()] == "<g>":
            parts[start] = parts[i] = ""
    return "".join(parts)


def _placed(svg):
    """What is used somewhere says where by x and y, and what by href, as SVG 2 has it."""
    svg = re.sub(
        r'(<use xlink:href="[^"]*") transform="translate\(([\d.-]+)(?: ([\d.-]+))?\)"/>',
        lambda m: f'{m[1]} x="{m[2]}"' + (f' y="{m[3]}"' if float(m[3] or 0) else "") + "/>",
        svg,
    )
    return svg.replace("xlink:href=", "href=").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")


def _joined(svg):
    """Neighbouring lines of one opaque style, as the four sides of a frame are, in one path."""
    styles = dict(re.findall(r"\.(s\d+)\{([^}]*)\}", svg))
    opaque = {name for name, style in styles.items() if "fill: none" in style and "opacity" not in style}
    runs = re.compile(r'(?:<path d="[^"]*" class="(s\d+)"/>\n)(?:<path d="[^"]*" class="\1"/>\n)+')

    def join(match):
        whole = "".join(re.findall(r' d="([^"]*)"', match[0]))
        return f'<path d="{whole}" class="{match[1]}"/>\n' if match[1] in opaque else match[0]

    return runs.sub(join, svg)


def slim(app, error):
    static = Path(app.outdir, "_static")
    if error or app.builder.format != "html":
        return
    pages = list(Path(app.outdir).rglob("*.html"))
    for page in pages:
        text = found = page.read_text(encoding="utf8")
        if page.name != "search.html":
            text = SEARCH_SCRIPT.sub("", text)
        text = UNCOLOURED.sub(r"\1", text)
        if text != found:
            page.write_text(text, encoding="utf8")
    script = static / "scripts" / "fontawesome.js"
    scripts = [p for p in static.rglob("*.js") if p != script and "katex" not in p.parts]
    words = set()
    for path in [*pages, *scripts]:
        words.update(re.findall(r"[\w-]+", path.read_text(encoding="utf8")))
    if script.exists() and not (source := script.read_text(encoding="utf8")).startswith("/* Icons"):
        small = icon_script(source, {w[3:] for w in words if w.startswith("fa-")})
        if small:
            script.write_text(small, encoding="utf8")
        else:
            log.warning("no icons found in %s: every page loads the whole script", script.name)
    for pattern in SHEETS:
        for sheet in static.glob(pattern):
            sheet.write_text(fewer_rules(sheet.read_text(encoding="utf8"), words), encoding="utf8")
    for figure in Path(app.outdir, "_images").glob("*.svg"):
        text = figure.read_text(encoding="utf8")
        if "matplotlib" in text.lower():
            figure.write_text(plainer(text), encoding="utf8")
    for pattern in ("*.js.map", "*.css.map", "fontawesome/webfonts/*"):
        for leftover in static.rglob(pattern):
            leftover.unlink()


def setup(app):
    app.connect("build-finished", slim)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
