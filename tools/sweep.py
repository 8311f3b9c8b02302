"""Run grids on Dask workers: `python tools/sweep.py --profile cpu [--only 05] [--workers 2]`.

`sweeps/NAME.ipynb` is one run, `sweeps/NAME.yml` the values of its parameters: for each profile a
list of blocks, each the product of its lists. Papermill executes every run (a *cell* of the grid) in
a worker. A finished cell is one file in `_build/sweep/NAME/`, named by a hash of code, parameters and
profile; the same call later runs only what has no file. When all are there they are stored in
`data/results/NAME_sweep.json`; --collect stores what is there now. `smoke` is shown, never stored.

Workers are processes of this machine, or those of a scheduler: `--scheduler tcp://host:8786`. They
need advlearn and papermill and no shared files: a task carries the notebook and the parameters, and
the executed notebook comes back.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import notebooks
import yaml
from nbformat import NotebookNode
from notebooks import ROOT
from tqdm import tqdm

from advlearn import storage

if TYPE_CHECKING:  # Slow to import, and each worker imports this file.
    from distributed import Client

# A laptop that slept must find its workers again, and a sweep that has lost them all must say so.
# (Local workers that die are started anew within seconds.)
LOCAL = {"distributed.scheduler.worker-ttl": None,
         "distributed.scheduler.no-workers-timeout": "60 s"}  # fmt: skip
PROVENANCE = "application/vnd.advlearn.provenance+json"
# Appended to the notebook, so that hardware, threads and versions are those of the cell's own kernel.
STAMP = f"""from advlearn import provenance
display({{"{PROVENANCE}": provenance.stamp(globals().get("device"))}}, raw=True)"""


@dataclass(frozen=True)
class Sweep:
    """A notebook and the cells of its grid: hash of code and parameters -> all parameters."""

    name: str
    nb: NotebookNode
    cells: dict[str, dict]
    folder: Path

    def kept(self, key: str) -> dict | None:
        """The finished run of a cell, or None. A damaged file is moved aside."""
        path = self.folder / f"{key}.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf8"))
        except ValueError:
            storage.move_aside(path)


def defaults(nb: NotebookNode) -> dict[str, object]:
    """The parameters of a notebook with the values they have there.

    Raises:
        ValueError: no cell tagged `parameters`, or none of its names is `profile` or `seed`.
    """
    sources = [c.source for c in notebooks.code_cells(nb) if "parameters" in notebooks.tags(c)]
    lines = [line for source in sources for line in ast.parse(source).body]
    found = {line.targets[0].id: ast.literal_eval(line.value)
             for line in lines if isinstance(line, ast.Assign)}  # fmt: skip
    if not {"profile", "seed"} <= set(found):
        raise ValueError(f"the cell tagged `parameters` needs profile and seed, has {list(found)}")
    return found


def plan(path: Path, profile: str) -> Sweep:
    """The sweep of a notebook and of the grid beside it, for one profile.

    Raises:
        ValueError: nothing for this profile; a parameter that the notebook does not have, or of
            another type (YAML reads 1e-3 as text, 1.0e-3 as a number).
    """
    nb, cells, name = notebooks.read(path), {}, f"{path.stem}.yml"
    known = {k: v for k, v in defaults(nb).items() if k != "profile"}
    profiles = yaml.safe_load(path.with_suffix(".yml").read_text(encoding="utf8")) or {}
    if not profiles.get(profile):
        raise ValueError(f"{name}: nothing for profile {profile!r}, only for {list(profiles)}")
    for block in profiles[profile]:
        lists = [value if isinstance(value, list) else [value] for value in block.values()]
        for parameter, values in zip(block, lists, strict=True):
            if parameter not in known:
                has = ", ".join(known)
                raise ValueError(f"{name}: {parameter!r} is no parameter of the notebook ({has})")
            kind = type(known[parameter])
            fits = (int, float) if kind is float else (kind,)
            if wrong := [value for value in values if type(value) not in fits]:
                raise ValueError(f"{name}: {parameter}={wrong[0]!r}, {kind.__name__} is needed")
        for values in itertools.product(*lists):
            cell = {"profile": profile} | known | dict(zip(block, values, strict=True))
            text = json.dumps([notebooks.code_hash(nb), cell], sort_keys=True)
            cells[hashlib.sha256(text.encode()).hexdigest()[:16]] = cell
    return Sweep(path.stem, nb, cells, path.parents[1] / "_build" / "sweep" / path.stem)


def label(cell: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in cell.items() if name != "profile")


def execute(text: str, parameters: dict, env: dict[str, str]) -> dict:
    """In a worker: execute a notebook in a kernel of the worker's own interpreter.

    It travels by value, through the scheduler: it uses nothing else of this file, and imports here
    what only workers have. Returns {"notebook": its JSON with outputs, "minutes"} or {"error"}.
    """
    try:
        import nbformat
        import papermill
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpec

        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = KernelSpec(argv=[*argv, "--log-level=50"], language="python", env=env)
        here = type("Here", (AsyncKernelManager,), {"kernel_spec": spec})
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            # Papermill's own `cwd` moves the whole worker, which may have several threads.
            options = {"resources": {"metadata": {"path": folder}}, "kernel_manager_class": here}
            options |= {"kernel_name": "python3", "progress_bar": False}
            nb = nbformat.reads(text, as_version=4)
            done = papermill.execute_notebook(nb, None, parameters, **options)
        return {"notebook": json.dumps(done), "minutes": (time.perf_counter() - start) / 60}
    except Exception as error:  # As text: not every exception survives the journey.
        return {"error": f"{type(error).__name__}: {error}".strip()}


def keep(done: dict, cell: dict, path: Path) -> None:
    """Write the file of a finished cell, whole or not at all.

    Raises:
        RuntimeError: the cell failed, or shows no headline numbers, or something else as one.
    """
    if "error" in done:
        raise RuntimeError(done["error"])
    nb = nbformat.from_dict(json.loads(done["notebook"]))
    values = notebooks.headline(nb)
    if not values or not all(isinstance(v, (int, float)) for v in values.values()):
        raise RuntimeError(f"the headline numbers of the notebook are {values}")
    run = {key: cell[key] for key in ("profile", "seed")} | {"minutes": round(done["minutes"], 2)}
    run |= notebooks.headline(nb, PROVENANCE) | cell | {"values": values}
    with storage.atomic(path) as temporary:
        temporary.write_text(json.dumps(run, indent=1) + "\n", encoding="utf8")


@contextmanager
def connect(scheduler: str | None, workers: int, timeout: float = 10) -> Iterator[Client]:
    """A client of the scheduler at an address, or of workers on this machine, loopback only.

    Raises:
        ConnectionError: nobody answers at the address within `timeout` seconds.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler is None:
        # The memory is the kernels', which Dask does not see; so it need not watch its own.
        options = {"processes": True, "memory_limit": 0, "dashboard_address": None}
        options |= {"n_workers": workers, "threads_per_worker": 1, "host": "127.0.0.1"}
        with dask.config.set(LOCAL), LocalCluster(**options) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout=timeout)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at {scheduler} ({error}). Start one with `dask scheduler` "
            "and workers with `dask worker ADDRESS`, or leave --scheduler out"
        ) from None
    with client:
        print(f"{scheduler}, workers: {len(client.scheduler_info()['workers'])}", flush=True)
        yield client


def environment(scheduler: str | None, workers: int) -> dict[str, str]:
    """What the kernels get besides the worker's environment: no bars, and a fair share of cores."""
    from dask.system import CPU_COUNT

    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, CPU_COUNT // workers)))
    # Elsewhere the worker's own setting holds.
    return {"TQDM_DISABLE": "1"} | ({} if scheduler else {"OMP_NUM_THREADS": threads})


def stamped(nb: NotebookNode) -> str:
    """The text of the notebook with the cell that says where its numbers come from."""
    copy = nbformat.from_dict(nb)
    copy.cells = [*nb.cells, nbformat.v4.new_code_cell(STAMP)]
    return nbformat.writes(copy)


def run(client: Client, sweep: Sweep, env: dict[str, str]) -> dict[str, str]:
    """Run the cells that have no file; returns key -> error of those that failed.

    A cell whose worker dies goes to another worker, up to three times. An interrupt leaves the
    files of all cells that had come back.
    """
    from distributed import as_completed

    todo = [key for key in sweep.cells if sweep.kept(key) is None]
    text, failed = stamped(sweep.nb), {}
    # Not pure: the scheduler must not answer with what an earlier call left there.
    futures = {client.submit(execute, text, sweep.cells[key], env, pure=False): key for key in todo}
    there = len(sweep.cells) - len(todo)
    with tqdm(total=len(sweep.cells), initial=there, desc=sweep.name, unit="cell") as bar:
        for future in as_completed(futures):
            key = futures[future]
            try:
                keep(future.result(), sweep.cells[key], sweep.folder / f"{key}.json")
            except Exception as error:  # a failing cell must not hide the next one's result
                failed[key] = str(error) or repr(error)
                bar.write(f"FAILED {label(sweep.cells[key])}\n{error}", file=sys.stderr)
            future.release()  # Or a worker that dies later would have this cell run again.
            bar.update()
    return failed


def table(runs: list[dict], parameters: list[str]) -> str:
    """The runs as aligned text: the parameters that differ, and the values."""
    from advlearn.results import Table

    differ = [p for p in parameters if len({json.dumps(run[p]) for run in runs}) > 1]
    keys = list(dict.fromkeys(key for run in runs for key in run["values"]))
    cells = [[run[p] for p in differ] + [run["values"].get(k) for k in keys] for run in runs]
    rows = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in cells]
    return repr(Table([*differ, *keys], rows))


def gather(sweep: Sweep) -> None:
    """Show the finished cells and store them in `data/results/`."""
    from advlearn import results

    runs = [found for key in sweep.cells if (found := sweep.kept(key)) is not None]
    others = [p for p in defaults(sweep.nb) if p not in ("profile", "seed")]
    said = f"{sweep.name}: {len(runs)} of {len(sweep.cells)} cells are finished"
    if runs:
        print(table(runs, [*others, "seed"]))
    if runs and runs[0]["profile"] != "smoke":
        results.store(f"{sweep.name}_sweep", runs, ["profile", *others, "seed"])
        said += f", stored in data/results/{sweep.name}_sweep.json"
    print(said)


def work(sweep: Sweep, args: argparse.Namespace) -> bool:
    """Run what has no file yet and gather what there is; False after a failure."""
    failed = {}
    if not args.collect and any(sweep.kept(key) is None for key in sweep.cells):
        with connect(args.scheduler, args.workers) as client:
            failed = run(client, sweep, environment(args.scheduler, args.workers))
    if not failed:
        gather(sweep)
        return True
    print(f"{sweep.name}: {len(failed)} of {len(sweep.cells)} cells failed", file=sys.stderr)
    for key, error in failed.items():
        print(f"  {label(sweep.cells[key])}: {error.splitlines()[-1]}", file=sys.stderr)
    print("the same call tries them again, --collect stores the others", file=sys.stderr)
    return False


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=notebooks.PROFILES, default="cpu")
    parser.add_argument("--only", default="", help="the sweeps whose name starts so")
    number = {"type": int, "choices": range(1, 1000), "metavar": "N", "default": 2}
    parser.add_argument("--workers", **number, help="processes on this machine")
    parser.add_argument("--scheduler", help="address of a Dask scheduler, tcp://host:8786")
    parser.add_argument("--collect", action="store_true", help="run nothing, store what is there")
    args = parser.parse_args(arguments)
    paths = [p for p in sorted((root / "sweeps").glob("*.ipynb")) if p.name.startswith(args.only)]
    if not paths:
        parser.error(f"no sweep starts with {args.only!r}")
    try:  # All grids first: a mistake in the last one must not show after a night.
        sweeps = [plan(path, args.profile) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    try:
        return int(not all([work(sweep, args) for sweep in sweeps]))
    except ConnectionError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; finished cells are kept, the same call goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
