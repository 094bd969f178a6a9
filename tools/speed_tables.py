# SPDX-License-Identifier: Apache-2.0
"""Tables of speed from the records in docs/bench: short ones for readers, and every cell for who doubts them.

``tools/gen_tables.py`` puts them into the pages.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmha_runtime.bench import cells as bench_cells
from fmha_runtime.bench.cells import Cell
from fmha_runtime.bench.record import OURS, BenchRecord
from fmha_runtime.bench.run import BAND
from fmha_runtime.errors import ArtifactError
from fmha_runtime.kernels.spec import DType

ROOT = Path(__file__).resolve().parent.parent
PEERS_FILE = "peers_h200.json"
LOW = 0.95  # of the best peer's speed: below it a cell is bold
PACKED_LOW = 0.9  # of the band kernel's speed, for a packed mask
LABELS = {
    "cudnn": "cuDNN",
    "flash": "torch's flash",
    "flash_attn_3": "FA3",
    "flash_attn_4": "FA4",
    "flex": "flex",
}  # of peers
NONE_YET = "Not recorded yet: `fmha bench --grid {} --json docs/bench/NAME.json`."
LONGEST = max(bench_cells.GRID_LENGTHS)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(root: Path) -> str:
    """One column a record, one row a peer: how many times their speed ours is."""
    found = [(path, record) for path, record in benchmarks(root) if not record.over_length]
    if not found:
        return "No benchmark is recorded yet: `fmha bench` writes one."
    names = dict.fromkeys(peer for _, record in found for peer in record.peers if record.geometric_mean(peer))
    heads = [f"[{path.stem}]({path.relative_to(root).as_posix()})" for path, _ in found]
    rows = [["our speed over", *heads]]
    for name in names:
        label = "our own band kernel" if name == BAND else LABELS.get(name, name)
        rows.append([label, *(_mean(record, name) for _, record in found)])
    times = [{h.provider: h.host_us for h in record.host} for _, record in found]
    for name in (OURS, "ours, plan.run", *LABELS):
        if any(of.get(name) for of in times):
            label = LABELS.get(name, {OURS: "`attention()`"}.get(name, "`plan.run()`"))
            rows.append([f"host time, {label}", *(f"{of[name]:.1f} us" if of.get(name) else "-" for of in times)])
    devices = ", ".join(sorted({str(record.meta["gpu"]) for _, record in found}))
    text = f"Geometric means on {devices}; in brackets how many cells, and in how many of them ours is slower."
    forced = [f"{path.stem} is forced to {record.meta['tile']}" for path, record in found if record.meta.get("tile")]
    return "\n\n".join([markdown(rows), " ".join([text, *(f"{one}." for one in forced)])])


def _mean(record: BenchRecord, peer: str) -> str:
    ratios, mean = record.ratios(peer), record.geometric_mean(peer)
    if mean is None:
        return "-"
    return f"{mean:.2f} ({len(ratios)}, slower in {sum(r < 1 for r in ratios.values())})"


def overview(root: Path) -> str:
    """One row a head dim of the newest record of the hopper grid in bf16."""
    wanted = [cell for cell in bench_cells.hopper() if cell.dtype is DType.BF16]
    found = latest(root, [cell.key for cell in wanted])
    if found is None:
        return NONE_YET.format("hopper")
    path, record = found
    here, everything = present(record), []
    heads = ["full: ours", "best other", "ratio", "causal: ours", "best other", "ratio"]
    rows = [["head dim", *heads, "ratio over all lengths", "lowest"]]
    for d in dict.fromkeys(cell.head_dim for cell in wanted):
        mine = [cell for cell in wanted if cell.head_dim == d]
        row = [str(d)]
        for causal in (False, True):
            cell = next(c for c in mine if c.causal is causal and c.seqlen == LONGEST)
            row += _against_best(record, cell, here)
        ratios = [r for cell in mine if (r := _over_best(record, cell.key, here)) is not None]
        everything += ratios
        row += [f"{statistics.geometric_mean(ratios):.2f}", mark(min(ratios), LOW)] if ratios else ["-", "-"]
        rows.append(row)
    names = ", ".join(LABELS[name] for name in here)
    parts = [markdown(rows)]
    if everything:
        mean, ahead = statistics.geometric_mean(everything), sum(r > 1 for r in everything)
        parts.append(
            f"TFLOP/s at {LONGEST // 1024}k tokens in bf16; the ratio is ours over the fastest of {names}, and the "
            f"last two columns are over 512 to {LONGEST // 1024}k tokens, both masks. All {len(everything)} cells: "
            f"geometric mean {mean:.3f}, ours faster in {ahead}. "
            f"From [{path.stem}](bench/{path.name}), {circumstances(record)}."
        )
    return "\n\n".join(parts)


def _against_best(record: BenchRecord, cell: Cell, here: Sequence[str]) -> list[str]:
    """Ours, the fastest other with its name, and ours over it."""
    speeds = {name: speed for name in here if (speed := record.tflops(cell.key, name))}
    best = max(speeds, key=lambda name: speeds[name], default=None)
    other = f"{speeds[best]:.0f} {LABELS[best]}" if best else "-"
    return [tflops(record.tflops(cell.key, OURS)), other, mark(_over_best(record, cell.key, here), LOW)]


def _over_best(record: BenchRecord, case: str, here: Sequence[str]) -> float | None:
    ours = record.tflops(case, OURS)
    best = max((speed for name in here if (speed := record.tflops(case, name))), default=None)
    return ours / best if ours and best else None


def features(root: Path) -> str:
    """The feature cells against those who ran in the same process, and the best of the peers' record."""
    wanted = [cell.key for cell in bench_cells.features()]
    found = latest(root, wanted)
    if found is None:
        return NONE_YET.format("features")
    path, record = found
    then, here = peers(root)["cells"], present(record)
    rows = [["case", "ours", *(LABELS[name] for name in here), "ours / best here", "best then", "ours / best then"]]
    for case in wanted:
        ours, old = record.tflops(case, OURS), then.get(case)
        row = [case, *(tflops(record.tflops(case, name)) for name in (OURS, *here))]
        if old is None:  # a packed mask: held against our own band kernel
            band = mark(record.ratios(BAND).get(case), PACKED_LOW)
            rows.append([*row, f"{band} of our band kernel", "-", "-"])
            continue
        who = next(name for name, value in old["tflops"].items() if value == old["best"])
        row += [mark(_over_best(record, case, here), 1.0), f"{old['best']} ({who})"]
        rows.append([*row, mark(ours / old["best"] if ours else None, 1.0)])
    text = (
        f"From [{path.stem}](bench/{path.name}), {circumstances(record)}. Bold: below the best peer, or a packed mask"
    )
    text += f" below {PACKED_LOW} of the band kernel."
    return "\n\n".join([text, markdown(rows), _absences(record)])


def cells(root: Path) -> str:
    """Every cell of the hopper grid: ours over the best in the same process, and ours / cuDNN against best / cuDNN as
    the peers were measured once."""
    found = latest(root, [cell.key for cell in bench_cells.hopper() if cell.dtype is DType.BF16])
    if found is None:
        return NONE_YET.format("hopper")
    path, record = found
    then, over_cudnn, here = peers(root)["cells"], record.ratios("cudnn"), present(record)
    parts = [f"From [{path.stem}](bench/{path.name}), {circumstances(record)}. Bold: below {LOW}."]
    heads = ["case", "ours", *(LABELS[name] for name in here), "ours / best here", "best / cuDNN then", "now / then"]
    for dtype in ("bf16", "fp16"):
        wanted = [c.key for c in bench_cells.hopper() if c.dtype.value == dtype]
        rows, to_best, to_then = [heads], [], []
        for case in wanted:
            ratio, old = _over_best(record, case, here), then.get(case)
            moved = over_cudnn[case] / old["best_over_cudnn"] if old and case in over_cudnn else None
            to_best += [ratio] if ratio is not None else []
            to_then += [moved] if moved is not None else []
            row = [case, *(tflops(record.tflops(case, name)) for name in (OURS, *here)), mark(ratio, LOW)]
            rows.append([*row, f"{old['best_over_cudnn']:.2f}" if old else "-", mark(moved, LOW)])
        text = f"**{dtype}**, {len(to_best)} of {len(wanted)} cells measured."
        if to_best:
            names, ahead = ", ".join(LABELS[name] for name in here), sum(r > 1 for r in to_best)
            text += f" Over the best of {names} in the same process: {_spread(to_best)}, ahead in {ahead}."
        if to_then:
            text += f" Now over then ({len(to_then)} cells): {_spread(to_then)}."
        parts += [text, markdown(rows)]
    return "\n\n".join(parts)


def _spread(ratios: Sequence[float]) -> str:
    mean, low = statistics.geometric_mean(ratios), sum(r < LOW for r in ratios)
    return f"geometric mean {mean:.3f}, lowest {min(ratios):.2f}, {low} below {LOW}"


def targets(root: Path) -> str:
    """TFLOP/s at 16k tokens against the targets that the project was given."""
    wanted = peers(root)["goals"]
    found = latest(root, list(wanted))
    if found is None:
        return NONE_YET.format("hopper")
    path, record = found
    known, ratios = peers(root)["cells"], record.ratios("cudnn")
    rows = [["d", "mask", "target", "ours", "ours / target", "best peer", "ours / cuDNN", "best / cuDNN"]]
    for case, target in wanted.items():
        ours = record.tflops(case, OURS)
        _, dims, _, mask = case.split("_")
        row = [dims[1:], {"n": "full", "c": "causal"}[mask], str(target), tflops(ours)]
        row += [mark(ours / target if ours else None, 1.0), str(known[case]["best"])]
        rows.append([*row, mark(ratios.get(case), 0.0), f"{known[case]['best_over_cudnn']:.2f}"])
    met = sum((record.tflops(case, OURS) or 0) >= target for case, target in wanted.items())
    return f"From [{path.stem}](../bench/{path.name}): {met} of {len(wanted)} met.\n\n{markdown(rows)}"


def full_records(root: Path) -> str:
    """Every cell of every benchmark record."""
    parts = []
    for path, record in benchmarks(root):
        meta, names = record.meta, record.peers
        parts.append(f"## {path.stem}")
        parts.append(
            f"{meta['gpu']}, driver {meta['driver']}, torch {meta['torch']}, "
            f"cuDNN {meta['cudnn']}, commit {str(meta['commit'])[:12]}, {meta['date'][:10]}. "
            + (f"Forced to {meta['tile']}. " if meta.get("tile") else "")
            + "TFLOP/s; `/peer` is our speed over the peer's, bold where we lose."
        )
        if path.with_suffix(".png").exists():
            parts.append(f"![TFLOP/s over sequence length](bench/{path.stem}.png)")
        rows = [["case", *record.providers, *(f"/{peer}" for peer in names)]]
        ratios = {peer: record.ratios(peer) for peer in names}
        for case in record.cases:
            row = [case, *(tflops(record.tflops(case, name)) for name in record.providers)]
            rows.append([*row, *(_ratio(ratios[peer].get(case)) for peer in names)])
        means = (_ratio(record.geometric_mean(peer)) for peer in names)
        rows.append(["geometric mean", *("" for _ in record.providers), *means])
        parts += [markdown(rows), _absences(record)]
    return "\n\n".join(filter(None, parts)) or "No benchmark is recorded yet: `fmha bench` writes one."


def _absences(record: BenchRecord) -> str:
    lines = []
    for (provider, reason), cases in record.absences().items():
        who = "this library" if provider == OURS else provider
        lines.append(f"- {who} is absent from {len(cases)} cells: {reason}")
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else mark(value, 1.0)


def decode(root: Path) -> str:
    """One row a cell of the newest record of the decode grid: microseconds, ours over the best other, GB a second."""
    wanted = [cell.key for cell in bench_cells.decode()]
    found = latest(root, wanted)
    if found is None:
        return NONE_YET.format("decode")
    path, record = found
    here = present(record)
    rows = [["cell", "ours", *(LABELS[name] for name in here), "ours over the best", "GB/s"]]
    ratios = []
    for case in record.cases:
        times = {name: getattr(record.timing(case, name), "median_us", None) for name in (OURS, *here)}
        others = [time for name, time in times.items() if time and name != OURS]
        ratio = min(others) / times[OURS] if others and times[OURS] else None
        ratios += [ratio] if ratio else []
        size = record.meta["bytes"].get(case)
        rate = f"{size / times[OURS] / 1e3:.0f}" if size and times[OURS] else "-"
        texts = ("-" if time is None else f"{time:.1f}" for time in times.values())
        rows.append([case, *texts, "-" if ratio is None else f"{ratio:.2f}", rate])
    mean = statistics.geometric_mean(ratios) if ratios else 0
    text = (
        f"Microseconds. Over the {len(ratios)} cells that another ran: geometric mean {mean:.3f}, lowest "
        f"{min(ratios, default=0):.2f}. From [{path.stem}](bench/{path.name}), {circumstances(record)}."
    )
    return f"{markdown(rows)}\n\n{text}"


def benchmarks(root: Path) -> list[tuple[Path, BenchRecord]]:
    """Every record of a benchmark that is there."""
    files = sorted((root / "docs" / "bench").glob("*.json"))
    return [(path, BenchRecord.load(path)) for path in files if path.name != PEERS_FILE]


def latest(root: Path, cases: Sequence[str]) -> tuple[Path, BenchRecord] | None:
    """The newest record, of kernels that nobody forced, that has at least nine tenths of the cases."""
    fits = []
    for path, record in benchmarks(root):
        mine = {t.case for t in record.cells if t.provider == OURS and t.tflops is not None}
        if not record.meta.get("tile") and sum(case in mine for case in cases) >= 0.9 * len(cases):
            fits.append((str(record.meta["date"]), path, record))
    return max(fits, key=lambda item: item[:2])[1:] if fits else None


def peers(root: Path) -> Any:
    """What all peers were measured at once, on another day."""
    for folder in (root, ROOT):  # a test's root has records only
        path = folder / "docs" / "bench" / PEERS_FILE
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise ArtifactError(f"{PEERS_FILE} is missing from docs/bench; restore the checkout")


def present(record: BenchRecord) -> list[str]:
    """The peers that ran at least one cell of a record."""
    return [name for name in LABELS if any(t.provider == name and t.tflops for t in record.cells)]


def circumstances(record: BenchRecord) -> str:
    """Where and with what a record was made."""
    meta = record.meta
    return f"{meta['gpu']}, torch {meta['torch']}, cuDNN {meta['cudnn']}, {meta['date'][:10]}"


def tflops(value: float | None) -> str:
    """A speed of a table."""
    return "-" if value is None else f"{value:.0f}"


def mark(value: float | None, low: float) -> str:
    """A ratio of a table, bold below ``low``."""
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < low else f"{value:.2f}"
