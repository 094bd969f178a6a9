# SPDX-License-Identifier: Apache-2.0
"""From what was asked to the kernel that computes exactly that, with the reason for every row that was passed over.

Selection is exact: a row serves a problem only when it computes the same thing. Asking whether a problem is supported
walks the same rows; there is no second, looser test.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from . import catalog, forced_tile
from .catalog import Tile
from .errors import InputError, UnsupportedProblem
from .spec import Arch, DType, KernelSpec, KvLayout, Mask, Op, Score


@dataclass(frozen=True)
class Problem:
    """What was asked, without pointers or strides. Lengths are upper bounds for varlen batches.

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
    seqlen_k: int = 1
    heads: int = 1
    heads_k: int = 1
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)

    def __str__(self) -> str:
        if self.op is Op.PACK:
            return f"{self.op.value} a mask of {self.dtype.value} on {self.arch.value}"
        dims = f"{self.head_dim}" + (f"x{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        words = [
            f"{self.op.value} on {self.arch.value}, {self.dtype.value}, head dim {dims}",
            f"batch {self.batch}, {self.heads}/{self.heads_k} heads, {self.seqlen_q} x {self.seqlen_k} tokens",
        ]
        words += ["varlen"] if self.varlen else []
        words += ["causal"] if self.causal else []
        left, right = self.window
        if left is not None or (right is not None and not self.causal):
            words.append(f"window ({left}, {right})")
        words += [self.score.value] if self.score is not Score.PLAIN else []
        words += ["packed mask"] if self.mask is Mask.PACKED else []
        words += ["paged KV"] if self.kv is KvLayout.PAGED else []
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
        lines += [f"rejected  {spec.name}  {reason}" for spec, reason in self.rejected]
        return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    """A kernel for a problem, and why this one."""

    spec: KernelSpec
    tile: Tile
    trace: Trace


def _reasons(spec: KernelSpec, problem: Problem) -> list[str]:
    """Why a row does not compute the problem; the gravest first."""
    reasons = []
    if spec.op is not problem.op:
        reasons.append(f"computes {spec.op.value}, problem is {problem.op.value}")
    if spec.arch not in problem.arch.targets:
        reasons.append(f"is for {spec.arch.value}, device is {problem.arch.value}")
    if spec.dtype is not problem.dtype:
        reasons.append(f"reads {spec.dtype.value}, problem is {problem.dtype.value}")
    if (spec.head_dim, spec.head_dim_v) != (problem.head_dim, problem.head_dim_v):
        reasons.append(
            f"has head dims {spec.head_dim}x{spec.head_dim_v}, problem has {problem.head_dim}x{problem.head_dim_v}"
        )
    if spec.score is not problem.score:
        reasons.append(f"computes {spec.score.value} scores, problem needs {problem.score.value}")
    if spec.mask is not problem.mask:
        reasons.append(f"applies {spec.mask.value} masks, problem needs {problem.mask.value}")
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
    chosen, rejected = _walk(Problem(p.arch, p.dtype, p.head_dim, p.head_dim_v, p.op, p.mask, p.score, p.kv))
    if tile is None or chosen is None:
        return Trace(problem, chosen, rejected)
    return _force(Trace(problem, chosen, rejected), chosen, tile)


def _force(found: Trace, best: KernelSpec, text: str) -> Trace:
    """The walk's outcome with another target or tile."""
    word, _, rest = text.strip().partition(" ")
    target = next((arch for arch in Arch if arch.value == word), None)
    if target is None:
        return replace(found, forced=forced_tile.parse(best, text))
    spec = replace(best, arch=target)
    targets = [arch for arch in found.problem.arch.targets if catalog.exists(replace(best, arch=arch))]
    if target not in targets:
        raise InputError(
            f"tile {text!r} asks for {target.value}; targets that compute this on {found.problem.arch.value}: "
            + ", ".join(arch.value for arch in targets)
        )
    rejected = [(other, why) for other, why in found.rejected if other != spec]
    if spec != best:
        rejected.insert(0, (best, f"the caller forced {target.value}"))
    forced = forced_tile.parse(spec, rest) if rest.strip() else catalog.tile(spec)
    return Trace(found.problem, spec, tuple(rejected), forced)


@lru_cache(maxsize=4096)
def _walk(problem: Problem) -> tuple[KernelSpec | None, tuple[tuple[KernelSpec, str], ...]]:
    """The walk itself, for a problem without lengths: no row depends on them, and a serving process meets new ones
    all the time."""
    accepted: list[KernelSpec] = []
    rejected: list[tuple[KernelSpec, list[str]]] = []
    for spec in catalog.enumerate_specs():
        reasons = _reasons(spec, problem)
        if reasons:
            rejected.append((spec, reasons))
        else:
            accepted.append(spec)
    # Several targets of one device compute the same; the order of Arch.targets decides, measured from 512 tokens up.
    accepted.sort(key=lambda spec: problem.arch.targets.index(spec.arch))
    chosen = accepted[0] if accepted else None
    for spec in accepted[1:]:
        assert chosen is not None
        why = f"computes the same; {chosen.arch.value} kernels come first on this GPU (measured from 512 tokens up)"
        rejected.append((spec, [why]))
    alike = set(accepted)
    # What nearly fitted is worth reading; the hundreds of others are not.
    rejected.sort(key=lambda item: (item[0] not in alike, len(item[1]), _distance(item[0], problem), item[0].name))
    return chosen, tuple((spec, "; ".join(reasons)) for spec, reasons in rejected[:8])


def _distance(spec: KernelSpec, problem: Problem) -> int:
    return abs(spec.head_dim - problem.head_dim) + abs(spec.head_dim_v - problem.head_dim_v)


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
