"""What holds the project together: addresses, dependencies, make targets, runner, workflows."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import notebooks
import numpy as np
import pytest
import requirements
import stamp
import yaml
from notebooks import ROOT
from packaging.requirements import Requirement
from PIL import Image

IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", "_build", ".*_cache", ".hypothesis", "__pycache__", "*.npz", "retrained"
)


def python(*arguments, cwd, **env):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def yaml_of(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf8"))


# --- address and version ----------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=IGNORED)


def everything(tree):
    """All text of the tree that readers see, pyproject.toml left out."""
    return {path: path.read_text(encoding="utf8") for path in stamp.files(tree, stamp.PLACES)}


def declare(tree, address, version):
    path = tree / "pyproject.toml"
    text = re.sub(r'^Repository = ".*"', f'Repository = "{address}"', path.read_text(), flags=re.M)
    path.write_text(re.sub(r'^version = ".*"', f'version = "{version}"', text, flags=re.M))


def test_address_and_version_are_the_same_everywhere():
    assert stamp.main(["--check"]) == 0


def test_stamping_an_unchanged_tree_changes_nothing(tree):
    before = everything(tree)
    assert stamp.main([], tree) == 0
    assert everything(tree) == before


def test_a_changed_address_is_carried_everywhere(tree, capsys):
    owner, name, version = stamp.declared(tree)
    before = everything(tree)
    declare(tree, "https://github.com/some-one/robust.book", "9.8.7")
    assert stamp.main(["--check"], tree) == 1
    assert everything(tree) == before, "--check must not write"
    stamp.main([], tree)
    assert stamp.main(["--check"], tree) == 0
    for path, text in everything(tree).items():
        for old in (f"{owner}/{name}", f"{owner}.github.io", name, f"tags/v{version}"):
            assert old not in text, f"{path}: {old}"
    assert "https://some-one.github.io/robust.book" in (tree / "README.md").read_text()
    assert "\nversion: 9.8.7\n" in (tree / "CITATION.cff").read_text()
    for path in notebooks.paths(tree):
        assert "github.com/some-one/robust.book/archive/refs/tags/v9.8.7.zip" in path.read_text()
        code = notebooks.code_hash(notebooks.read(path))
        assert code == notebooks.code_hash(notebooks.read(ROOT / path.relative_to(tree)))
    declare(tree, f"https://github.com/{owner}/{name}", version)
    stamp.main([], tree)
    assert everything(tree) == before, "and back again"


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "_config.yml", "a notebook"])
def test_a_stale_address_is_found(name, tree):
    path = notebooks.paths(tree)[0] if name == "a notebook" else tree / name
    owner, book, _ = stamp.declared(tree)
    text = path.read_text(encoding="utf8")
    path.write_text(text.replace(f"{owner}/{book}", f"somebody/{book}", 1), encoding="utf8")
    assert stamp.main(["--check"], tree) == 1


def test_a_stale_version_is_found(tree):
    path = notebooks.paths(tree)[0]
    path.write_text(path.read_text().replace("/tags/v", "/tags/v0"))
    assert stamp.main(["--check"], tree) == 1


def test_addresses_of_others_stay(tree):
    (tree / "book" / "note.md").write_text("https://github.com/MadryLab/robustness v0.1.0\n")
    declare(tree, "https://github.com/a/b", "2.0")
    stamp.main([], tree)
    assert (
        tree / "book" / "note.md"
    ).read_text() == "https://github.com/MadryLab/robustness v0.1.0\n"


# --- one list of dependencies -----------------------------------------------------------------


def pyproject():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


def test_environment_yml_holds_nothing_but_python_and_the_package():
    *conda, last = yaml_of("environment.yml")["dependencies"]
    assert [re.split("[<>=]", entry)[0] for entry in conda] == ["python", "pip"]
    assert last == {"pip": ["-e .[book,dev]"]}


def test_requirements_reads_the_extra():
    assert requirements.extra("book") == pyproject()["optional-dependencies"]["book"]


def test_torch_and_numpy_are_not_pinned():
    project = pyproject()
    for text in sum(project["optional-dependencies"].values(), project["dependencies"]):
        needed = Requirement(text)
        if needed.name in ("torch", "torchvision", "numpy"):
            assert all(s.operator == ">=" for s in needed.specifier), text


def test_the_book_needs_no_torch():
    names = {Requirement(text).name for text in requirements.extra("book")}
    assert not names & {"torch", "torchvision", "lightning-fabric", "advlearn"}


def test_shipped_files_are_small():
    for folder in ("checkpoints", "results"):
        files = list((ROOT / "data" / folder).iterdir())
        assert files
        assert {p.name: p.stat().st_size for p in files if p.stat().st_size >= 1_000_000} == {}


# --- make, workflows, hooks -------------------------------------------------------------------

TARGETS = "book test test-browser run reference sweep stamp lab serve bench clean help".split()


def make(*arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_help_lists_every_target():
    listed = re.findall(r"^make (\S+) +\S", make("help").stdout, re.M)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(listed) == set(phony) >= set(TARGETS)
    assert make().stdout == make("help").stdout


def test_the_readme_names_the_two_commands_and_every_chapter():
    text = (ROOT / "README.md").read_text(encoding="utf8")
    assert re.search(r"^make book\b.*\nmake test\b", text, re.M)
    for path in notebooks.paths():
        assert f"({path.relative_to(ROOT).as_posix()})" in text
    for target in re.findall(r"]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), f"README.md shows {target}, which is not there"


def test_workflows_are_valid_and_work_through_make():
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf8"))
        assert {"name", True, "jobs"} <= set(workflow), path.name  # YAML 1.1 reads `on` as True
        for job in workflow["jobs"].values():
            assert job["runs-on"] and job["steps"]
            steps = "\n".join(step.get("run", "") for step in job["steps"])
            used = re.findall(r"\bmake ([a-z-]+)", steps)
            assert used and set(used) <= set(TARGETS) | {"links"}, path.name


def test_ruff_has_nothing_to_say():
    done = python("-m", "ruff", "check", "--no-cache", "--output-format=concise", cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_other_settings_are_valid():
    assert yaml_of(".pre-commit-config.yaml")["repos"]
    citation = yaml_of("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# --- the runner -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A tree with one small notebook, and the runner."""
    for folder in ("src", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=IGNORED)
    shutil.copy(ROOT / "_toc.yml", tmp_path)  # by it the package knows a clone
    (tmp_path / "chapters").mkdir()
    sources = [
        ("setup", "import os, sys"),
        ("parameters", 'profile = "auto"\nseed = 0'),
        ("", "print(os.environ['ADVLEARN_PROFILE'], seed)\nprint(os.getcwd())"),
        ("widget", "print('a widget')"),
        ("", "from advlearn.results import headline\nheadline({'fgsm': 0.064})"),
    ]
    nb = nbformat.v4.new_notebook()
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for tag, source in sources:
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []})
        nb.cells.append(cell)
    notebooks.write(nb, tmp_path / "chapters" / "01_small.ipynb")
    return tmp_path


def run(small, *arguments):
    done = python("tools/run.py", *arguments, cwd=small, PYTHONPATH=str(small / "src"))
    return done, small / "chapters" / "01_small.ipynb"


def test_run_prints_minutes_and_headline_numbers_and_stores_nothing(small):
    before = (small / "chapters" / "01_small.ipynb").read_bytes()
    done, path = run(small, "--profile", "smoke")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| 01_small \| \d+\.\d+ \| fgsm = 0\.064 \|", done.stdout)
    assert (small / "_build" / "run" / "smoke" / "01_small.ipynb").exists()
    assert path.read_bytes() == before
    assert not (small / "data").exists()


def test_reference_stores_clean_outputs_and_where_they_come_from(small):
    done, path = run(small, "--profile", "cpu", "--reference")
    assert done.returncode == 0, done.stderr
    assert notebooks.problems(path) == []
    nb = notebooks.read(path)
    printed, widget, shown = nb.cells[2:]
    assert printed.outputs[0].text == "cpu 0\n_build/run/cpu\n"
    assert widget.outputs == []
    assert notebooks.headline(nb) == {"fgsm": 0.064}
    assert nb.metadata.advlearn.profile == "cpu"
    assert set(nb.metadata) == {"kernelspec", "advlearn"}, "no trace of papermill"
    assert all(set(cell.metadata) == {"tags"} for cell in nb.cells)
    (recorded,) = json.loads((small / "data/results/01_small.json").read_text())["runs"]
    assert (recorded["profile"], recorded["seed"], recorded["values"]) == (
        "cpu",
        0,
        {"fgsm": 0.064},
    )


def test_another_seed_is_recorded_only(small):
    before = (small / "chapters" / "01_small.ipynb").read_bytes()
    done, path = run(small, "--profile", "cpu", "--seed", "2", "--record")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    assert json.loads((small / "data/results/01_small.json").read_text())["runs"][0]["seed"] == 2


@pytest.mark.parametrize("last", ["1 / 0", "import os; os._exit(1)"])
def test_a_failure_leaves_the_stored_notebooks_alone(small, last):
    first = small / "chapters" / "01_small.ipynb"
    nb = notebooks.read(first)
    nb.cells[-1].source = last
    notebooks.write(nb, small / "chapters" / "02_broken.ipynb")
    before = {path: path.read_bytes() for path in (small / "chapters").iterdir()}
    done, _ = run(small, "--profile", "cpu", "--reference")
    assert done.returncode == 1
    assert "| 02_broken |" in done.stdout and "FAILED" in done.stdout
    assert {path: path.read_bytes() for path in (small / "chapters").iterdir()} == before
    assert not (small / "data").exists()


def test_smoke_is_no_reference(small):
    assert run(small, "--profile", "smoke", "--reference")[0].returncode == 2


def test_images_in_figures_are_stored_light_and_greys_exactly():
    """256 colours where that is smaller; a grey map keeps every level, a light image its bytes."""
    r, g = np.random.default_rng(0).integers(0, 256, (2, 64, 64))
    solid = np.full_like(r, 255)
    coloured, grey = (np.stack(bands, 2) for bands in ((r, g, 0 * r, solid), (r, r, r, solid)))
    for pixels, exact in ((coloured, False), (grey, True)):
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8), "RGBA").save(file, "png")
        inside = base64.b64encode(file.getvalue()).decode()
        svg = f'<svg><path d="M 0 0"/><image xlink:href="data:image/png;base64,\n{inside}" x="1"/></svg>'
        light = notebooks.with_light_images(svg)
        assert len(light) < len(svg)
        kept = re.fullmatch(r'(.*base64,\s*)([^"]+)(" x="1"/></svg>)', light, re.S)
        assert kept[1] + inside + kept[3] == svg
        image = Image.open(io.BytesIO(base64.b64decode(kept[2]))).convert("RGBA")
        off = np.abs(np.asarray(image).astype(int) - pixels).max()
        assert off == 0 if exact else 0 < off <= 40
