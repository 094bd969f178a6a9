# SPDX-License-Identifier: Apache-2.0
"""How results look on paper: aligned tables, sizes, the JSON envelope. Text in, text out."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..kernels import catalog, sources
from ..kernels.cache import Sweep
from ..kernels.ledger import Ledger, Status
from ..kernels.spec import KernelSpec
from ..kernels.store import Inventory, State
from ..kernels.tile import Tile
from ..toolchain import nvcc
from ..toolchain.build import BuildResult
from ..toolchain.check import Checked

if TYPE_CHECKING:
    from ..verify.run import Report

SCHEMA = 1
LIST_HEADER = ("kernel", "arch", "tile", "smem", "regs", "from", "verified", "state")


def envelope(items: Iterable[Any], **more: Any) -> str:
    """What every ``--json`` prints: one object with schema, version and items."""
    body = {"schema": SCHEMA, "version": __version__, "items": list(items), **more}
    return json.dumps(body, indent=1)


def size(count: int) -> str:
    """Bytes for people: 512 B, 96 KiB, 1.5 MiB."""
    if count < 1024:
        return f"{count} B"
    if count < 1 << 20:
        return f"{count / 1024:.4g} KiB"
    return f"{count / (1 << 20):.4g} MiB"


def axes(spec: KernelSpec) -> dict[str, Any]:
    """What a kernel computes, axis by axis."""
    return {
        "name": spec.name,
        "arch": spec.arch.value,
        "op": spec.op.value,
        "dtype": spec.dtype.value,
        "head_dim": spec.head_dim,
        "head_dim_v": spec.head_dim_v,
        "mask": spec.mask.value,
        "score": spec.score.value,
        "kv": spec.kv.value,
        "short": spec.short,
    }


def list_item(spec: KernelSpec, state: State, proof: Status) -> dict[str, Any]:
    """One item of ``fmha list --json``; facts of a cubin are null where there is none."""
    row = state.row
    tile = catalog.tile(spec)
    built = row.to_json() if row else {}
    facts = {
        name: built.get(name)
        for name in ("registers", "spill_bytes", "abi", "params_size", "size", "sha256", "ptx_sha256", "code", "nvcc")
    }
    record = proof.record
    return {
        **axes(spec),
        "tile": str(tile),
        "threads": tile.threads,
        "smem_bytes": catalog.smem_bytes(spec, tile),
        **facts,
        "state": state.word,
        "reason": state.reason,
        "from": row.root if row else None,
        "path": str(row.path) if row and row.path else None,
        "verified": {
            "state": proof.word,
            "reason": proof.reason,
            "how": record.how if record else None,
            "device": record.device if record else None,
            "emulator": proof.emulated,
        },
    }


def list_row(item: dict[str, Any]) -> tuple[str, ...]:
    """The line of ``fmha list`` that belongs to an item."""
    ready = item["state"] == "ready"
    proof = item["verified"]
    if proof["state"] == "verified":
        how = f"{proof['how']} {proof['device']}"
    elif proof["state"] == "same code":
        how = "same code as sm89"
    elif proof["emulator"]:
        how = "emulator"
    else:
        how = proof["state"]
    state = item["state"]
    if state == "not built":
        state += f"  (fmha build {item['name']})"
    elif not ready:
        state += f"  ({item['reason']})"
    return (
        item["name"],
        item["arch"],
        item["tile"],
        size(item["smem_bytes"]),
        str(item["registers"]) if ready else "-",
        item["from"] if ready else "-",
        how,
        state,
    )


def list_totals(items: Sequence[dict[str, Any]]) -> str:
    """The closing line of ``fmha list``."""
    words = Counter(item["state"] for item in items)
    proven = sum(item["verified"]["state"] == "verified" for item in items)
    emulated = sum(item["verified"]["emulator"] for item in items)
    states = [f"{words[word]} {word}" for word in ("ready", "stale", "not built", "broken")]
    whole = len(catalog.enumerate_specs())
    counted = f"{len(items)} of {whole}" if len(items) < whole else f"{whole}"
    parts = [f"{counted} in catalogue", *(s for s in states if not s.startswith("0 "))]
    parts.append(f"{proven} verified on a GPU")
    same = sum(item["verified"]["state"] == "same code" for item in items)
    parts += [f"{same} of the same code as one that is"] if same else []
    other = sum(item["verified"]["state"] == "other bytes" for item in items)
    parts += [f"{other} of verified code but other bytes"] if other else []
    return " · ".join([*parts, f"{emulated} on the emulator"])


def build_item(result: BuildResult) -> dict[str, Any]:
    """One item of ``fmha build --json``."""
    row = result.row
    return {
        **axes(result.spec),
        "tile": str(result.tile),
        "status": result.status,
        "seconds": round(result.seconds, 2),
        "registers": row.registers if row else None,
        "spill_bytes": row.spill_bytes if row else result.spill_stores + result.spill_loads,
        "smem_bytes": row.smem_bytes if row else None,
        "size": row.size if row else None,
        "sha256": row.sha256 if row else None,
        "path": str(row.path) if row and row.path else None,
        "lock": result.lock,
        "warning": result.warning or None,
        "error": str(result.error) if result.error else None,
    }


def build_line(result: BuildResult) -> str:
    """The line of ``fmha build`` for one kernel."""
    if result.row is None:
        return f"FAIL  {result.spec.name}  {result.error}"
    row = result.row
    facts = f"{row.registers} regs  {size(row.smem_bytes)} smem  {size(row.size)}"
    spills = f"  {row.spill_bytes} B spilled" if row.spill_bytes else ""
    seconds = f"  {result.seconds:.1f} s" if result.status == "built" else "  up to date"
    lock = "  DIFFERS from the committed manifest" if result.lock == "differs" else ""
    return f"ok    {result.spec.name}  {row.tile}  {facts}{spills}{seconds}{lock}"


def check_item(one: Checked) -> dict[str, Any]:
    """One item of ``fmha build --check --json``."""
    return {
        **axes(one.spec),
        "result": one.word,
        "reason": one.reason or None,
        "sha256": one.row.sha256 if one.row else None,
        "code": one.row.code if one.row else None,
    }


def check_line(one: Checked) -> str:
    """The line of ``fmha build --check`` for a row that is not simply identical."""
    return f"{one.word}  {one.spec.name}" + (f"  ({one.reason})" if one.reason else "")


def check_totals(checked: Sequence[Checked], seconds: float) -> str:
    """The closing line of ``fmha build --check``."""
    words = Counter(one.word for one in checked)
    counts = [f"{words[word]} {word}" for word in words]
    return " · ".join([f"checked {len(checked)} rows in {seconds:.1f} s", *counts])


def variant_line(spec: KernelSpec, tile: Tile) -> str:
    """The line of ``fmha tune --dry-run`` for one variant."""
    own = "  (the catalogue's)" if tile == catalog.tile(spec) else ""
    return f"{spec.name}  {tile}  {size(catalog.smem_bytes(spec, tile))} smem{own}"


def build_totals(results: Sequence[BuildResult], wanted: int, seconds: float, workers: int) -> str:
    """The closing line of ``fmha build``."""
    built = [r for r in results if r.status == "built"]
    current = sum(r.status == "up to date" for r in results)
    parts = [f"built {len(built)} of {wanted} in {seconds:.1f} s ({workers} workers)"]
    parts += [f"{current} up to date"] if current else []
    failed = sum(r.status == "failed" for r in results)
    parts += [f"{failed} failed"] if failed else []
    spilling = sum(bool(r.warning) for r in results)
    parts += [f"{spilling} with more spills than the catalogue allows"] if spilling else []
    rows = [r.row for r in results if r.row is not None]
    if rows:
        parts.append(f"largest {size(max(row.size for row in rows))}")
        parts.append(f"spills {sum(row.spill_bytes for row in rows)}")
    differing = sum(r.lock == "differs" for r in results)
    parts += [f"{differing} differ from the manifest"] if differing else []
    return " · ".join(parts)


def sweep_lines(swept: Sweep) -> list[str]:
    """What ``fmha cache clean`` or ``prune`` removed, or would have: a line each."""
    return [f"{item.path}  {size(item.size)}" + (f"  ({item.reason})" if item.reason else "") for item in swept.removed]


def sweep_totals(swept: Sweep, dry_run: bool) -> list[str]:
    """Its closing lines: how much went, what was left and why."""
    verb = "would remove" if dry_run else "removed"
    parts = [f"{verb} {len(swept.removed)} entries ({size(swept.size)}) from {swept.root}"]
    parts += [f"{swept.kept} in use"] if swept.kept else []
    lines = [" · ".join(parts)]
    if swept.adopted:
        lines.append(f"{'would mark' if dry_run else 'marked'} it as a cache: all that it held is ours")
    lines += [f"left {item.path}: {item.reason}" for item in swept.left]
    lines += [f"could not remove {item.path}: {item.reason}" for item in swept.failed]
    return lines


def proofs(inventory: Inventory) -> list[Status]:
    """What the ledger says about many kernels: about the cubin at hand, else about the one that the manifest locks."""
    ledger = Ledger.load(packaged=inventory.packaged)
    with sources.unchanged():
        return [ledger.status(spec, state.row) for spec, state in inventory.states.items()]


def verify_facts(outcome: Report) -> dict[str, Any]:
    """What ``fmha verify --json`` says about one kernel, besides its axes."""
    return {
        "ok": outcome.ok,
        "device": outcome.device,
        "how": outcome.how,
        "passed": len(outcome.passed),
        "failed": [
            {"case": one.case.id, "failures": [str(failure) for failure in one.failures]} for one in outcome.failed
        ],
        "skipped": [{"case": one.case.id, "reason": one.reason} for one in outcome.skipped],
        "worst_rel_l2": outcome.worst_rel_l2,
        "worst_ratio": outcome.worst.ratio if outcome.worst else None,
        "seconds": round(sum(one.seconds for one in outcome.results), 2),
    }


def build_script(specs: Sequence[KernelSpec], tile: Tile | None = None) -> list[str]:
    """Shell lines that compile kernels in the present folder; nothing is published."""
    compiler, cxx = nvcc.find_nvcc(), nvcc.find_host_cxx()
    lines = []
    for spec in specs:
        source = sources.render(spec, tile or catalog.tile(spec)).rstrip()
        command = nvcc.command_line(compiler, cxx, (*sources.flags(spec.arch), "-cubin"), spec, "cubin")
        lines += [f"cat > {spec.name}.cu <<'END'", *source.splitlines(), "END"]
        lines += [shlex.join(command), ""]
    return lines
