# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: ``attn_implementation="fmha"``. Tested with transformers 5.23.

Version 4.56 runs decoders too; its BERT does not use the attention interface yet.

Two functions are registered under one name. The mask function runs once per forward pass and
condenses what the model asked for (causality, window, padding) into a ``BandMask``; the attention
function runs in every layer and obeys it. Whatever the kernels do not compute is refused with what
to change: a mask is never dropped.

Rows of padded queries are the one thing that differs from eager attention: their output is unused
by every model, and under a causal mask they look at padded keys here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedProblem

if TYPE_CHECKING:
    import torch

Bounds = tuple[int | None, int | None]

# Keyword arguments that change the result and that no kernel computes yet.
_REFUSED = {
    "position_bias": "a learned position bias",
    "s_aux": "attention sinks",
    "cache": "transformers' paged cache",
    "head_mask": "a head mask",
    "cu_seq_lens_q": "packed sequences (cu_seq_lens)",
    "cu_seq_lens_k": "packed sequences (cu_seq_lens)",
    "output_attentions": "the attention weights as an output",
}
_EAGER = "load the model with attn_implementation='sdpa' or 'eager'"


@dataclass(frozen=True)
class BandMask:
    """What the mask function hands to every layer in place of a mask tensor.

    ``left`` and ``right`` bound the visible keys around the bottom-right aligned diagonal (None =
    unlimited); ``seqused_k`` is int32 ``[batch]``, the keys that exist in each sequence, or None
    when all do.
    """

    q_length: int
    kv_length: int
    left: int | None
    right: int | None
    seqused_k: torch.Tensor | None

    def to(self, *args: Any, **kwargs: Any) -> BandMask:
        """The same mask on another device: accelerate moves layer inputs that have this."""
        moved = None if self.seqused_k is None else self.seqused_k.to(*args, **kwargs)
        return BandMask(self.q_length, self.kv_length, self.left, self.right, moved)


class Registration:
    """Undoes ``register()``; ``calls`` counts the attention layers that ran through it."""

    def __init__(self) -> None:
        self.calls = 0
        self._undo: Callable[[], None] | None = None

    def remove(self) -> None:
        """Give the name back to whom it belonged before. A second call does nothing."""
        if self._undo is not None:
            self._undo()
        self._undo = None


def register(name: str = "fmha", *, device: str | None = None) -> Registration:
    """Make ``attn_implementation=name`` run on this library, in this process.

    Args:
        name: the name that models ask for.
        device: passed to ``attention``; ``"emulator"`` runs models on the CPU through the kernels
            themselves.

    Raises:
        ImportError: transformers is missing or too old to have the two interfaces.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    registration = Registration()

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        registration.calls += 1
        return _forward(device, module, query, key, value, mask, **kwargs)

    entries: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (AttentionInterface, forward),
        (AttentionMaskInterface, band_mask),
    )
    before = [interface._global_mapping.get(name) for interface, _ in entries]
    for interface, function in entries:
        interface.register(name, function)

    def undo() -> None:
        for (interface, _), previous in zip(entries, before, strict=True):
            if previous is None:
                interface._global_mapping.pop(name, None)
            else:
                interface.register(name, previous)

    registration._undo = undo
    return registration


def band_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    cache_position: torch.Tensor | None = None,
    device: Any = None,
    **kwargs: Any,
) -> BandMask:
    """The mask function: transformers calls it once per forward pass (and kind of layer).

    Query i is token ``q_offset + i``, key j token ``kv_offset + j``; ``attention_mask`` is the
    tokenizer's, bool ``[batch, tokens]``. Reads two flags back from the device when there is such a
    mask. transformers 4 passes ``cache_position [q_length]`` in place of ``q_length`` and
    ``q_offset``.

    Raises:
        UnsupportedProblem: the pattern is no band, or the padding is not on the right.
    """
    import torch

    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], int(cache_position[0])
    if q_length is None:
        raise TypeError("band_mask needs q_length, or cache_position")
    left, right = _bounds(mask_function)
    banded = (left, right) != (None, None)
    lengths = _lengths(attention_mask, kv_length, kv_offset)
    if not banded:
        return BandMask(q_length, kv_length, None, None, lengths)
    if lengths is not None and right != 0:
        raise UnsupportedProblem(
            "a two-sided window over a padded batch: the kernels centre the window of each "
            "sequence on its own length; "
            f"pass sequences of equal length, one by one, or {_EAGER}"
        )
    # Causal with padding on the right: a real query sees only tokens before itself, which are all
    # real, so the padding needs no mask. What remains is to say how many keys of a preallocated
    # cache are filled: the diagonal ends there.
    filled = q_offset + q_length - kv_offset
    used = None
    if isinstance(filled, torch.Tensor):
        used = filled.to(torch.int32).expand(batch_size).contiguous()
    elif filled > kv_length:
        raise UnsupportedProblem(
            f"{q_length} queries at token {q_offset} with only {kv_length} keys from token "
            f"{kv_offset}: the queries end "
            f"after the last key; {_EAGER}"
        )
    elif filled < kv_length:
        used = torch.full((batch_size,), filled, dtype=torch.int32, device=device)
    return BandMask(q_length, kv_length, left, right, used)


def _bounds(mask_function: Callable[..., Any] | None) -> Bounds:
    """The band of one of transformers' mask functions, known by structure: others are refused."""
    from transformers import masking_utils

    if mask_function in (None, masking_utils.causal_mask_function):
        return None, 0
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return None, None
    assert mask_function is not None
    code = getattr(mask_function, "__code__", None)
    cells = (cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ())
    inside = dict(zip(code.co_freevars, cells, strict=True)) if code else {}
    kind = ""
    if getattr(mask_function, "__module__", "") == masking_utils.__name__:
        kind = mask_function.__qualname__.partition(".")[0]
    if kind == "and_masks" and "mask_functions" in inside:
        parts = [_bounds(part) for part in inside["mask_functions"]]
        lefts = [left for left, _ in parts if left is not None]
        rights = [right for _, right in parts if right is not None]
        return min(lefts, default=None), min(rights, default=None)
    size = inside.get("sliding_window")
    if kind == "sliding_window_overlay" and isinstance(size, int):
        return size - 1, None
    if kind == "sliding_window_bidirectional_overlay" and isinstance(size, int):
        return size, size
    raise UnsupportedProblem(
        "the model asks for the mask pattern "
        f"{getattr(mask_function, '__qualname__', mask_function)!r}; the kernels compute "
        f"full, causal and sliding-window attention: {_EAGER}"
    )


def _lengths(mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """Keys that exist in each sequence, int32 ``[batch]``; None when all of them do."""
    import torch

    if mask is None:
        return None
    mask = mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    # Keys past the end of the mask are slots of a preallocated cache that nothing was written to.
    mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))
    lengths = mask.sum(1, dtype=torch.int32)
    right_padded = mask == (torch.arange(kv_length, device=mask.device) < lengths[:, None])
    ours, full = torch.stack([right_padded.all(), mask.all()]).tolist()
    if not ours:
        raise UnsupportedProblem(
            "the padding mask has padding on the left or holes; the kernels take sequences that "
            "start at the first column: "
            f"set tokenizer.padding_side = 'right', or {_EAGER}"
        )
    return None if full else lengths


def _forward(
    device: str | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of q ``[B, H, S, D]``, k, v ``[B, Hk, Sk, D]``: ``([B, S, H, Dv], None)``."""
    import torch

    from .. import attention

    for argument, what in _REFUSED.items():
        given = kwargs.get(argument)
        if given is not None and given is not False:
            raise UnsupportedProblem(f"{what} ({argument}=) is not computed by these kernels: {_EAGER}")
    if dropout:
        raise UnsupportedProblem(f"dropout {dropout} is not computed by these kernels: call model.eval(), or {_EAGER}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedProblem(
            f"these kernels have no backward pass: wrap the call in torch.no_grad(), or {_EAGER} for training"
        )
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedProblem(
            f"the model computes attention in {query.dtype}; the kernels take float16 and "
            "bfloat16: load it with dtype=torch.bfloat16, or call model.to(torch.bfloat16)"
        )
    left, right, lengths = _resolve(module, query, key, mask, is_causal, sliding_window)
    out: Any = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=right == 0,
        window=None if left is None and right in (None, 0) else (left, right),
        scale=scaling,
        softcap=softcap or 0.0,
        seqused_k=lengths,
        device=device,
    )
    return out, None


def _resolve(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: Any,
    is_causal: bool | None,
    sliding_window: int | None,
) -> tuple[int | None, int | None, torch.Tensor | None]:
    """(left, right, seqused_k) of one layer's call."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(mask, BandMask):
        if (mask.q_length, mask.kv_length) != (q_length, kv_length):
            raise UnsupportedProblem(
                f"the mask was made for {mask.q_length} x {mask.kv_length} tokens, this layer has "
                f"{q_length} x {kv_length}: {_EAGER}"
            )
        return mask.left, mask.right, mask.seqused_k
    if mask is not None:
        raise UnsupportedProblem(
            f"a ready-made mask of shape {tuple(mask.shape)} was passed; the kernels take the "
            "tokenizer's 2-D padding mask and know causal and sliding windows: pass that, or "
            f"{_EAGER}"
        )
    # No mask function ran: a model without masks (vision towers), or one that leaves causality to
    # the layer.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and q_length > 1
    if (causal and q_length != kv_length) or (sliding_window is not None and not causal):
        raise UnsupportedProblem(
            f"the model made no mask for {q_length} x {kv_length} tokens "
            f"(sliding_window={sliding_window}) and does not say how queries and keys are aligned: "
            f"{_EAGER}"
        )
    left = None if sliding_window is None else sliding_window - 1
    return left, 0 if causal else None, None
