"""Every notebook as on Colab: no clone, no advlearn, `google.colab` loaded, torch already there.

The wheel is built from this tree. Each notebook lies alone in an empty folder and runs in an
environment that sees what Colab brings (torch, numpy, ...) and not one package more; its set-up
cell has to install the rest. Nothing is fetched: what Colab would take from the package index, pip
finds in a folder of wheels repacked from the environment of this test.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import notebooks
import papermill
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COLAB = "torch torchvision numpy matplotlib ipywidgets ipykernel scipy tqdm pip".split()
HERE = Path(sysconfig.get_path("purelib"))


def applying(requirements, extra="") -> list[Requirement]:
    every = [Requirement(text) for text in requirements or []]
    return [r for r in every if not r.marker or r.marker.evaluate({"extra": extra})]


def closure(requirements) -> set[str]:
    """Names of the distributions that these requirements need, themselves included."""
    seen, todo = set(), applying(requirements)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            todo += applying(metadata.requires(name), extra)
    return {name for name, _ in seen}


def top_level(name: str) -> set[str]:
    """What a distribution put directly into site-packages."""
    parts = {Path(str(file)).parts[0] for file in metadata.files(name)}
    return {part for part in parts if part not in ("..", "__pycache__")}


def repack(name: str, folder: Path) -> None:
    """Make a wheel again from the files of an installed distribution."""
    dist = metadata.distribution(name)
    tag = re.findall(r"^Tag: (.*)$", dist.read_text("WHEEL"), re.M)[-1]
    stem = f"{dist.metadata['Name'].replace('-', '_').replace('.', '_')}-{dist.version}"
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as wheel:
        for file in dist.files:
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(file.locate(), str(file))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=notebooks.ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def index(wheel, tmp_path_factory) -> Path:
    """Wheels of what the package needs and Colab lacks."""
    folder = tmp_path_factory.mktemp("index")
    (info,) = (
        entry for entry in zipfile.Path(wheel).iterdir() if entry.name.endswith(".dist-info")
    )
    for name in closure(metadata.PathDistribution(info).requires) - closure(COLAB):
        repack(name, folder)
    return folder


@pytest.fixture
def colab(tmp_path, index, monkeypatch) -> Path:
    """An environment as Colab's; returns its site-packages."""
    image = tmp_path / "image"
    (image / "google" / "colab").mkdir(parents=True)
    (image / "google" / "colab" / "__init__.py").touch()
    for entry in {entry for name in closure(COLAB) for entry in top_level(name)}:
        if (HERE / entry).exists():
            (image / entry).symlink_to(HERE / entry)
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    (site / "colab.pth").write_text(f"{image}\nimport google.colab\n")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    monkeypatch.setenv("JUPYTER_PATH", "")
    notebooks.use_kernel(tmp_path / "jupyter", str(tmp_path / "env/bin/python"), offline)
    return site


def installed(site: Path) -> set[str]:
    return {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions(path=[str(site)])}


@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda p: p.stem)
def test_runs_as_on_colab(path, wheel, colab, tmp_path, record_property):
    nb = notebooks.read(path)
    (setup,) = (cell for cell in nb.cells if "setup" in notebooks.tags(cell))
    setup.source, count = notebooks.ARCHIVE.subn(wheel.as_uri(), setup.source)
    assert count == 1
    alone = tmp_path / "alone"
    alone.mkdir()
    notebooks.write(nb, alone / path.name)
    papermill.execute_notebook(
        alone / path.name, tmp_path / "out.ipynb", {"profile": "smoke"}, kernel_name="python3",
        cwd=alone, progress_bar=False, execution_timeout=300,
    )  # fmt: skip
    assert "advlearn" in installed(colab)
    assert (colab / "advlearn" / "_data").is_dir()
    assert not installed(colab) & closure(COLAB), "the install touched what Colab brings"


def test_the_environment_is_as_empty_as_colab(colab):
    """What the test leans on: nothing of the book is there before the set-up cell."""
    assert installed(colab) == set()
    brought = installed(colab.parents[3] / "image")
    assert {"torch", "numpy"} <= brought
    assert not brought & {"advlearn", "lightning-fabric", "jupyter-book", "papermill", "pytest"}
