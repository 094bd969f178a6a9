# SPDX-License-Identifier: Apache-2.0
"""Verifies whole archs with several processes and writes the ledger as it goes.

``fmha verify --record`` is the same for a few kernels; this is for all of them on a lent GPU. Each arch goes its
way: ``sm90=cubin`` loads the built cubins, ``sm80=ptx`` lets the driver's JIT finish the PTX, ``sm120=emulator`` needs
no GPU. Exit code 1 when a kernel failed; what passed is recorded all the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import click

from fmha_runtime.errors import FmhaError
from fmha_runtime.kernels import catalog, ledger, sources, store
from fmha_runtime.kernels.spec import Arch, KernelSpec
from fmha_runtime.verify import run as verifier

WAYS = ("cubin", "ptx", "emulator")


def one(spec: KernelSpec, way: str) -> tuple[str, ledger.Record | None]:
    """Runs in a worker: the kernel's report as text, and its record if it passed."""
    import torch

    torch.set_num_threads(1)
    device = "emulator" if way == "emulator" else "cuda:0"
    try:
        report = verifier.verify_kernel(spec, device=device, via="cubin" if way == "emulator" else way)
    except FmhaError as error:
        return f"FAIL  {spec.name}  {error}", None
    text = "\n".join(report.lines())
    return text, verifier.to_record(report) if report.ok else None


def parse(words: Iterable[str]) -> list[tuple[KernelSpec, str]]:
    """The (kernel, way) pairs of arguments such as ``sm80=ptx``."""
    found = []
    for word in words:
        arch, _, way = word.partition("=")
        if way not in WAYS or arch not in {a.value for a in Arch}:
            raise click.UsageError(f"{word!r} is not ARCH=WAY with a way of {', '.join(WAYS)}")
        found += [(spec, way) for spec in catalog.enumerate_specs(Arch(arch))]
    return found


def recorded(spec: KernelSpec, way: str, known: ledger.Ledger) -> bool:
    """Whether the ledger has the very bytes that the manifest locks, verified this way on the present suite."""
    tile = catalog.tile(spec)
    if way == "emulator":
        evidence: str | None = sources.emulated_code(spec, tile)
    else:
        row = store.locked(spec)
        current = row is not None and row.code == sources.code(spec, tile)
        evidence = (row.sha256 if way == "cubin" else row.ptx_sha256) if row is not None and current else None
    wanted = (way, evidence, verifier.suite(spec))
    return any((r.how, r.evidence, r.suite) == wanted for r in known.records.get(spec.name, ()))


@click.command(help=__doc__)
@click.argument("archs", nargs=-1, required=True, metavar="ARCH=WAY...")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True)
@click.option("--missing", is_flag=True, help="Only kernels that the ledger does not have as they are now.")
@click.option("--op", "ops", multiple=True, help="Only kernels of this op.")
@click.option("--seconds", default=0.0, help="Start nothing new after this long; 0 = no limit.")
def main(archs: tuple[str, ...], jobs: int, missing: bool, ops: tuple[str, ...], seconds: float) -> None:
    wanted, start = parse(archs), time.monotonic()
    if ops:
        wanted = [pair for pair in wanted if pair[0].op.value in ops]
    if missing:
        known = ledger.Ledger.load()
        wanted = [pair for pair in wanted if not recorded(*pair, known)]
    verified = failed = 0
    records: list[ledger.Record] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(one, *pair): pair for pair in wanted}
        for done in as_completed(waiting):
            if done.cancelled():
                continue
            text, record = done.result()
            if record is None:
                failed += 1
                click.echo(text)
            else:
                verified += 1
                records.append(record)
                if len(records) == 8:
                    ledger.record(records)
                    records.clear()
            if seconds and time.monotonic() - start > seconds:
                for other in waiting:
                    other.cancel()
    ledger.record(records)
    left = len(wanted) - verified - failed
    took = time.monotonic() - start
    click.echo(f"{verified} of {len(wanted)} verified, {failed} failed, {left} not run, {took:.0f} s")
    raise SystemExit(1 if failed or left else 0)


if __name__ == "__main__":
    main()
