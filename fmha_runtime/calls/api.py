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

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..device import loader
from ..errors import FmhaError, InputError
from ..kernels.spec import Arch, Mask
from ..ops import obtain
from ..ops.combine import merge
from ..ops.forward import direct
from ..ops.forward.plan import Plan
from ..ops.pack import packer
from ..problem import arguments, arrays, dispatch, kinds
from ..problem.arguments import Extras
from ..problem.dispatch import Problem, Trace
from ..problem.packed_mask import PackedMask
from . import mixed, route

if TYPE_CHECKING:
    import torch

    Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    Window = tuple[int | None, int | None] | None


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
            and lengths apply on top. Keys beyond the mask's columns are not seen.
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
    return route.run(
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
            by ``pack_mask(mask, cu_seqlens_q=cu_seqlens_q)``.
        seqused_k: [B] int32, keys at the start of each segment that exist; None = all.

    The other arguments are those of ``attention``.

    Returns:
        out [Tq, H, Dv], or (out, lse) with lse [H, Tq] fp32.

    Raises:
        the errors of ``attention``.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise InputError("attention_varlen needs cu_seqlens_q and cu_seqlens_k; without them call attention()")
    return route.run(
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
    num_decodes: int = 0,
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
        k_cache: [B, S, Hk, D], or with page_table a pool [pages, page_size, Hk, D] of pages of 1, 2, 4 or
            a multiple of 8 up to 1024 tokens. Any strides: an HND pool goes in as ``pool.transpose(1, 2)``, halves of
            a joint pool as slices.
        v_cache: [B, S, Hk, Dv] or [pages, page_size, Hk, Dv].
        cache_seqlens: [B] int32, keys of each sequence in the cache, or one int for all.
        page_table: [B, P] int32: token j of sequence b lies in page page_table[b, j // page_size]. Entries past a
            sequence's length are never read as pages and may be anything.
        cu_seqlens_q: [B + 1] int32 for queries of different lengths, with max_seqlen_q as in ``attention_varlen``.
        num_decodes: with cu_seqlens_q, how many sequences at the front have one query each, as engines sort a batch
            that prefills and decodes at once: each part then runs on the kernel that is fastest for it.
        mask: as in ``attention``, or with cu_seqlens_q as in ``attention_varlen``; column j is token j of the cache.

    The other arguments are those of ``attention``.

    Returns:
        out in the form of q, or (out, lse).

    Raises:
        the errors of ``attention``.
    """
    if isinstance(cache_seqlens, Integral):
        import torch

        batch, room = k_cache.shape[0], k_cache.shape[1]
        if page_table is not None:
            batch, room = page_table.shape[0], page_table.shape[1] * room
        if isinstance(cache_seqlens, bool) or not 0 <= cache_seqlens <= room:
            raise InputError(
                f"cache_seqlens is {cache_seqlens!r}; 0 to {room} keys of each sequence can be in this cache, as an "
                "int for all or int32 [batch]"
            )
        device_q = arrays.view("q", q).device
        cache_seqlens = torch.full((batch,), int(cache_seqlens), dtype=torch.int32, device=device_q)
    if cache_seqlens is None:
        raise InputError("cache_seqlens is None; int32 [batch] or an int is needed: keys in the cache")
    if num_decodes:
        return mixed.run(
            attention_with_kvcache, num_decodes, q, k_cache, v_cache, cache_seqlens, page_table, cu_seqlens_q, out,
            return_lse, alibi_slopes, mask,
            {
                "max_seqlen_q": max_seqlen_q, "causal": causal, "window": window, "scale": scale, "softcap": softcap,
                "sinks": sinks, "attention_chunk": attention_chunk, "device": device, "stream": stream,
                "fallback": fallback,
            },
        )  # fmt: skip
    return route.run(
        q, k_cache, v_cache, cu_seqlens_q, None, max_seqlen_q, None, causal, window, scale, softcap, attention_chunk,
        alibi_slopes, sinks, page_table, mask, cache_seqlens, out, return_lse, device, stream, fallback, True,
    )  # fmt: skip


@arrays.views
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
    extras = Extras(alibi_slopes, sinks, page_table, packer.packed(mask, cu_seqlens_q))
    made = route.make_plan(q, k, v, lengths, options, extras, out, device, None, None, tile)
    if made is None:
        raise InputError("CPU tensors run in plain torch and need no plan: pass device='emulator', or CUDA tensors")
    return made.for_runs((q, k, v), (cu_seqlens_q, cu_seqlens_k, seqused_k), extras)


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
        obtain.kernel(spec, device=f"cuda:{device}")
    if problem.mask is Mask.PACKED:
        packer.prepare(device)


@arrays.views
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
    extras = Extras(alibi_slopes, sinks, page_table, direct.packed(mask, cu_seqlens_q))
    shape = route.checked(q, k, v, lengths, extras)
    opts = arguments.options(
        causal=causal, window=window, scale=scale, softcap=softcap, attention_chunk=attention_chunk
    )
    emulated = loader.emulated_arch(device)
    on_cpu = q.device.type == "cpu"
    arch = emulated or (Arch.SM80 if on_cpu else route.arch_of(q.device.index))
    return dispatch.trace(route.problem(arch, q, shape, opts, extras), tile)


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

    if any(map(arrays.foreign, (*outs, *lses))):
        return arrays.merge(merge_states, outs, lses)
    merge.check(outs, lses)
    if kinds.traced() or kinds.are_special((*outs, *lses)):
        route.register_torch_ops()
        return torch.ops.fmha.merge(list(outs), list(lses))
    return merge.merge(outs, lses)
