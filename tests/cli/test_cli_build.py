# SPDX-License-Identifier: Apache-2.0
"""``fmha build``: what it compiles, where it goes, and how it fails, stops and is interrupted."""

from __future__ import annotations

import json
import re
import subprocess

from helpers.program import SMALL, fmha, names

from fmha_runtime.kernels import manifest


def test_build(bare_cache, fake_nvcc):
    result = fmha("build", SMALL, "fmha_fwd_sm80_fp16_d32")
    assert result.exit_code == 0
    assert names(result) == ["ok", "ok"]
    assert re.search(r"built 2 of 2 in [\d.]+ s \(\d+ workers\) · largest .* · spills 0", result.stderr)
    again = fmha("build", SMALL, "--json")
    (item,) = json.loads(again.stdout)["items"]
    assert item["status"] == "up to date"
    assert fake_nvcc.runs == 2


def test_build_failure_is_exit_1(bare_cache, fake_nvcc):
    fake_nvcc.write(failing=SMALL)
    result = fmha("build", SMALL, "fmha_fwd_sm80_fp16_d32")
    assert result.exit_code == 1
    assert sorted(names(result)[:2]) == ["FAIL", "ok"] or "FAIL" in result.stdout
    assert "on request" in result.stdout
    assert "built 1 of 2" in result.stderr
    assert "1 failed" in result.stderr


def test_build_fail_fast_stops(bare_cache, fake_nvcc):
    fake_nvcc.write(failing="fmha")
    result = fmha("build", "--arch", "sm80", "--jobs", "1", "--fail-fast")
    assert result.exit_code == 1
    assert fake_nvcc.runs < 26
    assert "--fail-fast" in result.stderr


def test_build_dry_run_can_be_pasted(bare_cache, fake_nvcc, tmp_path):
    result = fmha("build", SMALL, "--dry-run")
    assert result.exit_code == 0
    assert fake_nvcc.runs == 0
    assert not bare_cache.exists()
    folder = tmp_path / "pasted"
    folder.mkdir()
    subprocess.run(["bash", "-e"], input=result.stdout, cwd=folder, text=True, check=True)
    assert (folder / f"{SMALL}.cubin").is_file()


def test_build_into_a_packaged_root(bare_cache, fake_nvcc, tmp_path):
    root = tmp_path / "cubins"
    assert fmha("build", SMALL, "--into", root).exit_code == 0
    assert (root / "sm80" / f"{SMALL}.cubin").is_file()
    assert [row.spec.name for row in manifest.read(root)[0]] == [SMALL]


def test_build_of_another_tile(bare_cache, fake_nvcc):
    result = fmha("build", SMALL, "--tile", "64x64 w4 s2 c2")
    assert result.exit_code == 0
    assert "64x64 w4 s2 c2" in result.stdout
    assert fmha("build", SMALL, "--tile", "big").exit_code == 2


def test_build_without_nvcc_is_exit_3(bare_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("FMHA_NVCC", str(tmp_path / "nothing"))
    result = fmha("build", SMALL)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "FMHA_NVCC" in result.stderr


def test_interrupted_build_lists_what_is_finished(bare_cache, fake_nvcc, monkeypatch):
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
