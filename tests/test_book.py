"""The web book: it builds without a warning and without torch, its links resolve, and it loads
nothing from elsewhere. The checks are tried on a page with planted faults as well."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import notebooks
import pytest

bs4 = pytest.importorskip("bs4")

ROOT = Path(__file__).resolve().parents[1]
PAGE_LIMIT = 1_500_000  # bytes: a page with everything that it loads
FAULTY = """<html><head><link rel="stylesheet" href="https://cdn.example/x.css">
<script src="//cdn.example/x.js"></script><style>@import url(https://fonts.example/f.css);</style></head>
<body><h2 id="here">A</h2><a href="#here">fine</a> <a href="#gone">x</a> <a href="no.html">x</a>
<img src="a.svg"><img src="https://img.example/b.png" alt="b"></body></html>"""

pytestmark = pytest.mark.xdist_group("book")


def pages(folder: Path) -> dict[Path, "bs4.BeautifulSoup"]:
    found = [p for p in sorted(folder.rglob("*.html")) if "_static" not in p.parts]
    return {p: bs4.BeautifulSoup(p.read_text(encoding="utf8"), "html.parser") for p in found}


def references(soup: "bs4.BeautifulSoup") -> list[tuple[str, str]]:
    """(tag, address) of everything that the page names."""
    named = [
        (t.name, t[a]) for a in ("href", "src", "data", "poster") for t in soup.select(f"[{a}]")
    ]
    return [(name, address) for name, address in named if not address.startswith("data:")]


def outside(address: str) -> bool:
    return bool(urlsplit(address).netloc)


def broken_links(folder: Path) -> list[str]:
    parsed = pages(folder)
    ids = {p: {t["id"] for t in s.select("[id]")} | {t["name"] for t in s.select("a[name]")}
           for p, s in parsed.items()}  # fmt: skip
    faults = []
    for page, soup in parsed.items():
        for _, address in references(soup):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.exists():
                faults.append(f"{page.name}: {address} does not exist")
            elif parts.fragment and target in ids and unquote(parts.fragment) not in ids[target]:
                faults.append(f"{page.name}: {address} has no such anchor")
    return faults


def loaded_from_elsewhere(folder: Path) -> list[str]:
    """Scripts, sheets, images, frames and fonts with another host; plain links are fine."""
    faults = []
    remote = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//[^)"';\s]+""")
    for page, soup in pages(folder).items():
        for name, address in references(soup):
            if name != "a" and outside(address) and not is_canonical(soup, address):
                faults.append(f"{page.name}: <{name}> {address}")
        for tag in soup.select("[srcset]"):
            faults += [f"{page.name}: {tag['srcset']}"] if "//" in tag["srcset"] else []
        for script in soup.select("script:not([src])"):
            if re.search(r"unpkg\.com|jsdelivr|cdnjs|googleapis|cloudflare", script.text):
                faults.append(f"{page.name}: inline script names a CDN")
        faults += [
            f"{page.name}: {m}" for tag in soup.select("style") for m in remote.findall(tag.text)
        ]
    for sheet in folder.rglob("*.css"):
        faults += [f"{sheet.name}: {m}" for m in remote.findall(sheet.read_text(encoding="utf8"))]
    return faults


def is_canonical(soup: "bs4.BeautifulSoup", address: str) -> bool:
    return any(t.get("href") == address for t in soup.select("link[rel=canonical]"))


def images_without_words(folder: Path) -> list[str]:
    return [f"{page.name}: {img.get('src')}"
            for page, soup in pages(folder).items()
            for img in soup.select("img")
            if not img.get("alt", "").strip() or img["alt"].startswith("../")]  # fmt: skip


def weight(page: Path, soup: "bs4.BeautifulSoup") -> int:
    """Bytes of the page and of every local file that it loads, without fonts."""
    kinds = ("script", "img", "source")
    wanted = {a for name, a in references(soup) if name in kinds}
    wanted |= {t["href"] for t in soup.select("link[rel=stylesheet], link[rel~=icon]")}
    files = {(page.parent / unquote(urlsplit(a).path)).resolve() for a in wanted}
    return page.stat().st_size + sum(f.stat().st_size for f in files if f.is_file())


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """The book, built from the working tree where neither torch nor advlearn can be imported."""
    folder = tmp_path_factory.mktemp("book")
    for name in ("torch", "advlearn"):
        (folder / "blocked" / name).mkdir(parents=True)
        text = f"raise ImportError('the book is built without {name}')\n"
        (folder / "blocked" / name / "__init__.py").write_text(text)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(ROOT), "--path-output", str(folder), "-W", "-n", "--keep-going"]
    env = {**os.environ, "PYTHONPATH": str(folder / "blocked"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    said = "\n".join(line for line in (done.stdout + done.stderr).splitlines()
                     if re.search("WARNING|ERROR|[Ee]rror:", line))  # fmt: skip
    assert done.returncode == 0, said or done.stderr[-3000:]
    return folder / "_build" / "html"


def test_internal_links_and_anchors_resolve(book):
    assert len(pages(book)) > 8
    assert broken_links(book) == []


def test_nothing_is_loaded_from_elsewhere(book):
    assert loaded_from_elsewhere(book) == []


def test_every_image_is_described(book):
    assert images_without_words(book) == []


def test_pages_are_light(book):
    heavy = {p.name: weight(p, s) for p, s in pages(book).items() if weight(p, s) > PAGE_LIMIT}
    assert heavy == {}


def test_equations_are_numbered(book):
    labels = 0
    for page, soup in pages(book).items():
        for block in soup.select("div.math[id^=equation-]"):
            number = block.select_one(".eqno")
            assert number and re.match(r"\(\d+(\.\d+)*\)", number.text), (
                f"{page.name}: {block['id']}"
            )
            labels += 1
        assert not soup.find(string=re.compile(r"\\(eq)?ref\{")), f"{page.name}: raw reference"
    assert labels >= 5


def test_citations_resolve(book):
    entries = {p.name: s.select("div.citation") for p, s in pages(book).items()}
    known = re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text("utf8"), re.M)
    assert len(known) == len(set(known)) == len(entries["bibliography.html"])
    for page, soup in pages(book).items():
        assert not re.search(r"\[\?\]|\{cite", soup.get_text()), f"{page.name}: unresolved citation"


def test_directives_were_understood(book):
    """A misspelt role or directive shows up as text in braces."""
    for page, soup in pages(book).items():
        for code in soup.select("pre, code, script, .math"):
            code.decompose()
        stray = re.findall(r"\{[a-z:-]+\}`|:::\{|```\{", soup.get_text())
        assert not stray, f"{page.name}: {stray}"


def test_contents_list_every_notebook():
    contents = (ROOT / "_toc.yml").read_text(encoding="utf8")
    listed = set(re.findall(r"file: (chapters/\S+)", contents))
    present = {p.relative_to(ROOT).with_suffix("").as_posix() for p in notebooks.paths()}
    assert listed == present
    for name in re.findall(r"(?:file|root): (book/\S+)", contents):
        assert (ROOT / f"{name}.md").is_file()
    assert {p.stem for p in (ROOT / "book").glob("*.md")} == {
        Path(n).name for n in re.findall(r"(?:file|root): (book/\S+)", contents)
    }


def test_pages_say_where_their_outputs_come_from(book):
    for path in notebooks.paths():
        page = book / path.relative_to(ROOT).with_suffix(".html")
        foot = pages(page.parent)[page].select_one(".provenance")
        meta = json.loads(path.read_text(encoding="utf8"))["metadata"].get("advlearn", {})
        assert foot, path.name
        assert all(str(meta[k]) in foot.text for k in ("profile", "date", "device") if k in meta)


def test_results_page_shows_the_papers_numbers(book):
    text = bs4.BeautifulSoup(
        (book / "book/results.html").read_text("utf8"), "html.parser"
    ).get_text()
    numbers = json.loads((ROOT / "data/results/papers.json").read_text("utf8"))["numbers"]
    shown = [n for n in numbers if n["where"] in ("Table 1", "Table 2")]
    assert shown and all(f"{n['value']:.1f}" in text for n in shown)


def test_recorded_values_have_labels(book):
    soup = bs4.BeautifulSoup((book / "book/results.html").read_text("utf8"), "html.parser")
    raw = [c.text for c in soup.select(".from-data td:first-child code")]
    assert raw == []
    assert "FGSM, rounding removed, %" in soup.get_text()


def test_titles_of_solutions_hold_no_active_link():
    """Such a link would take the press that is to open the solution."""
    sheet = (ROOT / "book/_static/custom.css").read_text(encoding="utf8")
    rule = re.search(r"div\.solution\.dropdown > \.admonition-title a \{([^}]*)\}", sheet)
    assert rule and "pointer-events: none" in rule[1]


def test_colab_buttons_name_the_repository(book):
    address = re.search(
        r'Repository = "https://(github\.com/\S+)"', (ROOT / "pyproject.toml").read_text()
    )
    for path in notebooks.paths():
        page = (book / path.relative_to(ROOT).with_suffix(".html")).read_text(encoding="utf8")
        target = (
            address[1].replace("github.com", "github")
            + f"/blob/main/{path.relative_to(ROOT).as_posix()}"
        )
        assert f"https://colab.research.google.com/{target}" in page


def test_the_checks_find_planted_faults(tmp_path):
    (tmp_path / "faulty.html").write_text(FAULTY)
    (tmp_path / "a.svg").write_text("<svg/>")
    assert len(broken_links(tmp_path)) == 2
    assert len(loaded_from_elsewhere(tmp_path)) == 4
    assert len(images_without_words(tmp_path)) == 1


def test_a_figure_keeps_what_it_shows_and_loses_digits():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from book_slim import plainer

    svg = """<svg xmlns:xlink="http://www.w3.org/1999/xlink"><metadata>made by matplotlib</metadata><!-- a tick -->
  <defs><style type="text/css">*{stroke-linejoin: round}</style>
  <path id="used" d="M 0 -1.1234567 L 12.987654 3.04 L 1 1 z M 5 5 Q 1 2 3 4 Q 5 6 7 8"
    transform="scale(0.015625)" style="fill: #ff0000"/></defs>
  <g id="idle"><g clip-path="url(#area)"><path style="fill: #ff0000"/>
  <use xlink:href="#used" transform="translate(10.123456 7.06) scale(0.12 -0.12)" x="1.98"/>
  <use xlink:href="#used" transform="translate(63.623047 0)"/>
  <use xlink:href="#used" transform="translate(1.5 -2.25)"/></g>
  <image style="opacity: 1" xlink:href="data:image/png;base64,aB1+/9.123456=="/></g>
  <g style="opacity: 0.5"><clipPath id="area"/></g></svg>"""
    small = plainer(svg)
    assert 'd="M0-1.1 13 3 1 1zM5 5Q1 2 3 4 5 6 7 8"' in small and 'x="2"' in small
    assert "translate(10.1 7.1) scale(0.12 -0.12)" in small and "scale(0.015625)" in small
    assert ' x="63.6"/>' in small and ' x="1.5" y="-2.2"/>' in small and "xlink" not in small
    assert "base64,aB1+/9.123456==" in small and ".s0{fill: #ff0000}</style>" in small
    assert small.count('class="s0"') == 2 and 'style="opacity: 1"' in small
    for name in ("used", "area"):
        kept = re.search(r"#(i\d)", small[small.index("href" if name == "used" else "url") :])[1]
        assert small.count(f'id="{kept}"') == 1
    assert small.count("<g") == small.count("</g>") == 2  # the one that clips, the one that fades
    assert not any(gone in small for gone in ("metadata", "tick", "idle", "  "))
    assert plainer(small) == small


def test_the_sides_of_a_frame_are_one_path():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from book_slim import plainer

    line, faint = "fill: none; stroke: #000000", "fill: none; stroke: #000000; stroke-opacity: 0.2"
    sides = "".join(f'<path d="M {i} 0 L {i} 9" style="{style}"/>\n'
                    for style in (line, faint) for i in (1, 2, 3))  # fmt: skip
    small = plainer(f"<svg><defs><style>*{{a: b}}</style></defs>\n{sides}<g/>\n</svg>")
    assert 'd="M1 0 1 9M2 0 2 9M3 0 3 9"' in small, "opaque ones may lie on each other"
    assert small.count("<path") == 1 + 3, "where faint lines cross, both are seen"
    assert plainer(small) == small and "<g" not in small


def test_code_keeps_its_words_and_its_colours():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from book_slim import UNCOLOURED

    code = '<pre><span class="n">f</span><span class="p">(</span><span class="nb">len</span><span class="w"> </span></pre>'
    assert UNCOLOURED.sub(r"\1", code) == '<pre>f(<span class="nb">len</span> </pre>'


def test_a_picture_keeps_every_pixel_and_loses_channels():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from book_slim import plainer
    from PIL import Image

    def png(image):
        image.save(buffer := io.BytesIO(), "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    noise = Image.effect_noise((32, 32), 200)  # grey
    colours = Image.merge("RGB", [Image.effect_noise((32, 32), 200) for _ in range(3)])
    few = colours.quantize(20).convert("RGB")
    clear = colours.convert("RGBA")
    clear.putalpha(noise)
    for image, mode in ((noise, "L"), (few, "P"), (colours, "RGB"), (clear, "RGBA")):
        before = png(image.convert("RGBA"))
        svg = f'<svg><image xlink:href="data:image/png;base64,\n{before}"/></svg>'
        after = re.search(r'base64,([^"]*)"', plainer(svg))[1]
        found = Image.open(io.BytesIO(base64.b64decode(after)))
        assert found.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
        assert found.mode == mode and len(after) <= len(before)
        assert mode == "RGBA" or len(after) < len(before)

    padded = few.convert("RGBA").quantize(256)
    padded.putpalette(padded.getpalette() + [0] * (768 - len(padded.getpalette())))
    padded.save(buffer := io.BytesIO(), "PNG", transparency=bytes([255] * 256))
    before = base64.b64encode(buffer.getvalue()).decode()
    after = re.search(r'base64,([^"]*)"', plainer(f'<image href="data:image/png;base64,{before}"/>'))[1]
    found = Image.open(io.BytesIO(base64.b64decode(after)))
    assert found.convert("RGB").tobytes() == few.tobytes() and len(after) < len(before) - 300
