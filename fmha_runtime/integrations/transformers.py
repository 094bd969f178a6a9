# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: ``attn_implementation="fmha"``. Tested with transformers 5.17 and 5.23.

Two functions are registered under one name. The mask function runs once per forward pass and condenses what the model
asked for into a ``LayerMask`` (transformers_masks.py); the attention function runs in every layer and obeys it.
Continuous batching comes through the same functions (transformers_paged.py). Whatever the kernels do not compute is
refused with what to change, and so is an argument that this adapter does not know: nothing is dropped.

Rows of padded queries are the one thing that differs from eager attention: no model uses their output. Under a causal
mask they look at padded keys here, and where they see no key at all their output is 0 and not an average.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem
from . import transformers_paged
from .transformers_masks import EAGER, LayerMask, layer_mask, ready_made

if TYPE_CHECKING:
    import torch

    from .. import PackedMask

# What models hand to every layer and what does not change attention: the rest is refused by name.
_HARMLESS = frozenset(
    {
        *("position_ids", "cache_position", "position_embeddings", "seq_idx", "layer_idx", "input_ids", "labels"),
        *("past_key_values", "use_cache", "return_dict", "output_hidden_states", "output_router_logits"),
        *("num_items_in_batch", "logits_to_keep", "deterministic"),
        *("logits_indices", "logits_processor_args", "read_index", "write_index"),  # of continuous batching
    }
)

# Keyword arguments that change the result and that no kernel computes, in words.
_REFUSED = {
    "position_bias": "a position bias added to the scores",
    "head_mask": "a head mask",
    "output_attentions": "the attention weights as an output",
    "indices": "attention to a list of keys",
    "block_indices": "attention to a list of blocks",
    "sinks": "sinks of this form",
}


class Registration:
    """Undoes ``register()``; ``calls`` counts the attention layers that ran through it."""

    def __init__(self, device: str | None, harmless: frozenset[str]) -> None:
        self.calls = 0
        self.device = device
        self.harmless = harmless
        self._undo: list[Callable[[], None]] = []
        self._last: tuple[Any, int, PackedMask] | None = None

    def remove(self) -> None:
        """Give the name back to whom it belonged before. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def bits(self, mask: torch.Tensor, kv_length: int) -> PackedMask:
        """The bits of a mask tensor; all layers of a forward pass bring the same one."""
        if mask.is_inference():  # nobody counts the changes of such a tensor
            return ready_made(mask, kv_length)
        if self._last is not None:
            known, version, bits = self._last
            if known() is mask and version == mask._version and bits.cols == min(kv_length, mask.shape[-1]):
                return bits
        bits = ready_made(mask, kv_length)
        self._last = (weakref.ref(mask), mask._version, bits)
        return bits


def register(name: str = "fmha", *, device: str | None = None, harmless: Iterable[str] = ()) -> Registration:
    """Make ``attn_implementation=name`` run on this library, in this process, and ``paged|name`` as well.

    Args:
        name: the name that models ask for. transformers reads "flash" in a name as its own, so it may not be there.
        device: passed to ``attention``; ``"emulator"`` runs models on the CPU through the kernels themselves.
        harmless: names of keyword arguments that reach the attention layers and do not change attention. What is
            neither known nor named here is refused.

    Raises:
        ImportError: transformers is missing or too old to have the two interfaces.
        InputError: a name that transformers would take for something else.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if "flash" in name or "|" in name or "/" in name:
        raise InputError(f"name is {name!r}; transformers gives 'flash', '|' and '/' in a name a meaning: use another")
    registration = Registration(device, _HARMLESS | frozenset(harmless))

    def forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        _count(registration)
        return _forward(registration, module, query, key, value, attention_mask, **kwargs)

    for interface, entry, function in (
        (AttentionInterface, name, forward),
        (AttentionInterface, f"paged|{name}", forward),
        (AttentionMaskInterface, name, layer_mask),
    ):
        registration._undo.append(_enter(interface, entry, function))
    registration._undo.append(transformers_paged.admit({name, f"paged|{name}"}))
    return registration


def _enter(interface: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    before = interface._global_mapping.get(name)
    interface.register(name, function)

    def undo() -> None:
        if before is None:
            interface._global_mapping.pop(name, None)
        else:
            interface.register(name, before)

    return undo


def _count(registration: Registration) -> None:
    import torch

    if not torch.compiler.is_compiling():  # a number that grows would compile anew in every call
        registration.calls += 1


def _forward(
    registration: Registration,
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
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: Any = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    block_table: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of q ``[B, H, S, D]``, k, v ``[B, Hk, Sk, D]``: ``([B, S, H, Dv], None)``.

    ``s_aux [H]`` are sinks; ``cu_seq_lens_* [sequences + 1]`` cut rows laid end to end into packed sequences;
    ``cache`` is the paged cache of continuous batching, which brings lengths of its own.
    """
    from .. import attention, attention_varlen

    _check(registration, query, key, value, dropout, kwargs)
    mask = _layer_mask(registration, mask, key.shape[2])
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": _sinks(s_aux, query),
        "device": registration.device,
    }
    # max_seqlen_* are the names of transformers up to 5.17 or so.
    max_q = max_length_q if max_seqlen_q is None else max_seqlen_q
    max_k = max_length_k if max_seqlen_k is None else max_seqlen_k
    if cache is not None:
        if block_table is not None:
            raise UnsupportedProblem(
                "continuous batching asks for attention by block table, which this adapter does not do: set "
                "max_blocks_per_request=0 in the ContinuousBatchingConfig"
            )
        key, value, cu_seq_lens_k, max_k = transformers_paged.extended(
            cache, module, key, value, sliding_window, cu_seq_lens_k, max_k, kwargs
        )
    cu_q, cu_k = cu_seq_lens_q, cu_seq_lens_k
    if cu_q is None and mask is not None and mask.cu_seqlens is not None:
        cu_q = cu_k = mask.cu_seqlens
    if cu_q is not None:
        left, right = _band_of_packed(module, mask, is_causal, sliding_window)
        batch, _, length, _ = query.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        causal, window = _causal_and_window(left, right)
        packed: Any = attention_varlen(
            q,
            k,
            v,
            _int32(cu_q),
            _int32(cu_q if cu_k is None else cu_k),
            _bound(max_q, q),
            _bound(max_k, k),
            causal=causal,
            window=window,
            **options,
        )
        return packed.unflatten(0, (batch, length)), None
    band = _resolve(module, query, key, mask, is_causal, sliding_window)
    causal, window = _causal_and_window(band.left, band.right)
    out: Any = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        window=window,
        attention_chunk=band.chunk,
        seqused_k=band.seqused_k,
        mask=band.bits,
        **options,
    )
    return out, None


def _check(
    registration: Registration, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, kwargs: Any
) -> None:
    """Refuses what no kernel computes and what nobody knows."""
    import torch

    for argument, given in kwargs.items():
        if given is None or given is False or argument in registration.harmless:
            continue
        if argument in _REFUSED:
            raise UnsupportedProblem(f"{_REFUSED[argument]} ({argument}=) is not computed by these kernels: {EAGER}")
        raise UnsupportedProblem(
            f"the model passes {argument}= to attention, which this adapter does not know: if it does not change "
            f"attention, say so with register(harmless=[{argument!r}]), else {EAGER}"
        )
    if dropout:
        raise UnsupportedProblem(f"dropout {dropout} is not computed by these kernels: call model.eval(), or {EAGER}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedProblem(
            f"these kernels have no backward pass: wrap the call in torch.no_grad(), or {EAGER} for training"
        )
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedProblem(
            f"the model computes attention in {query.dtype}; the kernels take float16 and "
            "bfloat16: load it with dtype=torch.bfloat16, or call model.to(torch.bfloat16)"
        )


def _layer_mask(registration: Registration, mask: Any, kv_length: int) -> LayerMask | None:
    import torch

    if mask is None or isinstance(mask, LayerMask):
        return mask
    if isinstance(mask, torch.Tensor):
        bits = registration.bits(mask, kv_length)
        return LayerMask(bits.rows, kv_length, bits=bits)
    raise UnsupportedProblem(f"the model passes a {type(mask).__name__} as mask; a tensor or None is needed: {EAGER}")


def _resolve(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: LayerMask | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> LayerMask:
    """The mask of one layer's call, checked against its lengths."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if mask is not None:
        if (mask.q_length, mask.kv_length) != (q_length, kv_length):
            raise UnsupportedProblem(
                f"the mask was made for {mask.q_length} x {mask.kv_length} tokens, this layer has "
                f"{q_length} x {kv_length}: {EAGER}"
            )
        return mask
    # No mask function ran: a model without masks (vision towers), or one that leaves causality to
    # the layer.
    causal = _is_causal(module, is_causal) and q_length > 1
    if (causal and q_length != kv_length) or (sliding_window is not None and not causal):
        raise UnsupportedProblem(
            f"the model made no mask for {q_length} x {kv_length} tokens (sliding_window={sliding_window}) and does "
            f"not say how queries and keys are aligned: {EAGER}"
        )
    left = None if sliding_window is None else sliding_window - 1
    return LayerMask(q_length, kv_length, left, 0 if causal else None)


def _band_of_packed(
    module: Any, mask: LayerMask | None, is_causal: bool | None, sliding_window: int | None
) -> tuple[int | None, int | None]:
    """(left, right) of packed sequences: from the mask where there is one, as in eager attention."""
    if mask is None:
        causal = _is_causal(module, is_causal)
        left = None if sliding_window is None else sliding_window - 1
        return left, 0 if causal else left
    if mask.bits is not None or mask.seqused_k is not None or mask.chunk is not None:
        raise UnsupportedProblem(
            "packed sequences (cu_seq_lens) together with padding or a mask that is no band: pass only one of the two, "
            f"or {EAGER}"
        )
    return mask.left, mask.right


def _is_causal(module: Any, is_causal: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _causal_and_window(left: int | None, right: int | None) -> tuple[bool, tuple[int | None, int | None] | None]:
    return right == 0, None if left is None and right in (None, 0) else (left, right)


def _sinks(sinks: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if sinks is None:
        return None
    if tuple(sinks.shape) != (query.shape[1],):
        raise UnsupportedProblem(
            f"sinks (s_aux=) have shape {tuple(sinks.shape)}; one for each of {query.shape[1]} heads is computed: "
            f"{EAGER}"
        )
    return sinks.detach().float().contiguous()


def _bound(given: Any, rows: torch.Tensor) -> int:
    """The longest sequence, or all rows together: an upper bound that costs no look at the device."""
    return rows.shape[0] if given is None else int(given)


def _int32(offsets: torch.Tensor) -> torch.Tensor:
    import torch

    return offsets.to(torch.int32).contiguous()
