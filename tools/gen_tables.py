#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the generated parts of the README and of the pages in docs from what is recorded.

    python tools/gen_tables.py            rewrite the parts between markers
    python tools/gen_tables.py --check    change nothing, exit 1 when a part is out of date

A part lies between ``<!-- generated:NAME -->`` and ``<!-- /generated:NAME -->``. Its sources are
the catalogue, the ledger cubins/verified/, the records docs/bench/*.json and docs/accuracy/*.json, and the tuning
records docs/notes/tune_*.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import speed_tables  # noqa: E402
from speed_tables import markdown  # noqa: E402

from fmha_runtime.errors import ArtifactError  # noqa: E402
from fmha_runtime.kernels import catalog, ledger, sources, store  # noqa: E402
from fmha_runtime.kernels.forward.tiles import SHORT_KEYS  # noqa: E402
from fmha_runtime.kernels.pack import family as pack_family  # noqa: E402
from fmha_runtime.kernels.spec import HEAD_DIMS, Arch, KernelSpec, Op  # noqa: E402
from fmha_runtime.kernels.tile import Tile  # noqa: E402
from fmha_runtime.tune.record import Outcome, Tuned, TuneRecord  # noqa: E402


def support(root: Path) -> str:
    """Head dim and features x arch: how each kernel was proven, dtypes together where they agree."""
    records = ledger.Ledger.load(root / "cubins" / ledger.FOLDER)
    rows = [["head dim", "features", *(arch.value for arch in Arch)]]
    everything = [s for s in catalog.enumerate_specs() if s.op is Op.FWD]
    sets = dict.fromkeys(sorted((features(s) for s in everything), key=lambda x: ("short" in x, len(x), x)))
    for words_of in sets:
        alike: dict[tuple[str, ...], list[str]] = {}  # head dims whose cells are the same share a row
        for d, dv in HEAD_DIMS:
            specs = [s for s in everything if (s.head_dim, s.head_dim_v) == (d, dv) and features(s) == words_of]
            if not specs:  # short rows are there for some head dims only
                continue
            cells = tuple(_cell([s for s in specs if s.arch is arch], records) for arch in Arch)
            alike.setdefault(cells, []).append(str(d) if d == dv else f"{d}x{dv}")
        rows += [[", ".join(dims), " ".join(words_of) or "plain", *cells] for cells, dims in alike.items()]
    alike = {}
    for d, dv in HEAD_DIMS:
        specs = [s for s in catalog.enumerate_specs() if s.op is Op.DECODE and (s.head_dim, s.head_dim_v) == (d, dv)]
        cells = tuple(_cell([s for s in specs if s.arch is arch], records) for arch in Arch)
        alike.setdefault(cells, []).append(str(d) if d == dv else f"{d}x{dv}")
    rows += [[", ".join(dims), "decode: all of the above", *cells] for cells, dims in alike.items()]
    packers = [[s for s in (pack_family.spec(arch),) if catalog.exists(s)] for arch in Arch]
    rows.append(["any", "masks are packed", *(_cell(specs, records) for specs in packers)])
    devices = sorted({r.device for r in records if r.on_gpu})
    legend = (
        "Every attention kernel exists in fp16 and bf16. **cubin**: this cubin passed `fmha verify` on a "
        "GPU; **ptx**: its PTX did, through the driver's JIT on a newer GPU; **emulator**: its "
        "source did, on the CPU emulator only; **same code**: the sm89 kernel of equal tile and code passed on a GPU; "
        "**other bytes**: another build of its code passed; **stale**: the code or tile changed since a GPU ran it; "
        "**unverified**: no record."
    )
    short = sum(spec.short for spec in everything)
    legend += f" *short*: {short} kernels that compute what their plain twins do, cut for up to {SHORT_KEYS} keys."
    legend += (
        " *decode*: one kernel for every mask and score, for few queries on many keys, with K and V in pages or not."
    )
    where = f" Verified on: {', '.join(devices)}." if devices else ""
    return f"{markdown(rows)}\n\n{legend}{where}"


def _cell(specs: Sequence[KernelSpec], records: ledger.Ledger) -> str:
    """How the kernels of one place of the table were proven, once where they agree."""
    words: dict[str, dict[str, None]] = {}
    for spec in specs:
        words.setdefault(spec.dtype.value, {})[proof(spec, records)] = None
    joined = {dtype: " or ".join(each) for dtype, each in words.items()}
    if len(set(joined.values())) == 1:
        return next(iter(joined.values()))
    return ", ".join(f"{dtype} {word}" for dtype, word in joined.items()) or "no"


def features(spec: KernelSpec) -> tuple[str, ...]:
    """The words of a kernel's name that say what it does besides plain attention."""
    plain = KernelSpec(spec.op, spec.arch, spec.dtype, spec.head_dim, spec.head_dim_v)
    return tuple(spec.name.removeprefix(plain.name).split("_")[1:])


def proof(spec: KernelSpec, records: ledger.Ledger) -> str:
    """The word of the support table for one kernel."""
    status = records.status(spec, store.locked(spec))
    if status.word == "verified" and status.record is not None:
        return status.record.how
    return "emulator" if status.emulated and status.word not in ("same code", "other bytes") else status.word


def tiles(root: Path) -> str:
    """What tuning runs chose, and what the catalogue has now."""
    parts = []
    for path in sorted((root / "docs" / "notes").glob("tune_*.json")):
        record = TuneRecord.load(path)
        rows = [["kernel", "choice", "score", "catalogue then", "score", "catalogue now", "variants", "sources"]]
        for tuned in record.kernels:
            spec, chosen = KernelSpec.parse(tuned.kernel), tuned.choice
            own = next((o for o in tuned.outcomes if o.variant == tuned.catalogue), None)
            now = str(catalog.tile(spec)) if catalog.exists(spec) else "-"
            best = chosen.variant if chosen else "-"
            right = sum(tuned.score(o) is not None for o in tuned.outcomes)
            row = [f"`{tuned.kernel}`", best, _score(tuned, chosen), tuned.catalogue, _score(tuned, own)]
            row += [now if now == best else f"**{now}**", f"{right} of {len(tuned.outcomes)} right and timed"]
            current = catalog.exists(spec) and sources.code(spec, Tile.parse(tuned.catalogue)) == tuned.code
            rows.append([*row, "present" if current else "older"])
        where = f"{record.meta['gpu']}, {record.meta['date'][:10]}"
        parts.append(
            f"[{path.stem}](notes/{path.name}), {where}. The score is the geometric mean of the speed over cuDNN's."
        )
        parts.append(markdown(rows))
    return "\n\n".join(parts) or "No run is recorded yet: `fmha tune --json docs/notes/tune_NAME.json`."


def _score(tuned: Tuned, outcome: Outcome | None) -> str:
    score = tuned.score(outcome) if outcome else None
    return "-" if score is None else f"{score:.3f}"


def host_time(root: Path) -> str:
    """Every record that tools/host_time.py wrote, a column each."""
    found = {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted((root / "docs" / "host").glob("*.json"))}
    records = list(found.values())
    if not records:
        return "Nothing is recorded yet: `python tools/host_time.py --out docs/host/NAME.json` on a GPU."
    calls = list(dict.fromkeys(call for record in records for call in record["host_us"]))
    heads = (f"{p.stem} ({r['meta']['gpu']}, {r['meta']['date'][:10]})" for p, r in found.items())
    table = [["us a call, median (best)", *heads]]
    for call in calls:
        times = (record["host_us"].get(call) for record in records)
        table.append([call, *("-" if x is None else f"{x['median_us']:.1f} ({x['best_us']:.1f})" for x in times)])
    parts = [markdown(table)]
    for path, record in found.items():
        if rows := record.get("new_lengths"):
            heads = [
                "us a call with lengths not seen before",
                "median",
                "99th percentile",
                "the same call again",
                "MB grown",
            ]
            cells = [
                [name, *(f"{row[key]:.1f}" for key in ("median_us", "p99_us", "again_us", "grown_mb"))]
                for name, row in rows.items()
            ]
            parts += [
                f"{path.stem} ({record['meta']['gpu']}, {record['meta']['date'][:10]}):",
                markdown([heads, *cells]),
            ]
        if first := record.get("first"):
            parts.append(
                f"Import and first call {first['import_and_call_ms']:.0f} ms beside torch's own start; the first call "
                f"of another kernel, which loads it, {first['kernel_ms']:.1f} ms ({path.stem})."
            )
    return "\n\n".join(parts)


def accuracy(root: Path) -> str:
    """Every case of every record that tools/accuracy.py wrote: relative L2 errors, and ratios to the best peer."""
    paths = sorted((root / "docs" / "accuracy").glob("*.json"))
    if not paths:
        return "Nothing is recorded yet: `python tools/accuracy.py` on a GPU writes a record."
    import accuracy as tool  # beside this file; needs torch, which no other part does

    parts = []
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != tool.SCHEMA:
            raise ArtifactError(
                f"{path} has schema {record['schema']}: measure again with tools/accuracy.py", path=path
            )
        meta, rows = record["meta"], record["rows"]
        peers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != tool.OURS]
        errors = {(r["feature"], r["dtype"], r["head_dim"], r["provider"]): r["rel_l2"] for r in rows}
        table = [["case", "ours", *peers, "L2 / best", "largest / best fused"]]
        for one in tool.verdicts(rows):
            found = (errors.get((*one["case"], name)) for name in (tool.OURS, *peers))
            ratios = (one["l2_ratio"], one["max_ratio"])
            feature, dtype, d = one["case"]
            cells = ["-" if x is None else f"{x:.2e}" for x in found]
            cells += [f"{x:.2f}" if x <= 2 else f"**{x:.2f}**" for x in ratios]
            table.append([f"{feature} {dtype} d{d}", *cells])
        where = f"{meta['gpu']}, torch {meta['torch']}, cuDNN {meta['cudnn']}, {meta['seqlen']} tokens"
        parts += [f"## {path.stem}", f"{where}, commit {str(meta['commit'])[:12]}, {meta['date'][:10]}."]
        parts.append(markdown(table))
    return "\n\n".join(parts)


PARTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"support": support, "speed": speed_tables.summary},
    "docs/performance.md": {
        "overview": speed_tables.overview,
        "features": speed_tables.features,
        "decode": speed_tables.decode,
        "host": host_time,
    },
    "docs/performance_cells.md": {
        "cells": speed_tables.cells,
        "tiles": tiles,
        "records": speed_tables.full_records,
    },
    "docs/notes/targets.md": {"targets": speed_tables.targets},
    "docs/accuracy.md": {"accuracy": accuracy},
}


def regenerate(text: str, name: str, content: str) -> str:
    """``text`` with the part called ``name`` replaced.

    Raises:
        ArtifactError: there is not exactly one such part.
    """
    begin, end = f"<!-- generated:{name} -->", f"<!-- /generated:{name} -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    new, count = pattern.subn(lambda _: f"{begin}\n{content}\n{end}", text)
    if count != 1:
        raise ArtifactError(f"expected one part {begin} ... {end}, found {count}")
    return new


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if outdated")
    options = parser.parse_args(arguments)
    outdated = []
    for name, parts in PARTS.items():
        path = ROOT / name
        old = new = path.read_text(encoding="utf-8")
        for part, render in parts.items():
            new = regenerate(new, part, render(ROOT))
        if new != old:
            outdated.append(name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    verb = "is out of date: run python tools/gen_tables.py" if options.check else "rewritten"
    for name in outdated:
        print(f"{name} {verb}")
    return 1 if options.check and outdated else 0


if __name__ == "__main__":
    raise SystemExit(main())
