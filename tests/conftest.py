"""Tests run offline, each notebook in a kernel of this very interpreter.

Browser tests take the fixture `chromium` and carry the mark `browser`. They are skipped where no
Chromium is installed; with ADVLEARN_REQUIRE_BROWSER=1 a run in which one was skipped, or none
passed, fails.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import notebooks
import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_configure(config):
    folder = Path(tempfile.mkdtemp(prefix="advlearn-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    (folder / "data").mkdir()
    notebooks.use_kernel(folder / "jupyter")
    nowhere = "http://127.0.0.1:9"
    os.environ |= {
        "ADVLEARN_DATA": str(folder / "data"),  # an empty folder: no test leans on a local copy
        "IPYTHONDIR": str(folder / "ipython"),
        "http_proxy": nowhere, "https_proxy": nowhere,  # a download fails at once
        "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere,
        "no_proxy": "localhost,127.0.0.1", "NO_PROXY": "localhost,127.0.0.1",
    }  # fmt: skip
    os.environ.pop("ADVLEARN_PROFILE", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # Two processes with two threads each would spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):  # Else every kernel would compile torch anew,
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")  # 5 s that no reader spends.


@pytest.fixture(scope="session")
def compiled() -> None:
    """The bytecode of what notebooks import, written before the first is timed."""
    heavy = "import torch._dynamo, lightning_fabric, matplotlib.pyplot, ipykernel, ipywidgets, advlearn"
    subprocess.run([sys.executable, "-c", heavy], check=True)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of an installed Chromium or Chrome."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if not found:
        pytest.skip("no Chromium here; on Debian: sudo apt-get install chromium")
    return found


def pytest_terminal_summary(terminalreporter):
    timed = [
        (report.nodeid.split("::")[-1], dict(report.user_properties)["seconds"])
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call" and "seconds" in dict(report.user_properties)
    ]
    if timed:
        terminalreporter.section("CPU seconds per notebook, in smoke")
        for name, seconds in sorted(timed):
            terminalreporter.write_line(f"{seconds:6.1f}  {name}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if not os.environ.get("ADVLEARN_REQUIRE_BROWSER") or hasattr(session.config, "workerinput"):
        return
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    if stats.get("skipped") or not stats.get("passed"):
        print("\nADVLEARN_REQUIRE_BROWSER is set, but not every browser test ran")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
