# SPDX-License-Identifier: Apache-2.0
"""``fmha``: exit codes, clean stdout, JSON that parses, and errors that say what to do next."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import fmha_runtime
from fmha_runtime import config
from fmha_runtime.cli import program as cli
from fmha_runtime.cli import selection
from fmha_runtime.device import driver
from fmha_runtime.errors import (
    ArtifactError,
    BuildError,
    DriverError,
    InputError,
    KernelNotBuilt,
    ToolchainError,
    UnsupportedProblem,
)
from fmha_runtime.kernels import catalog, manifest, store
from fmha_runtime.kernels.spec import Arch, KernelSpec

SMALL = "fmha_fwd_sm80_bf16_d32"


def fmha(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


@pytest.fixture
def no_gpu(monkeypatch):
    def missing(*args):
        raise DriverError("no CUDA driver on this machine")

    monkeypatch.setattr(driver, "device_count", missing)


@pytest.fixture
def own_cache(own_cache, tmp_path, monkeypatch):
    """As in conftest.py, and without the package's cubins, which a developer may have built."""
    monkeypatch.setattr(config, "package_root", lambda: tmp_path / "package")
    return own_cache


def names(result):
    return [line.split()[0] for line in result.stdout.splitlines()]


# --- selection


def test_list_shows_the_whole_catalogue():
    result = fmha("list")
    assert result.exit_code == 0
    assert names(result) == [spec.name for spec in catalog.enumerate_specs()]
    assert f"{len(catalog.enumerate_specs())} in catalogue" in result.stderr


PLAIN = ["--mask", "band", "--score", "plain", "--no-paged", "--no-short"]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([*PLAIN, "--arch", "sm90"], 26),
        ([*PLAIN, "--arch", "sm90", "--arch", "sm80", "--dtype", "bf16"], 26),
        ([*PLAIN, "--head-dim", "192"], 24),
        ([*PLAIN, "--head-dim", "192x128", "--dtype", "fp16"], 6),
        (["--score", "softcap", "--no-paged", "--head-dim", "64", "--arch", "sm80"], 2),
        (["fmha_fwd_sm8?_*_d64"], 6),
        ([SMALL], 1),
        ([*PLAIN, "--op", "fwd"], 156),
        (["--short"], 18),
        (["--short", "--head-dim", "64"], 2),
        (["--no-short", "--head-dim", "64", "--arch", "sm90a"], 16),
        (["--no-short", "--op", "pack"], 5),
        (["--op", "pack"], 5),
        (["--op", "pack", "--arch", "sm90"], 1),
    ],
)
def test_selection(words, count):
    assert len(names(fmha("list", *words))) == count


@pytest.mark.parametrize("command", ["list", "build", "verify", "inspect"])
def test_nothing_selected(command):
    device = ["--device", "emulator"] if command == "verify" else []
    result = fmha(command, "fmha_fwd_sm80_bf16_d33", *device)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert SMALL in result.stderr
    assert "fmha list" in result.stderr


def test_nearest_names_respect_the_options():
    result = fmha("list", "--arch", "sm90", "--dtype", "e4m3", "--head-dim", "64")
    assert result.exit_code == 2
    near = re.findall(r"fmha_\w+", result.stderr)
    assert near
    assert all("_sm90_" in name and "_d64" in name for name in near[:2])


# --- list


def test_list_json():
    result = fmha("list", "--json", "--arch", "sm90", "--head-dim", "192x128")
    body = json.loads(result.stdout)
    assert body["version"] == fmha_runtime.__version__
    assert body["schema"] == 1
    item = body["items"][0]
    assert item["name"] == "fmha_fwd_sm90_bf16_d192x128"
    spec = KernelSpec.parse(item["name"])
    assert (item["arch"], item["op"], item["dtype"]) == ("sm90", "fwd", "bf16")
    assert (item["head_dim"], item["head_dim_v"]) == (192, 128)
    assert (item["mask"], item["score"], item["kv"]) == ("band", "plain", "contiguous")
    assert item["tile"] == str(catalog.tile(spec))
    assert item["smem_bytes"] == catalog.smem_bytes(spec, catalog.tile(spec))
    assert item["state"] in {"ready", "stale", "not built", "broken"}
    assert item["verified"]["state"] in {"verified", "stale", "unverified"}


def test_list_of_a_built_kernel(own_cache, fake_nvcc):
    assert fmha("build", SMALL).exit_code == 0
    result = fmha("list", SMALL)
    assert re.search(r" 100 +cache .* ready$", result.stdout)
    assert "1 ready" in result.stderr
    (item,) = json.loads(fmha("list", "--json", SMALL).stdout)["items"]
    assert (item["state"], item["from"], item["registers"]) == ("ready", "cache", 100)


def test_list_shows_a_truncated_cubin(own_cache, fake_nvcc):
    fmha("build", SMALL)
    path = store.find(KernelSpec.parse(SMALL)).path
    path.write_bytes(path.read_bytes()[:10])
    result = fmha("list", SMALL)
    assert "broken" in result.stdout
    assert "fmha build" in result.stdout


def test_list_needs_neither_torch_nor_a_gpu(tmp_path):
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise ImportError('blocked')\n")
    (tmp_path / "cuda.py").write_text("raise ImportError('blocked')\n")
    path = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(cli.__file__))])
    for words in (["list"], ["doctor"], ["explain", "d=64", "dtype=bf16", "--arch", "sm80"]):
        done = subprocess.run(
            [sys.executable, "-m", "fmha_runtime", *words],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        # What the doctor finds depends on the machine; that it reports does not.
        assert done.returncode in ({0, 3, 4} if words == ["doctor"] else {0}), done.stderr
        assert done.stdout
        assert "Traceback" not in done.stderr


# --- explain


def test_explain_names_the_kernel_and_the_reasons():
    result = fmha("explain", "d=128", "dtype=bf16", "sq=1", "sk=4096", "causal", "--arch", "sm90")
    assert result.exit_code == 0
    assert re.search(r"^chosen +fmha_fwd_sm90a_bf16_d128 ", result.stdout, re.MULTILINE)
    assert re.search(r"^rejected +fmha_fwd_sm90_bf16_d128 +computes the same", result.stdout, re.MULTILINE)


def test_explain_tells_short_from_long():
    for words, name in (("sk=1024", "d64_short"), ("sk=1025", "d64"), ("sq=9", "d64_short"), ("h=4", "d64")):
        result = fmha("explain", "d=64", "dtype=bf16", words, "--arch", "sm90", "--json")
        assert json.loads(result.stdout)["items"][0]["chosen"] == f"fmha_fwd_sm90a_bf16_{name}"
    result = fmha("explain", "d=64", "dtype=bf16", "--arch", "sm90")
    assert "1 x any tokens" in result.stdout
    assert "fmha_fwd_sm90a_bf16_d64_short  computes the same; is cut for up to 1024 keys" in result.stdout


def test_nothing_short_is_selected():
    result = fmha("list", "--short", "--arch", "sm80")
    assert result.exit_code == 2 and "arch sm80, short" in result.stderr


def test_explain_json():
    result = fmha("explain", "d=64", "dtype=fp16", "--arch", "sm80", "--json")
    (item,) = json.loads(result.stdout)["items"]
    assert item["chosen"] == "fmha_fwd_sm80_fp16_d64"
    assert all(one["reason"] for one in item["rejected"])


@pytest.mark.parametrize("words", [["d=64", "dtype=e4m3"], ["d=33", "dtype=fp16", "softcap"]])
def test_explain_of_what_no_kernel_computes(words):
    result = fmha("explain", *words, "--arch", "sm80")
    assert result.exit_code == 1
    assert re.search(r"^chosen +nothing", result.stdout, re.MULTILINE)
    assert "fallback='torch'" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["d=64"],
        ["dtype=bf16"],
        ["d=x", "dtype=bf16"],
        ["d=64", "dtype=fp8"],
        ["d=64", "dtype=bf16", "sq=many"],
        ["d=64", "dtype=bf16", "windows=1,0"],
        ["d=64", "dtype=bf16", "window=1"],
        ["d=64", "dtype=bf16", "h=6", "hk=4"],
    ],
)
def test_explain_of_nonsense(words):
    result = fmha("explain", *words, "--arch", "sm80")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_problem_words():
    problem = selection.problem(
        ["b=2", "sq=3", "h=8", "hk=2", "d=192x128", "dtype=bf16", "window=4,-1", "varlen"],
        Arch.SM90,
    )
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 3, 3)
    assert (problem.heads, problem.heads_k) == (8, 2)
    assert (problem.head_dim, problem.head_dim_v) == (192, 128)
    assert (problem.window, problem.varlen) == ((4, None), True)


def test_explain_without_a_gpu_wants_an_arch(no_gpu):
    result = fmha("explain", "d=64", "dtype=bf16")
    assert result.exit_code == 3
    assert "--arch" in result.stderr


# --- build


def test_build(own_cache, fake_nvcc):
    result = fmha("build", SMALL, "fmha_fwd_sm80_fp16_d32")
    assert result.exit_code == 0
    assert names(result) == ["ok", "ok"]
    assert re.search(r"built 2 of 2 in [\d.]+ s \(\d+ workers\) · largest .* · spills 0", result.stderr)
    again = fmha("build", SMALL, "--json")
    (item,) = json.loads(again.stdout)["items"]
    assert item["status"] == "up to date"
    assert fake_nvcc.runs == 2


def test_build_failure_is_exit_1(own_cache, fake_nvcc):
    fake_nvcc.write(failing=SMALL)
    result = fmha("build", SMALL, "fmha_fwd_sm80_fp16_d32")
    assert result.exit_code == 1
    assert sorted(names(result)[:2]) == ["FAIL", "ok"] or "FAIL" in result.stdout
    assert "on request" in result.stdout
    assert "built 1 of 2" in result.stderr
    assert "1 failed" in result.stderr


def test_build_fail_fast_stops(own_cache, fake_nvcc):
    fake_nvcc.write(failing="fmha")
    result = fmha("build", "--arch", "sm80", "--jobs", "1", "--fail-fast")
    assert result.exit_code == 1
    assert fake_nvcc.runs < 26
    assert "--fail-fast" in result.stderr


def test_build_dry_run_can_be_pasted(own_cache, fake_nvcc, tmp_path):
    result = fmha("build", SMALL, "--dry-run")
    assert result.exit_code == 0
    assert fake_nvcc.runs == 0
    assert not own_cache.exists()
    folder = tmp_path / "pasted"
    folder.mkdir()
    subprocess.run(["bash", "-e"], input=result.stdout, cwd=folder, text=True, check=True)
    assert (folder / f"{SMALL}.cubin").is_file()


def test_build_into_a_packaged_root(own_cache, fake_nvcc, tmp_path):
    root = tmp_path / "cubins"
    assert fmha("build", SMALL, "--into", root).exit_code == 0
    assert (root / "sm80" / f"{SMALL}.cubin").is_file()
    assert [row.spec.name for row in manifest.read(root)[0]] == [SMALL]


def test_build_of_another_tile(own_cache, fake_nvcc):
    result = fmha("build", SMALL, "--tile", "64x64 w4 s2 c2")
    assert result.exit_code == 0
    assert "64x64 w4 s2 c2" in result.stdout
    assert fmha("build", SMALL, "--tile", "big").exit_code == 2


def test_build_without_nvcc_is_exit_3(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_NVCC", str(tmp_path / "nothing"))
    result = fmha("build", SMALL)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "FMHA_NVCC" in result.stderr


def test_interrupted_build_lists_what_is_finished(own_cache, fake_nvcc, monkeypatch):
    from fmha_runtime.cli import progress

    call = progress.BuildProgress.__call__

    def interrupt(self, event):
        call(self, event)
        if event.done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.BuildProgress, "__call__", interrupt)
    result = fmha("build", SMALL, "fmha_fwd_sm80_fp16_d32", "--jobs", "1")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


# --- verify, bench, inspect


@pytest.mark.emulator
def test_verify_on_the_emulator():
    pytest.importorskip("torch", reason="torch is not installed")
    result = fmha("verify", SMALL, "--device", "emulator", "--quick", "--json")
    assert result.exit_code == 0, result.stderr
    (item,) = json.loads(result.stdout)["items"]
    assert item["ok"]
    assert item["how"] == "emulator"
    assert item["passed"] > 5
    assert "1 of 1 kernels ok on emulator" in result.stderr


@pytest.mark.emulator
def test_verify_replays_one_case():
    pytest.importorskip("torch", reason="torch is not installed")
    result = fmha("verify", "--case", f"{SMALL}/3", "--device", "emulator")
    assert result.exit_code == 0, result.stderr
    assert "1 of 1 cases" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--record", "--quick"],
        ["--record", "--case", f"{SMALL}/3"],
        ["--device", "tpu"],
        ["--case", "fmha_fwd_sm80_bf16_d32", "--device", "emulator"],
        ["--sanitizer", "valgrind"],
    ],
)
def test_verify_usage(words):
    result = fmha("verify", *words)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_no_gpu_is_exit_3(command, no_gpu):
    pytest.importorskip("torch", reason="torch is not installed")
    result = fmha(command)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "no CUDA driver" in result.stderr


@pytest.fixture
def hopper(monkeypatch):
    """A machine that claims to have an H200."""
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "capability", lambda index: (9, 0))
    monkeypatch.setattr(driver, "device_info", lambda index=0: None)


def test_the_default_arch_is_the_gpus(hopper, monkeypatch):
    from fmha_runtime.verify import run as verifier

    asked = []

    def run(spec, **options):
        asked.append((spec, options["device"], options["via"]))
        raise KernelNotBuilt("not built; run `fmha build`", name=spec.name, command="fmha build")

    monkeypatch.setattr(verifier, "verify_kernel", run)
    result = fmha("verify", "--head-dim", "64", *PLAIN)
    assert result.exit_code == 1
    assert [(spec.name, device, via) for spec, device, via in asked] == [
        (f"fmha_fwd_{target}_{dtype}_d64", "cuda:0", "cubin")
        for target in ("sm90", "sm90a")
        for dtype in ("bf16", "fp16")
    ]
    assert names(result) == ["FAIL"] * 4
    asked.clear()
    fmha("verify", "--arch", "sm80", "--head-dim", "64", "--via", "ptx", "--device", "cuda:1")
    assert {(spec.arch, device, via) for spec, device, via in asked} == {(Arch.SM80, "cuda:1", "ptx")}
    assert "fmha_fwd_sm90_bf16_d64" in fmha("explain", "d=64", "dtype=bf16").stdout


def test_bench_prints_and_writes(hopper, monkeypatch, tmp_path):
    from fmha_runtime.bench import run as bencher
    from fmha_runtime.bench.record import BenchRecord, Timing

    asked, wanted = [], []

    def run(cells, **options):
        asked.extend(cells)
        wanted.append((options["peers"], options["tile"]))
        options["on_cell"](cells[0], 0, len(cells))
        timings = (
            Timing(cells[0].key, "ours", median_us=1.0, tflops=500.0),
            Timing(cells[0].key, "flash", median_us=2.0, tflops=250.0),
        )
        return BenchRecord({"gpu": "H200", "torch": "2"}, timings)

    monkeypatch.setattr(bencher, "run", run)
    path = tmp_path / "record.json"
    words = ["--dtype", "bf16", "--head-dim", "64", "--seqlens", "512,1024", "--causal"]
    result = fmha("bench", *words, "--json", path)
    assert result.exit_code == 0, result.stderr
    assert [cell.key for cell in asked] == ["bf16_d64_s512_c", "bf16_d64_s1024_c"]
    assert "2.00" in result.stdout
    assert BenchRecord.load(path).providers == ("ours", "flash")
    for words in (["--grid", "hopper"], ["--grid", "mma"], ["--against", "all", "--arch", "sm90", "--tile", "128x64"]):
        assert fmha("bench", *words).exit_code == 0
    assert wanted == [
        (["sdpa"], None),
        (["cudnn", "flash"], None),
        (["cudnn", "flash"], "sm90"),
        (["all"], "sm90 128x64"),
    ]


@pytest.mark.emulator
def test_verify_reports_failure(monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    from fmha_runtime.ops.forward import direct

    run = direct.run
    monkeypatch.setattr(direct, "run", lambda *args, **options: run(*args, **{**options, "causal": False}))
    result = fmha("verify", SMALL, "--device", "emulator", "--quick")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert f"fmha verify --case {SMALL}/" in result.stdout


def test_sanitizer_replaces_the_process(monkeypatch):
    from fmha_runtime.verify import run as verifier

    called = []
    monkeypatch.setattr(verifier.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(os, "execvp", lambda file, argv: called.append(argv) or sys.exit(0))
    words = ["verify", SMALL, "--sanitizer", "memcheck", "--quick"]
    monkeypatch.setattr(sys, "argv", ["fmha", *words])
    assert fmha(*words).exit_code == 0
    (argv,) = called
    assert argv[0] == "/opt/compute-sanitizer"
    assert "memcheck" in argv
    assert argv[-5:] == ["verify", SMALL, "--quick", "--reference-device", "cpu"]


@pytest.mark.parametrize("words", [["--head-dim", "big"], ["--seqlens", "512,x"], ["--grid", "x"]])
def test_bench_usage(words):
    assert fmha("bench", *words).exit_code == 2


def test_inspect_of_a_kernel_that_is_not_built(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_NVCC", str(tmp_path / "nothing"))
    result = fmha("inspect", SMALL)
    assert result.exit_code == 0
    assert f"fmha build {SMALL}" in result.stdout
    assert "no instruction mix" in result.stdout
    assert fmha("inspect").exit_code == 2


@pytest.mark.nvcc
def test_inspect_of_a_real_kernel(cache_dir):
    assert fmha("build", SMALL).exit_code == 0
    (item,) = json.loads(fmha("inspect", SMALL, "--json").stdout)["items"]
    row = store.find(KernelSpec.parse(SMALL))
    assert (item["registers"], item["spill_bytes"]) == (row.registers, 0)
    assert item["key"] == row.path.parent.name
    words = {name.lower() for name in item["mix"]}
    assert words & {"hmma", "mma"}, "no matrix instruction in an attention kernel"


# --- cache


def test_cache(own_cache, fake_nvcc):
    assert fmha("cache", "dir").stdout.strip() == str(own_cache)
    fmha("build", SMALL)
    assert "removed 0 entries" in fmha("cache", "prune").stderr
    assert "removed 1 entries" in fmha("cache", "clean").stderr
    assert store.state(KernelSpec.parse(SMALL)).word != "ready"


def test_cache_prune_removes_what_is_outdated(own_cache, fake_nvcc):
    fmha("build", SMALL)
    path = store.find(KernelSpec.parse(SMALL)).path
    path.write_bytes(b"not a cubin")
    assert "removed 1 entries" in fmha("cache", "prune").stderr


# --- errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad; do this"), 2),
        (UnsupportedProblem("no; do this"), 2),
        (BuildError("failed; do this"), 1),
        (KernelNotBuilt("missing; do this", name="x", command="fmha build x"), 1),
        (DriverError("no driver; do this"), 3),
        (ToolchainError("no nvcc; do this"), 3),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3),
        (ArtifactError("corrupt; do this"), 4),
        (ZeroDivisionError("oops"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr(store, "rows", fail)
    monkeypatch.delenv("FMHA_DEBUG", raising=False)
    result = fmha("list")
    assert result.exit_code == code
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    if isinstance(error, ModuleNotFoundError):
        assert "pip install torch" in result.stderr
    if isinstance(error, ZeroDivisionError):
        assert "FMHA_DEBUG=1" in result.stderr


def test_debug_shows_the_traceback(monkeypatch):
    def fail():
        raise InputError("bad")

    monkeypatch.setattr(store, "rows", fail)
    monkeypatch.setenv("FMHA_DEBUG", "1")
    assert isinstance(fmha("list").exception, InputError)


def test_bad_option_is_exit_2():
    assert fmha("list", "--arch", "sm70").exit_code == 2
    assert fmha("lst").exit_code == 2


def test_version_and_help():
    assert fmha_runtime.__version__ in fmha("--version").stdout
    text = fmha("--help").stdout
    for command in ("list", "explain", "build", "verify", "bench", "tune", "inspect", "doctor", "cache"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
        assert fmha(command, "--help").exit_code == 0
