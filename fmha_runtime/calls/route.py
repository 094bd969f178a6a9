# SPDX-License-Identifier: Apache-2.0
"""One call of any public function: its plan is found or made and launched; a traced call becomes an operator instead.

Plans are kept by geometry and options, so that a warm call is one look-up and one launch.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from ..device import driver, loader
from ..errors import InputError, UnsupportedProblem
from ..kernels.spec import Arch
from ..ops import obtain
from ..ops.combine.merge import merge
from ..ops.forward import reference
from ..ops.forward.binding import Binding
from ..ops.forward.plan import NO_BACKWARD, Plan
from ..ops.pack import packer
from ..ops.works import WORK
from ..problem import arguments, arrays, dispatch, kinds, tensors, values
from ..problem.arguments import NO_EXTRAS, Extras
from ..problem.dispatch import Problem
from ..problem.overlap import Memory
from ..problem.packed_mask import unpack_mask
from . import torch_ops

PLANS = 4096
"""Plans that are kept, one a geometry; the oldest make room. Making one again costs some microseconds."""
_plans: dict[Any, Plan] = {}

BINDINGS = 1024
"""Bindings that are kept, one for each kernel and options."""
_bindings: dict[Any, Binding] = {}

ROVERS = 64
"""Bindings of a thread that have a plan which is aimed at one new geometry after the other."""

_seen: dict[int, None] = {}
"""Hashes of geometries that were met once. Who comes again while its thread's plan has moved on gets a plan of its own:
a conversation has new lengths with every token, a training loop a few for ever."""


class _Mine(threading.local):
    """What each thread has for itself, since a plan of others may be aimed elsewhere at any moment."""

    def __init__(self) -> None:
        self.recent: dict[Any, Plan] = {}
        """The plan that options, lengths and optional tensors had last: nearly always, its guard knows q, k and v."""
        self.rovers: dict[Binding, Plan] = {}


_mine = _Mine()


def _forget() -> None:
    """A forked child may not launch its parent's kernels."""
    for table in (_plans, _bindings, _seen, _mine.recent, _mine.rovers):
        table.clear()


os.register_at_fork(after_in_child=_forget)


def _keep(table: dict[Any, Any], limit: int, key: Any, value: Any) -> None:
    if len(table) >= limit:
        try:
            table.pop(next(iter(table)), None)
        except (RuntimeError, StopIteration):  # another thread changed the table at this moment
            table.clear()
    table[key] = value


def run(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, causal: Any, window: Any, scale: Any,
    softcap: Any, chunk: Any, alibi: Any, sinks: Any, table: Any, mask: Any, used: Any, out: Any, return_lse: bool,
    device: Any, stream: Any, fallback: Any, cache: bool = False, tile: str | None = None, traced: bool = False,
) -> Any:  # fmt: skip
    import torch

    if not traced and (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx and other modes that see operators
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad, jvp, functionalize
    ):
        return _trace(
            q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale, softcap, chunk, alibi, sinks, table, mask, used,
            out, return_lse, device, stream, fallback, cache, tile,
        )  # fmt: skip
    if stream is not None and type(stream) is not int:
        stream = arguments.stream(stream)
    # The hot path: one dictionary look-up and a guard stand for every check that depends on geometry and options.
    # Attributes are read in line: a function call would cost more than they do.
    extras, optional = NO_EXTRAS, None
    if alibi is not None or sinks is not None or table is not None or mask is not None:
        extras = Extras(alibi, sinks, table, None if mask is None else packer.packed(mask, cu_q, stream))
    asked: Any
    key: Any
    try:
        if extras is not NO_EXTRAS:
            optional = extras.key
        asked = (
            causal, window, scale, softcap, chunk, device, max_q, max_k, cache, tile, optional,
            None if out is None else (type(out), out.shape, out.stride(), out.dtype, out.device),
            None if used is None else (type(used), used.shape, used.stride(), used.dtype, used.device),
            None if cu_q is None else (type(cu_q), cu_q.shape, cu_q.stride(), cu_q.dtype, cu_q.device),
            None if cu_k is None else (type(cu_k), cu_k.shape, cu_k.stride(), cu_k.dtype, cu_k.device),
        )  # fmt: skip
        if (fallback is not None and fallback != "torch") or not arguments.plainly(
            causal, window, scale, softcap, chunk
        ):
            _check_options(causal, window, scale, softcap, chunk, fallback)
        plan = _mine.recent.get(asked)
        if (
            plan is not None
            and plan.guard(q, k, v)
            and torch.autograd.forward_ad._current_level < 0
            and not plan.emulated
        ):
            return plan.launch(q, k, v, out, return_lse, cu_q, cu_k, used, stream, extras, None, True)
        key = (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(),
            v.dtype, v.device, asked,
        )  # fmt: skip
        if plan is None or plan.key != key:
            plan = _plans.get(key)
    except (AttributeError, TypeError):  # no tensors, or a list as window: the slow path says what is wrong
        asked = key = plan = None
    given = (q, k, v, cu_q, cu_k, alibi, sinks, table, mask, used, out)
    if not traced and kinds.are_special(given):
        kinds.refuse_tangents(given)
        return _trace(
            q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale, softcap, chunk, alibi, sinks, table, mask, used,
            out, return_lse, device, stream, fallback, cache, tile,
        )  # fmt: skip
    if plan is not None:
        if not plan.guard(q, k, v):
            plan.learn(q, k, v)
        _keep(_mine.recent, BINDINGS, asked, plan)
    else:
        if key is None and any(map(arrays.foreign, given)):
            return arrays.call(run, {
                "q": q, "k": k, "v": v, "cu_q": cu_q, "cu_k": cu_k, "max_q": max_q, "max_k": max_k, "causal": causal,
                "window": window, "scale": scale, "softcap": softcap, "chunk": chunk, "alibi": alibi, "sinks": sinks,
                "table": table, "mask": mask, "used": used, "out": out, "return_lse": return_lse, "device": device,
                "stream": stream, "fallback": fallback, "cache": cache, "tile": tile,
            }, stream)  # fmt: skip
        lengths = (cu_q, cu_k, max_q, max_k, used, cache)
        options = {
            "causal": causal, "window": window, "scale": scale, "softcap": softcap, "attention_chunk": chunk
        }  # fmt: skip
        shape, binding = _bound(q, k, v, lengths, options, extras, out, device, stream, fallback, tile)
        if binding is None:
            return _in_torch(q, k, v, lengths, options, extras, out, return_lse, fallback)
        plan = _aimed(binding, key, shape, q, k, v, out, extras)
        if key is not None:
            _keep(_mine.recent, BINDINGS, asked, plan)
    if plan.emulated:
        values.check(plan.shape, cu_q, cu_k, used, table, k.shape[0], k.shape[0])
    return plan.launch(q, k, v, out, return_lse, cu_q, cu_k, used, stream, extras)


def _check_options(causal: Any, window: Any, scale: Any, softcap: Any, chunk: Any, fallback: Any) -> None:
    """What a look-up by equality cannot tell from right options: 1 is no True, and True is no number."""
    arguments.options(causal=causal, window=window, scale=scale, softcap=softcap, attention_chunk=chunk)
    if fallback not in (None, "torch"):
        raise InputError(f"fallback is {fallback!r}; None or 'torch' is needed")


def _trace(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, causal: Any, window: Any, scale: Any,
    softcap: Any, chunk: Any, alibi: Any, sinks: Any, table: Any, mask: Any, used: Any, out: Any, return_lse: bool,
    device: Any, stream: Any, fallback: Any, cache: bool, tile: str | None,
) -> Any:  # fmt: skip
    """The call as an operator, for the tracer to record. The checks of the call run when the operator runs."""
    import torch

    if out is not None and not torch.compiler.is_compiling():  # dynamo cannot ask a tensor what it is
        kinds.refuse_out(out)
    register_torch_ops()
    if stream is not None:
        raise InputError("stream= in a traced call: traced code runs on the current stream; leave it out")
    if window is not None and (not isinstance(window, tuple | list) or len(window) != 2):
        arguments.options(window=window)  # type: ignore[arg-type]  # raises
    left, right = (None, None) if window is None else window
    options: dict[str, Any] = {
        "causal": causal, "window_left": left, "window_right": right, "scale": scale, "softcap": softcap,
        "attention_chunk": chunk, "alibi_slopes": alibi, "sinks": sinks, "return_lse": return_lse, "device": device,
        "fallback": fallback, "tile": tile, **torch_ops.mask_arguments(mask),
    }  # fmt: skip
    if out is not None:
        options["into"] = out
    ops = torch.ops.fmha
    if cache:
        options.update(page_table=table, cu_seqlens_q=cu_q, max_seqlen_q=max_q)
        op = ops.fwd_kvcache if out is None else ops.fwd_kvcache_out
        result = op(q, k, v, used, **options)
    elif cu_q is not None:
        op = ops.fwd_varlen if out is None else ops.fwd_varlen_out
        result = op(q, k, v, cu_q, cu_k, max_q, max_k, seqused_k=used, **options)
    else:
        op = ops.fwd if out is None else ops.fwd_out
        result = op(q, k, v, seqused_k=used, **options)
    out, lse = result if out is None else (out, result)
    return (out, lse) if return_lse else out


def _run_op(name: str, given: dict[str, Any], out: Any) -> tuple[Any, Any]:
    """An operator's work: the eager call. Returns (out, lse or None)."""
    get = given.get
    mask = torch_ops.mask_of(given)
    cache = name == "fwd_kvcache"
    k, v = (given["k_cache"], given["v_cache"]) if cache else (given["k"], given["v"])
    return_lse = get("return_lse", False)
    result = run(
        given["q"], k, v, get("cu_seqlens_q"), get("cu_seqlens_k"), get("max_seqlen_q"), get("max_seqlen_k"),
        get("causal", False), (get("window_left"), get("window_right")), get("scale"), get("softcap", 0.0),
        get("attention_chunk"), get("alibi_slopes"), get("sinks"), get("page_table"), mask,
        get("cache_seqlens" if cache else "seqused_k"), out, return_lse, get("device"), None, get("fallback"), cache,
        get("tile"), True,
    )  # fmt: skip
    return result if return_lse else (result, None)


def register_torch_ops() -> None:
    """Defines ``torch.ops.fmha.fwd``, ``fwd_varlen``, ``fwd_kvcache``, their ``_out`` forms and ``merge``.

    Calls under torch.compile and the like do it by themselves; a program that was exported with these operators and is
    loaded in a fresh process needs it first. A second call does nothing.
    """
    torch_ops.define(_run_op, merge)


# What dynamo looks for: run this while tracing and take the result as it is. torch.compiler.assume_constant_result
# would say so, if torch could be imported here.
register_torch_ops._dynamo_marked_constant = True  # type: ignore[attr-defined]


def checked(q: Any, k: Any, v: Any, lengths: Any, extras: Extras, out: Any = None) -> arguments.Shape:
    """``call.check_call`` of tensors with ``lengths`` as in ``make_plan``. Raises InputError: see there."""
    cu_q, cu_k, max_q, max_k, used, cache = lengths
    return arguments.check_call(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used, max_seqlen_q=max_q, max_seqlen_k=max_k, out=out,
        extras=extras, cache=cache,
    )  # fmt: skip


def make_plan(
    q: Any, k: Any, v: Any, lengths: Any, options: dict[str, Any], extras: Extras, out: Any, device: Any, stream: Any,
    fallback: Any, tile: str | None = None,
) -> Plan | None:  # fmt: skip
    """The plan of a call, or None when plain torch is to run it (CPU tensors, or an explicit fallback).

    Args:
        lengths: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, whether K and V are a cache).
        options: the arguments of ``call.options``.

    Raises:
        the errors of ``api.attention``.
    """
    shape, binding = _bound(q, k, v, lengths, options, extras, out, device, stream, fallback, tile)
    return None if binding is None else Plan(binding, shape, q, k, v, out, extras)


def _aimed(
    binding: Binding, key: Any, shape: arguments.Shape, q: Any, k: Any, v: Any, out: Any, extras: Extras
) -> Plan:  # fmt: skip
    """A plan for a geometry that has none: the thread's rover, or one of its own where the geometry was met before."""
    if key is None:
        return Plan(binding, shape, q, k, v, out, extras)
    met = hash(key)
    if met in _seen:
        plan = Plan(binding, shape, q, k, v, out, extras)
        _keep(_plans, PLANS, key, plan)
    else:
        _keep(_seen, PLANS, met, None)
        rover = _mine.rovers.get(binding)
        if rover is None:
            plan = Plan(binding, shape, q, k, v, out, extras)
            _keep(_mine.rovers, ROVERS, binding, plan)
        else:
            plan = rover
            plan.key = None  # until all of it is aimed
            plan.aim(shape, q, k, v, out, extras)
    plan.key = key
    return plan


def _bound(
    q: Any, k: Any, v: Any, lengths: Any, options: dict[str, Any], extras: Extras, out: Any, device: Any, stream: Any,
    fallback: Any, tile: str | None,
) -> tuple[arguments.Shape, Binding | None]:  # fmt: skip
    """The checked sizes of a call and its binding, None when plain torch is to run it. Errors as for ``make_plan``."""
    shape = checked(q, k, v, lengths, extras, out)
    key: Any = (
        q.dtype, q.device, shape.head_dim, shape.head_dim_v, shape.page_size, *options.values(), device, fallback, tile,
        extras.alibi_slopes is None, extras.mask is None,
        dispatch.regime(shape.batch, shape.heads, shape.heads_k, shape.seqlen_q, shape.seqlen_k, shape.page_size),
    )  # fmt: skip
    try:
        binding = _bindings.get(key)
    except TypeError:  # a list as window
        key = binding = None
    if binding is None:
        binding = bind(q, shape, options, extras, device, stream, fallback, tile)
        if binding is not None and key is not None:
            _keep(_bindings, BINDINGS, key, binding)
    return shape, binding


def bind(
    q: Any, shape: arguments.Shape, options: dict[str, Any], extras: Extras, device: Any, stream: Any, fallback: Any,
    tile: str | None,
) -> Binding | None:  # fmt: skip
    """The kernel of a checked call, loaded, with its options; None when plain torch is to run it. Errors as above."""
    opts = arguments.options(**options)
    if fallback not in (None, "torch"):
        raise InputError(f"fallback is {fallback!r}; None or 'torch' is needed")
    emulated = loader.emulated_arch(device)
    if emulated is None and device is not None:
        raise InputError(f"device is {device!r}; None (where the tensors are), 'emulator' or 'emulator:ARCH' is needed")
    if emulated is not None and q.device.type != "cpu":
        raise InputError(f"the emulator runs CPU tensors; q is on {q.device}: call q.cpu()")
    if q.device.type not in ("cpu", "cuda"):
        raise InputError(f"q is on {q.device}; CUDA and CPU tensors are supported")
    arguments.score(opts, extras)  # contradictions are refused wherever the call runs
    if emulated is None and q.device.type == "cpu":
        if tile is not None:
            raise InputError(f"tile is {tile!r} and CPU tensors run in plain torch: pass device='emulator' as well")
        if fallback is None and not all(8 <= d <= 256 and d % 8 == 0 for d in (shape.head_dim, shape.head_dim_v)):
            raise UnsupportedProblem(
                f"head dims {shape.head_dim} of q and k and {shape.head_dim_v} of v: kernels exist for multiples of 8 "
                "from 8 to 256 only. Pad the tensors, or pass fallback='torch', which runs any in plain torch"
            )
        return None
    where = "emulator" if emulated else f"cuda:{q.device.index}"
    try:
        arch = emulated or arch_of(q.device.index)
        choice = dispatch.choose(problem(arch, q, shape, opts, extras), tile)
        if stream is None and not emulated:
            import torch

            stream = torch.cuda.current_stream(q.device).cuda_stream
        forced = None if tile is None else choice.tile
        kernel = obtain.kernel(choice.spec, device=where, tile=forced, stream=stream or 0)
    except UnsupportedProblem:
        if fallback == "torch" and tile is None:
            return None
        raise
    return Binding(kernel, choice.spec, choice.tile, opts, shape.page_size, WORK.get(choice.spec.op))


def arch_of(index: int) -> Arch:
    """The target of a GPU. Raises UnsupportedProblem: there are no kernels for it."""
    capability = driver.capability(index)
    found = Arch.for_capability(*capability)
    if found is None:
        raise UnsupportedProblem(
            f"no kernels for compute capability {capability[0]}.{capability[1]}; there are kernels for "
            + ", ".join(dict.fromkeys(f"{a.capability[0]}.{a.capability[1]}" for a in Arch))
            + ". fallback='torch' runs it in plain torch instead, if that is what you want."
        )
    return found


def problem(arch: Arch, q: Any, shape: arguments.Shape, opts: arguments.Options, extras: Extras) -> Problem:
    """What dispatch is asked about a checked call."""
    return Problem(
        arch=arch,
        dtype=tensors.dtype_of("q", q),
        head_dim=shape.head_dim,
        head_dim_v=shape.head_dim_v,
        mask=arguments.mask(extras),
        score=arguments.score(opts, extras),
        kv=shape.kv,
        varlen=shape.varlen,
        batch=shape.batch,
        seqlen_q=shape.seqlen_q,
        seqlen_k=shape.seqlen_k,
        heads=shape.heads,
        heads_k=shape.heads_k,
        page_size=shape.page_size,
        causal=opts.causal,
        window=opts.window,
    )


def _in_torch(
    q: Any, k: Any, v: Any, lengths: Any, options: dict[str, Any], extras: Extras, out: Any, return_lse: bool,
    fallback: Any,
) -> Any:  # fmt: skip
    """Plain torch with the same semantics, fp32 inside: CPU tensors, and ``fallback="torch"``, which also has
    gradients."""
    import torch

    cu_q, cu_k, _, _, used, _ = lengths
    wanted = torch.is_grad_enabled() and (any(t.requires_grad for t in (q, k, v)) or extras.requires_grad)
    if fallback is None and wanted:
        raise UnsupportedProblem(f"{NO_BACKWARD}. fallback='torch' has one")
    if q.device.type == "cpu":
        shape = checked(q, k, v, lengths, extras, out)
        values.check(shape, cu_q, cu_k, used, extras.page_table, k.shape[0], k.shape[0])
    if out is not None:
        Memory(q, k, v, out).check(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    shared: dict[str, Any] = {
        **options, "alibi_slopes": extras.alibi_slopes, "sinks": extras.sinks, "page_table": extras.page_table,
        "seqused_k": used, "compute_dtype": torch.float32,
        "mask": None if extras.mask is None else unpack_mask(extras.mask, cu_seqlens_q=cu_q),
    }  # fmt: skip
    if cu_q is None:
        result, lse = reference.attention(q, k, v, **shared)
    else:
        result, lse = reference.attention_varlen(q, k, v, cu_q, cu_k, **shared)
    if out is None:
        out = result.to(q.dtype)
    else:
        out.copy_(result)
    return (out, lse.float()) if return_lse else out
