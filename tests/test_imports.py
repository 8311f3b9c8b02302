"""The order of the modules, what an import may do, and the rules on size and docstrings."""

import ast
import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import advlearn

PACKAGE = Path(advlearn.__file__).parent
# A module may import those before it in this list, and no other of ours.
ORDER = ["tensors", "threats", "losses", "gradients", "models", "checks", "attacks.gradient", "attacks.inversion", "attacks.apgd",
         "attacks.boundary", "attacks.search", "attacks.combine", "attacks.standard", "attacks.captured", "attacks", "storage", "provenance", "progress", "data", "parts",
         "evaluation.judge", "evaluation.audit", "evaluation.restarts", "evaluation", "defences", "checkpoint",
         "training.state", "training.objectives", "training.watch", "training.weights", "training.loop", "training", "capacity", "tradeoff", "balls", "distributions", "relabelled", "robustfeatures", "perception",
         "zoo", "results", "plotting.style", "plotting.images", "plotting.lines", "plotting.planes", "plotting.landscapes", "plotting",
         "notebook", "exercises"]  # fmt: skip
# Where DESIGN says more than the order.
ONLY = {
    "tensors": set(), "threats": {"tensors"}, "losses": set(), "gradients": set(), "models": set(),
    "storage": set(), "progress": set(), "checks": set(), "data": {"storage", "tensors"},
}  # fmt: skip
NEVER = {"evaluation": {"training", "zoo", "data"}, "plotting": {"attacks", "training", "zoo"}}
LAZY = {"torchvision", "lightning_fabric", "pooch", "safetensors", "matplotlib", "ipywidgets", "IPython",
        "requests", "scipy"}  # fmt: skip


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__")
        yield name.rstrip("."), path


MODULES = {name: path for name, path in modules() if name}


def imported(path, lazily=True):
    """Names of our modules that a file imports (with `lazily`, inside functions too)."""
    tree = ast.parse(path.read_text("utf8"))
    nodes = ast.walk(tree) if lazily else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "advlearn":
            below = node.module.removeprefix("advlearn").lstrip(".")
            for alias in node.names:
                full = f"{below}.{alias.name}".lstrip(".")
                found.add(full if full in MODULES else below)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("advlearn.") for a in node.names if a.name.startswith("advlearn.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"
    return found - {""}


def place(name):
    """Position in ORDER: a module's own, else that of the package it lies in."""
    while name not in ORDER:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{name}: write the new module into ORDER, where DESIGN has it"
    return ORDER.index(name)


@pytest.mark.parametrize("name", MODULES)
def test_order_of_imports(name):
    for other in imported(MODULES[name]):
        same_package = name.split(".")[0] == other.split(".")[0] == "exercises"
        assert place(other) < place(name) or same_package, f"{name} imports {other}"


def closure(name):
    seen, todo = set(), [name]
    while todo:
        for other in imported(MODULES[todo.pop()]) - seen:
            seen.add(other)
            todo.append(other)
    return seen


def test_no_cycles():
    for name in MODULES:
        assert name not in closure(name)


def test_who_may_import_whom():
    for name, allowed in ONLY.items():
        assert imported(MODULES[name]) <= allowed, name
    for name, forbidden in NEVER.items():
        assert not closure(name) & forbidden, name
    assert not imported(MODULES["exercises"]) & {"training", "zoo"}


def run(code, **environment):
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                            env={**os.environ, "PYTHONWARNINGS": "error::UserWarning", **environment})  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


CORE = ORDER[: ORDER.index("results")]


def test_imports_are_light_and_touch_nothing(tmp_path):
    """No device, no random state, no file, no network, no heavy package, in any order."""
    out = run(f"""
import random, sys, socket
import torch, numpy as np
before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
socket.socket.connect = None
threads, default = torch.get_num_threads(), torch.get_default_dtype()
for name in {CORE[::-1]!r}:
    __import__("advlearn." + name)
assert torch.equal(torch.get_rng_state(), before[0])
assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
assert not torch.cuda.is_initialized()
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)
print(sorted({LAZY!r} & set(sys.modules)))
""", XDG_CACHE_HOME=str(tmp_path), ADVLEARN_DATA=str(tmp_path / "none"))  # fmt: skip
    assert out.strip() == "[]" and not list(tmp_path.iterdir())


def test_the_package_itself_imports_nothing():
    out = run("import sys, advlearn; print('torch' in sys.modules, bool(advlearn.__version__))")
    assert out.split() == ["False", "True"]


def test_names_of_the_design():
    from advlearn import zoo  # noqa: F401
    from advlearn.attacks import (  # noqa: F401
        apgd,
        cw_inf,
        fab,
        fgsm,
        from_center,
        on,
        pgd,
        square,
        standard_attack,
        toward,
    )
    from advlearn.data import load  # noqa: F401
    from advlearn.evaluation import accuracy, worst_case  # noqa: F401
    from advlearn.threats import L1, L2, Linf

    for kind in (Linf, L2, L1):
        assert all(hasattr(kind, m) for m in
                   ("take", "center", "sample", "render", "ascend", "project", "contains"))  # fmt: skip
    parameters = inspect.signature(pgd).parameters
    assert list(parameters)[:4] == ["f", "x", "y", "threat"] and "momentum" in parameters
    for attack in (pgd, fgsm, cw_inf, square, apgd, fab):
        assert inspect.signature(attack).parameters["start"].kind == inspect.Parameter.KEYWORD_ONLY


# --- docstrings, sizes, forbidden calls -------------------------------------------------------


def functions(path):
    """(qualified name, node) of every class, function and method; nested functions left out."""
    for node in ast.parse(path.read_text("utf8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{child.name}", child) for child in node.body
                            if isinstance(child, ast.FunctionDef))  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = import_module(f"advlearn.{name}")
    assert module.__doc__
    for qualified, node in functions(MODULES[name]):
        public = not any(part.startswith("_") for part in qualified.split("."))
        if name.startswith("exercises"):  # there the checkers are the public part
            public = public and qualified.startswith("check")
        if public and node.name != "forward":
            assert ast.get_docstring(node), f"advlearn.{name}.{qualified} has no docstring"


def code_lines(node):
    """Lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return node.end_lineno - body[0].lineno + 1 if body else 0


# Functions that the rule of 40 lines would only cut into pieces, and how long they may be.
LONG = {"training.loop.fit": 48, "exercises.chapter1.check_l1_step": 49,
        "exercises.chapter1.check_smallest_eps": 50, "exercises.chapter3.check_leak": 55,
        "exercises.chapter3.check_trades": 49, "exercises.tie.check_steepest": 48}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_sizes(name):
    text = MODULES[name].read_text("utf8")
    assert len(text.splitlines()) <= 300, f"{name} has {len(text.splitlines())} lines"
    long = {q: code_lines(n) for q, n in functions(MODULES[name]) if isinstance(n, ast.FunctionDef)
            and code_lines(n) > LONG.get(f"{name}.{q}", 40)}  # fmt: skip
    assert not long, f"functions over 40 lines in {name}: {long}"


@pytest.mark.parametrize("name", MODULES)
def test_forbidden_calls(name):
    """Nothing reseeds the global state, unpickles, evaluates text or moves to a device by name."""
    banned = {"torch.manual_seed", "np.random.seed", "random.seed", "torch.load", "pickle.load",
              "pickle.loads", "torch.cuda.manual_seed", "torch.set_default_device"}  # fmt: skip
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if name != "exercises.attack":  # which looks for readers who reseed
                assert called not in banned | {"eval", "exec"}, f"{name}: {called}"
            assert not (called.endswith(".cuda") and called != "torch.cuda"), f"{name}: {called}"
            if called == "np.load":
                assert "allow_pickle=False" in ast.unparse(node)
