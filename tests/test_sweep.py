"""The runner of grids, on a LocalCluster of two workers, with a notebook that needs no network."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import nbformat
import notebooks
import psutil
import pytest
import sweep
import yaml
from notebooks import ROOT

from advlearn import provenance, results, storage

# In one process of the test session, because they share a cluster.
pytestmark = pytest.mark.xdist_group("sweep")
PARAMETERS = 'profile = "auto"\nseed = 0\nwidth = 1  # a comment\ntraining = "natural"\nrate = 0.5'
# Every execution leaves a letter in the folder `log`. A file `kill` there makes one execution of
# width 3 kill its worker, the parent of its kernel; a file `fail` makes those of width 2 fail.
CODE = """
import os, pathlib, random, signal, time
log = pathlib.Path(LOG)
with open(log / f"{width} {training} {seed}", "a") as file:
    file.write("x")
if width == 3 and (log / "kill").exists():
    (log / "kill").unlink()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
assert width != 2 or not (log / "fail").exists(), "planted"
draw = random.Random(f"{width} {training} {seed}").random()
display({"application/vnd.advlearn.headline+json": {"rate": rate, "draw": draw}}, raw=True)
"""
GRID = {"cpu": [{"width": [1, 2, 3]}, {"width": 4, "training": ["pgd"], "rate": [1], "seed": 7}]}
CELLS = ["1 natural 0", "2 natural 0", "3 natural 0", "4 pgd 7"]
# The real one imports torch in every cell.
STAMP = f'display({{"{sweep.PROVENANCE}": {{"commit": "abc", "torch": "2.6"}}}}, raw=True)'
# A cluster that knows nothing of the tools, and the command that is told its address.
FOREIGN = """
import subprocess, sys
from distributed import LocalCluster
options = {"processes": False, "protocol": "tcp://", "host": "127.0.0.1", "dashboard_address": None}
cluster = LocalCluster(n_workers=1, threads_per_worker=1, **options)
print(cluster.scheduler_address, flush=True)
command = [sys.executable, "tools/sweep.py", "--profile", "smoke", "--scheduler"]
sys.exit(subprocess.run([*command, cluster.scheduler_address], cwd="..").returncode)
"""


def notebook(code, parameters=PARAMETERS):
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
                nbformat.v4.new_code_cell(code)]  # fmt: skip
    return nb


class Tree:
    """A tree with one sweep, and what its cells leave behind."""

    def __init__(self, root, grid=GRID):
        self.log, self.path = root / "log", root / "sweeps" / "05_small.ipynb"
        self.table = root / "data" / "results" / "05_small_sweep.json"
        for folder in (self.log, self.path.parent):
            folder.mkdir(parents=True)
        notebooks.write(notebook(CODE.replace("LOG", repr(str(self.log)))), self.path)
        self.grid(grid)

    def grid(self, content):
        self.path.with_suffix(".yml").write_text(yaml.safe_dump(content, sort_keys=False))

    def plan(self, profile="cpu"):
        return sweep.plan(self.path, profile)

    def run(self, client):
        """Labels of the cells that failed, with their errors."""
        plan = self.plan()
        failed = sweep.run(client, plan, sweep.environment(None, 2))
        return {sweep.label(plan.cells[key]): error for key, error in failed.items()}

    def executions(self):
        return {p.name: len(p.read_text()) for p in sorted(self.log.iterdir()) if " " in p.name}

    def gathered(self, monkeypatch):
        """The runs that are stored, without minutes."""
        monkeypatch.setattr(storage, "shipped", lambda: self.table.parents[1])
        sweep.gather(self.plan())
        return [without_minutes(run) for run in json.loads(self.table.read_text())["runs"]]


def without_minutes(run):
    return {key: value for key, value in run.items() if key not in ("minutes", "date")}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "STAMP", STAMP)
    return Tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A copy of the tree, and a process that runs the first cell of every sweep of the book there."""
    tree = tmp_path_factory.mktemp("foreign")
    for folder in ("src", "tools", "sweeps"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_toc.yml", tree)  # by it the package knows a clone
    for path in (tree / "sweeps").glob("*.ipynb"):
        cell = [*sweep.plan(path, "smoke").cells.values()][0]
        block = {name: value for name, value in cell.items() if name != "profile"}
        path.with_suffix(".yml").write_text(yaml.safe_dump({"smoke": [block]}))
    (tree / "elsewhere").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tree / "src")}
    with subprocess.Popen([sys.executable, "-c", FOREIGN], cwd=tree / "elsewhere", env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        yield tree, process
        process.kill()


@pytest.fixture(scope="module")
def client(foreign):  # The foreign run takes longest: it goes on beside the other tests.
    with sweep.connect(None, 2) as client:
        yield client


def in_the_worker():
    """A much faster `sweep.execute`, without kernels, for what does not depend on papermill."""

    def quick(text, parameters, env):  # A function of a function travels by value.
        import json

        nb, shown = json.loads(text), {}
        names = {"display": lambda data, raw: shown.update(data)}
        try:
            for cell in nb["cells"]:
                exec("".join(cell["source"]), names)
                names.update(parameters if "parameters" in cell["metadata"].get("tags", []) else {})
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        nb["cells"][-1]["outputs"] = [{"output_type": "display_data", "data": shown}]
        return {"notebook": json.dumps(nb), "minutes": 0}

    return quick


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(sweep, "execute", in_the_worker())


@pytest.fixture(scope="module")
def undisturbed(client, tmp_path_factory):
    """The table of a sweep that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "STAMP", STAMP)
        patch.setattr(sweep, "execute", in_the_worker())
        tree = Tree(tmp_path_factory.mktemp("undisturbed") / "tree")
        assert tree.run(client) == {}
        assert tree.executions() == dict.fromkeys(CELLS, 1)
        return tree.gathered(patch)


# --- on the cluster -----------------------------------------------------------------------------


def test_the_table_has_what_was_run_and_where_it_comes_from(undisturbed):
    fields = ("width", "training", "rate", "seed", "profile", "commit", "torch")
    assert [tuple(run[f] for f in fields) for run in undisturbed] == [
        (1, "natural", 0.5, 0, "cpu", "abc", "2.6"), (2, "natural", 0.5, 0, "cpu", "abc", "2.6"),
        (3, "natural", 0.5, 0, "cpu", "abc", "2.6"), (4, "pgd", 1, 7, "cpu", "abc", "2.6"),
    ]  # fmt: skip
    assert [run["values"]["rate"] for run in undisturbed] == [0.5, 0.5, 0.5, 1]
    assert len({run["values"]["draw"] for run in undisturbed}) == 4
    assert all(set(run) == {*fields, "values"} for run in undisturbed)
    assert all(list(run["values"]) == ["rate", "draw"] for run in undisturbed), "in this order"


def test_workers_listen_on_this_machine_only(client, foreign):
    own, other = psutil.Process(), psutil.Process(foreign[1].pid)
    ours = {own, *own.children(recursive=True)} - {other, *other.children(recursive=True)}
    hosts = [c.laddr.ip for process in ours for c in process.net_connections("inet")
             if c.status == psutil.CONN_LISTEN]  # fmt: skip
    assert len(hosts) >= 5 and set(hosts) == {"127.0.0.1"}, "scheduler, two nannies, two workers"


def test_a_killed_worker_changes_nothing(client, tree, undisturbed, monkeypatch):
    """The killed sweep runs kernels, by papermill, and the undisturbed one does without."""
    tree.grid({"cpu": GRID["cpu"][:1]})
    (tree.log / "kill").touch()
    before = set(client.run(os.getpid).values())
    assert tree.run(client) == {}
    assert not (tree.log / "kill").exists()
    again = dict.fromkeys(CELLS[:3], 1) | {"3 natural 0": 2}
    assert tree.executions() == again, "what had come back was not to be run again"
    assert len(before & set(client.run(os.getpid).values())) == 1, "of two workers one was killed"
    assert tree.gathered(monkeypatch) == undisturbed[:3]


def test_a_sweep_goes_on_after_an_interrupt_a_failure_and_damage(
    client, tree, undisturbed, without_kernels, monkeypatch, capsys
):
    tree.grid({"cpu": GRID["cpu"][:1]})
    plan, keep = tree.plan(), sweep.keep

    def make(*options):
        """Exit status, output, and how often each cell was executed."""
        status = sweep.main([*options], root=tree.path.parents[1])
        return status, capsys.readouterr(), list(tree.executions().values())

    def interrupted(done, cell, path):
        if cell["width"] == 2:
            raise KeyboardInterrupt
        keep(done, cell, path)

    monkeypatch.setattr(storage, "shipped", lambda: tree.table.parents[1])
    monkeypatch.setattr(sweep, "connect", lambda *_: nullcontext(client))
    monkeypatch.setattr(sweep, "keep", interrupted)
    assert sweep.main([], root=tree.path.parents[1]) == 130
    assert "the same call goes on" in capsys.readouterr().err
    while any(client.processing().values()):  # what was in a worker's hands ends there
        time.sleep(0.05)
    assert tree.executions()["2 natural 0"] == 1 and plan.kept([*plan.cells][1]) is None
    finished = [name for name, key in zip(CELLS, plan.cells, strict=False) if plan.kept(key)]

    monkeypatch.setattr(sweep, "keep", keep)
    (tree.log / "fail").touch()
    status, said, counts = make()
    assert status == 1 and not tree.table.exists()
    assert re.search("1 of 3 cells failed\n  seed=0, width=2, .*: AssertionError: planted\n", said.err)
    assert all(tree.executions()[name] == 1 for name in finished), "a finished cell ran again"
    assert [plan.kept(key) is not None for key in plan.cells] == [True, False, True]

    status, said, same = make("--collect")
    assert status == 0 and same == counts and "2 of 3 cells are finished, stored in" in said.out
    assert [run["width"] for run in json.loads(tree.table.read_text())["runs"]] == [1, 3]

    (tree.log / "fail").unlink()
    half = plan.folder / f"{[*plan.cells][0]}.json"
    half.write_text(half.read_text()[:40])
    with pytest.warns(UserWarning, match="is damaged"):
        status, said, after = make()
    assert status == 0 and "3 of 3 cells are finished" in said.out
    assert [b - a for a, b in zip(counts, after, strict=True)] == [1, 1, 0]
    assert tree.gathered(monkeypatch) == undisturbed[:3]

    monkeypatch.setattr(sweep, "connect", None)  # nothing is left to do
    assert make()[::2] == (0, after)


def test_the_command_sends_all_that_a_foreign_worker_needs(foreign):
    """The first cell of every sweep of the book, in a worker that cannot import the tools."""
    tree, process = foreign
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    address, *lines = said.splitlines()
    assert f"{address}, workers: 1" in lines
    plans = [sweep.plan(path, "smoke") for path in (tree / "sweeps").glob("*.ipynb")]
    assert plans
    for plan in plans:
        assert f"{plan.name}: 1 of 1 cells are finished" in lines, "smoke is not stored"
        ((key, cell),) = plan.cells.items()
        run = plan.kept(key)
        stamp = {"profile", "seed", "minutes", "values", *provenance.stamp()}
        assert cell.items() <= run.items() and set(run) == stamp | set(cell)
        assert run["torch"] and all(isinstance(v, float) for v in run["values"].values())
    assert not (tree / "data").exists()


def test_a_sweep_that_has_lost_all_its_workers_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sweep.LOCAL, "distributed.scheduler.no-workers-timeout", "1 s")
    plan = Tree(tmp_path).plan()
    with sweep.connect(None, 1) as client:
        client.cluster.scale(0)
        deadline = time.monotonic() + 30
        while client.scheduler_info()["workers"] and time.monotonic() < deadline:
            time.sleep(0.05)
        failed = sweep.run(client, plan, {})
    assert set(failed) == set(plan.cells)
    assert all("without any running workers" in said for said in failed.values()), failed


# --- without one --------------------------------------------------------------------------------


def test_two_threads_of_a_worker_do_not_disturb_each_other():
    code = """import os, time
time.sleep(seed)
display({"application/where+json": {"cwd": os.getcwd()}}, raw=True)"""
    text, here = nbformat.writes(notebook(code)), os.getcwd()
    with ThreadPoolExecutor(2) as pool:
        cells = [{"seed": 0}, {"seed": 1}]
        done = list(pool.map(lambda cell: sweep.execute(text, cell, {}), cells))
    assert not any("error" in d for d in done), done
    nbs = [nbformat.from_dict(json.loads(d["notebook"])) for d in done]
    folders = {notebooks.headline(nb, "application/where+json")["cwd"] for nb in nbs}
    assert len(folders | {here}) == 3 and os.getcwd() == here



@pytest.mark.parametrize(
    "block, message",
    [({"breadth": [1]}, r"05_small.yml: 'breadth' is no parameter of the notebook \(.*width.*\)"),
     ({"profile": "smoke"}, "'profile' is no parameter"),
     ({"width": [1, "2"]}, "width='2', int is needed"), ({"width": True}, "width=True, int is needed"),
     ({"rate": "1e-3"}, "rate='1e-3', float is needed"), ({"width": [[1]]}, "int is needed")],
)  # fmt: skip
def test_a_bad_grid_is_refused_by_name(block, message, tmp_path, capsys):
    tree = Tree(tmp_path, {"cpu": [{"seed": 0}, block]})
    with pytest.raises(ValueError, match=message):
        tree.plan()
    with pytest.raises(SystemExit, match="2"):
        sweep.main([], root=tmp_path)
    assert re.search(message, capsys.readouterr().err)


def test_other_things_that_are_missing(tmp_path, capsys):
    tree = Tree(tmp_path)
    with pytest.raises(ValueError, match=r"nothing for profile 'gpu', only for \['cpu'\]"):
        tree.plan("gpu")
    for options, message in {"--only=06": "no sweep starts with '06'", "--workers=0": "choice"}.items():
        with pytest.raises(SystemExit, match="2"):
            sweep.main([options], root=tmp_path)
        assert message in capsys.readouterr().err
    for parameters in ("width = 1\nseed = 0", "# none"):
        notebooks.write(notebook(CODE, parameters), tree.path)
        with pytest.raises(ValueError, match="needs profile and seed"):
            tree.plan()


def test_blocks_are_products_and_a_cell_counts_once(tmp_path):
    blocks = [{"width": [2, 1], "seed": [0, 1]}, {"width": 1, "training": "pgd"}, {"width": [1, 4]}]
    cells = list(Tree(tmp_path, {"cpu": blocks}).plan().cells.values())
    assert [(c["width"], c["training"], c["seed"]) for c in cells] == [
        (2, "natural", 0), (2, "natural", 1), (1, "natural", 0), (1, "natural", 1), (1, "pgd", 0),
        (4, "natural", 0)]  # fmt: skip
    assert all(c["profile"] == "cpu" and c["rate"] == 0.5 for c in cells)


def test_a_cell_is_another_after_a_change_of_code_parameters_or_profile(tmp_path):
    tree = Tree(tmp_path, {"cpu": [{"seed": [0, 1]}], "gpu": [{"seed": [0, 1]}]})
    keys = set(tree.plan().cells)
    assert len(keys | set(tree.plan("gpu").cells)) == 4
    nb = notebooks.read(tree.path)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell("text"))
    notebooks.write(nb, tree.path)
    assert set(tree.plan().cells) == keys
    nb.cells[1].source += "\nmore = 0"
    notebooks.write(nb, tree.path)
    assert not set(tree.plan().cells) & keys


@pytest.mark.parametrize("nowhere", ["tcp://127.0.0.1:{port}", "nothing at all"])
def test_nobody_at_the_schedulers_address(nowhere, tmp_path, monkeypatch, capsys):
    with socket.socket() as held:  # bound, but not listening
        held.bind(("127.0.0.1", 0))
        address = nowhere.format(port=held.getsockname()[1])
        monkeypatch.setattr(sweep, "connect", partial(sweep.connect, timeout=0.5))
        Tree(tmp_path)
        with pytest.raises(SystemExit, match="2"):
            sweep.main(["--scheduler", address], root=tmp_path)
    said = capsys.readouterr().err
    assert f"no Dask scheduler answers at {address}" in said and "dask worker" in said


def test_each_worker_gets_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr("dask.system.CPU_COUNT", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = [sweep.environment(None, n)["OMP_NUM_THREADS"] for n in (1, 3, 8, 20)]
    assert shares == ["8", "2", "1", "1"]
    assert "OMP_NUM_THREADS" not in sweep.environment("tcp://somewhere:1", 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert sweep.environment(None, 2)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    "values, message", [(None, "planted"), ({}, "are {}"), ({"loss": "nan"}, "are {'loss': 'nan'}")]
)
def test_a_cell_without_numbers_leaves_no_file(values, message, tmp_path):
    nb = notebook("")
    nb.cells[1].outputs = [nbformat.v4.new_output("display_data", {notebooks.HEADLINE: values or {}})]
    done = {"error": "planted"} if values is None else {"notebook": json.dumps(nb), "minutes": 1}
    with pytest.raises(RuntimeError, match=message):
        sweep.keep(done, {"profile": "cpu", "seed": 0}, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_smoke_is_shown_and_not_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "shipped", lambda: tmp_path / "data")
    plan = Tree(tmp_path / "tree", {"smoke": [{"width": [1, 2]}]}).plan("smoke")
    key = [*plan.cells][1]
    plan.folder.mkdir(parents=True)
    run = plan.cells[key] | {"minutes": 1, "values": {"pgd": 0.25}}
    (plan.folder / f"{key}.json").write_text(json.dumps(run))
    sweep.gather(plan)
    assert "0.25" in (said := capsys.readouterr().out) and "1 of 2 cells are finished\n" in said
    assert not (tmp_path / "data").exists()


# --- where the runs go --------------------------------------------------------------------------


def test_a_run_replaces_the_one_of_the_same_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "shipped", lambda: tmp_path)

    def run(width, seed, value, **more):
        return {"profile": "cpu", "seed": seed, **more, "width": width, "values": {"pgd": value}}

    by = ["profile", "width", "ramp", "seed"]
    results.store("a", [run(16, 0, 1), run(2, 1, 2), run(2, 0, 3, ramp=True)], by)
    results.store("a", [run(2, 0, 4, ramp=False), run(2, 1, 5), run(2, 0, 6, ramp=True)], by)
    stored = results.recorded("a", "cpu")
    assert [(r["width"], r.get("ramp"), r["seed"], r["values"]["pgd"]) for r in stored] == [
        (2, None, 1, 5), (2, False, 0, 4), (2, True, 0, 6), (16, None, 0, 1)]  # fmt: skip


def test_a_recorded_run_replaces_the_one_of_its_profile_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "shipped", lambda: tmp_path)
    for profile, seed, value in [("gpu", 0, 1), ("cpu", 1, 2), ("cpu", 0, 3), ("cpu", 1, 4)]:
        results.record("a", profile, seed, {"pgd": value}, 1.234, images=value)
    stored = results.recorded("a")
    assert [(r["profile"], r["seed"], r["values"], r["images"]) for r in stored] == [
        ("cpu", 0, {"pgd": 3}, 3), ("cpu", 1, {"pgd": 4}, 4), ("gpu", 0, {"pgd": 1}, 1)]  # fmt: skip
    assert stored[0]["minutes"] == 1.23 and set(provenance.stamp()) < set(stored[0])


def test_the_results_page_shows_a_sweep_by_cells(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    from book_results import is_sweep, sweep_table

    runs = [
        {"profile": "cpu", "seed": seed, "minutes": 1.5, "date": "d", "width": width, "images": 9,
         "values": {"pgd": width / 10 + seed / 100, "loss": 2.0}}
        for width in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    lines = list(sweep_table("05", runs))
    assert "| `width` | PGD, % | training loss | seeds | minutes, all seeds |" in lines
    assert "| 1 | 10.5 | 2 | 2 | 3 |" in lines and "| 2 | 20.5 | 2 | 2 | 3 |" in lines
    assert sum(line.startswith("seed 0; seed 1: ") for line in lines) == 1
    assert is_sweep(runs) and not is_sweep(runs[:2])


# --- the sweeps of the book ---------------------------------------------------------------------

SWEEPS = sorted((ROOT / "sweeps").glob("*.ipynb"))


def test_every_grid_has_its_notebook():
    assert SWEEPS and {p.stem for p in SWEEPS} == {p.stem for p in (ROOT / "sweeps").glob("*.yml")}
    assert not {p.resolve() for p in SWEEPS} & {p.resolve() for p in notebooks.paths()}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_is_stored_without_outputs_and_its_grids_are_valid(path):
    nb = notebooks.read(path)
    assert all(not c.outputs and c.execution_count is None for c in notebooks.code_cells(nb))
    profiles = yaml.safe_load(path.with_suffix(".yml").read_text(encoding="utf8"))
    assert {"smoke", "cpu"} <= set(profiles) <= set(notebooks.PROFILES)
    for profile in profiles:
        cells = sweep.plan(path, profile).cells.values()
        assert profile == "smoke" or {cell["seed"] for cell in cells} >= {0, 1, 2}
