"""Print the requirements of one extra of pyproject.toml, without those of the package itself.

The web book is built from stored outputs and so needs no torch. Plain Python 3.10 has no TOML
reader, but an array of strings is written the same in TOML and in Python.

    python tools/requirements.py book
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def extra(name: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    table = text.split("[project.optional-dependencies]", 1)[1]
    return ast.literal_eval(re.search(rf"^{name} = (\[.*?^\])", table, re.M | re.S).group(1))


if __name__ == "__main__":
    print(*extra(sys.argv[1]), sep="\n")
