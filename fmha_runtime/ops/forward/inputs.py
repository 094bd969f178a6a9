# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case, inside larger buffers of NaN, so that a kernel that reads beside them is seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...kernels.spec import KernelSpec
from .cases import Case

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; q, k and v lie in larger buffers whose other elements are NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # max_seqlen_q, max_seqlen_k of varlen
    features: dict[str, Any] = field(default_factory=dict)  # softcap, alibi_slopes, sinks, ...


def inputs(spec: KernelSpec, case: Case, device: str) -> Inputs:
    """The tensors of a case on a torch device, the same at every call."""
    import torch

    digest = hashlib.sha256(f"{spec.name}/{case.id}".encode()).digest()
    random = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    dtype = torch_dtype(spec)
    # A packed tensor is one long batch entry, with tokens after its last sequence.
    batch, rows_q, rows_k = len(case.lens_q), case.lens_q[0], case.lens_k[0]
    if case.varlen:
        batch, rows_q, rows_k = 1, sum(case.lens_q) + 7, sum(case.lens_k) + 7

    def normal(rows: int, heads: int, dim: int, size: float) -> Tensor:
        shape = (batch, rows, heads, dim)
        return (torch.randn(shape, generator=random, device=device) * size).to(dtype)

    q = normal(rows_q, case.heads, spec.head_dim, case.qk_size)
    k = normal(rows_k, case.kv_heads, spec.head_dim, case.qk_size)
    v = normal(rows_k, case.kv_heads, spec.head_dim_v, case.v_size)
    _poison(case, k)
    _poison(case, v)
    if case.layout == "packed":
        q, k, v = _fused(q, k, v)
    elif case.page_size:
        q = _place(q, case.layout)
    else:
        q, k, v = (_place(x, case.layout) for x in (q, k, v))
    used = None if case.used_k is None else _int32(case.used_k, device)
    features = _feature_tensors(case, random, device)
    if case.page_size:
        k, v, features["page_table"] = _paged(case, k, v, random)
        used = _int32(case.used_k or case.lens_k, device)
        if case.varlen:
            cu_q = _int32(_offsets(case.lens_q), device)
            longest = {"max_seqlen_q": max(case.lens_q)}
            return Inputs(q[0], k, v, cu_q, None, used, longest, features)
    if not case.varlen:
        return Inputs(q, k, v, seqused_k=used, features=features)
    return Inputs(
        *(q[0], k[0], v[0], _int32(_offsets(case.lens_q), device)),
        *(_int32(_offsets(case.lens_k), device), used),
        extra={"max_seqlen_q": max(case.lens_q), "max_seqlen_k": max(case.lens_k)},
        features=features,
    )


def _feature_tensors(case: Case, random: torch.Generator, device: str) -> dict[str, Any]:
    """The options that ask for a case's features; nothing where it has none."""
    import torch

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device)

    found: dict[str, Any] = {}
    if case.softcap:
        found["softcap"] = case.softcap
    if case.slopes:
        own = () if case.slopes == "heads" else (len(case.lens_q),)
        found["alibi_slopes"] = uniform(*own, case.heads)
    if case.sinks:
        normal = torch.randn(case.heads, generator=random, device=device)
        found["sinks"] = normal * case.sinks
    if case.chunk:
        found["attention_chunk"] = case.chunk
    if case.mask:
        heads = case.heads if case.mask_of in ("heads", "both") else 1
        if case.varlen:
            chance = uniform(heads, sum(case.lens_q) + 7, max(case.lens_k))
        else:
            batch = len(case.lens_q) if case.mask_of in ("batch", "both") else 1
            chance = uniform(batch, heads, case.lens_q[0], case.lens_k[0])
        found["mask"] = chance < case.mask
    return found


def _paged(case: Case, k: Tensor, v: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same keys and values in pages, shuffled, and the page table.

    Page tails and pages of nobody are NaN, table entries past a sequence's end are no pages.
    """
    import torch

    page, used = case.page_size, case.used_k or case.lens_k
    counts = [-(-n // page) for n in used]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=random, device=k.device)
    table = torch.full((len(used), max(counts) + 1), 1 << 30, dtype=torch.int32, device=k.device)
    starts = _offsets(case.lens_k)
    pools = []
    for x in (k, v):
        pool = x.new_full((total, page, *x.shape[2:]), float("nan"))
        first = 0
        for b, (n, count) in enumerate(zip(used, counts, strict=True)):
            own = order[first : first + count]
            table[b, :count] = own.int()
            rows = x.new_full((count * page, *x.shape[2:]), float("nan"))
            rows[:n] = x[0, starts[b] : starts[b] + n] if case.varlen else x[b, :n]
            pool[own] = rows.unflatten(0, (count, page)) if count else pool[own]
            first += count
        pools.append(_place(pool, case.layout))
    return pools[0], pools[1], table


def torch_dtype(spec: KernelSpec) -> torch.dtype:
    """The torch dtype of q, k and v."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16}[spec.dtype.value]


def _poison(case: Case, x: Tensor) -> None:
    """NaN in every row of ``x [batch, rows, heads, dim]`` that no sequence may read."""
    used = case.used_k or case.lens_k
    if not case.varlen:
        for b, n in enumerate(used):
            x[b, n:] = float("nan")
        return
    for begin, length, n in zip(_offsets(case.lens_k), case.lens_k, used, strict=False):
        x[0, begin + n : begin + length] = float("nan")
    x[0, sum(case.lens_k) :] = float("nan")


def _place(x: Tensor, layout: str) -> Tensor:
    """A view with the values of ``x [batch, rows, heads, dim]`` in a larger buffer of NaN."""
    batch, rows, heads, dim = x.shape
    if layout == "bshd":  # contiguous; NaN only after the end
        view = x.new_full((x.numel() + 64 * heads * dim,), float("nan"))[: x.numel()].view(x.shape)
    elif layout == "bhsd":
        view = x.new_full((batch, heads, rows + 5, dim), float("nan"))[:, :, :rows].transpose(1, 2)
    else:  # sliced: some heads, some columns, some rows
        view = x.new_full((batch, rows + 3, heads + 2, dim + 8), float("nan"))
        view = view[:, :rows, 1 : 1 + heads, :dim]
    return view.copy_(x)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one buffer whose rows hold all of q, k and v, as a fused projection leaves them."""
    import torch

    parts = [x.flatten(2) for x in (q, k, v)]
    fused = torch.cat(parts, -1)
    views = fused.split([part.shape[-1] for part in parts], -1)
    return tuple(view.unflatten(-1, x.shape[2:]) for view, x in zip(views, (q, k, v), strict=True))


def _offsets(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))


def _int32(values: tuple[int, ...], device: str) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.int32, device=device)
