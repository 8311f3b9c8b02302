"""What the runner, the checks and the tests share about notebooks."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
HEADLINE = "application/vnd.advlearn.headline+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
PROFILES = ("smoke", "cpu", "gpu", "paper")
MAX_BYTES, MAX_CELLS, MAX_CODE_CELLS = 1_500_000, 60, 30

ARCHIVE = re.compile(r"https://[^\s\"']+?/archive/refs/tags/v[^\s\"']+\.zip")
MACHINE_PATH = re.compile(
    r"(?<![\w:/.-])/(?:home|root|Users|tmp|mnt|work|content)/[\w.~-]+|[A-Z]:\\+Users\\"
)
WARNING = re.compile(r"\b\w*Warning: ")


def paths(root: Path = ROOT) -> list[Path]:
    """All notebooks of the book, each chapter followed by its exercises."""
    found = [
        p for folder in ("chapters", "chapters/exercises") for p in (root / folder).glob("*.ipynb")
    ]
    return sorted(found, key=lambda p: (p.name[:2], p.parent.name == "exercises", p.name))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(nb: NotebookNode, path: Path) -> None:
    """Write to a temporary name and rename, so that a notebook is never half written."""
    temporary = path.with_suffix(".ipynb.tmp")
    nbformat.write(nb, temporary)
    os.replace(temporary, path)


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def code_hash(nb: NotebookNode) -> str:
    """SHA-256 of the code; address and version in the set-up cell do not count."""
    sources = [
        ARCHIVE.sub("ARCHIVE", cell.source) if "setup" in tags(cell) else cell.source
        for cell in code_cells(nb)
    ]
    return hashlib.sha256("\n\0\n".join(sources).encode()).hexdigest()


def use_kernel(
    folder: Path, python: str = sys.executable, env: dict[str, str] | None = None
) -> None:
    """Make `python3`, the kernel every notebook names, be this interpreter and no other.

    Writes a kernelspec below `folder` and puts that first on Jupyter's search path.
    """
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True, exist_ok=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
    spec.write_text(
        json.dumps(
            {"argv": argv, "display_name": "Python 3", "language": "python", "env": env or {}}
        )
    )
    os.environ["JUPYTER_PATH"] = str(folder)


def headline(nb: NotebookNode, mime: str = HEADLINE) -> dict:
    """The headline numbers that a notebook displayed, or what it displayed as another `mime`."""
    numbers: dict = {}
    for cell in code_cells(nb):
        for output in cell.outputs:
            numbers.update(output.get("data", {}).get(mime, {}))
    return numbers


# --- cleaning, when reference outputs are stored ---------------------------------------------


def clean_outputs(cell: NotebookNode) -> list[NotebookNode]:
    """The outputs as they are stored: no widgets, no machine paths, nothing that only adds noise."""
    if "widget" in tags(cell):
        return []
    here = {str(ROOT) + os.sep: "", tempfile.gettempdir() + os.sep: "", str(Path.home()): "~"}

    def tidy(text: str) -> str:
        for path, name in here.items():
            text = text.replace(path, name)
        text = re.sub(r"\s*<dc:date>.*?</dc:date>", "", text)
        return re.sub(r" at 0x[0-9a-f]{6,}", "", text)

    kept: list[NotebookNode] = []
    for output in cell.outputs:
        if WIDGET in output.get("data", {}):
            continue
        if output.output_type == "stream":
            output.text = tidy(output.text)
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        for mime, value in output.get("data", {}).items():
            if isinstance(value, str) and is_text(mime):
                output.data[mime] = tidy(value)
            if mime == "image/svg+xml":
                output.data[mime] = with_light_images(output.data[mime])
        kept.append(output)
    return kept


def with_light_images(svg: str) -> str:
    """The figure with what is drawn as an image in 256 colours, where that makes it smaller.

    Greys stay as they are: a map of a loss must not get steps.
    """
    from PIL import Image

    def light(match: re.Match) -> str:
        file = io.BytesIO()
        image = Image.open(io.BytesIO(base64.b64decode(match[2]))).convert("RGBA")
        r, g, b, a = (band.tobytes() for band in image.split())
        if r == g == b and set(a) == {255}:
            image.convert("L").save(file, "png", optimize=True)
        else:
            image.quantize(256, Image.Quantize.FASTOCTREE).save(file, "png", optimize=True)
        encoded = base64.b64encode(file.getvalue()).decode()
        return match[1] + min(encoded, match[2], key=len) + '"'

    return re.sub(r'(href="data:image/png;base64,\s*)([^"]+)"', light, svg)


def is_text(mime: str) -> bool:
    return mime.startswith("text/") or mime == "image/svg+xml"


def store_outputs(source: NotebookNode, executed: NotebookNode, provenance: dict) -> NotebookNode:
    """Copy outputs into `source` by cell id; everything else in it stays as it is."""
    by_id = {cell.id: cell for cell in executed.cells}
    for cell in code_cells(source):
        done = by_id[cell.id]
        cell.outputs = clean_outputs(done)
        cell.execution_count = done.execution_count
    source.metadata.pop("widgets", None)
    source.metadata["advlearn"] = provenance
    return source


# --- checks, before a commit and in every test run --------------------------------------------


def text_of(outputs: list[NotebookNode]) -> str:
    parts = []
    for output in outputs:
        parts.append(output.get("text", ""))
        parts += [v for m, v in output.get("data", {}).items() if isinstance(v, str) and is_text(m)]
    return "\n".join(parts)


def problems(path: Path) -> list[str]:
    """Everything that keeps a stored notebook from being committed; empty when it is fit."""
    nb, found = read(path), []
    code = code_cells(nb)

    def demand(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    size = path.stat().st_size
    demand(size <= MAX_BYTES, f"{size / 1e6:.2f} MB, at most {MAX_BYTES / 1e6} MB")
    demand(len(nb.cells) <= MAX_CELLS, f"{len(nb.cells)} cells, at most {MAX_CELLS}")
    demand(len(code) <= MAX_CODE_CELLS, f"{len(code)} code cells, at most {MAX_CODE_CELLS}")
    demand("widgets" not in nb.metadata, "widget state is stored")
    for tag in ("parameters", "setup"):
        count = sum(tag in tags(cell) for cell in code)
        demand(count == 1, f"{count} cells tagged `{tag}`, exactly one is needed")
    for cell in code:
        if "parameters" in tags(cell):
            for line in ('profile = "auto"', "seed = 0"):
                present = any(row.startswith(line) for row in cell.source.splitlines())
                demand(present, f"the parameters cell lacks `{line}`")

    for number, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        where, text = f"cell {number} ({cell.id})", text_of(cell.outputs)
        kinds = {output.output_type for output in cell.outputs}
        mimes = {mime for output in cell.outputs for mime in output.get("data", {})}
        stderr = any(output.get("name") == "stderr" for output in cell.outputs)
        executed = cell.execution_count is not None or not cell.source.strip()
        demand(executed, f"{where}: never executed")
        demand("error" not in kinds, f"{where}: an error is stored")
        demand(not stderr and not WARNING.search(text), f"{where}: a warning is stored")
        demand(WIDGET not in mimes, f"{where}: a widget is stored; tag the cell `widget`")
        demand("widget" not in tags(cell) or not cell.outputs, f"{where}: outputs of a widget cell")
        if hit := MACHINE_PATH.search(text):
            found.append(f"{where}: a path of one machine is stored: {hit.group()}")
        if any(mime.startswith("image/") for mime in mimes):
            meta = cell.metadata.get("mystnb", {})
            demand(bool(meta.get("figure", {}).get("caption")), f"{where}: figure without caption")
            demand(bool(meta.get("image", {}).get("alt")), f"{where}: figure without alt text")

    stored = nb.metadata.get("advlearn")
    if not stored:
        return [*found, "no outputs of a reference run (metadata.advlearn); run `make reference`"]
    needed = ("profile", "commit", "code_sha256", "torch", "device", "date", "minutes")
    missing = [key for key in needed if key not in stored]
    demand(not missing, f"metadata.advlearn lacks {missing}")
    profile = stored.get("profile")
    demand(profile in PROFILES and profile != "smoke", f"outputs come from profile {profile!r}")
    stale = stored.get("code_sha256") != code_hash(nb)
    demand(not stale, "code has changed since the outputs were made; run `make reference`")
    return found
