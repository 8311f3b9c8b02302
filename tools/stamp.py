"""Carry the public address and the version from pyproject.toml to every place that shows them.

    python tools/stamp.py            rewrite the files
    python tools/stamp.py --check    only report what differs, exit 1 if anything does

The address is `https://github.com/<owner>/<name>`. Colab links, the address of the web book
(`https://<owner>.github.io/<name>`) and the install line of the notebooks follow from it.
CITATION.cff remembers what was stamped last, so that a changed name is found as well.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    "README.md", "CONTRIBUTING.md", "CITATION.cff", "_config.yml", "_toc.yml",
    "book/**/*.md", "book/**/*.html", "book/**/*.ipynb", "chapters/**/*.md", "chapters/**/*.ipynb",
    "src/**/*.py", "bench/*.py", "bench/*.md",
)  # fmt: skip
# These must show the address (and CITATION.cff and the notebooks the version), whatever else does.
REQUIRED = ("README.md", "CITATION.cff", "_config.yml", "chapters/**/*.ipynb")


def declared(root: Path) -> tuple[str, str, str]:
    """(owner, name, version) as pyproject.toml states them."""
    text = (root / "pyproject.toml").read_text(encoding="utf8")
    address = re.search(r'^Repository = "https://github\.com/([\w.-]+)/([\w.-]+)"$', text, re.M)
    version = re.search(r'^version = "(.+)"$', text, re.M)
    if not address or not version:
        sys.exit(
            "pyproject.toml: no version, or Repository is not https://github.com/<owner>/<name>"
        )
    return address[1], address[2], version[1]


def files(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def stamped(text: str, owner: str, name: str, version: str, previous: str) -> str:
    """`text` with every form of the address, under the new or the previous name, brought up to date."""
    names = "|".join(re.escape(n) for n in {name, previous})
    end = r"(?![\w-]|\.\w)"
    # github.com/OWNER/NAME, also inside Colab and raw addresses, also followed by .git or a path
    text = re.sub(
        rf"(github(?:usercontent)?(?:\.com)?/)[\w.-]+/(?:{names})(?![\w-])",
        rf"\g<1>{owner}/{name}",
        text,
    )
    text = re.sub(rf"[\w-]+(\.github\.io/)(?:{names})(?![\w-])", rf"{owner}\g<1>{name}", text)
    text = re.sub(rf"(?<![\w/.-])(?:{names}){end}", name, text)
    return re.sub(
        rf"({re.escape(owner)}/{re.escape(name)}/(?:archive/refs/tags|blob|tree)/)v\d[\w.]*?(?=\.zip|/)",
        rf"\g<1>v{version}", text,
    )  # fmt: skip


def main(arguments: list[str], root: Path = ROOT) -> int:
    owner, name, version = declared(root)
    address = f"https://github.com/{owner}/{name}"
    citation = (root / "CITATION.cff").read_text(encoding="utf8")
    previous = re.search(r"^repository-code: .*/([\w.-]+?)\"?$", citation, re.M)[1]
    check, wrong = "--check" in arguments, 0
    for path in files(root, PLACES):
        old = path.read_text(encoding="utf8")
        new = stamped(old, owner, name, version, previous)
        if path.name == "CITATION.cff":
            new = re.sub(r"^version: .*$", f"version: {version}", new, flags=re.M)
        if new == old:
            continue
        wrong += 1
        print(f"{path.relative_to(root)}: {'differs' if check else 'stamped'}")
        if not check:
            path.write_text(new, encoding="utf8", newline="\n")
    for path in files(root, REQUIRED):
        wanted = (
            f"{address}/archive/refs/tags/v{version}.zip" if path.suffix == ".ipynb" else address
        )
        if wanted not in path.read_text(encoding="utf8"):
            wrong += check
            print(f"{path.relative_to(root)}: does not show {wanted}", file=sys.stderr)
    return int(check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
