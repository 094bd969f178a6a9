# SPDX-License-Identifier: Apache-2.0
"""Which kernel: a frozen value that is a pure function of its name, and the reverse.

``fmha op arch dtype dHEAD[xV] [packed] [alibi|softcap] [paged] [short]`` joined by underscores is the entry point, the
file stem, the table key and what a profiler shows. Kernels that move bytes have no head dim: ``fmha_pack_sm90_u8``.
Tile numbers are not in it: see catalog.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

from ..errors import InputError


class Op(str, Enum):
    """What the kernel does."""

    FWD = "fwd"
    DECODE = "decode"  # attention of few queries on many keys
    PACK = "pack"  # packs masks (packed_mask.py)
    APPEND = "append"  # copies new keys and values into a cache


class Arch(str, Enum):
    """The GPU target that a cubin is compiled for."""

    SM80 = "sm80"
    SM86 = "sm86"
    SM89 = "sm89"
    SM90 = "sm90"
    SM90A = "sm90a"
    SM120 = "sm120"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability (major, minor)."""
        number = int(self.value[2:].rstrip("a"))
        return divmod(number, 10)

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory that one CTA may use (opt-in limit; CUDA C++ Programming Guide, table of
        technical specifications per compute capability)."""
        kib = {(8, 0): 163, (9, 0): 227}.get(self.capability, 99)
        return kib * 1024

    @property
    def targets(self) -> tuple[Arch, ...]:
        """Targets whose cubins run on a device of this arch, the preferred one first.

        sm90a is Hopper's own instruction set (TMA, wgmma); sm90 is the mma.sync family compiled for the same GPUs.
        """
        return (Arch.SM90A, Arch.SM90) if self is Arch.SM90 else (self,)

    @classmethod
    def for_capability(cls, major: int, minor: int) -> Arch | None:
        """The arch whose cubins run on a device: same major number, highest minor not above the device's.

        None when no arch of the table matches (cubins never cross a major compute capability). On Hopper this is sm90,
        whose ``targets`` include sm90a.
        """
        fits = [a for a in cls if a.capability[0] == major and a.capability[1] <= minor]
        return max(fits, key=lambda a: (a.capability, a is not Arch.SM90A), default=None)


class DType(str, Enum):
    """Element type of q, k and v; of the mask that a packer reads."""

    FP16 = "fp16"
    BF16 = "bf16"
    E4M3 = "e4m3"
    U8 = "u8"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 1 if self in (DType.E4M3, DType.U8) else 2


class Mask(str, Enum):
    """Mask family. ``band`` covers full, causal and sliding window with run-time bounds and is not named."""

    BAND = "band"
    PACKED = "packed"


class Score(str, Enum):
    """What happens to a score between q.k and the softmax, besides the scale."""

    PLAIN = "plain"
    ALIBI = "alibi"
    SOFTCAP = "softcap"


class KvLayout(str, Enum):
    """How K and V lie in memory."""

    CONTIGUOUS = "contiguous"
    PAGED = "paged"


HEAD_DIMS: tuple[tuple[int, int], ...] = (
    *((d, d) for d in (32, 40, 48, 64, 72, 80, 96, 104, 128, 160, 192, 256)),
    (192, 128),
)
"""(head dim of q and k, head dim of v) of the table."""

_NAME = re.compile(
    r"fmha_(?P<op>[a-z]+)_(?P<arch>sm\d+a?)_(?P<dtype>[a-z0-9]+)(?:_d(?P<d>\d+)(?:x(?P<dv>\d+))?)?"
    r"(?P<packed>_packed)?(?:_(?P<score>alibi|softcap))?(?P<paged>_paged)?(?P<short>_short)?"
)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel of the table, by what it computes. Head dims are 0 where there are none.

    ``short`` says nothing about what is computed: it is the twin of the kernel without it, cut for short sequences, or
    for few rows where the op is decode.
    """

    op: Op
    arch: Arch
    dtype: DType
    head_dim: int
    head_dim_v: int
    mask: Mask = Mask.BAND
    score: Score = Score.PLAIN
    kv: KvLayout = KvLayout.CONTIGUOUS
    short: bool = False

    @property
    def name(self) -> str:
        """The kernel's name; ``KernelSpec.parse`` is its inverse."""
        words = ["fmha", self.op.value, self.arch.value, self.dtype.value]
        if self.op in (Op.PACK, Op.APPEND):
            return "_".join(words)
        words.append(f"d{self.head_dim}" + ("" if self.head_dim_v == self.head_dim else f"x{self.head_dim_v}"))
        words += [self.mask.value] if self.mask is not Mask.BAND else []
        words += [self.score.value] if self.score is not Score.PLAIN else []
        words += [self.kv.value] if self.kv is not KvLayout.CONTIGUOUS else []
        words += ["short"] if self.short else []
        return "_".join(words)

    def __str__(self) -> str:
        return self.name

    @property
    def long(self) -> KernelSpec:
        """The kernel that computes the same and is not cut for short sequences: itself, or its twin."""
        return replace(self, short=False)

    @classmethod
    def parse(cls, name: str) -> KernelSpec:
        """The spec with this name.

        Raises:
            InputError: the text is not a kernel name.
        """
        found = _NAME.fullmatch(name)
        try:
            if found is None:
                raise ValueError
            d = int(found["d"] or 0)
            spec = cls(
                Op(found["op"]),
                Arch(found["arch"]),
                DType(found["dtype"]),
                d,
                int(found["dv"] or d),
                Mask.PACKED if found["packed"] else Mask.BAND,
                Score(found["score"] or "plain"),
                KvLayout.PAGED if found["paged"] else KvLayout.CONTIGUOUS,
                found["short"] is not None,
            )
            if spec.name != name:  # d64x64, d064, no head dim or one too many: one spelling a kernel
                raise ValueError
        except ValueError:
            raise InputError(
                f"{name!r} is not a kernel name; the form is fmha_OP_ARCH_DTYPE_dHEAD[xV][_packed]"
                "[_alibi|_softcap][_paged][_short], for example fmha_fwd_sm90_bf16_d128"
            ) from None
        return spec
