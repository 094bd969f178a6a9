# SPDX-License-Identifier: Apache-2.0
"""The public calls: check, choose, launch. docs/semantics.md is the long form of the rules below.

Tensors are ``[batch, seq, heads, head_dim]`` with any strides and a contiguous head dim, or ``[tokens, heads,
head_dim]`` with ``cu_seqlens`` for varlen. Query i sits at key position ``i + kv_len - q_len`` (bottom-right
alignment); causal calls see no key to the right of it, and ``window=(left, right)`` bounds both sides inclusively,
None = unlimited. Rows that see no key give out = 0 and lse = -inf. Log-sum-exp is fp32 in natural log, ``[batch,
heads, seq]`` or ``[heads, tokens]``.

Arrays of other libraries (DLPack or ``__cuda_array_interface__``) are taken for tensors without a copy, and the results
are of q's kind; ``out=`` is written in place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import call, dispatch, driver, interop, launch, loader, mask_packer, reference, tensors, torch_ops
from .call import NO_EXTRAS, Extras
from .dispatch import Problem, Trace
from .errors import FmhaError, InputError, UnsupportedProblem
from .launch import Plan
from .packed_mask import PackedMask, unpack_mask
from .spec import Arch, Mask

if TYPE_CHECKING:
    import torch

    Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    Window = tuple[int | None, int | None] | None

_PLAN_LIMIT = 4096
_plans: dict[Any, Plan] = {}
# A forked child makes its plans anew: those of its parent hold kernels that it may not launch, and perhaps a lock.
os.register_at_fork(after_in_child=_plans.clear)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: PackedMask | torch.Tensor | None = None,
    attention_chunk: int | None = None,
    seqused_k: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    device: str | None = None,
    stream: int | None = None,
    fallback: str | None = None,
    tile: str | None = None,
) -> Result:
    """Softmax attention, ``softmax(scale * q k^T + mask) v``, on a batch of equally long sequences.

    Args:
        q: [B, Sq, H, D] fp16 or bf16.
        k: [B, Sk, Hk, D]; H must be a multiple of Hk, and query head h reads head h // (H / Hk).
        v: [B, Sk, Hk, Dv].
        causal: hide keys to the right of the diagonal.
        window: (left, right) visible keys on either side of the diagonal, inclusive; None (or -1) = unlimited.
        scale: factor on q.k before the softmax; default 1 / sqrt(D).
        softcap: cap * tanh(score / cap) before the mask; 0 = off.
        alibi_slopes: [H] or [B, H] fp32; adds -slope * abs(distance to the diagonal). Not with softcap.
        sinks: [H] fp32; the logit of one more key per head that has no value: it takes weight and is part of the LSE.
        mask: which keys each query sees, True = attend: bool [Sq, Sk] or [B or 1, H or 1, Sq, Sk], or what
            ``pack_mask`` made of it. A bool mask is packed in every call; pack once what is used again. Causal, window
            and             lengths apply on top. Keys beyond the mask's columns are not seen.
        attention_chunk: a query sees only keys of its own chunk of this many positions; None = off.
        seqused_k: [B] int32, keys of each sequence that exist (right-padded K and V); None = all.
        out: tensor to write, [B, Sq, H, Dv]; default a new contiguous one.
        return_lse: also return the log-sum-exp.
        device: "emulator" runs CPU tensors on the kernel emulator ("emulator:sm90" for another arch than sm80);
            None = where the tensors are (CPU tensors go to the torch reference).
        stream: CUstream handle; default the current stream of the tensors' device.
        fallback: "torch" runs a problem that no kernel computes in plain torch; None raises.
        tile: for experiments: force a tile ("128x176", or all of it: "128x176 w12 s2 c1"), a target ("sm90" instead of
            sm90a on Hopper) or both ("sm90 128x64"). A cubin of a tile that the catalogue does not use is built at the
            first call.

    Returns:
        out [B, Sq, H, Dv] in q's dtype, or (out, lse) with lse [B, H, Sq] fp32.

    Raises:
        InputError: malformed arguments.
        UnsupportedProblem: no kernel computes this.
        KernelNotBuilt: the kernel exists but its cubin does not; the message has the command.
        ArtifactError: the cubin on disk is damaged.
        DriverError: no driver, or the driver refused the launch.
    """
    return _call(
        q, k, v, None, None, None, None, causal, window, scale, softcap, attention_chunk, alibi_slopes, sinks, None,
        mask, seqused_k, out, return_lse, device, stream, fallback, False, tile,
    )  # fmt: skip


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: PackedMask | torch.Tensor | None = None,
    attention_chunk: int | None = None,
    seqused_k: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    device: str | None = None,
    stream: int | None = None,
    fallback: str | None = None,
) -> Result:
    """``attention`` on sequences of different lengths, packed one after the other.

    Args:
        q: [Tq, H, D] fp16 or bf16, the query tokens of all sequences.
        k: [Tk, Hk, D].
        v: [Tk, Hk, Dv].
        cu_seqlens_q: [B + 1] int32 on q's device: sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1.
            Never read on the host; values that do not ascend from 0 to Tq are undefined behaviour.
        cu_seqlens_k: [B + 1] int32, the same for k and v.
        max_seqlen_q: longest query sequence, or an upper bound of it.
        max_seqlen_k: longest key sequence, or an upper bound of it.
        mask: bool [Tq, columns] or [H or 1, Tq, columns], column j of a token's row is key j of its sequence; or packed
            by             ``pack_mask(mask, cu_seqlens_q=cu_seqlens_q)``.
        seqused_k: [B] int32, keys at the start of each segment that exist; None = all.

    The other arguments are those of ``attention``.

    Returns:
        out [Tq, H, Dv], or (out, lse) with lse [H, Tq] fp32.

    Raises:
        the errors of ``attention``.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise InputError("attention_varlen needs cu_seqlens_q and cu_seqlens_k; without them call attention()")
    return _call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, scale, softcap,
        attention_chunk, alibi_slopes, sinks, None, mask, seqused_k, out, return_lse, device, stream, fallback,
    )  # fmt: skip


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor | int,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: PackedMask | torch.Tensor | None = None,
    attention_chunk: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    device: str | None = None,
    stream: int | None = None,
    fallback: str | None = None,
) -> Result:
    """``attention`` of new queries over a key/value cache, dense or in pages. The cache already holds the new keys.

    Args:
        q: [B, Sq, H, D], or [Tq, H, D] with cu_seqlens_q. Query i of a sequence sits at position
            i + cache_seqlens[b] - its query length, so Sq smaller than the cache is a chunk of a longer prefill.
        k_cache: [B, S, Hk, D], or with page_table a pool [pages, page_size, Hk, D] of pages of 8, 16, 32, 64, 128 or
            256 tokens. Any strides: an HND pool goes in as ``pool.transpose(1, 2)``, halves of a joint pool as slices.
        v_cache: [B, S, Hk, Dv] or [pages, page_size, Hk, Dv].
        cache_seqlens: [B] int32, keys of each sequence in the cache, or one int for all.
        page_table: [B, P] int32: token j of sequence b lies in page page_table[b, j // page_size]. Entries past a
            sequence's length are never read as pages and may be anything.
        cu_seqlens_q: [B + 1] int32 for queries of different lengths, with max_seqlen_q as in ``attention_varlen``.
        mask: as in ``attention``, or with cu_seqlens_q as in ``attention_varlen``; column j is token j of the cache.

    The other arguments are those of ``attention``.

    Returns:
        out in the form of q, or (out, lse).

    Raises:
        the errors of ``attention``.
    """
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        import torch

        batch = page_table if page_table is not None else k_cache
        device_q = interop.view("q", q).device
        cache_seqlens = torch.full((batch.shape[0],), cache_seqlens, dtype=torch.int32, device=device_q)
    if cache_seqlens is None:
        raise InputError("cache_seqlens is None; int32 [batch] or an int is needed: keys in the cache")
    return _call(
        q, k_cache, v_cache, cu_seqlens_q, None, max_seqlen_q, None, causal, window, scale, softcap, attention_chunk,
        alibi_slopes, sinks, page_table, mask, cache_seqlens, out, return_lse, device, stream, fallback, True,
    )  # fmt: skip


def _call(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, causal: Any, window: Any, scale: Any,
    softcap: Any, chunk: Any, alibi: Any, sinks: Any, table: Any, mask: Any, used: Any, out: Any, return_lse: bool,
    device: Any, stream: Any, fallback: Any, cache: bool = False, tile: str | None = None, traced: bool = False,
) -> Any:  # fmt: skip
    import torch

    if not traced and (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx and other modes that see operators
        or (type(q) is not torch.Tensor and _dispatches(q))
    ):
        return _trace(
            q, k, v, cu_q, cu_k, max_q, max_k, causal, window, scale, softcap, chunk, alibi, sinks, table, mask, used,
            out, return_lse, device, stream, fallback, cache, tile,
        )  # fmt: skip
    # The hot path: one dictionary look-up stands for every check that depends on geometry and options. Attributes are
    # read in line: a function call would cost more than they do.
    extras, optional = NO_EXTRAS, None
    if alibi is not None or sinks is not None or table is not None or mask is not None:
        extras = Extras(alibi, sinks, table, None if mask is None else mask_packer.packed(mask, cu_q, stream))
    key: Any
    try:
        if extras is not NO_EXTRAS:
            optional = extras.key
        key = (
            q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(),
            v.dtype, v.device, causal, window, scale, softcap, chunk, device, max_q, max_k, cache, tile, optional,
            None if out is None else (out.shape, out.stride(), out.dtype, out.device),
            None if used is None else (used.shape, used.stride(), used.dtype, used.device),
            None if cu_q is None else (cu_q.shape, cu_q.stride(), cu_q.dtype, cu_q.device),
            None if cu_k is None else (cu_k.shape, cu_k.stride(), cu_k.dtype, cu_k.device),
        )  # fmt: skip
        plan = _plans.get(key)
    except (AttributeError, TypeError):  # no tensors, or a list as window: the slow path says what is wrong
        key = plan = None
    if plan is None:
        if key is None and any(map(interop.foreign, (q, k, v, cu_q, cu_k, alibi, sinks, table, mask, used, out))):
            return interop.call(_call, {
                "q": q, "k": k, "v": v, "cu_q": cu_q, "cu_k": cu_k, "max_q": max_q, "max_k": max_k, "causal": causal,
                "window": window, "scale": scale, "softcap": softcap, "chunk": chunk, "alibi": alibi, "sinks": sinks,
                "table": table, "mask": mask, "used": used, "out": out, "return_lse": return_lse, "device": device,
                "stream": stream, "fallback": fallback, "cache": cache, "tile": tile,
            }, stream)  # fmt: skip
        lengths = (cu_q, cu_k, max_q, max_k, used, cache)
        options = {
            "causal": causal, "window": window, "scale": scale, "softcap": softcap, "attention_chunk": chunk
        }  # fmt: skip
        made = _make_plan(q, k, v, lengths, options, extras, out, device, stream, fallback, tile)
        if made is None:
            return _in_torch(q, k, v, lengths, options, extras, out, return_lse)
        plan = made
        if key is not None:
            if len(_plans) >= _PLAN_LIMIT:
                _plans.clear()
            _plans[key] = plan
    return plan.launch(q, k, v, out, return_lse, cu_q, cu_k, used, stream, extras)


def _dispatches(tensor: Any) -> bool:
    """Whether a tensor of this class sees every operator itself: fake tensors, DTensor and the like."""
    import torch

    plain = torch.Tensor.__torch_dispatch__
    return getattr(type(tensor), "__torch_dispatch__", plain) is not plain


def _trace(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, causal: Any, window: Any, scale: Any,
    softcap: Any, chunk: Any, alibi: Any, sinks: Any, table: Any, mask: Any, used: Any, out: Any, return_lse: bool,
    device: Any, stream: Any, fallback: Any, cache: bool, tile: str | None,
) -> Any:  # fmt: skip
    """The call as an operator, which whoever traces writes down and whose checks run with it."""
    import torch

    register_torch_ops()
    if stream is not None:
        raise InputError("stream= in a traced call: traced code runs on the current stream; leave it out")
    if window is not None and (not isinstance(window, tuple | list) or len(window) != 2):
        call.options(window=window)  # type: ignore[arg-type]  # raises
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
    result = _call(
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
    torch_ops.define(_run_op, _merge)


# What dynamo looks for: run this while tracing and take the result as it is. torch.compiler.assume_constant_result
# would say so, if torch could be imported here.
register_torch_ops._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(q: Any, k: Any, v: Any, lengths: Any, extras: Extras, out: Any = None) -> call.Shape:
    cu_q, cu_k, max_q, max_k, used, cache = lengths
    return call.check_call(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used, max_seqlen_q=max_q, max_seqlen_k=max_k, out=out,
        extras=extras, cache=cache,
    )  # fmt: skip


def _make_plan(
    q: Any, k: Any, v: Any, lengths: Any, options: dict[str, Any], extras: Extras, out: Any, device: Any, stream: Any,
    fallback: Any, tile: str | None = None,
) -> Plan | None:  # fmt: skip
    """The plan of a call, or None when plain torch is to run it (CPU tensors, or an explicit fallback)."""
    shape = _checked(q, k, v, lengths, extras, out)
    opts = call.options(**options)
    if fallback not in (None, "torch"):
        raise InputError(f"fallback is {fallback!r}; None or 'torch' is needed")
    emulated = loader.emulated_arch(device)
    if emulated is None and device is not None:
        raise InputError(f"device is {device!r}; None (where the tensors are), 'emulator' or 'emulator:ARCH' is needed")
    if emulated is not None and q.device.type != "cpu":
        raise InputError(f"the emulator runs CPU tensors; q is on {q.device}: call q.cpu()")
    if q.device.type not in ("cpu", "cuda"):
        raise InputError(f"q is on {q.device}; CUDA and CPU tensors are supported")
    call.score(opts, extras)  # contradictions are refused wherever the call runs
    if emulated is None and q.device.type == "cpu":
        if tile is not None:
            raise InputError(f"tile is {tile!r} and CPU tensors run in plain torch: pass device='emulator' as well")
        return None
    try:
        arch = emulated or _arch(q.device.index)
        choice = dispatch.choose(_problem(arch, q, shape, opts, extras), tile)
    except UnsupportedProblem:
        if fallback == "torch" and tile is None:
            return None
        raise
    where = "emulator" if emulated else f"cuda:{q.device.index}"
    if stream is None and not emulated:
        import torch

        stream = torch.cuda.current_stream(q.device).cuda_stream
    forced = None if tile is None else choice.tile
    kernel = loader.load(choice.spec, device=where, tile=forced, stream=stream or 0)
    cu_q, cu_k, _, _, used, _ = lengths
    return Plan(kernel, choice.spec, choice.tile, shape, opts, q, k, v, out, extras, (cu_q, cu_k, used))


def _arch(index: int) -> Arch:
    capability = driver.capability(index)
    found = Arch.for_capability(*capability)
    if found is None:
        raise UnsupportedProblem(
            f"no kernels for compute capability {capability[0]}.{capability[1]}; there are kernels for "
            + ", ".join(dict.fromkeys(f"{a.capability[0]}.{a.capability[1]}" for a in Arch))
            + ". fallback='torch' runs it in plain torch instead, if that is what you want."
        )
    return found


def _problem(arch: Arch, q: Any, shape: call.Shape, opts: call.Options, extras: Extras) -> Problem:
    return Problem(
        arch=arch,
        dtype=tensors.dtype_of("q", q),
        head_dim=shape.head_dim,
        head_dim_v=shape.head_dim_v,
        mask=call.mask(extras),
        score=call.score(opts, extras),
        kv=shape.kv,
        varlen=shape.varlen,
        batch=shape.batch,
        seqlen_q=shape.seqlen_q,
        seqlen_k=shape.seqlen_k,
        heads=shape.heads,
        heads_k=shape.heads_k,
        causal=opts.causal,
        window=opts.window,
    )


def _in_torch(
    q: Any, k: Any, v: Any, lengths: Any, options: dict[str, Any], extras: Extras, out: Any, return_lse: bool
) -> Any:  # fmt: skip
    """Plain torch with the same semantics, fp32 inside: CPU tensors, and ``fallback="torch"``."""
    import torch

    cu_q, cu_k, _, _, used, _ = lengths
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


@interop.views
def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: PackedMask | torch.Tensor | None = None,
    attention_chunk: int | None = None,
    page_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    device: str | None = None,
    tile: str | None = None,
) -> Plan:
    """Everything of a call that depends on shapes, strides and options, done once; the kernel is loaded.

    ``plan(...).run(q, k, v)`` is the cheapest call there is, and may be captured in a CUDA graph.

    Args:
        q, k, v: example tensors; only their geometry is kept. The other arguments are those of ``attention`` and
            ``attention_varlen``; with page_table those of ``attention_with_kvcache``, cache_seqlens as seqused_k.

    Returns:
        a Plan; ``run(q, k, v, out=, return_lse=, stream=)`` with the tensors among ``cu_seqlens_q=, cu_seqlens_k=,
        seqused_k=, alibi_slopes=, sinks=, page_table=, mask=`` that it was made with launches it.

    Raises:
        the errors of ``attention``; InputError also for CPU tensors without device="emulator", which need no plan.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, page_table is not None)
    options = {
        "causal": causal, "window": window, "scale": scale, "softcap": softcap, "attention_chunk": attention_chunk
    }  # fmt: skip
    extras = Extras(alibi_slopes, sinks, page_table, mask_packer.packed(mask, cu_seqlens_q))
    made = _make_plan(q, k, v, lengths, options, extras, out, device, None, None, tile)
    if made is None:
        raise InputError("CPU tensors run in plain torch and need no plan: pass device='emulator', or CUDA tensors")
    return made


def prepare(problem: Problem, *, device: int = 0) -> None:
    """Loads the kernels of a problem onto a GPU ahead of its first call, for example before a graph capture: its own,
    those that calls with fewer sequences, queries or keys take, and for a packed mask the one that packs.

    Args:
        problem: the largest call that will be asked; its arch must be the device's.
        device: CUDA device index.

    Raises:
        UnsupportedProblem, KernelNotBuilt, ArtifactError, DriverError: as ``attention``.
    """
    for spec in dispatch.kernels(problem):
        loader.load(spec, device=f"cuda:{device}")
    if problem.mask is Mask.PACKED:
        mask_packer.prepare(device)


@interop.views
def explain(
    q: torch.Tensor | Problem,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    mask: PackedMask | torch.Tensor | None = None,
    attention_chunk: int | None = None,
    page_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    device: str | None = None,
    tile: str | None = None,
) -> Trace:
    """Which kernel a call would use, and why the nearest others would not do. Launches and loads nothing.

    Args:
        q: a ``Problem``, or the tensors and options of a call (as for ``plan``). CPU tensors are explained for the
            emulator's arch.

    Returns:
        a Trace; ``chosen`` is None when no kernel computes the problem, ``str()`` prints it.

    Raises:
        InputError: malformed arguments.
    """
    if isinstance(q, Problem):
        return dispatch.trace(q, tile)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, page_table is not None)
    extras = Extras(alibi_slopes, sinks, page_table, launch.packed(mask, cu_seqlens_q))
    shape = _checked(q, k, v, lengths, extras)
    opts = call.options(causal=causal, window=window, scale=scale, softcap=softcap, attention_chunk=attention_chunk)
    emulated = loader.emulated_arch(device)
    on_cpu = q.device.type == "cpu"
    arch = emulated or (Arch.SM80 if on_cpu else _arch(q.device.index))
    return dispatch.trace(_problem(arch, q, shape, opts, extras), tile)


def is_supported(*args: Any, **kwargs: Any) -> list[str]:
    """Why a call (the arguments of ``explain``) would be refused; an empty list means it is supported.

    This is the selection itself with the launch left out, so it cannot disagree with ``attention``.
    """
    try:
        found = explain(*args, **kwargs)
        dispatch.choose(found.problem)
    except FmhaError as error:
        return [str(error)]
    return []


def merge_states(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attention over disjoint sets of keys into attention over their union.

    With ``l = logsumexp(lses)``: out = sum_i exp(lse_i - l) out_i (the combine step of split-KV attention).

    Args:
        outs: outputs of the parts, each [B, S, H, D] (or varlen [T, H, D]).
        lses: their log-sum-exps, each [B, H, S] fp32 (or [H, T]), as ``return_lse=True`` gives them.

    Returns:
        (out in the dtype of outs[0], lse fp32). Rows without keys in every part stay 0 and -inf.

    Raises:
        InputError: no parts, different numbers of outs and lses, or shapes that do not match.
    """
    import torch

    if any(map(interop.foreign, (*outs, *lses))):
        return interop.merge(merge_states, outs, lses)
    if len(outs) == 0 or len(outs) != len(lses):
        raise InputError(f"merge_states got {len(outs)} outs and {len(lses)} lses; at least one of each, equally many")
    shape = outs[0].shape
    rows = (*shape[:-3], shape[-2], shape[-3])
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != shape or tuple(lse.shape) != rows:
            raise InputError(
                f"part {i} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; {tuple(shape)} and {rows} are needed"
            )
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _dispatches(outs[0]):
        register_torch_ops()
        return torch.ops.fmha.merge(list(outs), list(lses))
    return _merge(outs, lses)


def _merge(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    stacked = torch.stack([lse.float() for lse in lses])
    total = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - torch.where(total.isinf(), 0.0, total))
    merged = sum(w.transpose(-1, -2).unsqueeze(-1) * out.float() for w, out in zip(weights, outs, strict=True))
    return torch.as_tensor(merged).to(outs[0].dtype), total
