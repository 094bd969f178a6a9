#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the generated parts of README.md, docs/performance.md and docs/accuracy.md from what is recorded.

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
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from fmha_runtime.bench import cells as bench_cells  # noqa: E402
from fmha_runtime.bench.peers import SDPA  # noqa: E402
from fmha_runtime.bench.record import OURS, BenchRecord  # noqa: E402
from fmha_runtime.bench.run import BAND  # noqa: E402
from fmha_runtime.errors import ArtifactError  # noqa: E402
from fmha_runtime.kernels import catalog, ledger, sources, store  # noqa: E402
from fmha_runtime.kernels.forward.tiles import SHORT_KEYS  # noqa: E402
from fmha_runtime.kernels.pack import family as pack_family  # noqa: E402
from fmha_runtime.kernels.spec import HEAD_DIMS, Arch, DType, KernelSpec, Op  # noqa: E402
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
    where = f" Verified on: {', '.join(devices)}." if devices else ""
    return f"{_markdown(rows)}\n\n{legend}{where}"


def _cell(specs: Sequence[KernelSpec], records: ledger.Ledger) -> str:
    """How the kernels of one place of the table were proven, once where the dtypes agree."""
    words = {spec.dtype.value: proof(spec, records) for spec in specs}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{dtype} {word}" for dtype, word in words.items()) or "no"


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


def speed(root: Path) -> str:
    """The geometric means of every benchmark record, in a sentence each."""
    lines = []
    for path, record in _benchmarks(root):
        link = path.relative_to(root).as_posix()
        forced = f", forced to {record.meta['tile']}" if record.meta.get("tile") else ""
        lines.append(f"[{path.stem}]({link}), {record.meta['gpu']}, torch {record.meta['torch']}{forced}:")
        for peer in record.peers:
            ratios, mean = record.ratios(peer), record.geometric_mean(peer)
            if mean is not None:
                lost = sum(r < 1 for r in ratios.values())
                name = f"torch's {peer} backend" if peer in SDPA else "our band kernel" if peer == BAND else peer
                lines.append(
                    f"- {mean:.2f} times the speed of {name} (geometric mean of {len(ratios)} cells; slower in {lost})"
                )
        times = [h for h in record.host if h.host_us is not None]
        if times:
            host = ", ".join(f"{h.provider} {h.host_us:.1f} us" for h in times)
            lines.append(f"- host time per call: {host}")
        lines.append("")
    return "\n".join(lines).strip() or "No benchmark is recorded yet: `fmha bench` writes one."


def performance(root: Path) -> str:
    """Every cell of every benchmark record."""
    parts = []
    for path, record in _benchmarks(root):
        meta = record.meta
        parts.append(f"## {path.stem}")
        parts.append(
            f"{meta['gpu']}, driver {meta['driver']}, torch {meta['torch']}, "
            f"cuDNN {meta['cudnn']}, commit {str(meta['commit'])[:12]}, {meta['date'][:10]}. "
            + (f"Forced to {meta['tile']}. " if meta.get("tile") else "")
            + "TFLOP/s; `/peer` is our speed over the peer's, bold where we lose."
        )
        if path.with_suffix(".png").exists():
            parts.append(f"![TFLOP/s over sequence length](bench/{path.stem}.png)")
        peers = record.peers
        rows = [["case", *record.providers, *(f"/{peer}" for peer in peers)]]
        ratios = {peer: record.ratios(peer) for peer in peers}
        for case in record.cases:
            speeds = (record.tflops(case, name) for name in record.providers)
            row = [case, *("-" if x is None else f"{x:.0f}" for x in speeds)]
            row += (_ratio(ratios[peer].get(case)) for peer in peers)
            rows.append(row)
        means = [record.geometric_mean(peer) for peer in peers]
        rows.append(["geometric mean", *("" for _ in record.providers), *map(_ratio, means)])
        parts.append(_markdown(rows))
        for (provider, reason), cases in record.absences().items():
            name = "this library" if provider == OURS else provider
            parts.append(f"- {name} is absent from {len(cases)} cells: {reason}")
    return "\n\n".join(parts) or "No benchmark is recorded yet: `fmha bench` writes one."


PEERS_FILE = "peers_h200.json"
FLOOR = 0.95  # no cell of the yardstick may be below
GOAL = 1.05  # of the geometric mean
PACKED_FLOOR = 0.9  # of a packed mask's speed over the band's
LABELS = {"cudnn": "cuDNN", "flash": "torch's flash", "flash_attn_3": "FA3", "flash_attn_4": "FA4"}  # of peers


def yardstick(root: Path) -> str:
    """Ours over the best of those that ran in the same process, and ours / cuDNN against best / cuDNN as the peers were
    measured once, for the cells of the hopper grid."""
    found = _latest(root, [cell.key for cell in bench_cells.hopper() if cell.dtype is DType.BF16])
    if found is None:
        return "Not recorded yet: `fmha bench --grid hopper --json docs/bench/NAME.json`."
    path, record = found
    then, over_cudnn = _peers(root)["cells"], record.ratios("cudnn")
    here = _present(record)
    parts = [f"From [{path.stem}](bench/{path.name}), {_circumstances(record)}."]
    for dtype in ("bf16", "fp16"):
        wanted = [c.key for c in bench_cells.hopper() if c.dtype.value == dtype]
        rows = [["case", "ours", *(LABELS[name] for name in here), "ours / best here", "best / cuDNN then", "quotient"]]
        to_best, quotients, plain = [], [], []
        for case in wanted:
            ours = record.tflops(case, OURS)
            theirs = [record.tflops(case, name) for name in here]
            ratio = _over_best(ours, theirs)
            old = then.get(case)
            quotient = over_cudnn[case] / old["best_over_cudnn"] if old and case in over_cudnn else None
            to_best += [ratio] if ratio is not None else []
            quotients += [quotient] if quotient is not None else []
            plain += [ours / old["best"]] if old and ours else []
            row = [case, *map(_speed, (ours, *theirs)), _mark(ratio, FLOOR)]
            rows.append([*row, f"{old['best_over_cudnn']:.2f}" if old else "-", _mark(quotient, FLOOR)])
        text = f"**{dtype}**, {len(to_best)} of {len(wanted)} cells measured."
        if to_best:
            names, ahead = ", ".join(LABELS[name] for name in here), sum(r > 1 for r in to_best)
            text += f" Over the best of {names} in the same process: {_summary(to_best)}, ahead in {ahead}."
        if quotients:
            text += f" The quotient with the peers' record ({len(quotients)} cells): {_summary(quotients)}."
            text += f" Plain TFLOP/s over that record's best, from another day: {_summary(plain)}."
        parts += [text, _markdown(rows)]
    return "\n\n".join(parts)


def _present(record: BenchRecord) -> list[str]:
    """The peers that ran at least one cell of a record."""
    return [name for name in LABELS if any(t.provider == name and t.tflops for t in record.cells)]


def _over_best(ours: float | None, theirs: Sequence[float | None]) -> float | None:
    best = max((speed for speed in theirs if speed), default=None)
    return ours / best if ours and best else None


def _summary(ratios: Sequence[float]) -> str:
    mean, low = statistics.geometric_mean(ratios), sum(r < FLOOR for r in ratios)
    return f"geometric mean {mean:.3f} (goal {GOAL}), lowest {min(ratios):.2f}, {low} below {FLOOR}"


def goals(root: Path) -> str:
    """TFLOP/s at 16k tokens against the goals."""
    wanted = _peers(root)["goals"]
    found = _latest(root, list(wanted))
    if found is None:
        return "Not recorded yet: see the yardstick."
    path, record = found
    cells, ratios = _peers(root)["cells"], record.ratios("cudnn")
    rows = [["d", "mask", "goal", "ours", "ours / goal", "best peer", "ours / cuDNN", "best / cuDNN"]]
    for case, goal in wanted.items():
        ours = record.tflops(case, OURS)
        _, dims, _, mask = case.split("_")
        row = [dims[1:], {"n": "full", "c": "causal"}[mask], str(goal), _speed(ours)]
        row += [_mark(ours / goal if ours else None, 1.0), str(cells[case]["best"])]
        rows.append([*row, _mark(ratios.get(case), 0.0), f"{cells[case]['best_over_cudnn']:.2f}"])
    met = sum((record.tflops(case, OURS) or 0) >= goal for case, goal in wanted.items())
    return f"From [{path.stem}](bench/{path.name}): {met} of {len(wanted)} goals met.\n\n{_markdown(rows)}"


def feature_speed(root: Path) -> str:
    """The feature cells against those who ran in the same process, and the best of the peers' record."""
    wanted = [cell.key for cell in bench_cells.features()]
    found = _latest(root, wanted)
    if found is None:
        return "Not recorded yet: `fmha bench --grid features --json docs/bench/NAME.json`."
    path, record = found
    then = _peers(root)["cells"]
    here = _present(record)
    rows = [["case", "ours", *(LABELS[name] for name in here), "ours / best here", "best then", "ours / best then"]]
    for case in wanted:
        ours, theirs, old = record.tflops(case, OURS), [record.tflops(case, name) for name in here], then.get(case)
        row = [case, *map(_speed, (ours, *theirs))]
        if old is None:  # a packed mask: held against our own band kernel
            band = _mark(record.ratios(BAND).get(case), PACKED_FLOOR)
            rows.append([*row, f"{band} of our band kernel", "-", "-"])
            continue
        who = next(name for name, value in old["tflops"].items() if value == old["best"])
        row += [_mark(_over_best(ours, theirs), 1.0), f"{old['best']} ({who})"]
        rows.append([*row, _mark(ours / old["best"] if ours else None, 1.0)])
    text = (
        f"From [{path.stem}](bench/{path.name}), {_circumstances(record)}. Bold: below the best peer, or a packed mask"
    )
    text += f" below {PACKED_FLOOR} of the band kernel."
    absent = [f"- {who} is absent from {len(cases)} cells: {why}" for (who, why), cases in record.absences().items()]
    return "\n\n".join([text, _markdown(rows), "\n".join(absent)])


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
        parts.append(_markdown(rows))
    return "\n\n".join(parts) or "No run is recorded yet: `fmha tune --json docs/notes/tune_NAME.json`."


def _score(tuned: Tuned, outcome: Outcome | None) -> str:
    score = tuned.score(outcome) if outcome else None
    return "-" if score is None else f"{score:.3f}"


def _latest(root: Path, cases: Sequence[str]) -> tuple[Path, BenchRecord] | None:
    """The newest record, of kernels that nobody forced, that has at least nine tenths of the cases."""
    fits = []
    for path, record in _benchmarks(root):
        mine = {t.case for t in record.cells if t.provider == OURS and t.tflops is not None}
        if not record.meta.get("tile") and sum(case in mine for case in cases) >= 0.9 * len(cases):
            fits.append((str(record.meta["date"]), path, record))
    return max(fits, key=lambda item: item[:2])[1:] if fits else None


def _peers(root: Path) -> Any:
    for folder in (root, ROOT):  # a test's root has records only
        path = folder / "docs" / "bench" / PEERS_FILE
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise ArtifactError(f"{PEERS_FILE} is missing from docs/bench; restore the checkout")


def _circumstances(record: BenchRecord) -> str:
    meta = record.meta
    return f"{meta['gpu']}, torch {meta['torch']}, cuDNN {meta['cudnn']}, {meta['date'][:10]}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _mark(value: float | None, floor: float) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < floor else f"{value:.2f}"


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
    parts = [_markdown(table)]
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
                _markdown([heads, *cells]),
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
        parts.append(_markdown(table))
    return "\n\n".join(parts)


PARTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"support": support, "speed": speed},
    "docs/performance.md": {
        "yardstick": yardstick,
        "goals": goals,
        "features": feature_speed,
        "host": host_time,
        "tiles": tiles,
        "performance": performance,
    },
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


def _benchmarks(root: Path) -> list[tuple[Path, BenchRecord]]:
    files = sorted((root / "docs" / "bench").glob("*.json"))
    return [(path, BenchRecord.load(path)) for path in files if path.name != PEERS_FILE]


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 1 else f"**{value:.2f}**"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
