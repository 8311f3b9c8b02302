"""Every notebook of the book: fit to be committed, runs in `smoke`, pinned outputs, solutions."""

import ast
import os
import re
import shutil
import subprocess
import sys

import nbformat
import notebooks
import papermill
import pytest

BUDGET = 15  # CPU seconds for one notebook in smoke; reported, and an error past twice as much
TIMEOUT = 300  # seconds for one cell, against hanging only: other work may slow this machine down
NOTEBOOKS = notebooks.paths()
EXERCISES = [path for path in NOTEBOOKS if path.parent.name == "exercises"]

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
each_exercise = pytest.mark.parametrize("path", EXERCISES, ids=lambda p: p.stem)


def run(path, folder):
    """Run a notebook in smoke, alone in an empty folder."""
    return papermill.execute_notebook(
        path, folder / "out.ipynb", {"profile": "smoke"}, kernel_name="python3", cwd=folder,
        progress_bar=False, execution_timeout=TIMEOUT,
    )  # fmt: skip


def nbval(path, folder, monkeypatch):
    """Run nbval as a reader would, on a copy, knowing nothing of this test session."""
    copy = shutil.copy(path, folder)
    (folder / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setenv("ADVLEARN_PROFILE", "smoke")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:xdist",
         "-p", "no:cacheprovider", f"--nbval-cell-timeout={TIMEOUT}", "-c", folder / "pytest.ini", copy],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


def test_every_chapter_has_exercises():
    chapters = {p.stem for p in NOTEBOOKS if p not in EXERCISES}
    assert chapters
    assert {p.stem.removesuffix("_exercises") for p in EXERCISES} == chapters


@each
def test_fit_to_be_committed(path):
    assert notebooks.problems(path) == []


@each
def test_runs_in_smoke(path, tmp_path, record_property, compiled):
    before = os.times()
    run(path, tmp_path)
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])  # of the kernel, user and system
    record_property("seconds", seconds)
    assert seconds < 2 * BUDGET


@each
def test_pinned_outputs(path, tmp_path, monkeypatch):
    done = nbval(path, tmp_path, monkeypatch)
    assert done.returncode == 0, done.stdout


# --- exercises: what stands in each solution, put in place of its stub, satisfies the check -----

SOLUTION = re.compile(r"^(`{3,}|:{3,})\{solution\}[^\n]*\n(.*?)^\1[ \t]*$", re.M | re.S)
CODE = re.compile(r"^(`{3,})(?:\{code-block\} ?)?python[^\n]*\n(.*?)^\1[ \t]*$", re.M | re.S)


def solutions(nb) -> list[tuple]:
    """(stub cell, solution's code, checking cell) for every exercise with a stub."""
    found, stub = [], None
    for number, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and "exercise" in notebooks.tags(cell):
            assert stub is None, f"cell {number}: the exercise before has no solution"
            assert "NotImplementedError" in cell.source, f"cell {number}: not a stub"
            stub = number
        elif cell.cell_type == "markdown":
            blocks = [
                code for _, body in SOLUTION.findall(cell.source) for _, code in CODE.findall(body)
            ]
            if blocks and stub is not None:
                later = [c for c in nb.cells[stub:] if c.cell_type == "code"]
                check = next((c for c in later if re.search(r"\bcheck_\w+\(", c.source)), None)
                assert check is not None, f"cell {stub}: nothing checks this exercise"
                found.append((nb.cells[stub], "\n".join(blocks), check))
                stub = None
    assert stub is None, f"cell {stub}: the exercise has no solution"
    return found


class Report(ast.NodeTransformer):
    """check_x(...) becomes _report(check_x(...))."""

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if not name.startswith("check_"):
            return node
        return ast.copy_location(ast.Call(ast.Name("_report", ast.Load()), [node], []), node)


def instrumented(nb, solved: bool):
    """The notebook with stubs or with solutions, where a report of the other kind is an error."""
    exercises = solutions(nb)
    assert exercises, "no exercise with a stub"
    for stub, code, check in exercises:
        tree = ast.fix_missing_locations(Report().visit(ast.parse(check.source)))
        check.source = ast.unparse(tree)
        if solved:
            stub.source = code
    test = f"assert bool(report) is {solved}, 'exercise {'refused' if solved else 'passed unsolved'}: ' + str(report)"
    prelude = f"def _report(report):\n    {test}\n    return report"
    nb.cells.insert(0, nbformat.v4.new_code_cell(prelude))
    return nb


@each_exercise
@pytest.mark.parametrize("solved", [False, True], ids=["stubs", "solutions"])
def test_exercises(path, solved, tmp_path):
    nbformat.write(instrumented(notebooks.read(path), solved), tmp_path / "in.ipynb")
    run(tmp_path / "in.ipynb", tmp_path)


# --- the checks themselves, against planted mistakes ------------------------------------------


def code(source, *cell_tags, outputs=(), **metadata):
    cell = nbformat.v4.new_code_cell(source, execution_count=1, outputs=list(outputs))
    cell.metadata.update(tags=list(cell_tags), **metadata)
    return cell


def printed(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def shown(**data):
    return nbformat.v4.new_output("display_data", data)


PICTURE = shown(**{"image/png": "aGVsbG8=", "text/plain": "<Figure>"})
FIGURE = {"figure": {"caption": "What to see."}, "image": {"alt": "Two curves."}}
INSTALL = "https://github.com/OWNER/book/archive/refs/tags/v0.1.0.zip"


def sound():
    """A small notebook without a fault."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_markdown_cell("# A chapter"),
        code(f'url = "{INSTALL}"', "setup"),
        code('profile = "auto"  # or a name\nseed = 0', "parameters"),
        code("# NBVAL_CHECK_OUTPUT\nprint(1 + 1)", outputs=[printed("2\n")]),
        code("figure()", outputs=[PICTURE], mystnb=FIGURE),
    ]
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb.metadata.advlearn = {
        "profile": "cpu", "commit": "abc", "torch": "2.6", "device": "CPU", "date": "2025-01-01",
        "minutes": 1.0, "code_sha256": notebooks.code_hash(nb),
    }  # fmt: skip
    return nb


def add(*args, **kwargs):
    return lambda nb: nb.cells.append(code(*args, **kwargs))


MISTAKES = {
    "MB, at most": add("print('x')", outputs=[printed("x" * 1_600_000)]),
    "cells, at most": lambda nb: nb.cells.extend(
        nbformat.v4.new_markdown_cell() for _ in range(60)
    ),
    "code cells, at most": lambda nb: nb.cells.extend(code("1") for _ in range(30)),
    "widget state": lambda nb: nb.metadata.update(widgets={}),
    "0 cells tagged `setup`": lambda nb: nb.cells.pop(1),
    "0 cells tagged `parameters`": lambda nb: nb.cells.pop(2),
    "lacks `seed = 0`": lambda nb: nb.cells[2].update(source='profile = "auto"\nseed = 1'),
    "never executed": lambda nb: nb.cells[3].update(execution_count=None),
    "an error": add(
        "1/0", outputs=[nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    ),
    "a warning is": add("f()", outputs=[printed("UserWarning: old\n")]),
    "warning is stored": add("f()", outputs=[printed("anything", name="stderr")]),
    "a widget is stored": add("w()", outputs=[shown(**{notebooks.WIDGET: {"model_id": "1"}})]),
    "outputs of a widget cell": add("w()", "widget", outputs=[printed("1")]),
    "path of one machine": add("f()", outputs=[shown(**{"text/html": "<b>/home/me/book</b>"})]),
    "without caption": add("g()", outputs=[PICTURE], mystnb={"image": {"alt": "a"}}),
    "without alt": add("g()", outputs=[PICTURE], mystnb={"figure": {"caption": "c"}}),
    "no outputs of a reference run": lambda nb: nb.metadata.pop("advlearn"),
    "lacks ['commit']": lambda nb: nb.metadata.advlearn.pop("commit"),
    "profile 'smoke'": lambda nb: nb.metadata.advlearn.update(profile="smoke"),
    "code has changed": lambda nb: nb.cells[3].update(source="print(2)"),
}


def test_a_sound_notebook_has_no_problems(tmp_path):
    notebooks.write(sound(), tmp_path / "nb.ipynb")
    assert notebooks.problems(tmp_path / "nb.ipynb") == []


@pytest.mark.parametrize("message", MISTAKES)
def test_a_planted_mistake_is_named(message, tmp_path):
    nb = sound()
    MISTAKES[message](nb)
    notebooks.write(nb, tmp_path / "nb.ipynb")
    assert any(message in problem for problem in notebooks.problems(tmp_path / "nb.ipynb"))


def test_hash_ignores_only_address_and_version():
    nb = sound()
    before = notebooks.code_hash(nb)
    nb.cells[1].source = 'url = "https://github.com/someone/else/archive/refs/tags/v9.9.zip"'
    assert notebooks.code_hash(nb) == before
    nb.cells[1].source += "\nseed = 1"
    assert notebooks.code_hash(nb) != before


@pytest.mark.parametrize("stored, code", [("2\n", 0), ("3\n", 1)])
def test_nbval_compares_pinned_cells(stored, code, tmp_path, monkeypatch):
    nb = sound()
    nb.cells = nb.cells[3:4]
    nb.cells[0].outputs[0].text = stored
    notebooks.write(nb, tmp_path / "nb.ipynb")
    (tmp_path / "alone").mkdir()
    assert nbval(tmp_path / "nb.ipynb", tmp_path / "alone", monkeypatch).returncode == code


def exercise(solution):
    nb = sound()
    nb.cells = [
        code(
            "def check_double(f):\n    try: return f(2) == 4\n    except NotImplementedError: return 0"
        ),
        code("def double(x):\n    raise NotImplementedError", "exercise"),
        code("check_double(double)"),
        nbformat.v4.new_markdown_cell(
            f"````{{solution}} ex-double\n:class: dropdown\nLike this:\n```python\n{solution}\n```\n````"
        ),
    ]
    return nb


GOOD, BAD = "def double(x):\n    return 2 * x", "def double(x):\n    return x"


@pytest.mark.parametrize("solution, solved", [(GOOD, True), (BAD, True), (GOOD, False)])
def test_solutions_replace_stubs(solution, solved, tmp_path):
    nbformat.write(instrumented(exercise(solution), solved), tmp_path / "in.ipynb")
    if solution == BAD:
        with pytest.raises(papermill.PapermillExecutionError, match="exercise refused"):
            run(tmp_path / "in.ipynb", tmp_path)
    else:
        run(tmp_path / "in.ipynb", tmp_path)


@pytest.mark.parametrize("drop, message", [(3, "no solution"), (2, "nothing checks")])
def test_incomplete_exercises_are_named(drop, message):
    nb = exercise(GOOD)
    nb.cells.pop(drop)
    with pytest.raises(AssertionError, match=message):
        solutions(nb)
