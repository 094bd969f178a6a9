# SPDX-License-Identifier: Apache-2.0
"""The CUDA source of a kernel: its translation unit, the headers it reaches, their hash, the flags
it is built with.

Text only; build.py and emulator.py run compilers on it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from . import catalog, config
from .catalog import Tile
from .errors import ArtifactError
from .spec import Arch, DType, KernelSpec, KvLayout, Mask, Op

_ELEMENT = {DType.FP16: "fmha::Fp16", DType.BF16: "fmha::Bf16"}
_SYSTEM = {"stddef.h", "stdint.h"}
_INCLUDE = re.compile(r'[ \t]*#[ \t]*include\b[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)?')
_ABI = re.compile(r"^#define FMHA_ABI (\d+)$", re.MULTILINE)

_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xptxas=--warn-on-spills")


def _root() -> Path:
    return (config.kernel_src() / "fmha").resolve()


def _family(spec: KernelSpec) -> str:
    if spec.op is Op.PACK:
        return "pack_mask"
    assert spec.op is Op.FWD
    return "fwd_sm90" if spec.arch is Arch.SM90A else "fwd_sm80"


def header(spec: KernelSpec) -> str:
    """The header, inside ``kernel_src/fmha``, that defines this kernel."""
    return f"{_family(spec)}.cuh"


def render(spec: KernelSpec, tile: Tile) -> str:
    """The translation unit of a kernel: the same text for nvcc and for the emulator's g++."""
    family = _family(spec)
    if family == "pack_mask":
        traits, params = f"PackMaskTraits<{tile.warps}, {tile.stages}>", "PackMaskParams"
    elif family == "fwd_sm90":
        traits, params = _sm90_traits(spec, tile), "FwdSm90Params"
    else:
        traits, params = _sm80_traits(spec, tile), "FwdParams"
    return f"""#include "{header(spec)}"
using Traits = fmha::{traits};
static_assert(Traits::kSmemBytes == {catalog.smem_bytes(spec, tile)}, \
"catalog.py and the traits must agree on shared memory");
FMHA_KERNEL({spec.name}, fmha::{params}, {tile.threads}, {tile.ctas_per_sm}) {{ \
fmha::{family}<Traits>(params); }}
"""


def _sm80_traits(spec: KernelSpec, tile: Tile) -> str:
    flag = "true" if tile.q_in_regs else "false"
    numbers = (spec.head_dim, spec.head_dim_v, tile.block_m, tile.block_n, tile.warps, tile.stages)
    words = [_ELEMENT[spec.dtype], *map(str, numbers), flag, *_features(spec)]
    return f"FwdTraits<{', '.join(words)}>"


def _sm90_traits(spec: KernelSpec, tile: Tile) -> str:
    words = [
        _ELEMENT[spec.dtype], spec.head_dim, spec.head_dim_v, f"fmha::Score::k{spec.score.value.capitalize()}",
        tile.block_n, tile.block_m // 64, tile.stages,
    ]  # fmt: skip
    features = [spec.mask is Mask.PACKED, spec.kv is KvLayout.PAGED]
    while features and not features[-1]:
        features.pop()
    words += [str(x).lower() for x in features]
    return f"FwdSm90Traits<{', '.join(map(str, words))}>"


def _features(spec: KernelSpec) -> list[str]:
    """The template arguments that say which features a kernel has; the last ones that are off are left out."""
    flags = [spec.mask is Mask.PACKED, spec.kv is KvLayout.PAGED]
    words = [f"fmha::Score::k{spec.score.value.capitalize()}", *(str(x).lower() for x in flags)]
    plain = ["fmha::Score::kPlain", "false", "false"]
    while words and words[-1] == plain[len(words) - 1]:
        words.pop()
    return words


def flags(arch: Arch) -> tuple[str, ...]:
    """nvcc's flags for a cubin of this arch. Part of a kernel's identity: another set makes its
    cubins stale.
    """
    number = arch.value[2:]
    return (*_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}")


def ptx_flags(arch: Arch) -> tuple[str, ...]:
    """nvcc's flags for PTX of this arch's virtual architecture."""
    return (*_FLAGS, f"-arch=compute_{arch.value[2:]}")


def include_closure(header: str) -> list[Path]:
    """Every file of ``kernel_src/fmha`` that the header reaches, itself included, sorted by path.

    Includes behind an ``#if`` count too: better one rebuild too many than a stale cubin.

    Raises:
        ArtifactError: a file is missing, or an include is written so that it cannot be followed.
    """
    root = _root()
    found: set[Path] = set()
    todo = [root / header]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        if not path.is_file():
            raise ArtifactError(
                f"kernel source {path} is missing; reinstall fmha-runtime or restore the checkout",
                path=path,
            )
        found.add(path)
        for match in filter(None, map(_INCLUDE.match, path.read_text().splitlines())):
            quoted, angled = match.groups()
            if quoted:
                todo.append((path.parent / quoted).resolve())
            elif angled and angled.startswith("ptx/"):
                todo.append(root / angled)
            elif angled not in _SYSTEM:
                raise ArtifactError(
                    f"{path} includes {angled or 'a computed name'}, which the source hash cannot "
                    'follow; use "file" for headers of this folder, <ptx/file> for wrappers, or '
                    f"{sorted(_SYSTEM)}",
                    path=path,
                )
    return sorted(found)


def source_hash(spec: KernelSpec) -> str:
    """SHA-256 (hex) of the headers a kernel is made of: relative paths and contents, never mtimes
    or tiles.
    """
    root = _root()
    digest = hashlib.sha256()
    for path in include_closure(header(spec)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def abi() -> int:
    """The ABI number of params.h: a cubin with another one is never launched."""
    path = _root() / "params.h"
    found = _ABI.search(path.read_text())
    if found is None:
        raise ArtifactError(f"{path} does not define FMHA_ABI; restore the checkout", path=path)
    return int(found[1])
