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

# A module imports from its own floor or from below, never in a circle. A new file needs its place.
FLOORS = {
    0: "errors config spec alibi records",
    1: "code_hash catalog forced_tile sources manifest store params publish ledger",
    2: "nvcc build ptx check disassembly gxx driver emulator tensors interop packed_mask tensor_map",
    3: "call dispatch emulated_launch launch loader obtain mask_packer merge reference sections torch_ops",
    4: "api eager",
    5: "verify verify_cases verify_check verify_pack bench bench_record plots doctor inspection progress"
    " report selection integrations integrations.torch_sdpa integrations.transformers"
    " integrations.transformers_masks integrations.transformers_paged integrations.vllm"
    " compat compat.shared compat.kvcache compat.bert_padding compat.flash_attn compat.flash_attn_3"
    " bench_cells bench_libraries bench_peers bench_provider"
    " tune tune_record tune_variants tune_worker",
    6: "cli demo",
    7: "__init__ __main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}

DOORS = {
    "cuda.bindings": {"driver", "tensor_map"},
    "cuda.pathfinder": {"nvcc"},
    "subprocess": {"nvcc", "gxx"},
    "click": {"cli"},
    "rich": {"cli", "progress"},
}
NETWORK = {"socket", "ssl", "http", "urllib", "requests", "ftplib", "httpx"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def walk(node):
    """Every node that runs: all but the bodies of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from walk(child)


def imports(path):
    """(own modules, foreign modules) that a file imports, inside functions too."""
    own, foreign = set(), set()
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = path.parent.relative_to(PACKAGE).parts[: 2 - node.level]
            base = ".".join((*inside, *filter(None, [node.module])))
            if base in FLOOR:  # from .module import thing
                own.add(base)
            else:  # from . import module, or a public name by way of __init__
                names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
                own.update(fmha_runtime._HOME.get(name, name) for name in names)
    return own, foreign


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    name = module_name(path)
    assert name in FLOOR, f"{name} has no floor; give it one in this test"
    for other in imports(path)[0] - {name, "__version__"}:
        assert other in FLOOR, f"{name} imports {other}, which has no floor"
        assert FLOOR[other] <= FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {other}"


def test_no_import_circle():
    graph = {module_name(path): imports(path)[0] for path in FILES}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph


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
    wanted = ", ".join(repr(name) for name in modules if not name.startswith("__"))
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
