# SPDX-License-Identifier: Apache-2.0
"""The program ``fmha``: parse, call, print. No logic lives here.

stdout is data, everything else goes to stderr, so that ``fmha list | wc -l`` counts kernels. Exit
codes: 0 done, 1 the subject failed, 2 usage or nothing selected, 3 environment (GPU, driver, nvcc,
g++, torch), 4 an artefact is invalid, 130 interrupted. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import __version__, config
from ..errors import (
    ArtifactError,
    BuildError,
    DriverError,
    EmulatorFault,
    FmhaError,
    InputError,
    KernelNotBuilt,
    ToolchainError,
)
from ..kernels import catalog
from ..kernels.spec import Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from ..kernels.tile import Tile
from . import report, selection
from .selection import Selection

FAILED, USAGE, ENVIRONMENT, ARTIFACT, INTERRUPTED = 1, 2, 3, 4, 130

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _say(text: str = "") -> None:
    click.echo(text, err=True)


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)


def _code(error: BaseException) -> int:
    """The exit code of an error."""
    if isinstance(error, ArtifactError):
        return ARTIFACT
    if isinstance(error, DriverError | ToolchainError | ImportError):
        return ENVIRONMENT
    if isinstance(error, KernelNotBuilt | BuildError | EmulatorFault):
        return FAILED
    return USAGE if isinstance(error, FmhaError) else FAILED


def _sentence(error: BaseException) -> str:
    """What went wrong and what to do next."""
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return f"{package} is not installed and this needs it: pip install {package}"
    if isinstance(error, FmhaError):
        return str(error)
    return f"{type(error).__name__}: {error}; this is a bug: FMHA_DEBUG=1 shows where it happened"


def _debug() -> bool:
    try:
        return config.debug()
    except InputError:
        return False


class _Program(click.Group):
    """A click group that turns our exceptions into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _say("interrupted; what is finished stays")
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if _debug():
                raise
            _say(f"error: {_sentence(error)}")
            ctx.exit(_code(error))


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fmha")
def main() -> None:
    """Attention kernels as data: list, build, verify, measure and explain them.

    Exit codes: 0 done, 1 the subject failed, 2 usage or nothing selected, 3 environment, 4 an
    artefact is invalid, 130 interrupted.
    """


def _choice(flag: str, kind: type[Enum], text: str) -> Callable[[_Command], _Command]:
    words = [str(member.value) for member in kind]
    return click.option(flag, type=click.Choice(words), multiple=True, help=text)


def _selectable(command: Callable[..., Any]) -> Callable[..., Any]:
    """The selection options, handed to the command as one ``Selection``."""

    def call(
        names: tuple[str, ...], op: Any, arch: Any, dtype: Any, head_dim: Any, mask: Any,
        score: Any, paged: bool | None, short: bool | None, **rest: Any,
    ) -> Any:  # fmt: skip
        chosen = Selection(
            names=names,
            op=tuple(map(Op, op)),
            arch=tuple(map(Arch, arch)),
            dtype=tuple(map(DType, dtype)),
            head_dim=head_dim,
            mask=tuple(map(Mask, mask)),
            score=tuple(map(Score, score)),
            kv=() if paged is None else (KvLayout.PAGED if paged else KvLayout.CONTIGUOUS,),
            short=() if short is None else (short,),
        )
        return command(chosen, **rest)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__click_params__ = list(getattr(command, "__click_params__", ()))  # type: ignore[attr-defined]
    for decorate in (
        click.option("--short/--no-short", default=None, help="Cut for short sequences, or not."),
        click.option("--paged/--no-paged", default=None, help="K and V in pages, or not."),
        _choice("--score", Score, "What happens to a score before the softmax."),
        _choice("--mask", Mask, "Mask family; band is full, causal and window."),
        click.option("--head-dim", multiple=True, metavar="D|DxV", help="128, or 192x128."),
        _choice("--dtype", DType, "Element type."),
        _choice("--arch", Arch, "GPU target."),
        _choice("--op", Op, "What the kernel does."),
        click.argument("names", nargs=-1, metavar="[NAME|GLOB]..."),
    ):
        call = decorate(call)
    return call


def _json_flag(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)


@main.command("list")
@_json_flag
@_selectable
def list_(chosen: Selection, as_json: bool) -> None:
    """Show kernels: tile, resources, where the cubin is, how it was verified."""
    from ..kernels.store import Inventory

    inventory = Inventory.of(chosen.kernels())
    states = inventory.states
    items = [report.list_item(*each, proof) for each, proof in zip(states.items(), report.proofs(states), strict=True)]
    if as_json:
        click.echo(report.envelope(items))
        return
    header, *rows = report.table([report.LIST_HEADER, *map(report.list_row, items)])
    _say(header)
    _print(rows)
    _say(report.list_totals(items))
    for error in inventory.broken:
        _say(f"broken: {error}")


@main.command()
@click.argument("words", nargs=-1, required=True, metavar="d=128 dtype=bf16 [sq=1024 ...]")
@click.option("--arch", type=click.Choice([a.value for a in Arch]), help="Default: this GPU's.")
@click.option("--tile", metavar="[TARGET] TILE", help="As attention(tile=...) would force it.")
@_json_flag
def explain(words: tuple[str, ...], arch: str | None, tile: str | None, as_json: bool) -> None:
    """Say which kernel serves a problem and why the nearest others do not.

    Words: b=2 sq=1024 sk=1024 h=32 hk=8 d=128 (or d=192x128) dtype=bf16 causal window=127,0 varlen
    softcap alibi packed paged. Exits with 1 when no kernel serves it.
    """
    from ..problem import dispatch

    trace = dispatch.trace(selection.problem(words, Arch(arch) if arch else selection.device_arch()), tile)
    if as_json:
        item = {
            "problem": str(trace.problem),
            "chosen": trace.chosen.name if trace.chosen else None,
            "tile": str(trace.forced or catalog.tile(trace.chosen)) if trace.chosen else None,
            "rejected": [{"name": spec.name, "reason": why} for spec, why in trace.rejected],
        }
        click.echo(report.envelope([item]))
    else:
        click.echo(str(trace))
    if trace.chosen is None:
        _say("no kernel computes this; attention(..., fallback='torch') runs it in plain torch")
        sys.exit(FAILED)


@main.command()
@_json_flag
@click.option("--dry-run", is_flag=True, help="Print the commands instead of running them.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at once.")
@click.option("--keep", is_flag=True, help="Leave source and command beside the cubin.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option("--force", is_flag=True, help="Build what is up to date too.")
@click.option("--into", type=click.Path(path_type=Path), help="A packaged root, not the cache.")
@click.option("--tile", metavar="TILE", help="Another tile, e.g. '128x64 w4 s2 c2'; experiments.")
@click.option("--all", "everything", is_flag=True, help="Every kernel of the catalogue, which is also the default.")
@click.option("--check", is_flag=True, help="Compare with the packaged manifest instead; builds nothing for use.")
@click.option("--compile", "compile_all", is_flag=True, help="With --check: compile where the code is equal, too.")
@click.option("--update", is_flag=True, help="With --check: write the new code of rows that are identical by bytes.")
@click.option("--allow-changed", is_flag=True, help="With --check: exit with 0 although some changed.")
@_selectable
def build(
    chosen: Selection, as_json: bool, dry_run: bool, jobs: int | None, keep: bool,
    fail_fast: bool, force: bool, into: Path | None, tile: str | None, everything: bool,
    check: bool, compile_all: bool, update: bool, allow_changed: bool,
) -> None:  # fmt: skip
    """Compile kernels with nvcc: what is not up to date, into the cache.

    --check says of every row of the packaged manifest whether the present sources still give its cubin: identical by
    code (nothing is compiled), identical by bytes, or changed. It needs no GPU, and exits with 1 when one changed.
    """
    from ..toolchain import build as builder
    from .progress import BuildProgress

    if everything and chosen != Selection():
        raise InputError("--all is every kernel: leave out the names and the other criteria")
    if not check and (compile_all or update or allow_changed):
        raise InputError("--compile, --update and --allow-changed belong to --check")
    if check and (dry_run or keep or fail_fast or force or into or tile):
        raise InputError("--check compares and builds nothing for use: leave out the options of building")
    specs = chosen.kernels()
    if check:
        _check(specs, as_json, jobs, compile_all, update, allow_changed)
        return
    cut = Tile.parse(tile) if tile else None
    if dry_run:
        _print(report.build_script(specs, cut))
        return
    results: list[builder.BuildResult] = []
    begin = time.perf_counter()
    interrupted: KeyboardInterrupt | None = None
    with BuildProgress() as progress:

        def on_event(event: builder.Event) -> None:
            progress(event)
            if event.result is not None:
                results.append(event.result)
                if fail_fast and event.result.error is not None:
                    raise _Stop

        try:
            results = builder.build(specs, jobs=jobs, force=force, keep=keep, into=into, tile=cut, on_event=on_event)
        except _Stop:
            _say("stopped at the first failure (--fail-fast)")
        except KeyboardInterrupt as error:
            interrupted = error
    results.sort(key=lambda result: result.spec.name)
    if as_json:
        click.echo(report.envelope(map(report.build_item, results)))
    else:
        _print([report.build_line(result) for result in results])
    seconds = time.perf_counter() - begin
    _say(report.build_totals(results, len(specs), seconds, jobs or config.build_jobs()))
    if interrupted is not None:
        raise interrupted
    if any(result.error is not None for result in results):
        sys.exit(FAILED)


def _check(
    specs: Sequence[KernelSpec], as_json: bool, jobs: int | None, compile_all: bool, update: bool, allow_changed: bool
) -> None:
    from ..toolchain import check

    begin = time.perf_counter()

    def on_done(done: int, total: int) -> None:
        if done % max(1, total // 10) == 0 or done == total:
            _say(f"compiled {done}/{total}")

    checked = check.check(specs, compile_all=compile_all, jobs=jobs, on_done=on_done)
    shown = [one for one in checked if not one.ok or one.reason]
    if as_json:
        click.echo(report.envelope(map(report.check_item, checked)))
    else:
        _print([report.check_line(one) for one in shown])
    _say(report.check_totals(checked, time.perf_counter() - begin))
    if update:
        written = check.update(checked)
        _say(f"{len(written)} rows of {config.package_root()} have their new code")
    if not allow_changed and not all(one.ok for one in checked):
        sys.exit(FAILED)


class _Stop(Exception):
    """--fail-fast has seen a failure."""


@main.command()
@_json_flag
@click.option("--device", metavar="DEVICE", help="cuda, cuda:1 or emulator; default cuda.")
@click.option("--via", type=click.Choice(["cubin", "ptx"]), default="cubin", show_default=True)
@click.option("--record", is_flag=True, help="Write what passed into the ledger.")
@click.option("--quick", is_flag=True, help="About a quarter of the cases.")
@click.option("--case", metavar="NAME/ID", help="Replay one case.")
@click.option("--sanitizer", metavar="TOOL", help="memcheck, racecheck or synccheck.")
@click.option("--reference-device", metavar="DEVICE", type=click.Choice(["cpu", "cuda"]), help="Default: as --device.")
@_selectable
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
            chosen = Selection(**{**vars(chosen), "arch": selection.device_arch().targets})
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
            worst = max(worst, _code(error))
            items.append({**report.axes(spec), "ok": False, "error": str(error)})
            lines = [f"FAIL  {spec.name}  {error}"]
        else:
            worst = max(worst, 0 if outcome.ok else FAILED)
            items.append({**report.axes(spec), **report.verify_facts(outcome)})
            lines = list(outcome.lines())
            if record and outcome.ok:
                ledger.record([verifier.to_record(outcome)])
        (_say("\n".join(lines)) if as_json else _print(lines))
    if as_json:
        click.echo(report.envelope(items))
    passed = sum(bool(item["ok"]) for item in items)
    seconds = time.perf_counter() - begin
    written = f" · {passed} recorded in {ledger.folder()}" if record else ""
    _say(f"{passed} of {len(items)} kernels ok on {device} in {seconds:.1f} s{written}")
    sys.exit(worst)


@main.command()
@click.option("--grid", default="standard", show_default=True, metavar="GRID", help="standard, hopper (the 96 cells of "
              "the yardstick, and fp16), mma (standard on the mma.sync kernels), features, quick.")  # fmt: skip
@click.option("--against", metavar="NAME,NAME,...", help="Peers: cudnn, flash, efficient, math (all four: sdpa), "
              "flash_attn, flash_attn_3, flash_attn_4, flashinfer, xformers; all is everyone who can be imported. "
              "Default: sdpa for the standard grid, cudnn,flash for the others.")  # fmt: skip
@click.option("--tile", metavar="[TARGET] TILE", help="Force a target, a tile or both: sm90, '128x176', 'sm90 128x64'.")
@click.option("--arch", type=click.Choice([a.value for a in Arch]), help="Force a target; the same as --tile ARCH.")
@click.option("--dtype", multiple=True, type=click.Choice(["fp16", "bf16"]), help="Default: both.")
@click.option("--head-dim", multiple=True, metavar="D|DxV", help="Default: 64, 80, 128.")
@click.option("--seqlens", metavar="N,N,...", help="Default: 512,1024,...,16384.")
@click.option("--causal/--full", default=None, help="Only one of the two masks; default both.")
@click.option("--seconds", type=click.FloatRange(1), default=180.0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the record.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Draw the record.")
def bench(
    grid: str, against: str | None, tile: str | None, arch: str | None, dtype: tuple[str, ...],
    head_dim: tuple[str, ...], seqlens: str | None, causal: bool | None, seconds: float, json_path: Path | None,
    png_path: Path | None,
) -> None:  # fmt: skip
    """Measure this library next to torch's attention and others, interleaved, in one process.

    The axes (--dtype, --head-dim, --seqlens, --causal) make the standard grid, and leave cells out of the others.
    """
    from ..bench import cells as bench_cells
    from ..bench import run as bencher

    cells = bench_cells.select(
        grid,
        dtypes=tuple(map(DType, dtype)) or None,
        head_dims=selection.head_dims(head_dim) if head_dim else None,
        lengths=selection.lengths(seqlens) if seqlens else None,
        masks=None if causal is None else (causal,),
    )
    target = arch or ("sm90" if grid == "mma" and tile is None else None)
    peers = against or ("sdpa" if grid == "standard" else "cudnn,flash")

    def on_cell(cell: Any, number: int, count: int) -> None:
        if number % max(1, count // 10) == 0:
            _say(f"measuring {number}/{count}  {cell.key}")

    record = bencher.run(
        cells,
        peers=peers.split(","),
        seconds=seconds,
        tile=" ".join(filter(None, [target, tile])) or None,
        on_cell=on_cell,
    )
    _print(record.lines())
    if json_path is not None:
        record.save(json_path)
        _say(f"wrote {json_path}")
    if png_path is not None:
        from ..bench import plots

        plots.speed(record, png_path)
        _say(f"wrote {png_path}")


@main.command()
@click.option("--dry-run", is_flag=True, help="List the variants; needs no GPU.")
@click.option("--build-only", is_flag=True, help="Build them into the cache; needs no GPU.")
@click.option("--tile", "tiles", multiple=True, metavar="TILE", help="Only these and the catalogue's: 128x176, ...")
@click.option("--plain-grid", is_flag=True, help="Time Hopper's also with one CTA a query tile.")
@click.option("--seqlens", metavar="N,N,...", help="Default: 512,2048,16384 (short rows: 512,1024), "
              "full and causal.")  # fmt: skip
@click.option("--against", default="cudnn", show_default=True, metavar="NAME,NAME,...", help="As for bench.")
@click.option("--jobs", type=click.IntRange(1), help="Compilers at once.")
@click.option("--seconds", type=click.FloatRange(1), default=1200.0, show_default=True)
@click.option("--timeout", type=click.FloatRange(1), default=30.0, show_default=True, help="Until a variant hangs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the record.")
@_selectable
def tune(
    chosen: Selection, dry_run: bool, build_only: bool, tiles: tuple[str, ...], seqlens: str | None, against: str,
    jobs: int | None, seconds: float, timeout: float, json_path: Path | None, plain_grid: bool,
) -> None:  # fmt: skip
    """Build tiles of kernels, check each against the reference, time the right ones on this GPU.

    Without names, --arch, --dtype or features: the plain bf16 kernels of this GPU's first target.
    """
    from ..tune import run as tuner

    specs = selection.for_tuning(chosen).kernels()
    wanted = [(spec, tile) for spec in specs for tile in tuner.candidates(spec, tiles)]
    if dry_run:
        _print([report.variant_line(spec, tile) for spec, tile in wanted])
        _say(f"{len(wanted)} variants of {len(specs)} kernels")
        return
    if build_only:
        outcomes = tuner.build_all(wanted, jobs, _say)
        for (spec, _), outcome in outcomes.items():
            click.echo(f"{spec.name}  {outcome}")
        return
    record = tuner.run(
        specs,
        tiles=tiles,
        lengths=selection.lengths(seqlens) if seqlens else None,
        peers=against.split(","),
        jobs=jobs,
        seconds=seconds,
        timeout=timeout,
        plain_grid=plain_grid,
        say=_say,
    )
    for tuned in record.kernels:
        _print([*tuned.lines(), ""])
    if json_path is not None:
        record.save(json_path)
        _say(f"wrote {json_path}")
    _say("the catalogue is fmha_runtime/catalog.py; `fmha cache prune` removes the variants that it does not have")
    if not record.choices():
        sys.exit(FAILED)


@main.command()
@_json_flag
@_selectable
def inspect(chosen: Selection, as_json: bool) -> None:
    """Show registers, shared memory, spills, identity and instruction mix of kernels."""
    from . import inspection

    if not chosen.names:
        raise InputError("name the kernels to inspect (globs work): `fmha list` shows them")
    found = [inspection.inspect(spec) for spec in chosen.kernels()]
    if as_json:
        click.echo(report.envelope(one.item() for one in found))
    else:
        for one in found:
            _print(one.lines())


@main.command()
@_json_flag
def doctor(as_json: bool) -> None:
    """Show what this machine has, what is broken, and the command that repairs it."""
    from . import doctor as physician

    diagnosis = physician.examine()
    if as_json:
        click.echo(diagnosis.json())
    else:
        _print(diagnosis.text())
    sys.exit(diagnosis.exit_code)


@main.group()
def cache() -> None:
    """The folder of kernels built on this machine."""


@cache.command("dir")
def cache_dir() -> None:
    """Print the folder."""
    click.echo(str(config.cache_dir()))


@cache.command("clean")
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
def cache_clean(dry_run: bool) -> None:
    """Remove every kernel in it. What is not ours stays."""
    _sweep(True, dry_run)


@cache.command("prune")
@click.option("--dry-run", is_flag=True, help="Only list what would go.")
def cache_prune(dry_run: bool) -> None:
    """Remove what is damaged, outdated or abandoned. What is not ours stays."""
    _sweep(False, dry_run)


def _sweep(everything: bool, dry_run: bool) -> None:
    from ..kernels.cache import sweep

    swept = sweep(config.cache_dir(), everything=everything, dry_run=dry_run)
    _print(report.sweep_lines(swept) if dry_run else [])
    _say("\n".join(report.sweep_totals(swept, dry_run)))
    if swept.failed:
        sys.exit(FAILED)
