# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests about files: a pretended nvcc, a copy of the kernel sources to edit."""

from __future__ import annotations

import shutil

from fmha_runtime import config
from fmha_runtime.kernels.spec import KernelSpec

SMALL = KernelSpec.parse("fmha_fwd_sm80_bf16_d32")
OTHER = KernelSpec.parse("fmha_fwd_sm80_fp16_d40")

_SCRIPT = """#!/bin/sh
case "$1" in --version) echo "Cuda compilation tools, release 13.0, V{version}"; exit 0;; esac
echo run >> "{log}"
while [ $# -gt 0 ]; do
    case "$1" in -o) out=$2; shift;; *.cu) source=$1;; esac
    shift
done
sleep {seconds}
case "$source" in *{failing}*) echo "$source(1): error: on request"; exit 2;; esac
(echo "compiled by {version} from"; cat "$source") > "$out"
case "$out" in *.ptx) ;; *) (echo "// PTX of {version}"; cat "$source") > "${{source%.cu}}.ptx";; esac
echo "ptxas info    : Compiling entry function"
echo "    {spills} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads"
echo "ptxas info    : Used 100 registers, used 1 barriers"
"""


class FakeNvcc:
    """Answers like nvcc; its "cubin" is the translation unit behind a line with its version."""

    def __init__(self, folder, monkeypatch):
        folder.mkdir()
        self.path = folder / "nvcc"
        self._log = folder / "runs"
        self.write()
        monkeypatch.setenv("FMHA_NVCC", str(self.path))

    def write(self, version="13.0.99", seconds=0, spills=0, failing="nothing"):
        """Change how it behaves from now on."""
        text = _SCRIPT.format(version=version, seconds=seconds, spills=spills, failing=failing, log=self._log)
        self.path.write_text(text)
        self.path.chmod(0o755)

    @property
    def runs(self):
        """How many compilations it was asked for."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


def editable_sources(tmp_path, monkeypatch):
    """A copy of kernel_src that the library uses for the rest of the test."""
    copy = tmp_path / "kernel_src"
    shutil.copytree(config.kernel_src(), copy)
    monkeypatch.setattr(config, "kernel_src", lambda: copy)
    return copy
