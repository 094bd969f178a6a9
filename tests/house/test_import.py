# SPDX-License-Identifier: Apache-2.0
"""Importing touches nothing; modules import downwards only; dangerous libraries have one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fmha_runtime

PACKAGE = Path(fmha_runtime.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Folders are floors: a file imports from its own folder and from floors above its own in this list. Folders that share
# a line know nothing of each other. So do the op folders inside ops/ and kernels/, but for BUILT_ON.
FLOORS = (
    "errors",
    "config",
    "records",
    "kernels",
    "toolchain",
    "device",
    "problem",
    "ops",
    "calls",
    "verify bench",
    "tune",
    "integrations compat",
    "cli",
    "demo",
    "__main__",
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
OPS = {
    floor: {path.name for path in (PACKAGE / floor).iterdir() if any(path.glob("*.py"))} for floor in ("kernels", "ops")
}
BUILT_ON = {("decode", "forward")}  # a decode kernel's parameters are a forward one's and more, and so is its binding
PUBLIC = "__init__"  # names of the package, each loaded from its home when it is asked for

COMMANDS = ("show", "explain", "build", "verify", "bench", "tune", "doctor", "cache")

DOORS = {
    "cuda.bindings": {"device.driver", "device.tensor_map"},
    "cuda.pathfinder": {"toolchain.nvcc"},
    "subprocess": {"toolchain.process"},
    "click": {f"cli.{name}" for name in ("program", "options", "output", *COMMANDS)},
    "rich": {"cli.progress"},
}
NETWORK = {"socket", "ssl", "http", "urllib", "requests", "ftplib", "httpx"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in FILES}


def absolute(tree):
    """Names of this package that a file imports by their full name, by statement or by import_module."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return [name for name in found if top(name) == "fmha_runtime"]


def imports(path):
    """(own modules, foreign modules) that a file imports, in functions and under TYPE_CHECKING too."""
    own, foreign = set(), set()
    me = module_name(path)
    tree = ast.parse(path.read_text())
    assert not absolute(tree), f"{me}: import relatively"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            foreign.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = path.parent.relative_to(PACKAGE).parts
            base = ".".join((*inside[: len(inside) - node.level + 1], *filter(None, [node.module])))
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                if name in MODULES:
                    own.add(name)
                elif base in MODULES:  # from .module import thing
                    own.add(base)
                else:  # a public name by way of __init__
                    assert base == "", f"{me} imports {alias.name} from {base or 'the package'}, which is no module"
                    own.add(fmha_runtime._HOME.get(alias.name, PUBLIC))
    return own, foreign


def top(name):
    return name.partition(".")[0]


def objection(name, other):
    """What is wrong with an import of one module by another; empty when nothing is."""
    if top(other) != top(name):
        fine = FLOOR[top(other)] < FLOOR[top(name)]
        return "" if fine else f"{name} imports {other}, which lies on a lower floor, or on its own behind another door"
    mine, theirs = (
        [part for part in module.split(".")[1:-1] if part in OPS.get(top(name), ())] for module in (name, other)
    )
    apart = mine and theirs and mine != theirs and (mine[0], theirs[0]) not in BUILT_ON
    return f"{name} imports {other}: ops know nothing of each other" if apart else ""


@pytest.mark.parametrize("name", [name for name in MODULES if name != PUBLIC])
def test_imports_go_down(name):
    assert top(name) in FLOOR, f"{name} lies on no floor; give its folder a place in this test"
    for other in imports(MODULES[name])[0] - {name, PUBLIC}:
        assert not objection(name, other)


@pytest.mark.parametrize(
    ("name", "other", "fine"),
    [
        ("ops.forward.plan", "kernels.spec", True),
        ("kernels.spec", "ops.forward.plan", False),
        ("verify.run", "bench.run", False),
        ("tune.run", "bench.run", True),
        ("ops.pack.cases", "ops.suite", True),
        ("ops.pack.cases", "ops.forward.check", False),
        ("kernels.catalog", "kernels.forward.family", True),
        ("ops.decode.work", "ops.forward.binding", True),
        ("ops.forward.plan", "ops.decode.work", False),
        ("ops.pack.packer", "ops.append.appender", False),
        ("kernels.append.family", "kernels.forward.family", False),
        ("compat.kvcache", "integrations.vllm", False),
    ],
)
def test_the_rule_itself(name, other, fine):
    assert name in MODULES and other in MODULES
    assert (objection(name, other) == "") is fine


@pytest.mark.parametrize(
    "line",
    [
        "import fmha_runtime.calls.api",
        "from fmha_runtime import attention",
        "def f():\n    from fmha_runtime.calls import api",
        "importlib.import_module('fmha_runtime.calls.api')",
    ],
)
def test_an_absolute_import_is_noticed(line):
    assert absolute(ast.parse(line))
    assert not absolute(ast.parse("import torch\nfrom . import fmha_runtime\nimport_module('torch')"))


def test_only_the_version_is_asked_of_the_package():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and not node.module and name != PUBLIC:
                names = {alias.name for alias in node.names}
                if node.level == len(path.relative_to(PACKAGE).parts):
                    assert all(n in MODULES or top(n) in FLOOR or n in fmha_runtime.__all__ for n in names), (
                        name,
                        names,
                    )


def test_the_rule_sees_what_hides(tmp_path):
    """An import under TYPE_CHECKING or in a function is one."""
    path = PACKAGE / "kernels" / "catalog.py"
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..ops.forward.plan import Plan\n"
    text += "def f():\n    from ..cli import report\n"

    class File:
        parent = path.parent
        read_text = staticmethod(lambda: text)
        relative_to = path.relative_to

    assert imports(File)[0] == {"ops.forward.plan", "cli.report"}


def test_no_import_circle():
    graph = {name: imports(path)[0] - {name, PUBLIC} for name, path in MODULES.items() if name != PUBLIC}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph


def test_every_public_name_has_its_home():
    for name, home in fmha_runtime._HOME.items():
        assert home in MODULES, (name, home)
        assert hasattr(fmha_runtime, name)
    assert set(fmha_runtime.__all__) == {*fmha_runtime._HOME, "__version__"}


@pytest.mark.parametrize("door", DOORS)
def test_each_library_has_its_door(door):
    users = {module_name(path) for path in FILES if any(f"{name}.".startswith(f"{door}.") for name in imports(path)[1])}
    assert users <= DOORS[door]


def test_nothing_reaches_the_network():
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)[1]} & NETWORK, path.name


def test_the_environment_is_read_in_config_only():
    for path in FILES:
        if module_name(path) == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            word = getattr(node, "attr", None) or getattr(node, "id", None)
            assert word not in {"environ", "environb", "getenv", "putenv"}, path.name
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                assert not {alias.name for alias in node.names} & {"environ", "getenv"}, path.name


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_import_touches_nothing(tmp_path):
    # The hook sees what really happens: files opened for writing, folders, processes, sockets.
    code = """
import os, sys
touched, asked = [], []
def hook(event, args):
    if event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        touched.append((event, args[0]))
    elif event in {"os.mkdir", "subprocess.Popen", "os.exec", "socket.connect", "os.rename"}:
        touched.append((event, args))
class Spy(type(os.environ)):
    def __getitem__(self, name):
        asked.append(name)
        return super().__getitem__(name)
os.environ.__class__ = Spy
sys.dont_write_bytecode = True
sys.addaudithook(hook)
import fmha_runtime
assert fmha_runtime.__version__
loaded = {"torch", "cuda", "numpy", "click", "rich", "ctypes"} & set(sys.modules)
assert not loaded, loaded
assert not touched, touched
assert not [name for name in asked if name.startswith(("FMHA", "CUDA", "XDG", "HOME"))], asked
assert os.listdir() == []
"""
    done = run(code, cwd=tmp_path, env={"PYTHONPATH": str(PACKAGE.parent)})
    assert done.returncode == 0, done.stderr


def test_no_module_loads_torch_or_cuda():
    modules = [module_name(path) for path in FILES]
    holds_a_module_of_torch = "compat.rotary"  # the others pass, so none of them imports it at the top
    wanted = ", ".join(repr(n) for n in modules if not n.startswith("__") and n != holds_a_module_of_torch)
    code = f"""
import importlib, sys
for name in [{wanted}]:
    importlib.import_module("fmha_runtime." + name)
    loaded = {{"torch", "transformers", "cuda.bindings", "matplotlib"}} & set(sys.modules)
    assert not loaded, (name, loaded)
"""
    done = run(code, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_a_process_may_fork_after_the_import():
    code = """
import os, fmha_runtime
from fmha_runtime.kernels import catalog, store
pid = os.fork()
if pid == 0:
    specs = catalog.enumerate_specs()
    os._exit(0 if len(store.Inventory.of(specs).states) == len(set(specs)) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = run(code, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
