# SPDX-License-Identifier: Apache-2.0
"""A build is skipped, done or refused for the right reason; what it leaves is whole or absent."""

from __future__ import annotations

import hashlib
import io
import json
import re

import pytest
from click.testing import CliRunner
from helpers import ROOT, artefacts
from helpers.artefacts import OTHER, SMALL
from packaging.requirements import Requirement
from rich.console import Console

from fmha_runtime import config
from fmha_runtime.cli import program as cli
from fmha_runtime.cli.progress import BuildProgress
from fmha_runtime.errors import ArtifactError, BuildError, InputError, ToolchainError
from fmha_runtime.kernels import cache, catalog, code_hash, manifest, sources, store
from fmha_runtime.kernels.forward import tiles
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.kernels.tile import Tile
from fmha_runtime.ops import obtain
from fmha_runtime.toolchain import build, disassembly, nvcc, ptx


def leftovers(root):
    return [path.name for path in root.glob(".tmp-*")]


class TestWithAPretendedCompiler:
    @pytest.fixture(autouse=True)
    def setup(self, own_cache, fake_nvcc):
        self.cache, self.nvcc = own_cache, fake_nvcc

    def test_builds_publishes_and_tidies(self):
        results = build.build([SMALL, OTHER, SMALL])
        assert [(r.spec, r.status) for r in results] == [(SMALL, "built"), (OTHER, "built")]
        assert results[0].row == store.find(SMALL)
        files = sorted(path.name for path in results[0].row.path.parent.iterdir())
        assert files == [f"{SMALL.name}.cubin", "row.json"]
        assert not leftovers(self.cache)

    def test_what_is_up_to_date_is_not_compiled(self):
        build.build([SMALL])
        results = build.build([SMALL, OTHER])
        assert [r.status for r in results] == ["up to date", "built"]
        assert self.nvcc.runs == 2

    def test_force_compiles_again(self):
        build.build([SMALL])
        assert build.build([SMALL], force=True)[0].status == "built"
        assert self.nvcc.runs == 2
        assert len(list(self.cache.glob("fmha_*"))) == 1

    def test_mtimes_mean_nothing(self, tmp_path, monkeypatch):
        root = artefacts.editable_sources(tmp_path, monkeypatch)
        build.build([SMALL])
        for path in root.rglob("*.cuh"):
            path.touch()
        assert build.build([SMALL])[0].status == "up to date"

    @pytest.mark.parametrize("change", ["source", "tile", "compiler", "cubin", "row"])
    def test_what_changed_is_compiled(self, change, tmp_path, monkeypatch):
        root = artefacts.editable_sources(tmp_path, monkeypatch)
        row = build.build([SMALL])[0].row
        if change == "source":
            (root / "fmha" / "blocks/mask.cuh").open("a").write("int more;\n")
        elif change == "tile":
            monkeypatch.setattr(catalog, "tile", lambda spec: Tile(64, 32, 4, 2, 1))
        elif change == "compiler":
            self.nvcc.write(version="13.1.5")
        elif change == "cubin":
            row.path.write_bytes(b"x" * row.size)
        else:
            (row.path.parent / "row.json").write_text("{")
        result = build.build([SMALL])[0]
        assert result.status == "built"
        assert manifest.load_image(store.find(SMALL)) == result.row.path.read_bytes()

    def test_a_failure_keeps_the_others(self):
        self.nvcc.write(failing=SMALL.name)
        first, second = build.build([SMALL, OTHER])
        assert (first.status, second.status) == ("failed", "built")
        assert isinstance(first.error, BuildError)
        assert SMALL.name in str(first.error) and "error: on request" in str(first.error)
        assert str(self.nvcc.path) in first.error.command
        assert store.find(SMALL) is None
        assert not leftovers(self.cache)

    def test_sources_edited_meanwhile_are_not_mistaken_for_the_compiled_ones(self, tmp_path, monkeypatch):
        header = artefacts.editable_sources(tmp_path, monkeypatch) / "fmha" / "blocks/mask.cuh"
        text = self.nvcc.path.read_text()
        self.nvcc.path.write_text(text.replace("(echo", f'echo "int edited;" >> {header}\n(echo'))
        result = build.build([SMALL])[0]
        assert "its sources changed while it was compiled; build again" in str(result.error)
        assert store.find(SMALL) is None

    def test_spills_fail_the_kernel(self):
        self.nvcc.write(version=catalog.PROVEN_NVCC, spills=24)
        result = build.build([SMALL])[0]
        assert result.status == "failed"
        assert "48 bytes of spills where 0 are allowed, at 100 registers" in str(result.error)
        assert store.find(SMALL) is None

    def test_spills_that_another_compiler_adds_are_a_warning(self):
        self.nvcc.write(version="13.5.37", spills=24)
        spilling, other = build.build([SMALL, OTHER])
        assert (spilling.status, spilling.row.spill_bytes) == ("built", 48)
        for word in (SMALL.name, "nvcc 13.5.37", "48 bytes", catalog.PROVEN_NVCC):
            assert word in spilling.warning
        assert OTHER.name in other.warning
        assert store.find(SMALL) == spilling.row, "it serves"

    def test_a_warning_is_shown_and_counted(self):
        self.nvcc.write(version="13.5.37", spills=24)
        run = CliRunner().invoke(cli.main, ["build", SMALL.name, "--json"])
        assert run.exit_code == 0
        assert f"warning: {SMALL.name}: nvcc 13.5.37 leaves 48 bytes of spills where 0 are allowed" in run.stderr
        assert "1 with more spills than the catalogue allows" in run.stderr
        assert "13.5.37" in json.loads(run.stdout)["items"][0]["warning"]

    def test_a_build_on_demand_warns(self, monkeypatch):
        monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
        self.nvcc.write(version="13.5.37", spills=24)
        with pytest.warns(RuntimeWarning, match=rf"{SMALL.name}: nvcc 13\.5\.37"):
            obtain.image(SMALL)

    def test_spills_that_the_catalogue_allows(self, monkeypatch):
        monkeypatch.setitem(tiles.ALLOWED_SPILLS, SMALL.name, (48, "a test"))
        self.nvcc.write(version=catalog.PROVEN_NVCC, spills=24)
        result = build.build([SMALL])[0]
        assert (result.status, result.row.spill_bytes) == ("built", 48)

    def test_a_compiler_that_reports_nothing_is_not_believed(self):
        text = self.nvcc.path.read_text()
        self.nvcc.path.write_text(text.replace("Used 100", "took some"))
        assert "did not report" in str(build.build([SMALL])[0].error)

    def test_a_tile_that_does_not_fit(self):
        with pytest.raises(InputError, match="shared memory"):
            build.build([SMALL], tile=Tile(1024, 1024, 4, 2, 1))
        assert self.nvcc.runs == 0

    def test_an_experiment_is_cached_and_never_dispatched(self):
        tile = Tile(64, 32, 4, 2, 1)
        first = build.build([SMALL], tile=tile)[0]
        assert first.row.tile == tile
        assert store.find(SMALL) is None
        assert build.build([SMALL], tile=tile)[0].status == "up to date"

    def test_keep_leaves_source_and_command(self):
        row = build.build([SMALL], keep=True)[0].row
        folder = row.path.parent
        assert (folder / f"{SMALL.name}.cu").read_text() == sources.render(SMALL, row.tile)
        assert str(self.nvcc.path) in (folder / f"{SMALL.name}.sh").read_text()

    def test_into_writes_a_packaged_root(self, tmp_path):
        root = tmp_path / "cubins"
        build.build([OTHER], into=root)
        results = build.build([SMALL, OTHER], into=root)
        assert [r.status for r in results] == ["built", "up to date"]
        assert results[0].row.path == root / "sm80" / f"{SMALL.name}.cubin"
        assert {row.spec for row in manifest.read(root)[0]} == {SMALL, OTHER}
        assert not self.cache.exists() and not leftovers(root)

    def test_into_does_not_write_over_a_manifest_it_cannot_read(self, tmp_path):
        table = manifest.table(tmp_path, SMALL.op, SMALL.arch)
        table.parent.mkdir()
        table.write_text("{")
        with pytest.raises(ArtifactError, match=r"fwd_sm80\.json"):
            build.build([SMALL], into=tmp_path)
        assert table.read_text() == "{"

    def test_kernels_that_left_the_catalogue_leave_the_manifest(self, tmp_path, monkeypatch):
        build.build([OTHER], into=tmp_path)
        exists = catalog.exists
        monkeypatch.setattr(catalog, "exists", lambda spec: spec != OTHER and exists(spec))
        build.build([SMALL], into=tmp_path)
        assert {row.spec for row in manifest.read(tmp_path)[0]} == {SMALL}

    def test_the_lock_is_compared(self, tmp_path, monkeypatch):
        root = tmp_path / "cubins"
        build.build([SMALL], into=root)
        monkeypatch.setattr(config, "package_root", lambda: root)
        assert build.build([SMALL], force=True)[0].lock == "same"
        path = manifest.table(root, SMALL.op, SMALL.arch)
        sha = json.loads(path.read_text())["rows"][0]["sha256"]
        path.write_text(path.read_text().replace(sha, "0" * 64))
        assert build.build([SMALL], force=True)[0].lock == "differs"
        self.nvcc.write(version="13.1.5")
        assert build.build([SMALL])[0].lock == "", "the lock is of another compiler"

    def test_without_a_compiler_what_is_there_still_counts(self, monkeypatch):
        build.build([SMALL])
        monkeypatch.setenv("FMHA_NVCC", "/nowhere/nvcc")
        assert build.build([SMALL])[0].status == "up to date"
        with pytest.raises(ToolchainError, match="FMHA_NVCC=/nowhere/nvcc is not an executable"):
            build.build([SMALL, OTHER])

    def test_without_a_host_compiler(self, monkeypatch):
        monkeypatch.setenv("FMHA_HOST_CXX", "no-such-compiler")
        with pytest.raises(ToolchainError, match=r"no-such-compiler.*install g\+\+.*FMHA_HOST_CXX"):
            build.build([SMALL])

    def test_a_cache_that_cannot_be_written(self, monkeypatch):
        monkeypatch.setenv("FMHA_CACHE_DIR", "/proc/fmha_runtime")  # not even by root
        with pytest.raises(BuildError, match="set FMHA_CACHE_DIR"):
            build.build([SMALL])

    def test_variables_that_would_change_flags_do_not_reach_nvcc(self, monkeypatch):
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
        text = self.nvcc.path.read_text()
        self.nvcc.path.write_text(text.replace("(echo", 'test -z "$NVCC_APPEND_FLAGS" || exit 3\n(echo'))
        assert build.build([SMALL])[0].status == "built"

    def test_ptx_is_kept_for_machines_without_nvcc(self, monkeypatch):
        text = ptx.compile_ptx(SMALL)
        assert b"\0" not in text
        monkeypatch.setenv("FMHA_NVCC", "/nowhere/nvcc")
        assert ptx.compile_ptx(SMALL) == text
        with pytest.raises(ToolchainError):
            ptx.compile_ptx(OTHER)

    def test_ptx_failure(self):
        self.nvcc.write(failing=SMALL.name)
        with pytest.raises(BuildError, match="error: on request"):
            ptx.compile_ptx(SMALL)
        assert not leftovers(self.cache)

    def test_clean_keeps_what_is_good(self):
        good = build.build([SMALL])[0].row.path
        old = build.build([SMALL], tile=Tile(64, 32, 4, 2, 1))[0].row.path
        broken = build.build([OTHER])[0].row.path
        broken.write_bytes(b"")
        ptx.compile_ptx(SMALL)
        swept = cache.sweep(self.cache)
        assert (len(swept.removed), swept.size > 0) == (2, True)
        assert good.exists() and not old.exists() and not broken.exists()
        cache.sweep(self.cache, everything=True)
        assert {path.name for path in self.cache.rglob("*")} == {cache.MARKER, cache.PTX}

    def test_progress_in_a_log_is_plain_lines(self):
        self.nvcc.write(failing=OTHER.name)
        stream = io.StringIO()
        with BuildProgress(Console(file=stream, soft_wrap=True)) as progress:
            build.build([SMALL, OTHER], on_event=progress, jobs=1)
        text = stream.getvalue()
        assert text.startswith("building 2 kernels, 1 at once: about 5 s (")
        assert f"building 1/2  {SMALL.name}  about 5 s left" in text and f"building 2/2  {OTHER.name}\n" in text
        assert f"FAIL  {OTHER.name}" in text and "\x1b" not in text


class TestFindingTheCompiler:
    def test_the_variable_comes_first(self, fake_nvcc):
        found = nvcc.find_nvcc()
        assert (found.path, found.version, found.origin) == (fake_nvcc.path, "13.0.99", "FMHA_NVCC")

    def test_a_program_that_is_no_nvcc(self, fake_nvcc):
        fake_nvcc.path.write_text("#!/bin/sh\necho hello\n")
        with pytest.raises(ToolchainError, match="does not answer --version like an nvcc"):
            nvcc.find_nvcc()

    def test_a_program_that_does_not_run(self, fake_nvcc):
        fake_nvcc.path.write_text("#!/nowhere/sh\n")
        with pytest.raises(ToolchainError, match="cannot run"):
            nvcc.find_nvcc()

    def test_a_ptxas_of_another_release(self, fake_nvcc):
        ptxas = fake_nvcc.path.with_name("ptxas")
        ptxas.write_text('#!/bin/sh\necho "release 13.2, V13.2.51"\n')
        ptxas.chmod(0o755)
        with pytest.raises(ToolchainError, match=r"nvcc 13\.0, ptxas 13\.2.*pip install"):
            nvcc.find_nvcc()

    def packaged_toolkit(self, fake_nvcc, tmp_path, monkeypatch, **versions):
        site = tmp_path / "site-packages"
        path = site / "nvidia" / "cu13" / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        fake_nvcc.path.rename(path)
        monkeypatch.setenv("FMHA_NVCC", str(path))
        parts = ("cuda_nvcc", "nvvm", "cuda_crt", "cuda_runtime", "cuda_cccl")
        for part in parts:
            version = versions.get(part, "13.0.85")
            if version:
                (site / f"nvidia_{part}-{version}.dist-info").mkdir()

    def test_a_consistent_toolkit_from_the_index(self, fake_nvcc, tmp_path, monkeypatch):
        self.packaged_toolkit(fake_nvcc, tmp_path, monkeypatch, cuda_cccl="13.3.4.3.1")
        assert nvcc.find_nvcc().version == "13.0.99"

    @pytest.mark.parametrize(
        ("part", "version", "word"),
        [("nvvm", "13.5.37", r"13\.5"), ("nvvm", None, "missing"), ("cuda_cccl", None, "missing")],
    )
    def test_a_mixed_toolkit_from_the_index(self, fake_nvcc, tmp_path, monkeypatch, part, version, word):
        self.packaged_toolkit(fake_nvcc, tmp_path, monkeypatch, **{part: version})
        remedy = re.escape("--force-reinstall 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.*'")
        with pytest.raises(ToolchainError, match=rf"{part} {word}.*pip install {remedy}"):
            nvcc.find_nvcc()

    def test_nowhere(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("FMHA_NVCC", raising=False)
        monkeypatch.setattr(nvcc, "_USUAL", tmp_path / "nvcc")
        monkeypatch.setitem(__import__("sys").modules, "cuda.pathfinder", None)
        with pytest.raises(ToolchainError, match=r"pip install 'fmha-runtime\[build\]'"):
            nvcc.find_nvcc()

    def test_no_disassembler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("FMHA_NVCC", "/nowhere/nvcc")
        with pytest.raises(ToolchainError, match="no disassembler"):
            disassembly.disassemble(b"")


class TestTheProvenCompiler:
    def test_it_is_the_manifests(self):
        assert {row.nvcc for row in manifest.read(config.package_root())[0]} == {catalog.PROVEN_NVCC}

    def test_it_is_what_is_installed(self):
        """nvcc 13.0.88 is in the index's toolkits 13.0.2 and 13.0.3, which are what versions of torch ask for."""
        extra = re.search(r"^build = \[\"(cuda-toolkit[^\"]*)\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        made = re.search(r"^TOOLKIT \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert extra[1] == made[1]
        wanted = Requirement(extra[1])
        assert [v for v in ("13.0.1", "13.0.2", "13.0.3.0", "13.1.0", "13.5.0", "12.8.2") if v in wanted.specifier] == [
            "13.0.2", "13.0.3.0",
        ]  # fmt: skip
        assert wanted.extras == {"nvcc", "nvvm", "crt", "cudart", "cccl"}


def test_instruction_mix():
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00 */
        /*0010*/              @!P0 HMMA.16816.F32 R4, R8, R2, R4 ;
        /*00a0*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
    """
    ptx = "\t.reg .pred %p<2>;\n\tmma.sync.aligned.m16n8k16 {%f1};\n\t@%p1 bra \t$L__BB0_2;\n\tret;\n"
    assert disassembly.instruction_mix(sass) == {"LDC": 1, "HMMA": 2}
    assert disassembly.instruction_mix(ptx) == {"mma": 1, "bra": 1, "ret": 1}


@pytest.mark.nvcc
class TestWithTheRealCompiler:
    @pytest.fixture(autouse=True)
    def setup(self, own_cache):
        self.cache = own_cache

    def test_a_kernel_compiles_to_the_same_bytes_from_two_folders(self, tmp_path, monkeypatch):
        first = build.build([SMALL])[0]
        assert first.status == "built", first.error
        assert first.seconds < 10
        artefacts.editable_sources(tmp_path, monkeypatch)
        second = build.build([SMALL], into=tmp_path / "elsewhere")[0]
        assert second.row.path.read_bytes() == first.row.path.read_bytes()
        assert first.row.path.read_bytes().startswith(b"\x7fELF")
        assert str(tmp_path).encode() not in second.row.path.read_bytes()
        assert first.row.registers > 0 and first.row.spill_bytes == 0

    def test_the_lock_holds(self):
        """A sample rebuilt with the pinned compiler has the committed SHA-256."""
        names = [f"fmha_fwd_{end}" for end in ("sm80_fp16_d32", "sm90_bf16_d64", "sm120_bf16_d40")]
        sample = [KernelSpec.parse(name) for name in names]
        version = nvcc.find_nvcc().version
        locked = {spec: store.locked(spec) for spec in sample}
        if not all(row and row.nvcc == version for row in locked.values()):
            pinned = {row.nvcc for row in locked.values() if row} or "nothing"
            pytest.skip(f"the manifest locks builds of nvcc {pinned}, here is {version}")
        for result in build.build(sample):
            assert result.error is None
            image = result.row.path.read_bytes()
            assert hashlib.sha256(image).hexdigest() == locked[result.spec].sha256
            assert result.lock == "same"

    def test_ptx_is_of_the_base_architecture(self):
        text = ptx.compile_ptx(SMALL)
        assert b".target sm_80\n" in text and SMALL.name.encode() in text
        assert b"\0" not in text
        assert disassembly.instruction_mix(text.decode())["mma"] > 0

    def test_a_source_error_leaves_nothing(self, tmp_path, monkeypatch):
        root = artefacts.editable_sources(tmp_path, monkeypatch)
        (root / "fmha" / "blocks/mask.cuh").open("a").write("\nthis is not C++\n")
        result = build.build([SMALL])[0]
        assert result.status == "failed"
        assert "blocks/mask.cuh" in str(result.error) and "error" in result.log
        assert [path.name for path in self.cache.iterdir()] == [cache.MARKER]

    def test_a_disagreement_about_shared_memory_does_not_compile(self, monkeypatch):
        true = catalog.smem_bytes
        monkeypatch.setattr(catalog, "smem_bytes", lambda spec, tile: true(spec, tile) + 16)
        assert "must agree on shared memory" in str(build.build([SMALL])[0].error)


def test_a_kernel_of_the_present_text_is_found_without_working_out_its_code(
    own_cache, fake_nvcc, tmp_path, monkeypatch
):
    """Reading the tokens of all headers takes tens of milliseconds, once a process: the first call need not."""
    folder = artefacts.editable_sources(tmp_path, monkeypatch)
    assert build.build([SMALL])[0].row.text == sources.text(SMALL, catalog.tile(SMALL))

    def digest(*_, **__):
        worked_out.append(1)
        return real(*_, **__)

    real, worked_out = code_hash.Flattener.digest, []
    monkeypatch.setattr(code_hash.Flattener, "digest", digest)
    assert store.find(SMALL) is not None and not worked_out
    header = folder / "fmha" / "blocks" / "softmax.cuh"
    header.write_text("// A new comment.\n" + header.read_text())
    assert store.find(SMALL) is not None and worked_out, "the code is the same"
    header.write_text("inline int new_code = 1;\n" + header.read_text())
    assert store.find(SMALL) is None
