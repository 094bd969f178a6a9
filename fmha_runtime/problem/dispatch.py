# SPDX-License-Identifier: Apache-2.0
"""From what was asked to the kernel that computes exactly that, with the reason for every row that was passed over.

Selection is exact: a row serves a problem only when it computes the same thing. Where no row of the catalogue does, an
extended kernel may (catalog.py), if it was built. Asking whether a problem is supported
walks the same rows; there is no second, looser test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from ..errors import InputError, UnsupportedProblem
from ..kernels import catalog, forced_tile
from ..kernels.decode.family import ROWS, SHORT_ROWS
from ..kernels.forward import tiles
from ..kernels.spec import Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..kernels.tile import Tile
from .arguments import PAGE_SIZES


@dataclass(frozen=True)
class Problem:
    """What was asked, without pointers or strides. Lengths are upper bounds for varlen batches and caches.

    ``seqlen_k`` None: any number of keys, for whoever asks before the lengths are known; a call always knows a bound.
    ``window`` is (left, right), inclusive, None = unlimited; causal problems have right = 0.
    """

    arch: Arch
    dtype: DType
    head_dim: int
    head_dim_v: int
    op: Op = Op.FWD
    mask: Mask = Mask.BAND
    score: Score = Score.PLAIN
    kv: KvLayout = KvLayout.CONTIGUOUS
    varlen: bool = False
    batch: int = 1
    seqlen_q: int = 1
    seqlen_k: int | None = None
    heads: int = 1
    heads_k: int = 1
    page_size: int | None = None  # tokens; None: not told
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)

    def __str__(self) -> str:
        if self.op in (Op.PACK, Op.APPEND):
            what = "a mask" if self.op is Op.PACK else "keys and values"
            return f"{self.op.value} {what} of {self.dtype.value} on {self.arch.value}"
        keys = "any" if self.seqlen_k is None else self.seqlen_k
        dims = f"{self.head_dim}" + (f"x{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        words = [
            f"{self.op.value} on {self.arch.value}, {self.dtype.value}, head dim {dims}",
            f"batch {self.batch}, {self.heads}/{self.heads_k} heads, {self.seqlen_q} x {keys} tokens",
        ]
        words += ["varlen"] if self.varlen else []
        words += ["causal"] if self.causal else []
        left, right = self.window
        if left is not None or (right is not None and not self.causal):
            words.append(f"window ({left}, {right})")
        words += [self.score.value] if self.score is not Score.PLAIN else []
        words += ["packed mask"] if self.mask is Mask.PACKED else []
        words += ["paged KV" + (f" of {self.page_size}" if self.page_size else "")] if self.kv is KvLayout.PAGED else []
        return ", ".join(words)


@dataclass(frozen=True)
class Trace:
    """How a choice came about; ``str()`` is what ``fmha explain`` prints."""

    problem: Problem
    chosen: KernelSpec | None
    rejected: tuple[tuple[KernelSpec, str], ...] = field(default=())
    forced: Tile | None = None  # by the caller; None: the catalogue's

    def __str__(self) -> str:
        lines = [f"problem   {self.problem}"]
        if self.chosen is None:
            lines.append("chosen    nothing")
        else:
            own = catalog.tile(self.chosen)
            text = f"{self.forced} (forced; the catalogue says {own})" if self.forced else str(own)
            lines.append(f"chosen    {self.chosen.name}  tile {text}")
            if not catalog.is_core(self.chosen):
                lines.append(
                    f"          not in the catalogue: `fmha build {self.chosen.name}` builds it, nobody has verified it"
                )
        lines += [f"rejected  {spec.name}  {reason}" for spec, reason in self.rejected]
        return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    """A kernel for a problem, and why this one."""

    spec: KernelSpec
    tile: Tile
    trace: Trace


class Regime(NamedTuple):
    """All that the choice between rows which compute the same depends on, of a problem's sizes: calls of one regime
    take one kernel."""

    short: bool
    """Up to tiles.SHORT_KEYS keys."""
    crowd: bool
    """Up to 64 queries each, 2048 or more batch * heads."""
    rows: int = 0
    """Rows of the decode kernel for it: pairs of a query and a head that shares its KV head. 0: not for decoding."""
    any_pages: bool = False
    """Pages of a size that forward kernels do not read."""


def regime(
    batch: int, heads: int, heads_k: int, seqlen_q: int, seqlen_k: int | None, page_size: int | None = None
) -> Regime:
    """The regime of a problem; ``seqlen_k`` None is any number of keys."""
    rows = seqlen_q * heads // max(1, heads_k)
    any_pages = page_size is not None and page_size not in PAGE_SIZES
    decodes = any_pages or (seqlen_k is not None and _for_decode(batch, heads, heads_k, seqlen_q, seqlen_k))
    return Regime(
        seqlen_k is not None and seqlen_k <= tiles.SHORT_KEYS,
        seqlen_q <= 64 and batch * heads >= 2048,
        0 if not decodes else SHORT_ROWS if rows <= SHORT_ROWS else ROWS,
        any_pages,
    )


def _for_decode(batch: int, heads: int, heads_k: int, queries: int, keys: int) -> bool:
    """Whether decode kernels are faster: measured on an H100 on 2026-11-27, d 64 and 128, against wgmma rows
    (docs/notes/decoding_h200.md). They read K and V once a KV head, the others once a head; they split keys among CTAs,
    which takes a few microseconds to put together again."""
    enough = keys >= 768 or (keys >= 256 and batch * heads >= 256)
    few = queries <= 16 or queries * heads <= ROWS * heads_k
    alone = queries <= 32 and batch * heads_k <= 128
    long = queries <= 128 and batch * heads <= 64 and keys >= 16384
    return enough and (few or alone or long)


@dataclass(frozen=True)
class _Preference:
    """Between rows that compute the same: where it ``holds``, those that it ``picks`` come before the others."""

    holds: Callable[[Problem, Regime], bool]  # of a problem without its sizes
    picks: Callable[[KernelSpec, Arch], bool]  # a row, for a device of this arch
    why: str  # with {arch}, the target that was chosen


def _decodes_d64(p: Problem, sizes: Regime) -> bool:
    plain = p.mask is Mask.BAND and p.score is Score.PLAIN  # as it was measured
    return sizes.crowd and plain and p.kv is KvLayout.PAGED and (p.head_dim, p.head_dim_v) == (64, 64)


_PREFERENCES = (
    _Preference(
        lambda p, sizes: bool(sizes.rows),
        lambda spec, arch: spec.op is Op.DECODE,
        "decode kernels read K and V once for all query heads of a KV head",
    ),
    _Preference(
        lambda p, sizes: sizes.rows == SHORT_ROWS,
        lambda spec, arch: spec.op is not Op.DECODE or spec.short,
        f"its short twin is for up to {SHORT_ROWS} queries x heads of a KV head",
    ),
    _Preference(
        lambda p, sizes: sizes.rows == ROWS,
        lambda spec, arch: spec.op is not Op.DECODE or not spec.short,
        f"is cut for up to {SHORT_ROWS} queries x heads of a KV head",
    ),
    # H200, 32 heads, 1 to 64 queries, 2k keys: 278 against 395 us for 64 sequences. For 8 it was 50.4 against 57.8,
    # which the wgmma row's present tile, a fifth faster for many queries and not timed with one, may well have turned
    # round; with one sequence sm90 has 0.6 times the speed, and at other head dims it never wins
    # (docs/notes/decoding_h200.md).
    _Preference(
        _decodes_d64,
        lambda spec, arch: spec.arch is Arch.SM90,
        "{arch} kernels are faster with pages, head dim 64, up to 64 queries, 2048 or more batch * heads",
    ),
    _Preference(
        lambda p, sizes: True,
        lambda spec, arch: spec.arch is arch.targets[0],
        "{arch} kernels come first on this GPU (measured from 512 tokens up)",
    ),
    _Preference(
        lambda p, sizes: sizes.short,
        lambda spec, arch: spec.short,
        f"up to {tiles.SHORT_KEYS} keys its short twin is faster",
    ),
    _Preference(
        lambda p, sizes: not sizes.short,
        lambda spec, arch: not spec.short,
        f"is cut for up to {tiles.SHORT_KEYS} keys",
    ),
)
"""The most important first: the first preference that tells two rows apart decides which of them comes first."""


def _reasons(spec: KernelSpec, problem: Problem, sizes: Regime) -> list[str]:
    """Why a row does not compute the problem; the most general reason first."""
    reasons = []
    if (spec.op, problem.op) == (Op.DECODE, Op.FWD):
        if not sizes.rows:
            reasons.append("is faster only for few queries on many keys")
    elif spec.op is not problem.op:
        reasons.append(f"computes {spec.op.value}, problem is {problem.op.value}")
    if spec.arch not in problem.arch.targets:
        reasons.append(f"is for {spec.arch.value}, device is {problem.arch.value}")
    if spec.dtype is not problem.dtype:
        reasons.append(f"reads {spec.dtype.value}, problem is {problem.dtype.value}")
    if (spec.head_dim, spec.head_dim_v) != (problem.head_dim, problem.head_dim_v):
        reasons.append(
            f"has head dims {spec.head_dim}x{spec.head_dim_v}, problem has {problem.head_dim}x{problem.head_dim_v}"
        )
    if not catalog.serves(spec, spec.mask, problem.score):
        reasons.append(f"computes {spec.score.value} scores, problem needs {problem.score.value}")
    if not catalog.serves(spec, problem.mask, spec.score):
        reasons.append(f"applies {spec.mask.value} masks, problem needs {problem.mask.value}")
    if sizes.any_pages and spec.op is Op.FWD:
        reasons.append(f"reads pages of {', '.join(map(str, PAGE_SIZES))} tokens only")
    if spec.kv is not problem.kv:
        reasons.append(f"reads {spec.kv.value} K and V, problem has {problem.kv.value}")
    return reasons


def trace(problem: Problem, tile: str | None = None) -> Trace:
    """Walks every row of the catalogue; ``chosen`` is None when nothing fits.

    Args:
        tile: forced by the caller, see ``choose``.

    Raises:
        InputError: ``tile`` is not a tile of the kernel; without one, nothing.
    """
    p = problem
    accepted, rejected = _walk(
        Problem(p.arch, p.dtype, p.head_dim, p.head_dim_v, p.op, p.mask, p.score, p.kv),
        regime(p.batch, p.heads, p.heads_k, p.seqlen_q, p.seqlen_k, p.page_size),
    )
    if not accepted:
        return Trace(problem, None, rejected)
    found = Trace(problem, accepted[0], rejected)
    return found if tile is None else _force(found, accepted, tile)


def _force(found: Trace, accepted: Sequence[KernelSpec], text: str) -> Trace:
    """The walk's outcome with another target or tile."""
    best = accepted[0]
    word, _, rest = text.strip().partition(" ")
    target = next((arch for arch in Arch if arch.value == word), None)
    rest = text if target is None else rest.strip()
    # A short row differs from its long twin by the tile alone. A tile forced by the caller therefore goes on the long
    # twin, whatever the length. What is forced is the tile of a forward kernel; decode kernels have few.
    rows = [spec for spec in accepted if target in (None, spec.arch) and not (rest and spec.short)]
    rows = [spec for spec in rows if spec.op is not Op.DECODE]
    if not rows:
        raise InputError(
            f"tile {text!r} asks for {word}; targets that compute this on {found.problem.arch.value}: "
            + _listed(arch.value for arch in found.problem.arch.targets if any(s.arch is arch for s in accepted))
        )
    spec = rows[0]
    forced = forced_tile.parse(spec, rest) if rest else catalog.tile(spec)
    rejected = [(other, why) for other, why in found.rejected if other != spec]
    if spec != best:
        what = "a tile" if spec.arch is best.arch else spec.arch.value
        rejected.insert(0, (best, f"the caller forced {what}"))
    return Trace(found.problem, spec, tuple(rejected), forced)


@lru_cache(maxsize=4096)
def _walk(problem: Problem, sizes: Regime) -> tuple[tuple[KernelSpec, ...], tuple[tuple[KernelSpec, str], ...]]:
    """The walk itself: the rows that compute a problem, the best first, and why the others are not taken.

    The problem is without its sizes, of which ``sizes`` says all that counts.
    """
    accepted: list[KernelSpec] = []
    rejected: list[tuple[KernelSpec, list[str]]] = []
    for spec in catalog.enumerate_specs():
        reasons = _reasons(spec, problem, sizes)
        if reasons:
            rejected.append((spec, reasons))
        else:
            accepted.append(spec)
    if not accepted:
        accepted = [spec for spec in _expressed(problem) if catalog.exists(spec)]
    rules = [preference for preference in _PREFERENCES if preference.holds(problem, sizes)]

    def ranks(spec: KernelSpec) -> list[bool]:
        return [not rule.picks(spec, problem.arch) for rule in rules]

    accepted.sort(key=lambda spec: (ranks(spec), spec.name))
    for spec in accepted[1:]:
        best = accepted[0]
        decisive = next(rule for rule, a, b in zip(rules, ranks(best), ranks(spec), strict=True) if a != b)
        rejected.append((spec, [f"computes the same; {decisive.why.format(arch=best.arch.value)}"]))
    alike = set(accepted)
    # What nearly fitted is worth reading; the hundreds of others are not.
    rejected.sort(key=lambda item: (item[0] not in alike, len(item[1]), _distance(item[0], problem), item[0].name))
    return tuple(accepted), tuple((spec, "; ".join(reasons)) for spec, reasons in rejected[:8])


def _expressed(p: Problem) -> list[KernelSpec]:
    """The kernels that compute exactly a problem, whether or not anybody has them."""
    return [KernelSpec(p.op, arch, p.dtype, p.head_dim, p.head_dim_v, p.mask, p.score, p.kv) for arch in p.arch.targets]


def _distance(spec: KernelSpec, problem: Problem) -> int:
    return abs(spec.head_dim - problem.head_dim) + abs(spec.head_dim_v - problem.head_dim_v)


def kernels(problem: Problem) -> tuple[KernelSpec, ...]:
    """The kernels of a problem and of all that are like it with fewer sequences, queries or keys; its own first.

    Raises:
        UnsupportedProblem: as ``choose``.
    """
    group = max(1, problem.heads // max(1, problem.heads_k))
    few = [max(1, min(problem.seqlen_q, each)) for each in (128, 32, 16, ROWS // group, SHORT_ROWS // group)]
    keys = problem.seqlen_k
    fewer = [] if keys is None else [min(keys, tiles.SHORT_KEYS), min(keys, 256)]
    sizes = product((problem.batch, 1), (problem.seqlen_q, *few, 1), (keys, *fewer, 1))
    each = (choose(replace(problem, batch=b, seqlen_q=q, seqlen_k=k)).spec for b, q, k in sizes)
    return tuple(dict.fromkeys(each))


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def choose(problem: Problem, tile: str | None = None) -> Choice:
    """The kernel for a problem.

    Args:
        tile: forced by the caller: a tile as ``forced_tile.parse`` reads it, a target ("sm90"), or both.

    Raises:
        InputError: ``tile`` is not a tile of the kernel.
        UnsupportedProblem: no row computes it; the message says which axis stands in the way and what exists.
    """
    found = trace(problem, tile)
    if found.chosen is not None:
        return Choice(found.chosen, found.forced or catalog.tile(found.chosen), found)
    nearest, reason = found.rejected[0] if found.rejected else (None, "the catalogue is empty")
    hint = f"nearest row {nearest.name if nearest else None}: {reason}."
    here = [s for s in catalog.enumerate_specs(problem.arch) if s.dtype is problem.dtype]
    if (problem.head_dim, problem.head_dim_v) not in {(s.head_dim, s.head_dim_v) for s in here}:
        dims = sorted({(s.head_dim, s.head_dim_v) for s in here})
        names = _listed(str(d) if d == dv else f"{d}x{dv}" for d, dv in dims)
        hint += f" Head dims on {problem.arch.value} for {problem.dtype.value}: {names}."
    raise UnsupportedProblem(
        f"no kernel computes this: {problem}. {hint} "
        "fallback='torch' runs it in plain torch instead, if that is what you want.",
        problem=problem,
        rejections=[(spec.name, why) for spec, why in found.rejected],
        nearest=nearest.name if nearest else None,
    )
