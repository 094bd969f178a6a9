#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the generated parts of README.md and docs/performance.md from what is recorded.

    python tools/gen_tables.py            rewrite the parts between markers
    python tools/gen_tables.py --check    change nothing, exit 1 when a part is out of date

A part lies between ``<!-- generated:NAME -->`` and ``<!-- /generated:NAME -->``. Its sources are
the catalogue, the ledger cubins/verified.json and the benchmark records docs/bench/*.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fmha_runtime import catalog, ledger  # noqa: E402
from fmha_runtime.bench_record import OURS, BenchRecord  # noqa: E402
from fmha_runtime.errors import ArtifactError  # noqa: E402
from fmha_runtime.spec import HEAD_DIMS, Arch, KernelSpec  # noqa: E402


def support(root: Path) -> str:
    """Head dim and features x arch: how each kernel was proven, dtypes together where they agree."""
    records = ledger.load(root / "cubins" / "verified.json")
    rows = [["head dim", "features", *(arch.value for arch in Arch)]]
    everything = catalog.enumerate_specs()
    sets = dict.fromkeys(sorted((features(s) for s in everything), key=lambda x: (len(x), x)))
    for words_of in sets:
        alike: dict[tuple[str, ...], list[str]] = {}  # head dims whose cells are the same share a row
        for d, dv in HEAD_DIMS:
            specs = [s for s in everything if (s.head_dim, s.head_dim_v) == (d, dv) and features(s) == words_of]
            cells = tuple(_cell([s for s in specs if s.arch is arch], records) for arch in Arch)
            alike.setdefault(cells, []).append(str(d) if d == dv else f"{d}x{dv}")
        rows += [[", ".join(dims), " ".join(words_of) or "plain", *cells] for cells, dims in alike.items()]
    devices = sorted({r.device for r in records if r.on_gpu})
    legend = (
        "Every kernel exists in fp16 and bf16. **cubin**: this cubin passed `fmha verify` on a "
        "GPU; **ptx**: its PTX did, through the driver's JIT on a newer GPU; **emulator**: its "
        "source did, on the CPU emulator only; **stale**: the source or tile changed since a GPU "
        "ran it; **unverified**: no record."
    )
    where = f" Verified on: {', '.join(devices)}." if devices else ""
    return f"{_markdown(rows)}\n\n{legend}{where}"


def _cell(specs: Sequence[KernelSpec], records: Sequence[ledger.Record]) -> str:
    """How the kernels of one place of the table were proven, once where the dtypes agree."""
    words = {spec.dtype.value: proof(spec, records) for spec in specs}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{dtype} {word}" for dtype, word in words.items()) or "no"


def features(spec: KernelSpec) -> tuple[str, ...]:
    """The words of a kernel's name that say what it does besides plain attention."""
    plain = KernelSpec(spec.op, spec.arch, spec.dtype, spec.head_dim, spec.head_dim_v)
    return tuple(spec.name.removeprefix(plain.name).split("_")[1:])


def proof(spec: KernelSpec, records: Sequence[ledger.Record]) -> str:
    """The word of the support table for one kernel."""
    status = ledger.status(spec, records)
    if status.word == "verified" and status.record is not None:
        return status.record.how
    return "emulator" if status.emulated else status.word


def speed(root: Path) -> str:
    """The geometric means of every benchmark record, in a sentence each."""
    lines = []
    for path, record in _benchmarks(root):
        link = path.relative_to(root).as_posix()
        lines.append(f"[{path.stem}]({link}), {record.meta['gpu']}, torch {record.meta['torch']}:")
        for peer in record.peers:
            ratios, mean = record.ratios(peer), record.geometric_mean(peer)
            if mean is not None:
                lost = sum(r < 1 for r in ratios.values())
                lines.append(
                    f"- {mean:.2f} times the speed of torch's {peer} backend (geometric mean of "
                    f"{len(ratios)} cells; slower in {lost})"
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
            "TFLOP/s; `/peer` is our speed over the peer's, bold where we lose."
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


PARTS: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"support": support, "speed": speed},
    "docs/performance.md": {"performance": performance},
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
    return [(path, BenchRecord.load(path)) for path in files]


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
