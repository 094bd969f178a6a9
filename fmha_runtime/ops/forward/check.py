# SPDX-License-Identifier: Apache-2.0
"""The checks of one case: runs a kernel on it and lists the promises that it broke.

The number rule: the largest error against an fp64 reference is at most twice that of an honest
low-precision implementation of the same maths, plus the rounding noise of the output dtype.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...errors import DriverError, EmulatorFault
from ...kernels.spec import DType, KernelSpec
from ..suite import CaseResult, Failure
from . import reference
from .cases import Case
from .inputs import Inputs, inputs

if TYPE_CHECKING:
    from torch import Tensor


Runner = Callable[..., Any]
"""``runner(q, k, v, **options)`` with the options of ``launch.run``: returns out, or (out, lse)."""

REL_L2_LIMIT = {DType.BF16: 3e-3, DType.FP16: 4e-4}
"""On standard normal inputs. Good kernels measure 2.2e-3 to 2.4e-3 and 2.8e-4 to 3.1e-4."""
LSE_LIMIT = 1e-3
ERROR_FACTOR = 2  # of the baseline's error, and of the rounding noise of the output dtype
EDITION = 1
"""Raised by hand when a check is added or becomes another one, so that older records are of another suite."""

_CANARY = -1280.0  # exact in fp16 and bf16; no case comes near it
_GUARD = 64  # floats before and after the log-sum-exp


def limits(dtype: DType) -> dict[str, float]:
    """What the checks of a kernel of this dtype allow."""
    return {"edition": EDITION, "error_factor": ERROR_FACTOR, "rel_l2": REL_L2_LIMIT[dtype], "lse": LSE_LIMIT}


def check_case(
    spec: KernelSpec, case: Case, device: str, runner: Runner, reference_device: str | None = None
) -> CaseResult:
    """Run one case with tensors on a torch device and apply every check.

    The reference is computed, and the results are compared with it, on ``reference_device``; None: on ``device``.
    """
    begin = time.perf_counter()
    given = inputs(spec, case, device)
    try:
        result = _Check(spec, case, given, runner, reference_device or device).result()
    except (EmulatorFault, DriverError, RuntimeError) as error:
        failure = Failure("fault", f"{type(error).__name__}: {error}")
        result = CaseResult(case, "FAIL", failures=(failure,), allowed=1.0, max_error=math.inf)
    return replace(result, seconds=time.perf_counter() - begin)


class _Check:
    """The checks of one case; collects failures."""

    def __init__(self, spec: KernelSpec, case: Case, given: Inputs, runner: Runner, reference_device: str) -> None:
        self.spec = spec
        self.case = case
        self.given = given
        self.runner = runner
        self.reference_device = reference_device
        self.failures: list[Failure] = []
        self.rows = sum(case.lens_q) if case.varlen else case.lens_q[0]

    def result(self) -> CaseResult:
        canvas, outside, out = self._canvas()
        lse_canvas, lse_outside, lse = self._lse_canvas()
        got, got_lse = self.run(out=out, lse=lse, return_lse=True)
        if not self._check_form(got, got_lse, out, lse):
            return CaseResult(self.case, "FAIL", "", tuple(self.failures), math.inf, 1.0)
        self._check_canary("the output", canvas, outside)
        self._check_canary("the log-sum-exp", lse_canvas, lse_outside)
        got, got_lse = self._inside(got), self._inside_lse(got_lse)
        ref, ref_lse = self._reference(reference.attention, reference.attention_varlen)
        base, _ = self._reference(reference.baseline, reference.baseline_varlen)
        there, there_lse = got.to(self.reference_device), got_lse.to(self.reference_device)
        max_error, allowed = self._check_output(there, ref, base)
        rel_l2 = self._check_l2(there, ref)
        self._check_empty_rows(there, ref_lse)
        lse_error = self._check_lse(there_lse, ref_lse)
        # Another buffer and no LSE must not change a bit. On a GPU neither may the same call again,
        # where a race would show; the emulator's order of events is fixed.
        self._check_repeat("without LSE", self._inside(self.run(return_lse=False)), got)
        if got.is_cuda:
            again, again_lse = self.run(return_lse=True)
            self._check_repeat("a second time", self._inside(again), got)
            self._check_repeat("a second time, LSE", self._inside_lse(again_lse), got_lse)
        if self.case.options:
            self._check_options(got)
        word = "FAIL" if self.failures else "ok"
        failures = tuple(self.failures)
        return CaseResult(self.case, word, "", failures, max_error, allowed, rel_l2, lse_error)

    def fail(self, check: str, message: str, **where: Any) -> None:
        self.failures.append(Failure(check, message, **where))

    def run(self, **options: Any) -> Any:
        """The kernel on the case's inputs; ``options`` override the case's."""
        given = self.given
        merged = {
            **{"cu_seqlens_q": given.cu_seqlens_q, "cu_seqlens_k": given.cu_seqlens_k},
            **{**given.extra, **self._options(), **options},
        }
        return self.runner(given.q, given.k, given.v, **merged)

    def _options(self) -> dict[str, Any]:
        case = self.case
        scale, used = case.scale(self.spec), self.given.seqused_k
        asked = {"causal": case.causal, "window": case.window, "scale": scale, "seqused_k": used}
        return asked | self.given.features

    def _reference(self, dense: Callable[..., Any], varlen: Callable[..., Any]) -> Any:
        def there(x: Any) -> Any:
            return x.to(self.reference_device) if hasattr(x, "to") else x

        given = self.given
        q, k, v, cu_q, cu_k = map(there, (given.q, given.k, given.v, given.cu_seqlens_q, given.cu_seqlens_k))
        options = {name: there(value) for name, value in self._options().items()}
        if not self.case.varlen:
            return dense(q, k, v, **options)
        out, lse = varlen(q, k, v, cu_q, cu_k, **options)
        return self._inside(out), self._inside_lse(lse)

    def _inside(self, x: Tensor) -> Tensor:
        """Of ``[..., rows, heads, dim]``, the rows that belong to a sequence."""
        return x[..., : self.rows, :, :]

    def _inside_lse(self, x: Tensor) -> Tensor:
        return x[..., : self.rows]

    def _canvas(self) -> tuple[Tensor, Tensor, Tensor]:
        """A buffer of canaries, where it must keep them, and the view of it that the kernel fills.

        The rows that the kernel must write hold NaN beforehand; tokens after the last sequence of a
        packed tensor are not its to write.
        """
        import torch

        q, dv = self.given.q, self.spec.head_dim_v
        *lead, rows, heads, _ = q.shape

        def view(x: Tensor) -> Tensor:
            return x[..., 2 : 2 + rows, 1 : 1 + heads, :dv]

        canvas = q.new_full((*lead, rows + 4, heads + 2, dv + 8), _CANARY)
        outside = torch.ones_like(canvas, dtype=torch.bool)
        self._inside(view(outside))[:] = False
        canvas.masked_fill_(~outside, float("nan"))
        return canvas, outside, view(canvas)

    def _lse_canvas(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for the log-sum-exp, which is contiguous: canaries before it, after it, and in the tokens that no
        sequence has.
        """
        import torch

        q = self.given.q
        *lead, rows, heads, _ = q.shape
        shape = (*lead, heads, rows)
        count = math.prod(shape)
        canvas = torch.full((count + 2 * _GUARD,), _CANARY, dtype=torch.float32, device=q.device)
        outside = torch.ones_like(canvas, dtype=torch.bool)
        self._inside_lse(outside[_GUARD : _GUARD + count].view(shape))[:] = False
        canvas.masked_fill_(~outside, float("nan"))
        return canvas, outside, canvas[_GUARD : _GUARD + count].view(shape)

    def _check_form(self, got: Tensor, got_lse: Tensor, out: Tensor, lse: Tensor) -> bool:
        form = (tuple(got.shape), got.dtype, got.data_ptr())
        if form != (tuple(out.shape), out.dtype, out.data_ptr()):
            self.fail("output", f"returned {form[:2]}, which is not the tensor passed as out=")
        lse_form = (tuple(got_lse.shape), got_lse.dtype, got_lse.data_ptr())
        if lse_form != (tuple(lse.shape), lse.dtype, lse.data_ptr()):
            self.fail("lse", f"returned {lse_form[:2]}, which is not the tensor passed as lse=")
        return not self.failures

    def _check_canary(self, what: str, canvas: Tensor, outside: Tensor) -> None:
        written = (outside & (canvas != _CANARY)).nonzero()
        if len(written):
            first = tuple(written[0].tolist())
            where = {"coordinate": first, "got": float(canvas[first]), "want": _CANARY}
            self.fail("canary", f"{len(written)} elements around {what} were written", **where)

    def _check_output(self, got: Tensor, ref: Tensor, base: Tensor) -> tuple[float, float]:
        error = (got.double() - ref).abs().nan_to_num(nan=math.inf)
        base_error = (base.double() - ref).abs()
        rounded = ref.to(got.dtype)
        noise = ((rounded + 0.3 - 0.3) - rounded).abs().max()
        allowed = float(ERROR_FACTOR * base_error.max() + ERROR_FACTOR * noise)
        worst = float(error.max())
        if not worst <= allowed:
            at = _unravel(int(error.argmax()), error.shape)
            where = {"coordinate": at, "got": float(got[at]), "want": float(ref[at])}
            message = f"off by {worst:.3e}, allowed {allowed:.3e},"
            self.fail("output", message, **where, baseline_error=float(base_error[at]))
        return worst, allowed

    def _check_l2(self, got: Tensor, ref: Tensor) -> float:
        error, size = float((got.double() - ref).norm()), float(ref.norm())
        value = error / size if size else (0.0 if error == 0 else math.inf)
        limit = REL_L2_LIMIT[self.spec.dtype]
        if self.case.normal and not value <= limit:
            self.fail("l2", f"relative L2 error {value:.3e}, allowed {limit:.1e}")
        return value

    def _check_empty_rows(self, got: Tensor, ref_lse: Tensor) -> None:
        empty = (ref_lse == -math.inf).transpose(-1, -2)[..., None]
        wrong = (empty & (got != 0)).nonzero()
        if len(wrong):
            first = tuple(wrong[0].tolist())
            message = f"{len(wrong)} elements of rows that see no key are not 0,"
            self.fail("empty rows", message, coordinate=first, got=float(got[first]), want=0.0)

    def _check_lse(self, got: Tensor, ref: Tensor) -> float:
        empty = ref == -math.inf
        error = (got.double() - ref).abs().nan_to_num(nan=math.inf)
        error = error.masked_fill(empty & (got == -math.inf), 0.0)
        worst = float(error.max())
        if not worst <= LSE_LIMIT:
            at = _unravel(int(error.argmax()), error.shape)
            where = {"coordinate": at, "got": float(got[at]), "want": float(ref[at])}
            self.fail("lse", f"off by {worst:.3e}, allowed {LSE_LIMIT:.0e},", **where)
        return worst

    def _check_repeat(self, label: str, again: Tensor, first: Tensor) -> None:
        import torch

        as_bits = torch.int32 if first.dtype == torch.float32 else torch.int16
        differ = (again.contiguous().view(as_bits) != first.contiguous().view(as_bits)).nonzero()
        if len(differ):
            at = tuple(differ[0].tolist())
            where = {"coordinate": at, "got": float(again[at]), "want": float(first[at])}
            self.fail("repeat", f"{len(differ)} elements differ when run {label},", **where)

    def _check_options(self, got: Tensor) -> None:
        import torch

        case, k = self.case, self.given.k
        used = torch.full((len(case.lens_k),), case.lens_k[0] // 2, device=k.device)
        changes: dict[str, Any] = {
            "causal": not case.causal,
            "window": (5, 3),
            "scale": 2 * self.spec.head_dim**-0.5,
            "seqused_k": used.to(torch.int32),
            "sinks": torch.ones(case.heads, device=k.device),
            "attention_chunk": 8,
        }
        if case.softcap:
            changes["softcap"] = case.softcap / 2
        if case.mask:
            changes["mask"] = torch.ones(case.lens_q[0], case.lens_k[0], dtype=torch.bool, device=k.device)
        if case.slopes:
            changes["alibi_slopes"] = torch.full((case.heads,), 0.01, device=k.device)
        for option, value in changes.items():
            if torch.equal(self.run(**{option: value}), got):
                self.fail("options", f"{option}={value} gives the same output as without it")


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    at = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        at.append(place)
    return tuple(reversed(at))
