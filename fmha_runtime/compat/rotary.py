# SPDX-License-Identifier: Apache-2.0
"""``flash_attn.layers.rotary`` and ``flash_attn.ops.triton.rotary`` in plain torch: rotary embedding with gradients.

Angles are applied in fp32 and the result is rounded once, as there. Unlike the rest of this package the file imports
torch, since it holds a module; whoever needs a function of it imports it when it is called.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError, UnsupportedProblem
from . import shared

LAYERS = (
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
)
"""What ``flash_attn.layers.rotary`` has of this."""

Offsets = int | torch.Tensor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [..., heads, D], its first 2 * cos.shape[-1] dims turned by the angles cos, sin [..., rotary_dim / 2]."""
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise InputError(f"rotary_cos has {half} columns; the head dim {x.shape[-1]} has room for {x.shape[-1] // 2}")
    c, s = (angle.float().unsqueeze(-2) for angle in (cos, sin))
    turned = x[..., : 2 * half].float()
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    out = torch.stack((a * c - b * s, a * s + b * c), -1 if interleaved else -2).flatten(-2)
    return torch.cat((out.to(x.dtype), x[..., 2 * half :]), -1)


def places(x: torch.Tensor, cu_seqlens: torch.Tensor | None, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each token and its place among the tokens there: [B, 1] and [1, S], or both [T].

    Tokens behind the last sequence of a packed batch are of sequence ``batch``, which there is not.
    """
    if cu_seqlens is None:
        dense, length = torch.arange(batch, device=x.device), torch.arange(x.shape[1], device=x.device)
        return dense.unsqueeze(1), length.unsqueeze(0)
    token = torch.arange(x.shape[0], device=x.device)
    first = cu_seqlens.long()
    sequence = torch.searchsorted(first[1:].contiguous(), token, right=True)
    return sequence, token - first[sequence]


def rotate_half(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Each pair (a, b) of dims becomes (-b, a): halves of the head dim, or neighbours with ``interleaved``."""
    pairs = (-1, 2) if interleaved else (2, -1)
    a, b = x.unflatten(-1, pairs).unbind(-1 if interleaved else -2)
    return torch.stack((-b, a), -1 if interleaved else -2).flatten(-2)


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """x [B, S, H, D] turned in its own precision by cos, sin [S, rotary_dim / 2] or [B, S, rotary_dim / 2]."""
    dims = 2 * cos.shape[-1]
    if dims > x.shape[-1]:
        raise InputError(f"cos has {cos.shape[-1]} columns; the head dim {x.shape[-1]} has room for {x.shape[-1] // 2}")
    c, s = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)).unsqueeze(-2) for t in (cos, sin)
    )  # fmt: skip
    turned = x[..., :dims]
    return torch.cat((turned * c + rotate_half(turned, interleaved) * s, x[..., dims:]), -1)


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """x [B, S, H, D], or [T, H, D] with cu_seqlens [B + 1], turned by the rows of cos, sin [positions, rotary_dim / 2].

    Args:
        seqlen_offsets: where each sequence begins, an int or [B]. Positions that the table does not have (only a tensor
            can ask for them) leave their tokens as they are.
        max_seqlen: tokens of the longest sequence of a packed batch.
        inplace: write x and return it.
        conjugate: turn back.

    Raises:
        InputError: a table that is too short, or shapes that do not go together.
    """
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    rows = cos.shape[0]
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequence, position = places(x, cu_seqlens, batch)
    if isinstance(seqlen_offsets, torch.Tensor):
        position = position + seqlen_offsets.long()[sequence.clamp(max=max(0, batch - 1))]
    else:
        position = position + seqlen_offsets
    at = position.clamp(0, max(0, rows - 1))
    c, s = cos[at], sin[at]
    if cu_seqlens is not None or isinstance(seqlen_offsets, torch.Tensor):  # else the host has checked all positions
        inside = ((position == at) & (sequence < batch)).unsqueeze(-1)
        c, s = torch.where(inside, c, 1), torch.where(inside, s, 0)
    turned = rotate(x, c, -s if conjugate else s, interleaved)
    return x.copy_(turned) if inplace else turned


def _check(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offsets: Offsets, cu_seqlens: Any, max_seqlen: int | None
) -> None:
    packed = cu_seqlens is not None
    if x.ndim != (3 if packed else 4):
        layout = "[tokens, heads, dim] with cu_seqlens" if packed else "[batch, seq, heads, dim] without cu_seqlens"
        raise InputError(f"x has shape {tuple(x.shape)}; {layout} is needed")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise InputError(
            f"cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be [positions, rotary_dim / 2]"
        )
    if packed and max_seqlen is None:
        raise InputError("cu_seqlens needs max_seqlen: the tokens of the longest sequence")
    longest = max_seqlen if packed else x.shape[1]
    assert longest is not None
    batch = cu_seqlens.shape[0] - 1 if packed else x.shape[0]
    if isinstance(offsets, torch.Tensor):
        if offsets.shape != (batch,) or offsets.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"seqlen_offsets is {offsets.dtype} {tuple(offsets.shape)}; an int, or an int32 or int64 tensor "
                f"[{batch}] is needed"
            )
        offsets = 0
    if offsets < 0 or offsets + longest > cos.shape[0]:
        raise InputError(
            f"cos and sin have {cos.shape[0]} positions; {longest} tokens from position {offsets} on need positions "
            f"{offsets} to {offsets + longest - 1}: make a longer table"
        )


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """``apply_rotary`` in the order of ``flash_attn.layers.rotary``."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Turns q and k of qkv [B, S, 3, H, D], or of [B, S, H + 2 Hk, D] with num_heads_q = H, in place; k by cos_k, sin_k
    where they are given."""
    q, k, _ = shared.split_qkv(qkv, num_heads_q)
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(
        k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, True, seqlen_offsets
    )
    return qkv


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
) -> torch.Tensor:
    """Turns k of kv [B, S, 2, Hk, D] in place."""
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise InputError(f"kv has shape {tuple(kv.shape)}; [B, S, 2, Hk, D] is needed")
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with its table of angles, which grows with the positions that are asked for.

    The angle of position p and pair i is p * base^(-2 i / dim). With scale_base the vectors are scaled by position as
    well (XPos): those of q by s^((p - half) / scale_base) with s = (2 i + 0.4 dim) / (1.4 dim), those of k by its
    inverse.
    """

    inv_freq: torch.Tensor
    scale: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        """``pos_idx_in_fp32`` is of older versions; positions are fp32 here.

        Raises:
            UnsupportedProblem: positions of another dtype are asked for.
        """
        super().__init__()
        if not pos_idx_in_fp32 or isinstance(device, bool):
            raise UnsupportedProblem(
                f"RotaryEmbedding: pos_idx_in_fp32 is {pos_idx_in_fp32} and device {device!r}; positions are always "
                "fp32 here and device comes fifth, as in flash_attn 2.8: leave pos_idx_in_fp32 out"
            )
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None if scale_base is None else self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: torch.Tensor | None = None
        self._sin_cached: torch.Tensor | None = None
        self._cos_k_cached: torch.Tensor | None = None
        self._sin_k_cached: torch.Tensor | None = None

    def _pairs(self, device: Any) -> torch.Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _compute_inv_freq(self, device: Any = None) -> torch.Tensor:
        return self.base ** -(self._pairs(device) / self.dim)

    def _compute_scale(self, device: Any = None) -> torch.Tensor:
        return (self._pairs(device) + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """A table of at least so many positions on this device. Subclasses of models call it by this name."""
        table = self._cos_cached
        if (
            table is not None
            and seqlen <= self._seq_len_cached
            and (table.device, table.dtype) == (device, dtype)
            and not (self.training and table.is_inference())  # a table of inference mode has no use in training
        ):
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # A model that was cast as a whole has rounded its frequencies; they are made anew.
        exact = self.inv_freq.dtype == torch.float32
        angle = torch.outer(position, self.inv_freq.to(device) if exact else self._compute_inv_freq(device))
        cos, sin = angle.cos(), angle.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        scale = self._compute_scale(device) ** ((position - seqlen // 2) / self.scale_base).unsqueeze(-1)
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Turns q and k in place.

        Args:
            qkv: [B, S, 3, H, D], or [B, S, H + 2 Hk, D] with num_heads_q = H; with kv it is q alone, [B, S, H, D].
            kv: [B, S, 2, Hk, D].
            seqlen_offset: where each sequence begins, an int or [B]. A tensor is not read: max_seqlen says then how
                many positions the table needs.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise InputError("seqlen_offset is a tensor and there is no table yet: pass max_seqlen=, its positions")
        cos_k, sin_k = (cos, sin) if self.scale is None else (self._cos_k_cached, self._sin_k_cached)
        assert cos_k is not None and sin_k is not None
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
