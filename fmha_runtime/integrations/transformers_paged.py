# SPDX-License-Identifier: Apache-2.0
"""transformers' continuous batching: ``model.generate_batch`` with ``attn_implementation="fmha"`` or ``"paged|fmha"``.

Sequences come packed end to end; their cache is transformers' own, which gathers the keys of each sequence before
attention. The cache's decode path by block table is not used: transformers offers it to its own kernels only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def admit(names: set[str]) -> Callable[[], None]:
    """Let the manager of continuous batching run models whose implementation is one of ``names``; returns the undo.

    The manager knows its own implementations only: it switches a model of another name to them or refuses it.
    """
    try:
        from transformers.generation.continuous_batching import ContinuousBatchingManager
    except ImportError:  # before 5.0
        return lambda: None
    manager: Any = ContinuousBatchingManager
    before = getattr(manager, "switch_to_cb_friendly_attn", None)
    if before is None:
        return lambda: None

    @functools.wraps(before)
    def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation not in names:
            before(self, model, *args, **kwargs)

    manager.switch_to_cb_friendly_attn = switch

    def undo() -> None:
        # Who wrapped it after us keeps our wrapper: emptied, it passes everything on.
        names.clear()
        if manager.switch_to_cb_friendly_attn is switch:
            manager.switch_to_cb_friendly_attn = before

    return undo


def extended(
    cache: Any,
    module: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
    cu_seq_lens_k: Any,
    max_length_k: Any,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """Stores new keys and values ``[1, Hk, T, D]`` and returns those of the whole sequences, packed.

    Returns:
        (keys ``[1, Hk, Tk, D]``, values, cu_seqlens ``[sequences + 1]``, longest sequence of keys).
    """
    if "kwargs" in inspect.signature(cache.update).parameters:  # 5.18 and later: lengths by kind of layer inside
        inside = {**kwargs, "cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=inside)
        return key, value, inside["cu_seq_lens_k"], inside["max_length_k"]
    keys, values = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )  # [Tk, Hk, D]
    if isinstance(cu_seq_lens_k, dict):
        window = sliding_window or getattr(module, "sliding_window", None)
        kind = "sliding_attention" if window else "full_attention"
        cu_seq_lens_k, max_length_k = cu_seq_lens_k[kind], max_length_k[kind]
    return keys.transpose(0, 1)[None], values.transpose(0, 1)[None], cu_seq_lens_k, max_length_k
