# SPDX-License-Identifier: Apache-2.0
"""Verification passes a right kernel and catches every kind of wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fmha_runtime.device.loader import Image
from fmha_runtime.errors import EmulatorFault, InputError, ToolchainError
from fmha_runtime.kernels import catalog, sources
from fmha_runtime.kernels.spec import DType, KernelSpec, Score
from fmha_runtime.ops import obtain
from fmha_runtime.ops.forward import cases as verify_cases
from fmha_runtime.ops.forward import check as verify_check
from fmha_runtime.ops.forward import direct, reference
from fmha_runtime.ops.forward.cases import cases
from fmha_runtime.ops.forward.check import CaseResult
from fmha_runtime.ops.forward.inputs import inputs
from fmha_runtime.verify import run as verifier

SPEC = KernelSpec.parse("fmha_fwd_sm80_bf16_d40")
Kernel = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The products are tiny: on a busy machine, waiting for a second thread costs 50 times more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def right(q: Any, k: Any, v: Any, *, out: Any = None, lse: Any = None, return_lse: bool = False, **options: Any) -> Any:
    """What a kernel does, in float32 and rounded once at the end."""
    cu_q, cu_k = options.pop("cu_seqlens_q", None), options.pop("cu_seqlens_k", None)
    options = {key: x for key, x in options.items() if not key.startswith("max_seqlen")}
    if out is None:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if cu_q is None:
        full, full_lse = reference.attention(q, k, v, **options, compute_dtype=torch.float32)
        rows = q.shape[1]
    else:
        full, full_lse = reference.attention_varlen(q, k, v, cu_q, cu_k, **options, compute_dtype=torch.float32)
        rows = int(cu_q[-1])  # tokens after the last sequence are not written
    out[..., :rows, :, :] = full[..., :rows, :, :].to(out.dtype)
    if lse is None:
        lse = full_lse
    else:
        lse[..., :rows] = full_lse[..., :rows]
    return (out, lse) if return_lse else out


def wrong(change: Callable[[Any, Any], None]) -> Kernel:
    """The right kernel with something done to its output and LSE."""

    def run(*args: Any, return_lse: bool = False, **options: Any) -> Any:
        out, lse = right(*args, return_lse=True, **options)
        change(out, lse)
        return (out, lse) if return_lse else out

    return run


def ignoring(*names: str) -> Kernel:
    def run(*args: Any, **options: Any) -> Any:
        return right(*args, **{key: x for key, x in options.items() if key not in names})

    return run


def report(kernel: Kernel, spec: KernelSpec = SPEC) -> verifier.Report:
    return verifier.verify_kernel(spec, device="emulator", quick=True, runner=kernel)


def checks(kernel: Kernel) -> set[str]:
    return {f.check for result in report(kernel).failed for f in result.failures}


@pytest.mark.parametrize("name", ["fmha_fwd_sm80_bf16_d40", "fmha_fwd_sm90_fp16_d192x128"])
def test_a_right_kernel_passes(name: str) -> None:
    spec = KernelSpec.parse(name)
    found = report(right, spec)
    assert found.ok and not found.failed
    assert len(found.passed) >= 15
    assert 0 < found.worst_rel_l2 < 3e-3
    assert found.worst is not None and 0 < found.worst.ratio < 1
    assert next(found.lines()).startswith(f"ok    {name}  {len(found.passed)} of ")


def test_the_low_precision_baseline_itself_passes_the_max_rule() -> None:
    case = next(c for c in cases(SPEC) if str(c).startswith("b=2 sq=257 sk=257"))

    def run(q: Any, k: Any, v: Any, *, out: Any = None, lse: Any = None, return_lse: bool = False, **o: Any) -> Any:
        options = {key: o[key] for key in ("causal", "window", "scale", "seqused_k")}
        base, base_lse = reference.baseline(q, k, v, **options)
        base = base if out is None else out.copy_(base)
        lse = base_lse if lse is None else lse.copy_(base_lse)
        return (base, lse) if return_lse else base

    result = verifier.check_case(SPEC, case, "cpu", run)
    assert not {f.check for f in result.failures} & {"output", "canary", "repeat", "empty rows"}
    assert result.ratio <= 0.5


@pytest.mark.parametrize("varlen", [False, True])
def test_the_reference_may_be_elsewhere(varlen: bool) -> None:
    """Every tensor of the call goes there, and the kernel's stay where they are."""
    spec = KernelSpec.parse("fmha_fwd_sm80_bf16_d64_packed_paged")
    case = next(c for c in cases(spec) if c.varlen == varlen and c.used_k)
    seen: list[Any] = []

    def spy(*given: Any, **options: Any) -> Any:
        seen.extend(x.device.type for x in (*given, *options.values()) if isinstance(x, torch.Tensor))
        return given[0], given[0][..., 0]

    given = inputs(spec, case, "cpu")
    verify_check._Check(spec, case, given, spy, "meta")._reference(spy, spy)
    assert set(seen) == {"meta"} and len(seen) >= (7 if varlen else 6)
    assert given.q.device.type == "cpu"


def poke(at: tuple[Any, ...], value: float) -> Callable[[Any, Any], None]:
    def change(out: Any, lse: Any) -> None:
        out[at] = value

    return change


def overwrite_next_head(out: Any, lse: Any) -> None:
    if out.untyped_storage().nbytes() > out.numel() * out.element_size():  # a view of something
        beyond = out.storage_offset() + out.shape[-2] * out.stride(-2)
        out.as_strided((1,), (1,), beyond)[0] = 0


def overwrite_behind_lse(out: Any, lse: Any) -> None:
    if lse.untyped_storage().nbytes() > lse.numel() * lse.element_size():
        lse.as_strided((1,), (1,), lse.storage_offset() + lse.numel())[0] = 0


def overwrite_before_lse(out: Any, lse: Any) -> None:
    if lse.storage_offset():
        lse.as_strided((1,), (1,), lse.storage_offset() - 1)[0] = -math.inf


def write_lse_of_no_token(out: Any, lse: Any) -> None:
    if lse.ndim == 2 and lse.storage_offset():
        lse[0, -1] = 0  # packed tensors of the cases end with tokens of no sequence


def forget_last_row(out: Any, lse: Any) -> None:
    if out.ndim == 4 and out.shape[1] > 64:
        out[:, -1] = math.nan


def tiny_where_empty(out: Any, lse: Any) -> None:
    out[(lse == -math.inf).transpose(-1, -2)] = 1e-30


def base_two(out: Any, lse: Any) -> None:
    lse /= math.log(2)


def infinite_the_wrong_way(out: Any, lse: Any) -> None:
    lse[lse == -math.inf] = math.inf


def slightly_off_everywhere(out: Any, lse: Any) -> None:
    out *= 1 + 2**-7


@pytest.mark.parametrize(
    ("kernel", "caught_by"),
    [
        (wrong(poke((0, 0, 0), 9.0)), "output"),
        (wrong(poke((..., -1, -1), math.nan)), "output"),
        (wrong(forget_last_row), "output"),
        (wrong(slightly_off_everywhere), "l2"),
        (wrong(base_two), "lse"),
        (wrong(infinite_the_wrong_way), "lse"),
        (wrong(tiny_where_empty), "empty rows"),
        (wrong(overwrite_next_head), "canary"),
        (wrong(overwrite_behind_lse), "canary"),
        (wrong(overwrite_before_lse), "canary"),
        (wrong(write_lse_of_no_token), "canary"),
        (ignoring("causal"), "output"),
        (ignoring("window"), "output"),
        (ignoring("scale"), "output"),
        (ignoring("seqused_k"), "output"),
        (ignoring("causal"), "options"),
        (ignoring("window"), "options"),
        (ignoring("scale"), "options"),
        (ignoring("seqused_k"), "options"),
    ],
)
def test_a_wrong_kernel_fails(kernel: Kernel, caught_by: str) -> None:
    assert caught_by in checks(kernel)


def test_a_window_that_is_one_key_short_is_caught() -> None:
    def run(*args: Any, window: Any = None, **options: Any) -> Any:
        if window is not None and window[0]:
            window = (window[0] - 1, window[1])
        return right(*args, window=window, **options)

    assert "output" in checks(run)


def test_a_diagonal_at_the_top_left_is_caught() -> None:
    def run(q: Any, k: Any, v: Any, *, causal: bool = False, **options: Any) -> Any:
        if causal and q.ndim == 4 and q.shape[1] < k.shape[1] and options["seqused_k"] is None:
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        return right(q, k, v, causal=causal, **options)

    assert "output" in checks(run)


def test_query_heads_on_the_wrong_kv_head_are_caught() -> None:
    def run(q: Any, k: Any, v: Any, **options: Any) -> Any:
        shared = q.shape[-2] // k.shape[-2]
        return right(q, *(x.tile(shared, 1) for x in (k, v)), **options)

    assert "output" in checks(run)


def test_a_result_that_changes_between_runs_is_caught() -> None:
    calls = []

    def change(out: Any, lse: Any) -> None:
        calls.append(None)
        if len(calls) % 2:  # by one unit in the last place
            bits = out.view(torch.int16)
            bits += 1

    assert "repeat" in checks(wrong(change))


def test_an_output_that_is_not_the_one_passed_is_caught() -> None:
    def run(*args: Any, out: Any = None, **options: Any) -> Any:
        return right(*args, **options)

    assert checks(run) == {"output"}


def test_an_lse_of_the_wrong_form_is_caught() -> None:
    def run(*args: Any, return_lse: bool = False, **options: Any) -> Any:
        out, lse = right(*args, return_lse=True, **options)
        return (out, lse.transpose(-1, -2).double()) if return_lse else out

    assert checks(run) == {"lse"}


def test_an_lse_that_is_not_the_one_passed_is_caught() -> None:
    def run(*args: Any, lse: Any = None, **options: Any) -> Any:
        return right(*args, **options)

    assert checks(run) == {"lse"}


@pytest.mark.emulator
def test_a_tensor_for_the_lse_is_checked() -> None:
    kernel = obtain.kernel(SPEC, device="emulator")
    q = torch.randn(1, 20, 2, 40, dtype=torch.bfloat16)
    room = torch.full((200,), 7.0)
    _, lse = direct.run(kernel, SPEC, q, q, q, return_lse=True, lse=room[40:80].view(1, 2, 20))
    assert lse.data_ptr() == room[40:].data_ptr() and (room[:40] == 7).all() and (room[80:] == 7).all()
    assert torch.equal(lse, direct.run(kernel, SPEC, q, q, q, return_lse=True)[1])
    for bad in (room[:40].view(1, 20, 2), room[:40].view(1, 2, 20).double(), room[:80].view(1, 2, 40)[..., ::2]):
        with pytest.raises(InputError, match=r"contiguous torch.float32 \(1, 2, 20\)"):
            direct.run(kernel, SPEC, q, q, q, return_lse=True, lse=bad)
    with pytest.raises(InputError, match="return_lse=True"):
        direct.run(kernel, SPEC, q, q, q, lse=room[:40].view(1, 2, 20))


def test_a_fault_is_the_failure_of_its_case_and_the_next_case_runs() -> None:
    def run(q: Any, *args: Any, **options: Any) -> Any:
        if q.ndim == 3:
            raise EmulatorFault("thread 3 read past the end of k")
        return right(q, *args, **options)

    found = report(run)
    assert found.passed and found.failed
    assert all(r.case.varlen for r in found.failed)
    text = "\n".join(found.lines())
    assert "thread 3 read past the end of k" in text
    assert f"fmha verify --case {SPEC.name}/{found.failed[0].case.id} --device emulator" in text


def test_a_failure_says_where_and_by_how_much() -> None:
    found = report(wrong(poke((..., 0, 0, 5), 9.0)))
    failure = next(f for r in found.failed for f in r.failures if f.check == "output")
    assert failure.coordinate is not None and failure.coordinate[-3:] == (0, 0, 5)
    assert failure.got == 9.0 and failure.want != 9.0 and failure.baseline_error is not None
    assert "allowed" in str(failure) and "got 9.0" in str(failure)


def test_every_promised_kind_of_case_is_there() -> None:
    found = cases(SPEC)
    assert [c.id for c in found] == list(range(len(found)))
    assert len({str(c) for c in found}) == len(found)
    assert {(c.lens_q[0], c.lens_k[0]) for c in found} >= set(verify_cases.SHAPES)
    assert {(c.heads, c.kv_heads) for c in found} >= set(verify_cases.HEADS)
    assert {c.layout for c in found} == set(verify_cases.LAYOUTS)
    bands = {(c.causal, c.window) for c in found}
    assert bands >= set(verify_cases.BANDS)
    for chosen in (
        [c for c in found if c.varlen and 0 in c.lens_q and 0 in c.lens_k],
        [c for c in found if c.used_k and 0 in c.used_k],
        [c for c in found if c.scale_factor != 1],
        [c for c in found if not c.normal],
        [c for c in found if c.options],
        [c for c in found if max(c.lens_k) > 4000],
    ):
        assert chosen
    assert all(c.layout != "packed" or c.lens_q == c.lens_k for c in found)


def test_inputs_are_reproducible_and_poisoned() -> None:
    for case in (c for c in cases(SPEC) if c.quick and c.products(SPEC) < 10_000):
        one, two = (inputs(SPEC, case, "cpu") for _ in range(2))
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in ((one.k, two.k), (one.v, two.v)))
        assert torch.equal(one.q, two.q) and torch.equal(one.k.nan_to_num(), two.k.nan_to_num())
        assert not one.q.isnan().any()
        used = case.used_k or case.lens_k
        if case.varlen:
            assert one.k.isnan().any()
            assert int((~one.k[:, 0, 0].isnan()).sum()) == sum(used)
        else:
            assert [int((~x).sum()) for x in one.k[:, :, 0, 0].isnan()] == list(used)


def test_another_kernel_has_other_inputs() -> None:
    other = KernelSpec.parse("fmha_fwd_sm90_bf16_d40")
    case = cases(SPEC)[36]
    one, two = (inputs(spec, case, "cpu").q for spec in (SPEC, other))
    assert not torch.equal(one, two)


def test_a_case_is_replayed_by_its_name() -> None:
    assert verifier.parse_case(f"{SPEC.name}/7") == (SPEC, 7)
    found = verifier.verify_kernel(SPEC, device="emulator", case=7, runner=right)
    assert [r.case.id for r in found.results] == [7] and found.ok
    for text in (SPEC.name, f"{SPEC.name}/x", "nonsense/1", f"{SPEC.name}/9999"):
        with pytest.raises(InputError):
            verifier.parse_case(text)


def test_kernels_without_cases_are_refused() -> None:
    with pytest.raises(InputError, match="no verification cases"):
        cases(KernelSpec.parse("fmha_fwd_sm90_e4m3_d64"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, -1])
def test_a_row_without_its_log_sum_exp_fails(value: float, where: int) -> None:
    """What a kernel leaves that does not write it (the canvas holds NaN), or writes the word for an empty row."""

    def change(out: Any, lse: Any) -> None:
        lse.view(-1)[where] = value

    case = next(c for c in cases(SPEC) if not c.varlen and not c.causal and c.window is None and c.used_k is None)
    result = verifier.check_case(SPEC, case, "cpu", wrong(change))
    assert "lse" in {f.check for f in result.failures}, result.failures


def test_cases_too_large_for_the_emulator_are_skipped_and_said() -> None:
    found = report(right)
    assert found.skipped
    assert all("too large for the emulator" in r.reason for r in found.skipped)
    ids = " ".join(str(r.case.id) for r in found.skipped)
    assert any(line.endswith(f"(cases {ids})") for line in found.lines())


def test_only_a_complete_passing_report_is_recorded() -> None:
    results = tuple(CaseResult(c, "ok", max_error=1.0, allowed=2.0, rel_l2=2e-3) for c in cases(SPEC))
    ran = Image(SPEC, catalog.tile(SPEC), "emulator", Path("a.so"), "e" * 64)
    complete = verifier.Report(SPEC, "emulator", "cubin", True, results, ran)
    record = verifier.to_record(complete)
    assert (record.name, record.how, record.cases) == (SPEC.name, "emulator", len(results))
    assert (record.worst_ratio, record.worst_rel_l2) == (0.5, 2e-3)
    assert (record.evidence, record.suite) == (ran.evidence, verifier.suite(SPEC))
    assert record.code == sources.code(SPEC, catalog.tile(SPEC))
    failed = replace(results[0], word="FAIL")
    for broken in (
        replace(complete, complete=False),
        replace(complete, results=(failed, *results[1:])),
        replace(complete, results=()),
        replace(complete, image=None),  # whatever that runner ran
    ):
        with pytest.raises(InputError, match="cannot be recorded"):
            verifier.to_record(broken)


def test_the_suite_is_the_cases_and_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    present, other = verifier.suite(SPEC), KernelSpec.parse("fmha_fwd_sm90_bf16_d128")
    assert present == verifier.suite(other)
    assert present != verifier.suite(replace(SPEC, score=Score.SOFTCAP))
    assert present != verifier.suite(KernelSpec.parse(SPEC.name.replace("bf16", "fp16")))
    for module, name, value in (
        (verify_check, "LSE_LIMIT", 1e-2),
        (verify_check, "ERROR_FACTOR", 3),
        (verify_check, "EDITION", verify_check.EDITION + 1),
        (verify_check, "REL_L2_LIMIT", dict.fromkeys(DType, 1e-2)),
        (verifier, "cases", lambda spec: verify_cases.cases(spec)[:-1]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert verifier.suite(SPEC) != present, name
    assert verifier.suite(SPEC) == present


@pytest.mark.emulator
def test_what_ran_is_what_is_recorded() -> None:
    small = KernelSpec.parse("fmha_fwd_sm80_bf16_d32")
    found = verifier.verify_kernel(small, device="emulator", case=0)
    assert found.image is not None and found.image.how == "emulator"
    assert found.image.evidence == sources.emulated_code(small, catalog.tile(small))


def test_the_sanitizer_command_runs_fmha_under_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}")
    argv = verifier.sanitizer_argv("racecheck", ["verify", SPEC.name])
    assert argv[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert argv[argv.index("--kernel-name") + 1] == "kns=fmha_", "the reference's kernels are not instrumented"
    assert argv[-6:] == ["-m", "fmha_runtime", "verify", SPEC.name, "--reference-device", "cpu"]
    with pytest.raises(InputError, match="memcheck"):
        verifier.sanitizer_argv("leakcheck", [])
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ToolchainError, match="PATH"):
        verifier.sanitizer_argv("memcheck", [])


@pytest.mark.emulator
@pytest.mark.parametrize(
    "name",
    [
        *("fmha_fwd_sm80_fp16_d40", "fmha_fwd_sm80_bf16_d64"),
        *("fmha_fwd_sm90a_bf16_d64_short", "fmha_fwd_sm90a_fp16_d192_short"),
    ],
)
def test_kernels_are_right_on_the_emulator(name: str) -> None:
    found = verifier.verify_kernel(KernelSpec.parse(name), device="emulator", quick=True)
    assert found.ok, "\n".join(found.lines())
    assert len(found.passed) >= 15
