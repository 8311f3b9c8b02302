"""Run the chapters: `python tools/run.py --profile cpu [--only 01] [--reference]`.

Executed copies and a summary go to `_build/run/<profile>/`. With --record the headline numbers are
also stored in `data/results/`, with --reference the outputs in `chapters/` as well. Both happen
after everything has run: a failure on the way leaves the stored files untouched.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import notebooks
from notebooks import ROOT


def execute(path: Path, out: Path, parameters: dict) -> dict:
    """Run one notebook into `out`; returns its row of the summary."""
    import papermill

    row = {"notebook": path.stem, "minutes": None, "headline": {}, "error": None}
    start = time.perf_counter()
    try:
        done = papermill.execute_notebook(
            path, out, parameters, kernel_name="python3", cwd=out.parent, autosave_cell_every=0
        )
        row["headline"] = notebooks.headline(done)
    except Exception as error:  # a failing chapter must not hide the next one's result
        row["error"] = f"{type(error).__name__}: {error}".strip()
    row["minutes"] = round((time.perf_counter() - start) / 60, 2)
    return row


def table(rows: list[dict]) -> str:
    lines = ["| notebook | minutes | headline numbers |", "|---|---|---|"]
    for row in rows:
        numbers = ", ".join(f"{key} = {value}" for key, value in row["headline"].items())
        lines.append(
            f"| {row['notebook']} | {row['minutes']} | {'FAILED' if row['error'] else numbers} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=notebooks.PROFILES, default="cpu")
    parser.add_argument("--only", default="", help="run the notebooks whose name starts so")
    parser.add_argument("--seed", type=int, help="run with this seed instead of the notebook's 0")
    parser.add_argument("--record", action="store_true", help="store the headline numbers")
    parser.add_argument("--reference", action="store_true", help="store outputs and numbers")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the kernel")
    args = parser.parse_args()
    if args.reference and args.profile == "smoke":
        parser.error("reference outputs come from the profile cpu or better, not from smoke")
    if args.reference and args.seed is not None:
        parser.error("reference outputs are those of the notebook's own seed; use --record")
    chosen = [p for p in notebooks.paths() if p.name.startswith(args.only)]
    if not chosen:
        parser.error(f"no notebook starts with {args.only!r}")

    from advlearn import provenance

    made = provenance.stamp()  # Now: the commit that runs, not one that comes meanwhile.
    folder = ROOT / "_build" / "run" / args.profile
    folder.mkdir(parents=True, exist_ok=True)
    env = {"ADVLEARN_PROFILE": args.profile}
    if args.reference:
        env["TQDM_DISABLE"] = "1"  # bars are for the live reader
    if args.record:
        env["ADVLEARN_RECORDING"] = "1"  # the bands must not choose the runs that make them
    parameters = {} if args.seed is None else {"seed": args.seed}
    rows, outs = [], []
    with tempfile.TemporaryDirectory() as kernels:
        notebooks.use_kernel(Path(kernels), args.python, env)
        for number, path in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {path.stem} ({args.profile})", flush=True)
            outs.append(folder / path.name)
            rows.append(execute(path, outs[-1], parameters))
            if rows[-1]["error"]:
                print(rows[-1]["error"], file=sys.stderr)

    summary = table(rows)
    (folder / "summary.md").write_text(summary + "\n", encoding="utf8")
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    print("\n" + summary)
    if any(row["error"] for row in rows):
        return 1
    ready = with_outputs(chosen, outs, rows, args.profile, made) if args.reference else []
    if args.reference or args.record:
        record(rows, args.profile, args.seed or 0)
    for nb, path in ready:
        notebooks.write(nb, path)
    return 0


def record(rows: list[dict], profile: str, seed: int) -> None:
    from advlearn import results

    for row in rows:
        if row["headline"]:
            results.record(row["notebook"], profile, seed, row["headline"], row["minutes"])


def with_outputs(
    chosen: list[Path], outs: list[Path], rows: list[dict], profile: str, made: dict
) -> list:
    """The stored notebooks with the new outputs, not yet written."""
    ready = []
    for path, out, row in zip(chosen, outs, rows, strict=True):
        nb, executed = notebooks.read(path), notebooks.read(out)
        code = notebooks.code_hash(nb)
        if code != notebooks.code_hash(executed):
            sys.exit(f"{path.name}: the code was changed during the run; nothing was stored")
        origin = {
            "profile": profile,
            "code_sha256": code,
            "minutes": row["minutes"],
            "device": made["hardware"],
            **{key: made[key] for key in ("commit", "date", "torch")},
        }
        ready.append((notebooks.store_outputs(nb, executed, origin), path))
    return ready


if __name__ == "__main__":
    sys.exit(main())
