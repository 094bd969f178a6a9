# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backend ``CUSTOM``, served by this library. It has not been run inside vLLM.

Written against the v1 interface of vLLM 0.26 (``vllm.v1.attention.backend``) and exercised in
tests/test_vllm.py with a stand-in of that interface and a small runner. Importing this file needs neither vLLM nor
torch; ``register`` is what the entry point of ``vllm.general_plugins`` calls in every process of vLLM, and it only
fills the slot: who wants it asks for ``--attention-backend CUSTOM``.

The cache is ``[blocks, 2, block_size, heads_k, head_size]``, keys and values of a block side by side; the kernels read
it through strides, so both of vLLM's layouts (NHD, HND) are fine.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import FmhaError, InputError, UnsupportedProblem
from ..kernels import catalog
from ..kernels.spec import Arch, DType, KvLayout
from ..problem import dispatch
from ..problem.arguments import LARGEST_PAGE, PAGE_SIZES, is_page_size

if TYPE_CHECKING:
    import torch

CLASS_PATH = f"{__name__}.FmhaBackend"
_INTERFACE = "vllm.v1.attention.backend"
_log = logging.getLogger(__name__)


def register() -> bool:
    """Puts ``FmhaBackend`` into vLLM's slot for custom backends. Cheap, repeatable, touches no GPU.

    vLLM calls this wherever the package is installed, so it complains by a log entry and never by an exception.

    Returns:
        whether the slot is ours now: False without vLLM, or when another plugin holds it.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        _log.warning("fmha_runtime does not serve vLLM: no attention registry of vLLM 0.14 or later (%s)", error)
        return False
    slot = AttentionBackendEnum.CUSTOM
    if slot.is_overridden() and slot.get_path() != CLASS_PATH:
        _log.warning("fmha_runtime does not serve vLLM: the CUSTOM slot belongs to %s", slot.get_path())
        return False
    register_backend(slot, CLASS_PATH)
    return True


@dataclass
class FmhaMetadata:
    """What all layers of a step share. T tokens of B requests lie end to end.

    ``query_start_loc [B + 1]`` int32 are their boundaries, ``seq_lens [B]`` int32 the keys of each request with the
    new ones, ``block_table [B, blocks]`` int32, ``slot_mapping [T]`` where new keys go, -1 = nowhere.
    """

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool


class Backend:
    """What vLLM asks before it chooses a backend. ``FmhaBackend`` is this class with vLLM's base beside it."""

    accept_output_buffer = True
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """The name of the slot in vLLM's enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        """The class of a layer's attention."""
        return _classes()["FmhaImpl"]

    @staticmethod
    def get_metadata_cls() -> type:
        """The class of the metadata (asked by older versions)."""
        return FmhaMetadata

    @staticmethod
    def get_builder_cls() -> type:
        """The class that makes the metadata of a step."""
        return _classes()["FmhaMetadataBuilder"]

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int]:
        """Tokens of a page; vLLM cuts its own blocks into these."""
        return list(PAGE_SIZES)

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """``(blocks, 2, block_size, heads_k, head_size)``.

        Raises:
            InputError: pages of another size than the kernels read.
        """
        if not is_page_size(block_size):
            raise InputError(
                f"block_size is {block_size}; pages of 1, 2, 4 and multiples of 8 up to {LARGEST_PAGE} are read"
            )
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """The order of the axes in memory: NHD as they are, HND with heads before tokens.

        Raises:
            NotImplementedError: one tensor for all layers, which has not been tried.
        """
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        if include_num_layers_dimension:
            raise NotImplementedError("a cache of all layers in one tensor has not been tried with this backend")
        return (0, 1, 3, 2, 4) if get_kv_cache_layout() == "HND" else (0, 1, 2, 3, 4)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head dims that have kernels for pages, whatever the GPU."""
        specs = (s for s in catalog.enumerate_specs() if s.kv is KvLayout.PAGED and s.head_dim == s.head_dim_v)
        return sorted({spec.head_dim for spec in specs})

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders over a cache only."""
        return attn_type == "decoder"

    @classmethod
    def supports_sink(cls) -> bool:
        """Sinks are an option of the kernels."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """So are windows."""
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        """So is attention without causality."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Whether the table has an arch for this GPU."""
        return Arch.for_capability(capability.major, capability.minor) is not None

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        *rest: Any,
        **more: Any,
    ) -> str | None:
        """Why the table has no kernel for this, from the selection itself; None when it has.

        vLLM passes the device capability last, or by name, and flags before it that differ between versions.
        """
        capability = more.get("device_capability", rest[-1] if rest else None)
        arch = None if capability is None else Arch.for_capability(capability.major, capability.minor)
        if arch is None:
            return f"no kernels for compute capability {capability}"
        try:
            kind = DType("fp16" if str(dtype) == "torch.float16" else "bf16")
            dispatch.choose(dispatch.Problem(arch, kind, head_size, head_size, kv=KvLayout.PAGED))
        except FmhaError as error:
            return str(error)
        return None


class MetadataBuilder:
    """vLLM's description of a step, as the kernels read it. No copies, no look at the device."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> FmhaMetadata:
        """The metadata of a step; a common prefix needs no special care, its pages are simply shared.

        Raises:
            UnsupportedProblem: requests that are causal and requests that are not in one batch.
        """
        common = common_attn_metadata
        if not isinstance(common.causal, bool):
            raise UnsupportedProblem(
                "vLLM asks for causality request by request (a tensor); the kernels take one value for a batch"
            )
        batch = common.seq_lens.shape[0]
        return FmhaMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=int(common.max_query_len),
            query_start_loc=common.query_start_loc[: batch + 1],
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor[:batch],
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Attention to a common prefix by itself: no."""
        return False


class Impl:
    """The attention of one layer. ``FmhaImpl`` is this class with vLLM's base beside it."""

    supports_quant_query_input = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        """vLLM's arguments; ``sinks [heads]``.

        Raises:
            UnsupportedProblem: a quantised cache, attention that is not a decoder's, or an option nobody knows.
        """
        asked = {name: value for name, value in unknown.items() if value is not None and value is not False}
        asked = {name: value for name, value in asked.items() if value != -1}  # vLLM's other way to say no
        if asked:
            raise UnsupportedProblem(f"the model asks attention for {asked}, which this backend does not know")
        if kv_cache_dtype not in ("auto", "float16", "bfloat16"):
            raise UnsupportedProblem(f"a cache of {kv_cache_dtype}; fp16 and bf16 are read: kv_cache_dtype='auto'")
        if attn_type != "decoder":
            raise UnsupportedProblem(f"attention of type {attn_type!r}; decoders are computed")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._slopes = alibi_slopes
        self._floats: tuple[torch.Tensor | None, torch.Tensor | None] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are weights: what was made of them before is stale."""
        self._floats = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FmhaMetadata | None,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stores key and value ``[T, Hk, D]``, then writes the attention of ``query [T, H, D]`` to ``output``.

        Raises:
            UnsupportedProblem: an output to be quantised, or a window without causality.
            the errors of ``attention_with_kvcache``.
        """
        from .. import attention_with_kvcache

        if output is None:
            raise InputError("output is None; vLLM's v1 engine passes the tensor to write")
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedProblem("a quantised output (output_scale=) is not written by these kernels")
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        meta = attn_metadata
        if self.sliding_window is not None and not meta.causal:
            raise UnsupportedProblem("a sliding window without causality: vLLM does not say where it ends")
        keys, values = kv_cache.unbind(1)
        if self.kv_sharing_target_layer_name is None and key is not None and value is not None:
            store(key, value, keys, values, meta.slot_mapping)
        slopes, sinks = self._float_extras(query)
        tokens = meta.num_actual_tokens
        attention_with_kvcache(
            query.view(-1, self.num_heads, self.head_size)[:tokens],
            keys,
            values,
            cache_seqlens=meta.seq_lens,
            page_table=meta.block_table,
            cu_seqlens_q=meta.query_start_loc,
            max_seqlen_q=meta.max_query_len,
            causal=meta.causal,
            window=None if self.sliding_window is None else (self.sliding_window - 1, 0),
            scale=self.scale,
            softcap=self.logits_soft_cap,
            alibi_slopes=slopes,
            sinks=sinks,
            out=output.view(-1, self.num_heads, self.head_size)[:tokens],
        )
        return output

    def _float_extras(self, query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """ALiBi slopes and sinks as the kernels read them, made once: vLLM warms up before it captures graphs."""
        import torch

        if self._floats is None:
            slopes = None if self._slopes is None else torch.tensor(self._slopes, dtype=torch.float32)
            self._floats = (
                None if slopes is None else slopes.to(query.device),
                None if self.sinks is None else self.sinks.detach().to(query.device, torch.float32).contiguous(),
            )
        return self._floats


def store(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes ``key``, ``value`` ``[T, Hk, D]`` into pools ``[blocks, block_size, Hk, D]``.

    Slot s is token ``s % block_size`` of block ``s // block_size``; tokens with slot -1 go nowhere. ``key`` may have
    more rows than there are slots. Nothing waits for the device, so it may be captured in a graph.
    """
    from ..ops.append.appender import append_kv

    count = min(slots.shape[0], key.shape[0])
    if count:
        key, value = (new[:count].to(pool.dtype) for new, pool in ((key, keys), (value, values)))
        append_kv(key, value, keys, values, slot_mapping=slots[:count].long().contiguous())


@functools.cache
def _classes() -> dict[str, type]:
    """The three classes with vLLM's bases beside them, which exist where vLLM does only."""
    import importlib

    import torch

    base = importlib.import_module(_INTERFACE)
    dtypes = {
        "supported_dtypes": [torch.float16, torch.bfloat16],
        "supported_kv_cache_dtypes": ["auto", "float16", "bfloat16"],
    }
    # A graph keeps the grid of its longest query, so batches must be of one query length.
    graphs = {"_cudagraph_support": base.AttentionCGSupport.UNIFORM_BATCH}
    inside: dict[str, tuple[tuple[type, ...], dict[str, Any]]] = {
        "FmhaBackend": ((Backend, base.AttentionBackend), dtypes),
        "FmhaImpl": ((Impl, base.AttentionImpl), {}),
        "FmhaMetadataBuilder": ((MetadataBuilder, base.AttentionMetadataBuilder), graphs),
    }
    return {name: type(name, bases, {**members, "__module__": __name__}) for name, (bases, members) in inside.items()}


def __getattr__(name: str) -> Any:
    if name not in ("FmhaBackend", "FmhaImpl", "FmhaMetadataBuilder"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _classes()[name]
