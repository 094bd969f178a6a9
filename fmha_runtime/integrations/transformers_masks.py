# SPDX-License-Identifier: Apache-2.0
"""What a transformers model asks to be masked, condensed once per forward pass into a ``LayerMask``.

transformers describes a mask by nested functions of (batch, head, query, key). The ones it builds itself are known
here by their structure and become numbers: a band, a chunk, lengths, boundaries of packed sequences. All others
(padding on the left, holes, images that see both ways, functions of the user) become one bit per query and key: slower,
but the same pattern. Nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from .. import PackedMask, pack_mask
from ..errors import UnsupportedProblem

if TYPE_CHECKING:
    import torch

EAGER = "load the model with attn_implementation='eager' or 'sdpa'"


@dataclass(frozen=True)
class Pattern:
    """A mask function in numbers: keys around the diagonal (None = unlimited), a chunk, packed sequences.

    ``segments`` numbers the sequences of packed rows, int64 ``[batch, tokens]``; ``restarts`` says that positions
    count from the start of each of them.
    """

    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    segments: torch.Tensor | None = None
    restarts: bool = False


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What the mask function hands to every layer in place of a mask tensor.

    ``left`` and ``right`` bound the visible keys around the bottom-right aligned diagonal (None = unlimited), ``chunk``
    cuts positions into chunks that do not see each other, ``seqused_k`` int32 ``[batch]`` counts the keys that exist
    (None: all), ``cu_seqlens`` int32 ``[sequences + 1]`` are the boundaries of packed sequences in the rows laid end
    to end. ``bits`` replaces all of these.
    """

    q_length: int
    kv_length: int
    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    seqused_k: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    bits: PackedMask | None = None

    # generate() makes masks ahead of the forward pass and passes them where the tokenizer's go; a 4-D one is final.
    ndim = 4

    def contiguous(self) -> LayerMask:
        """Itself: ``generate`` asks that of the masks it makes ahead."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LayerMask:
        """The same mask on another device: accelerate moves layer inputs that have this."""
        moved: dict[str, Any] = {
            name: tensor.to(*args, **kwargs)
            for name in ("seqused_k", "cu_seqlens")
            if (tensor := getattr(self, name)) is not None
        }
        if self.bits is not None:
            bits = self.bits
            moved["bits"] = replace(bits, words=bits.words.to(*args, **kwargs), any=bits.any.to(*args, **kwargs))
        return replace(self, **moved)

    # A model that computes attention by itself would add or slice the mask. It must not get far.
    def __getitem__(self, index: Any) -> NoReturn:
        _refuse_own_attention()

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """What torch calls for every function and operator that meets one of these."""
        _refuse_own_attention()


def _refuse_own_attention() -> NoReturn:
    raise UnsupportedProblem(
        "this model computes attention in its own code and not through transformers' AttentionInterface (BLOOM and "
        f"MPT do, for example), so no registered kernel can serve it: {EAGER}"
    )


def layer_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    *,
    cache_position: torch.Tensor | None = None,
    device: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> LayerMask:
    """The mask function: transformers calls it once per forward pass (and kind of layer).

    Query i is token ``q_offset + i``, key j token ``kv_offset + j``; ``attention_mask`` is the tokenizer's, bool
    ``[batch, tokens]``. Reads two flags back from the device when there is such a mask, and the number of sequences
    when rows are packed. transformers 4 passes ``cache_position [q_length]`` in place of ``q_length`` and ``q_offset``.

    Raises:
        UnsupportedProblem: the queries end after the last key.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask  # the package itself is lazy: not traceable

    if isinstance(attention_mask, LayerMask):  # made ahead by generate()
        return attention_mask
    place: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    if cache_position is not None:
        place = {"cache_position": cache_position}
        q_length, q_offset = cache_position.shape[0], int(cache_position[0])
    if q_length is None:
        raise TypeError("the mask function needs q_length, or cache_position")
    if mask_function is None:
        mask_function = causal_mask_function
    pattern = recognise(mask_function)
    # Chunks count from the first real token, so padding on the left moves them even after a rolling cache forgot it.
    first = 0 if pattern is not None and pattern.chunk is not None else kv_offset
    regular, lengths = right_padding(attention_mask, kv_offset + kv_length - first, first)
    filled = q_offset + q_length - kv_offset  # keys up to the last query
    if pattern is not None and pattern.right == 0 and isinstance(filled, int) and filled > kv_length:
        raise UnsupportedProblem(
            f"{q_length} queries at token {q_offset} with only {kv_length} keys from token {kv_offset}: the queries "
            f"end after the last key; {EAGER}"
        )
    if pattern is not None and regular:
        mask = _in_numbers(pattern, batch_size, q_length, kv_length, q_offset, kv_offset, lengths, filled, device)
        if mask is not None:
            return mask
    visible = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device if attention_mask is None else attention_mask.device,
        **place,
    )
    return LayerMask(q_length, kv_length, bits=pack_mask(visible))


def _in_numbers(
    pattern: Pattern,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    lengths: torch.Tensor | None,
    filled: int | torch.Tensor,
    device: Any,
) -> LayerMask | None:
    """The mask of a known pattern over keys that are padded on the right at most; None when bits are needed."""
    import torch

    left, right, chunk = pattern.left, pattern.right, pattern.chunk
    if pattern.segments is not None:
        if lengths is not None or q_length != kv_length or chunk is not None:
            return None
        return LayerMask(q_length, kv_length, left, right, cu_seqlens=boundaries(pattern.segments))
    if (left, right, chunk) == (None, None, None):
        return LayerMask(q_length, kv_length, seqused_k=lengths)
    if right != 0:
        # The kernels centre a two-sided window on the diagonal of each sequence's own length.
        same = isinstance(filled, int) and filled == kv_length
        return LayerMask(q_length, kv_length, left, right) if lengths is None and same and chunk is None else None
    if chunk is not None and kv_offset % chunk:
        # The kernels count chunks from the first key, which a rolling cache has moved.
        if q_length != 1 or not isinstance(q_offset, int):
            return None
        left, chunk = min(q_offset % chunk, q_offset if left is None else left), None
    # Causal with padding on the right: a real query sees only tokens before itself, which are all real, so the
    # padding needs no mask. What remains is to say how many keys of a preallocated cache are filled: the diagonal
    # ends there.
    used = None
    if isinstance(filled, torch.Tensor):
        used = filled.to(torch.int32).expand(batch_size).contiguous()
    elif filled < kv_length:
        used = torch.full((batch_size,), filled, dtype=torch.int32, device=device)
    return LayerMask(q_length, kv_length, left, right, chunk, used)


def recognise(mask_function: Callable[..., Any]) -> Pattern | None:
    """The pattern of one of transformers' mask functions, known by structure; None for all others."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return Pattern(right=0)
    code = getattr(mask_function, "__code__", None)
    if code is None or getattr(mask_function, "__module__", "") != causal_mask_function.__module__:
        return None
    kind = mask_function.__qualname__.partition(".")[0]
    if mask_function.__qualname__ == "bidirectional_mask_function":
        return Pattern()
    cells = (cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ())
    inside = dict(zip(code.co_freevars, cells, strict=True))
    size = inside.get("sliding_window")
    if kind == "sliding_window_overlay" and isinstance(size, int):
        return Pattern(left=size - 1)
    if kind == "sliding_window_bidirectional_overlay" and isinstance(size, int):
        return Pattern(left=size, right=size)
    if kind == "chunked_overlay" and isinstance(inside.get("chunk_size"), int):
        # Chunks count from the first real token: the same place unless there is padding on the left.
        return Pattern(chunk=inside["chunk_size"])
    if kind == "packed_sequence_mask_function" and "packed_sequence_mask" in inside:
        return Pattern(segments=inside["packed_sequence_mask"])
    if kind == "remap_positions_for_packed_sequence" and "mask_function" in inside:
        part = recognise(inside["mask_function"])
        return None if part is None else replace(part, restarts=True)
    if kind == "and_masks" and "mask_functions" in inside:
        return _all_of([recognise(part) for part in inside["mask_functions"]])
    return None


def _all_of(parts: list[Pattern | None]) -> Pattern | None:
    known = [part for part in parts if part is not None]
    chunks = {part.chunk for part in known} - {None}
    segments = [part.segments for part in known if part.segments is not None]
    restarts = any(part.restarts for part in known)
    if len(known) < len(parts) or len(chunks) > 1 or len(segments) > 1:
        return None
    if restarts and not segments:  # positions that start over, in rows that are not cut there
        return None
    lefts = [part.left for part in known if part.left is not None]
    rights = [part.right for part in known if part.right is not None]
    chunk = next(iter(chunks), None)
    segment = segments[0] if segments else None
    return Pattern(min(lefts, default=None), min(rights, default=None), chunk, segment, restarts)


def right_padding(mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> tuple[bool, torch.Tensor | None]:
    """(whether the keys that exist are the first ones, how many they are, int32 ``[batch]``, None = all)."""
    import torch

    if mask is None:
        return True, None
    mask = mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    # Keys past the end of the mask are slots of a preallocated cache that nothing was written to.
    mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))
    lengths = mask.sum(1, dtype=torch.int32)
    right_padded = mask == (torch.arange(kv_length, device=mask.device) < lengths[:, None])
    regular, full = torch.stack([right_padded.all(), mask.all()]).tolist()
    return regular, None if full else lengths


def boundaries(segments: torch.Tensor) -> torch.Tensor:
    """``cu_seqlens`` int32 of the sequences that ``segments [batch, tokens]`` numbers, rows laid end to end."""
    import torch

    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(first, (0, 1), value=segments.numel()).to(torch.int32)


def ready_made(mask: torch.Tensor, kv_length: int) -> PackedMask:
    """The bits of a mask tensor that the caller made: bool, or 0 and the lowest number of a float type.

    Raises:
        UnsupportedProblem: another shape, or a bias that is neither.
    """
    import torch

    if mask.ndim != 4:
        raise UnsupportedProblem(
            f"a mask of shape {tuple(mask.shape)} reached the attention; [batch, heads or 1, queries, keys] is needed "
            f"there, or pass the tokenizer's 2-D mask to the model: {EAGER}"
        )
    mask = mask[..., :kv_length]
    if mask.dtype is torch.bool:
        return pack_mask(mask)
    floats = mask.dtype.is_floating_point
    hidden = mask <= torch.finfo(mask.dtype).min / 2 if floats else torch.zeros_like(mask, dtype=torch.bool)
    if not (hidden | (mask == 0)).all():
        raise UnsupportedProblem(
            "the mask adds numbers to the scores that are neither 0 nor minus infinity (a position bias); the kernels "
            f"show a key or hide it: {EAGER}"
        )
    return pack_mask(~hidden)
