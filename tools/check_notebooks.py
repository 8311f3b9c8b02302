"""Check stored notebooks: `python tools/check_notebooks.py [NOTEBOOK ...]` (default: all)."""

import sys
from pathlib import Path

import notebooks


def main(arguments: list[str]) -> int:
    bad = 0
    for path in [Path(a) for a in arguments] or notebooks.paths():
        for problem in notebooks.problems(path):
            print(f"{path}: {problem}")
            bad += 1
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
