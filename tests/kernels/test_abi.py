# SPDX-License-Identifier: Apache-2.0
"""The parameter block is one struct in Python and C++: sizes, offsets, order, ABI number."""

from __future__ import annotations

import ctypes
import subprocess

import pytest

from fmha_runtime import config
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels import catalog, manifest, sources
from fmha_runtime.kernels.append.params import AppendParams, ByteStrides
from fmha_runtime.kernels.decode.params import DecodeParams
from fmha_runtime.kernels.forward import params
from fmha_runtime.kernels.pack.params import PackMaskParams
from fmha_runtime.toolchain import nvcc

PADDED = (params.TensorMap, params.FwdTmaParams, params.FwdSm90Params, DecodeParams)
STRUCTS = (params.Strides, params.FwdParams, PackMaskParams, ByteStrides, AppendParams)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the host compiler says: {struct: (size, {field: (offset, size)}, alignment)}."""
    folder = tmp_path_factory.mktemp("abi")
    lines = [
        '#include "params_sm90.h"',
        '#include "params_decode.h"',
        '#include "pack/packer.cuh"',
        '#include "append/appender.cuh"',
        "#include <stdio.h>",
        "int main() {",
    ]
    for struct in STRUCTS:
        name = f"fmha::{struct.__name__}"
        lines.append(f'printf("{struct.__name__} . %zu %zu\\n", sizeof({name}), alignof({name}));')
        for field, _ in struct._fields_:
            lines.append(
                f'printf("{struct.__name__} {field} %zu %zu\\n", offsetof({name}, {field}), sizeof({name}::{field}));'
            )
    for struct in PADDED:  # in C++ their padding has no name
        name = f"fmha::{struct.__name__}"
        lines.append(f'printf("{struct.__name__} . %zu %zu\\n", sizeof({name}), alignof({name}));')
    for struct, names in (
        ("FwdTmaParams", ("q_map", "k_map", "v_map", "fwd", "ctas")),
        ("FwdSm90Params", ("tma", "queue")),
        ("DecodeParams", [name for name, _ in DecodeParams._fields_]),
    ):
        for field in names:
            member = f"offsetof(fmha::{struct}, {field}), sizeof(fmha::{struct}::{field})"
            lines.append(f'printf("{struct} {field} %zu %zu\\n", {member});')
    lines.append('printf("constants . %d %d\\n", FMHA_ABI, fmha::kUnlimited);\n}')
    (folder / "abi.cpp").write_text("\n".join(lines))
    folders = [config.kernel_src() / name for name in ("emulator", "fmha")]  # the twins stand in for <ptx/...>
    command = [
        str(nvcc.find_host_cxx()),
        "-std=c++17",
        "-Wno-invalid-offsetof",
        *(f"-I{folder}" for folder in folders),
    ]
    subprocess.run([*command, "abi.cpp", "-o", "abi"], cwd=folder, check=True)
    done = subprocess.run([folder / "abi"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(struct, field): (int(a), int(b)) for struct, field, a, b in rows}


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_size_and_alignment(compiled, struct):
    expected = (ctypes.sizeof(struct), ctypes.alignment(struct))
    assert compiled[struct.__name__, "."] == expected


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_has_its_offset_and_size(compiled, struct):
    for field, _ in struct._fields_:
        found = getattr(struct, field)
        assert compiled[struct.__name__, field] == (found.offset, found.size), field


def test_no_field_is_missing_in_python(compiled):
    """Fields that only C++ has would show as a gap or as a longer struct."""
    for struct in STRUCTS:
        end = 0
        for field, _ in struct._fields_:
            found = getattr(struct, field)
            assert found.offset == end, f"a gap before {field}"
            end = found.offset + found.size
        assert end == compiled[struct.__name__, "."][0]


@pytest.mark.parametrize("struct", PADDED, ids=lambda struct: struct.__name__)
def test_hoppers_blocks_have_the_size_of_the_kernels(compiled, struct):
    assert compiled[struct.__name__, "."][0] == ctypes.sizeof(struct)


@pytest.mark.parametrize("struct", PADDED[1:], ids=lambda struct: struct.__name__)
def test_hoppers_fields_lie_where_the_kernel_reads_them(compiled, struct):
    fields = [field for field, _ in struct._fields_ if field != "padding"]
    assert len(fields) >= 2
    for field in fields:
        found = getattr(struct, field)
        assert compiled[struct.__name__, field] == (found.offset, found.size), field


def test_the_manifest_records_the_size_of_the_block():
    """What the driver compares when it loads a cubin; on the CPU the manifest's number is all there is."""
    rows, broken = manifest.read(config.package_root())
    assert not broken and len(rows) > 1000
    assert {row.spec.name for row in rows if row.params_size != ctypes.sizeof(catalog.block(row.spec))} == set()


def test_constants(compiled):
    assert compiled["constants", "."] == (params.ABI, params.UNLIMITED)
    assert sources.abi() == params.ABI


def test_sources_without_an_abi_are_refused(tmp_path, monkeypatch):
    (tmp_path / "fmha").mkdir()
    (tmp_path / "fmha" / "params.h").write_text("#pragma once\n")
    monkeypatch.setattr(config, "kernel_src", lambda: tmp_path)
    with pytest.raises(ArtifactError, match="does not define FMHA_ABI"):
        sources.abi()
