# SPDX-License-Identifier: Apache-2.0
"""``fmha verify``: kernels against the reference, and what passed into the ledger."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import click

from ..errors import ArtifactError, BuildError, InputError, KernelNotBuilt
from ..kernels.spec import KernelSpec
from . import report, selection
from .exits import FAILED, exit_code
from .options import json_flag, selectable
from .output import say, show
from .selection import Selection


@click.command()
@json_flag
@click.option("--device", metavar="DEVICE", help="cuda, cuda:1 or emulator; default cuda.")
@click.option("--via", type=click.Choice(["cubin", "ptx"]), default="cubin", show_default=True)
@click.option("--record", is_flag=True, help="Write what passed into the ledger.")
@click.option("--quick", is_flag=True, help="About a quarter of the cases.")
@click.option("--case", metavar="NAME/ID", help="Replay one case.")
@click.option("--sanitizer", metavar="TOOL", help="memcheck, racecheck or synccheck.")
@click.option("--reference-device", metavar="DEVICE", type=click.Choice(["cpu", "cuda"]), help="Default: as --device.")
@selectable
def verify(
    chosen: Selection, as_json: bool, device: str | None, via: str, record: bool, quick: bool,
    case: str | None, sanitizer: str | None, reference_device: str | None,
) -> None:  # fmt: skip
    """Run kernels on awkward cases and compare with an fp64 reference.

    On a GPU without --arch or names: the kernels of that GPU's arch.
    """
    from ..kernels import ledger
    from ..verify import run as verifier

    if sanitizer is not None:
        argv = verifier.sanitizer_argv(sanitizer, selection.without("--sanitizer", sys.argv[1:]))
        os.execvp(argv[0], argv)
    if record and (quick or case):
        raise InputError("--record counts only a run of all cases: leave out --quick and --case")
    device = selection.device(device or "cuda")
    number: int | None = None
    specs: Sequence[KernelSpec]
    if case is not None:
        spec, number = verifier.parse_case(case)
        specs = [spec]
    else:
        if device.startswith("cuda") and not chosen.names and not chosen.arch:
            chosen = replace(chosen, arch=selection.device_arch().targets)
        specs = chosen.kernels()
    items = []
    worst = 0
    begin = time.perf_counter()
    for spec in specs:
        try:
            outcome = verifier.verify_kernel(
                spec, device=device, via=via, quick=quick, case=number, reference_device=reference_device
            )
        except (KernelNotBuilt, ArtifactError, BuildError) as error:
            worst = max(worst, exit_code(error))
            items.append({**report.axes(spec), "ok": False, "error": str(error)})
            lines = [f"FAIL  {spec.name}  {error}"]
        else:
            worst = max(worst, 0 if outcome.ok else FAILED)
            items.append({**report.axes(spec), **report.verify_facts(outcome)})
            lines = list(outcome.lines())
            if record and outcome.ok:
                ledger.record([verifier.to_record(outcome)])
        (say("\n".join(lines)) if as_json else show(lines))
    if as_json:
        click.echo(report.envelope(items))
    passed = sum(bool(item["ok"]) for item in items)
    seconds = time.perf_counter() - begin
    written = f" · {passed} recorded in {ledger.folder()}" if record else ""
    say(f"{passed} of {len(items)} kernels ok on {device} in {seconds:.1f} s{written}")
    sys.exit(worst)
