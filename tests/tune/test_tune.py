# SPDX-License-Identifier: Apache-2.0
"""Tuning: candidates fit, wrong and hanging variants neither win nor cost the run, the record says what was found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import ROOT

from fmha_runtime.cli import program as cli
from fmha_runtime.device import driver
from fmha_runtime.errors import ArtifactError, DriverError, InputError
from fmha_runtime.kernels import catalog, store
from fmha_runtime.kernels.spec import HEAD_DIMS, Arch, DType, KernelSpec, KvLayout, Mask, Op, Score
from fmha_runtime.kernels.tile import Tile
from fmha_runtime.ops.forward.variants import variants
from fmha_runtime.problem import dispatch
from fmha_runtime.problem.dispatch import Problem
from fmha_runtime.tune import run as tuner
from fmha_runtime.tune import worker as tune_worker
from fmha_runtime.tune.record import Outcome, Tuned, TuneRecord
from fmha_runtime.tune.worker import Job

HOPPER = KernelSpec.parse("fmha_fwd_sm90a_bf16_d128")
SMALL = KernelSpec.parse("fmha_fwd_sm80_bf16_d32")


@pytest.mark.parametrize("arch", list(Arch))
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_every_candidate_can_be_rendered_and_fits(arch: Arch, dims: tuple[int, int]) -> None:
    spec = KernelSpec(Op.FWD, arch, DType.BF16, *dims)
    found = variants(spec)
    assert found[0] == catalog.tile(spec) and len(set(found)) == len(found)
    for tile in found:
        assert Tile.parse(str(tile)) == tile
        # An SM keeps 1 KiB of shared memory for each CTA (CUDA programming guide, table of compute capabilities).
        of_an_sm = {(8, 0): 164, (9, 0): 228}.get(spec.arch.capability, 100) << 10
        assert tile.ctas_per_sm * (catalog.smem_bytes(spec, tile) + 1024) <= of_an_sm
    if arch in (Arch.SM90, Arch.SM90A):
        assert 3 <= len(found) <= 40
    if arch is Arch.SM90A:
        assert {128, 192} <= {tile.block_m for tile in found} or dims == (256, 256)


def test_packed_kernels_have_two_stages() -> None:
    spec = KernelSpec(Op.FWD, Arch.SM90, DType.BF16, 64, 64, Mask.PACKED)
    assert {tile.stages for tile in variants(spec)} == {2}


def test_what_computes_no_attention_is_not_tuned() -> None:
    packer = next(spec for spec in catalog.enumerate_specs(Arch.SM90) if spec.op is Op.PACK)
    with pytest.raises(InputError, match="nothing to tune"):
        variants(packer)
    assert fmha("--dry-run", packer.name).exit_code == 2


def test_candidates_can_be_named() -> None:
    own = catalog.tile(HOPPER)
    assert [str(t) for t in tuner.candidates(HOPPER, ["128x176 s2", str(own)])] == [str(own), "128x176 w12 s2 c1"]
    with pytest.raises(InputError, match="not understood"):
        tuner.candidates(HOPPER, ["wide"])


def test_a_short_row_is_timed_where_it_is_used() -> None:
    spec = KernelSpec.parse("fmha_fwd_sm90a_bf16_d64_short")
    assert [cell.seqlen for cell in tuner.cells_for(spec)] == [512, 512, 1024, 1024]
    assert [cell.seqlen for cell in tuner.cells_for(spec, (2048,))] == [2048, 2048]
    assert variants(spec)[0] == catalog.tile(spec) != catalog.tile(spec.long)


def test_a_short_rows_variants_are_built_where_dispatch_looks_for_them(own_cache, fake_nvcc) -> None:
    spec, tile = KernelSpec.parse("fmha_fwd_sm90a_bf16_d64_short"), Tile.parse("128x64 w12 s3 c1")
    assert tuner.build_all([(spec, tile)])[spec, tile].state == "ok"
    row = store.find_tile(dispatch.choose(Problem(Arch.SM90, DType.BF16, 64, 64, seqlen_k=9), str(tile)).spec, tile)
    assert row is not None and row.tile == tile


def test_a_kernel_is_timed_with_its_features() -> None:
    keys = [cell.key for cell in tuner.cells_for(HOPPER)]
    assert keys[:2] == ["bf16_d128_s512_n", "bf16_d128_s512_c"] and len(keys) == 6
    capped = tuner.cells_for(replace(HOPPER, score=Score.SOFTCAP), (512,))
    assert all(cell.softcap for cell in capped)
    assert all(cell.alibi for cell in tuner.cells_for(replace(HOPPER, score=Score.ALIBI), (512,)))
    (packed,) = tuner.cells_for(replace(HOPPER, mask=Mask.PACKED), (512,))
    assert packed.packed and packed.causal
    assert all(cell.page_size for cell in tuner.cells_for(replace(HOPPER, kv=KvLayout.PAGED), (512,)))


class Bench:
    """Plays the other process: variants are right and fast unless said otherwise."""

    def __init__(self, wrong: str = "", hang: str = "", hang_in: str = "", fault_in: str = "") -> None:
        self.wrong, self.hang, self.hang_in, self.fault_in = wrong, hang, hang_in, fault_in
        self.asked: list[tuple[str, tuple[str, ...], int]] = []

    def __call__(self, task: str, job: Job, timeout: float) -> Iterator[tuple[Any, ...]]:
        self.asked.append((task, job.variants, len(job.cells)))
        yield ("ready",)
        if task == "check":
            for name in job.variants:
                yield ("checking", name)
                if name == self.hang:
                    yield ("lost", "hung", "no answer in 30 s")
                    return
                yield ("checked", name, "wrong" if name == self.wrong else "ok", "max err 1" * (name == self.wrong))
            yield ("end",)
            return
        for cell in job.cells:
            for name in (*job.peers, *job.variants):
                yield ("trying", cell.key, name)
                if name == self.hang_in and cell.causal:
                    yield ("lost", "hung", "no answer in 30 s")
                    return
                if name == self.fault_in:
                    yield ("refused", cell.key, name, "fault", "illegal address")
                    yield ("lost", "fault", "its process ended with code 0")
                    return
            yield ("turns", cell.key)
            yield ("timed", cell.key, {"cudnn": 100.0, **{name: float(name.split("x")[0]) for name in job.variants}})
        yield ("end",)


BUILT = [Outcome(f"{m}x64 w4 s2 c1", "ok", "", 128, 0, 1000) for m in (16, 32, 64, 128)]
NAMES = [outcome.variant for outcome in BUILT]
JOB = Job(SMALL.name, (), tuner.cells_for(SMALL, (512, 2048)), ("cudnn",))


def tuned(bench: Bench, built: list[Outcome] = BUILT) -> tuple[Tuned, dict[str, str]]:
    result = tuner.tune_kernel(SMALL, built, JOB, 30, bench)
    return result, {outcome.variant: outcome.state for outcome in result.outcomes}


def test_the_fastest_wins() -> None:
    bench = Bench()
    result, states = tuned(bench)
    assert result.choice is not None and result.choice.variant == NAMES[3]
    assert result.score(result.choice) == pytest.approx(1.28)
    assert set(states.values()) == {"ok"} and len(result.cells) == 4
    assert [task for task, _, _ in bench.asked] == ["check", "measure"]
    assert result.peers == {"cudnn": dict.fromkeys(result.cells, 100.0)}


def test_a_plain_grid_is_a_variant_that_needs_no_check() -> None:
    bench = Bench(wrong="128x128 w12 s2 c1")
    built = [Outcome(f"{m}x128 w{m // 16 + 4} s2 c1") for m in (128, 192)]
    result = tuner.tune_kernel(HOPPER, built, replace(JOB, kernel=HOPPER.name), 30, bench, plain_grid=True)
    assert bench.asked == [
        ("check", ("128x128 w12 s2 c1", "192x128 w16 s2 c1"), 0 + len(JOB.cells)),
        ("measure", ("192x128 w16 s2 c1", "192x128 w16 s2 c1 plain"), len(JOB.cells)),
    ]
    assert len(result.outcomes) == 3


def test_a_wrong_variant_is_not_timed() -> None:
    bench = Bench(wrong=NAMES[3])
    result, states = tuned(bench)
    assert result.choice is not None and result.choice.variant == NAMES[2]
    assert states[NAMES[3]] == "wrong"
    assert bench.asked[-1] == ("measure", tuple(NAMES[:3]), 4)


def test_a_hang_costs_its_variant_only() -> None:
    bench = Bench(hang=NAMES[1])
    result, states = tuned(bench)
    assert states[NAMES[1]] == "hung" and result.choice is not None and result.choice.variant == NAMES[3]
    assert [asked[1] for asked in bench.asked] == [tuple(NAMES), tuple(NAMES[2:]), (NAMES[0], *NAMES[2:])]


def test_a_hang_while_timing_goes_on_with_the_others() -> None:
    bench = Bench(hang_in=NAMES[3])
    result, states = tuned(bench)
    assert states[NAMES[3]] == "hung" and result.choice is not None and result.choice.variant == NAMES[2]
    assert [asked[1:] for asked in bench.asked[1:]] == [(tuple(NAMES), 4), (tuple(NAMES[:3]), 3)]
    assert len(result.cells) == 4
    half = next(o for o in result.outcomes if o.variant == NAMES[3])
    assert len(half.tflops) == 1 and result.score(half) is None


def test_a_fault_ends_its_process_and_a_faulty_peer_is_left_out() -> None:
    result, states = tuned(Bench(fault_in=NAMES[0]))
    assert states == {NAMES[0]: "fault", **dict.fromkeys(NAMES[1:], "ok")} and len(result.cells) == 4
    bench = Bench(fault_in="cudnn")
    result, states = tuned(bench)
    assert set(states.values()) == {"ok"} and len(bench.asked) == 3


def test_what_was_not_built_is_neither_checked_nor_timed() -> None:
    bench = Bench()
    result, states = tuned(bench, [*BUILT[:2], Outcome(NAMES[2], "not built", "nvcc exited with 1")])
    assert states[NAMES[2]] == "not built" and bench.asked[0][1] == tuple(NAMES[:2])
    assert "not built: nvcc exited with 1" in "\n".join(result.lines())
    assert tuned(Bench(), [Outcome(NAMES[0], "not built", "x")])[0].choice is None


def test_a_process_that_does_nothing_is_an_error() -> None:
    def silent(task: str, job: Job, timeout: float) -> Iterator[tuple[Any, ...]]:
        yield ("lost", "fault", "its process ended with code 1")

    with pytest.raises(DriverError, match="code 1"):
        tuner.tune_kernel(SMALL, BUILT, JOB, 30, silent)

    def tired(task: str, job: Job, timeout: float) -> Iterator[tuple[Any, ...]]:
        yield from Bench()(task, job, timeout) if task == "check" else silent(task, job, timeout)

    with pytest.raises(DriverError, match="times variants"):
        tuner.tune_kernel(SMALL, BUILT, JOB, 30, tired)


def test_a_cell_that_stops_everybody_is_given_up() -> None:
    class Stuck(Bench):
        def __call__(self, task: str, job: Job, timeout: float) -> Iterator[tuple[Any, ...]]:
            for message in super().__call__(task, job, timeout):
                yield message
                if message[0] == "turns" and message[1].endswith("s512_c"):
                    yield ("lost", "hung", "no answer")
                    return

    result, states = tuned(Stuck())
    assert [cell.split("_", 2)[2] for cell in result.cells] == ["s512_n", "s2048_n", "s2048_c"]
    assert set(states.values()) == {"ok"} and result.choice is not None


@pytest.fixture
def worker() -> Iterator[tuner.Worker]:
    made = tuner.Worker()
    yield made
    made.close()


def test_a_silent_process_is_killed(worker: tuner.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "START_SECONDS", 0.01)  # no interpreter starts in that time
    (message,) = worker("check", replace(JOB, variants=(NAMES[0],)), 1.0)
    assert message[:2] == ("lost", "hung") and worker._process is None


def test_a_process_lives_for_many_jobs_and_its_death_is_noticed(worker: tuner.Worker) -> None:
    pytest.importorskip("torch")
    job = replace(JOB, device="emulator")
    assert list(worker("check", job, 60)) == [("ready",), ("end",)]
    first = worker._process.pid
    assert list(worker("check", job, 60)) == [("ready",), ("end",)]
    assert worker._process.pid == first
    (message,) = worker("check", replace(job, kernel="no kernel"), 60)
    assert message[:2] == ("lost", "fault") and "code 1" in message[2]
    assert list(worker("check", job, 60))[-1] == ("end",)  # another one takes its place


@pytest.mark.emulator
def test_variants_are_checked() -> None:
    """The real check, on the emulator: a right tile, and one whose kernel cannot be instantiated."""
    pytest.importorskip("torch")
    job = Job(SMALL.name, ("64x32 w4 s2 c1", "48x32 w4 s2 c1"), device="emulator")
    found: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tune_worker.Tile, "parse", lambda text: Tile(*map(int, text.replace("x", " ").split()[:2]), 4, 2, 1)
        )
        assert tune_worker.check(job, found.append)
    words = [message[0] for message in found]
    assert words == ["ready", "checking", "checked", "checking", "checked", "end"]
    assert found[2][1:3] == (job.variants[0], "ok")
    assert found[4][2] == "not built" and "m16" in found[4][3]


def record() -> TuneRecord:
    cells = ("bf16_d128_s512_n", "bf16_d128_s512_c")
    outcomes = (
        Outcome("128x128 w12 s2 c1", "ok", "", 168, 0, 164096, dict(zip(cells, (500.0, 300.0), strict=True))),
        Outcome("128x176 w12 s2 c1", "ok", "", 168, 24, 213248, dict(zip(cells, (600.0, 290.0), strict=True))),
        Outcome("192x80 w16 s2 c1", "hung", "no answer"),
    )
    peers = {"cudnn": dict(zip(cells, (500.0, 330.0), strict=True))}
    one = Tuned(HOPPER.name, "abc", "128x128 w12 s2 c1", cells, outcomes, peers)
    return TuneRecord({"gpu": "H200"}, (one,))


def test_a_record_survives_the_disk_and_says_the_choice(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    record().save(path)
    assert TuneRecord.load(path) == record()
    assert record().choices() == {HOPPER.name: "128x176 w12 s2 c1"}
    assert '"choice": "128x176 w12 s2 c1"' in path.read_text()
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="fmha tune"):
        TuneRecord.load(path)


def test_the_table_shows_the_choice_first() -> None:
    lines = record().kernels[0].lines()
    assert lines[0] == HOPPER.name
    assert lines[1].split() == ["tile", "512", "n", "512", "c", "score", "regs", "spills", "smem"]
    assert lines[2].split() == ["cudnn", "500", "330"]
    assert lines[3].split() == ["*", "128x176", "w12", "s2", "c1", "600", "290", "1.027", "168", "24", "213248"]
    assert lines[4].split()[0] == "c"
    assert lines[5].strip() == "192x80 w16 s2 c1: hung: no answer"
    assert lines[6].startswith("choice    128x176")


def test_without_a_peer_the_catalogues_tile_is_the_measure() -> None:
    one = replace(record().kernels[0], peers={})
    assert one.score(one.outcomes[0]) == pytest.approx(1.0)
    assert one.choice is one.outcomes[1]
    equal = replace(one, outcomes=(one.outcomes[0], replace(one.outcomes[0], variant="other")))
    assert equal.choice is equal.outcomes[0]


def fmha(*words: object) -> Any:
    return CliRunner().invoke(cli.main, ["tune", *map(str, words)])


def test_the_dry_run_lists_without_a_gpu() -> None:
    result = fmha("--dry-run", "--arch", "sm90a", "--head-dim", 128)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(variants(HOPPER)) and all(line.startswith(HOPPER.name) for line in lines)
    assert lines[0].endswith("(the catalogue's)")
    result = fmha("--dry-run", HOPPER.name, "--tile", "128x176")
    assert len(result.stdout.splitlines()) == 2
    assert fmha("--dry-run", HOPPER.name, "--tile", "96").exit_code == 2


def test_builds_are_variants_in_the_cache(own_cache: Path, fake_nvcc: Any) -> None:
    fake_nvcc.write(version=catalog.PROVEN_NVCC, spills=8)
    result = fmha("--build-only", "--tile", "64x32 w4 s2 c1", SMALL.name)
    assert result.exit_code == 0, result.stderr
    assert "64x32 w4 s2 c1  100 registers, 16 bytes of spills" in result.stdout
    assert fake_nvcc.runs == 2
    fmha("--build-only", "--tile", "64x32 w4 s2 c1", SMALL.name)
    assert fake_nvcc.runs <= 3  # the catalogue's own tile with spills is stale and built again


def test_the_command_prints_and_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(driver, "available", lambda: True)
    monkeypatch.setattr(driver, "capability", lambda index: (9, 0))

    def run(specs: Any, **options: Any) -> TuneRecord:
        asked.update(options, specs=[spec.name for spec in specs])
        return record()

    monkeypatch.setattr(tuner, "run", run)
    path = tmp_path / "t.json"
    result = fmha("--head-dim", 128, "--json", path, "--against", "cudnn,flash", "--timeout", 5)
    assert result.exit_code == 0, result.stderr
    assert asked["specs"] == [HOPPER.name]
    assert asked["peers"] == ["cudnn", "flash"] and asked["timeout"] == 5
    assert "choice    128x176" in result.stdout and TuneRecord.load(path) == record()


@pytest.mark.nvcc
def test_variants_are_built_with_the_real_compiler(own_cache: Path) -> None:
    spec = KernelSpec.parse("fmha_fwd_sm90a_bf16_d64")
    good, narrow = Tile.parse("128x64 w12 s2 c1"), Tile.parse("192x240 w16 s2 c1")
    outcomes = tuner.build_all([(spec, good), (spec, narrow)], jobs=1)
    assert outcomes[spec, good].state == "ok" and outcomes[spec, good].registers
    assert outcomes[spec, narrow].state == "not built"  # three consumers have 160 registers, S alone takes 120
    assert tuner.build_all([(spec, good)], jobs=1) == {(spec, good): outcomes[spec, good]}


def test_the_page_says_what_was_chosen_and_what_the_catalogue_has(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import gen_tables

    assert "No run is recorded" in gen_tables.tiles(tmp_path)
    found = record()
    TuneRecord({"gpu": "H200", "date": "2026-11-22"}, found.kernels).save(tmp_path / "docs" / "notes" / "tune_x.json")
    page = gen_tables.tiles(tmp_path)
    now = str(catalog.tile(HOPPER))
    now = now if now == "128x176 w12 s2 c1" else f"**{now}**"
    row = f"| `{HOPPER.name}` | 128x176 w12 s2 c1 | 1.027 | 128x128 w12 s2 c1 | 0.953 | {now} | 2 of 3 right and timed"
    assert f"{row} | older |" in page


@pytest.mark.skipif(driver.available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = fmha("--arch", "sm90a", "--head-dim", 128)
    assert result.exit_code == 3


@pytest.mark.gpu
def test_a_kernel_is_tuned_on_the_gpu(own_cache: Path) -> None:
    import torch

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the tiles are Hopper's")
    found = tuner.run([HOPPER], tiles=["128x64"], lengths=(512,), reps=3)
    (one,) = found.kernels
    assert one.choice is not None and {o.state for o in one.outcomes} == {"ok"}
    assert len(one.cells) == 2 and all(len(o.tflops) == 2 for o in one.outcomes)
