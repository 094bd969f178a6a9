# SPDX-License-Identifier: Apache-2.0
"""The instructions of a compiled kernel: the SASS of a cubin, and a count of them by name."""

from __future__ import annotations

import re
import tempfile
from collections import Counter

from .. import config
from ..errors import ToolchainError
from . import process
from .nvcc import try_nvcc

_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
_PTX = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][a-z0-9]*)\b[^\n]*;", re.MULTILINE)


def disassemble(image: bytes) -> str:
    """The SASS of a cubin, from nvdisasm or cuobjdump.

    Raises:
        ToolchainError: neither tool is installed, or it failed.
    """
    compiler, _ = try_nvcc()
    for program, options in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        beside = compiler.path.resolve().parent / program if compiler else None
        found = beside if beside and beside.is_file() else config.which(program)
        if found:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(image)
                file.flush()
                return process.output([str(found), *options, file.name])
    raise ToolchainError(
        "no disassembler: nvdisasm and cuobjdump are neither beside nvcc nor on PATH; install a full CUDA toolkit"
    )


def instruction_mix(listing: str) -> Counter[str]:
    """How often each instruction occurs in SASS or PTX text, by the first word of its name."""
    return Counter(_SASS.findall(listing) or _PTX.findall(listing))
