# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the parts of vLLM that an attention backend meets, and a runner that drives one as vLLM's does.

Names, argument lists and duties are those of vLLM 0.26's v1 attention interface; the code is not vLLM's.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace

import torch


class AttentionBackend(ABC):
    supported_dtypes = ()
    supported_kv_cache_dtypes = ()
    forward_includes_kv_cache_update = True

    @staticmethod
    @abstractmethod
    def get_name(): ...

    @staticmethod
    @abstractmethod
    def get_impl_cls(): ...

    @staticmethod
    @abstractmethod
    def get_builder_cls(): ...

    @staticmethod
    @abstractmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"): ...

    @classmethod
    def supports_head_size(cls, head_size):
        return head_size in cls.get_supported_head_sizes()

    @classmethod
    def supports_block_size(cls, block_size):
        return any(block_size % size == 0 for size in cls.get_supported_kernel_block_sizes())

    @classmethod
    def is_mla(cls):
        return False


class AttentionImpl(ABC):
    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.dcp_world_size = 1  # vLLM puts the ranks of context parallelism here
        return self

    @abstractmethod
    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None): ...

    @abstractmethod
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output): ...


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class AttentionMetadataBuilder(ABC):
    _cudagraph_support = AttentionCGSupport.NEVER
    reorder_batch_threshold = None

    @abstractmethod
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device): ...

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True


def install(patch, layout="NHD"):
    """Puts the stand-in into ``sys.modules`` through pytest's monkeypatch; returns the registry."""
    taken = {}

    class Slot(Enum):
        FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
        CUSTOM = None

        def is_overridden(self):
            return self in taken

        def get_path(self):
            return taken.get(self, self.value)

    registry = ModuleType("vllm.v1.attention.backends.registry")
    registry.AttentionBackendEnum = Slot
    registry.register_backend = taken.__setitem__
    registry.taken = taken
    backend = ModuleType("vllm.v1.attention.backend")
    for each in (
        AttentionBackend,
        AttentionImpl,
        AttentionCGSupport,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
    ):
        setattr(backend, each.__name__, each)
    utils = ModuleType("vllm.v1.attention.backends.utils")
    utils.get_kv_cache_layout = lambda: layout
    for name in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.backends"):
        patch.setitem(sys.modules, name, ModuleType(name))
    for module in (registry, backend, utils):
        patch.setitem(sys.modules, module.__name__, module)
    return registry


class Runner:
    """One layer of a model as vLLM's worker runs it: blocks of a shared pool, steps of mixed prefill and decoding.

    ``history[r]`` keeps the keys and values that request r has seen, for the reference.
    """

    def __init__(self, backend, *, heads=(4, 2), head_size=32, block_size=16, blocks=24, device="cpu", **options):
        self.heads, self.kv_heads, self.head_size, self.block_size = *heads, head_size, block_size
        self.device, self.options = device, options
        self.generator = torch.Generator().manual_seed(0)
        shape = backend.get_kv_cache_shape(blocks, block_size, self.kv_heads, head_size)
        order = backend.get_kv_cache_stride_order()
        inverse = [order.index(axis) for axis in range(len(order))]
        memory = torch.full([shape[axis] for axis in order], float("nan"), dtype=torch.bfloat16, device=device)
        self.cache = memory.permute(inverse)
        assert self.cache.shape == shape
        self.free = torch.randperm(blocks - 1, generator=self.generator).add(1).tolist()  # 0 is nobody's
        self.impl = backend.get_impl_cls()(
            self.heads, head_size, head_size**-0.5, self.kv_heads,
            options.get("alibi_slopes"), options.get("sliding_window"), "auto", options.get("logits_soft_cap"),
            "decoder", None, **{name: options[name] for name in ("sinks",) if name in options},
        )  # fmt: skip
        spec = SimpleNamespace(block_size=block_size, num_kv_heads=self.kv_heads, head_size=head_size)
        self.builder = backend.get_builder_cls()(spec, ["layer"], SimpleNamespace(), torch.device(device))
        self.tables: dict[int, list[int]] = {}
        self.history: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def random(self, tokens, heads):
        return torch.randn(tokens, heads, self.head_size, generator=self.generator).bfloat16()

    def step(self, lengths, padding=0, causal=True):
        """New tokens of some requests, {request: count}; returns [(query, keys, values, output)] of each.

        ``padding``: rows and requests that a captured graph adds, which must change nothing.
        """
        starts, seqs, slots, parts = [0], [], [], []
        for request, count in lengths.items():
            table = self.tables.setdefault(request, [])
            old = self.history.get(request, (self.random(0, self.kv_heads),) * 2)
            begin = len(old[0])
            while len(table) * self.block_size < begin + count:
                table.append(self.free.pop())
            places = range(begin, begin + count)
            slots += [table[i // self.block_size] * self.block_size + i % self.block_size for i in places]
            query, key, value = (self.random(count, n) for n in (self.heads, self.kv_heads, self.kv_heads))
            self.history[request] = tuple(torch.cat(pair) for pair in zip(old, (key, value), strict=True))
            starts.append(starts[-1] + count)
            seqs.append(begin + count)
            parts.append((query, key, value))
        total = starts[-1]
        rows = total + padding
        query, key, value = (torch.cat(x) for x in zip(*parts, strict=True))
        garbage = torch.full((padding, 1, self.head_size), float("nan")).bfloat16()
        query, key, value = (torch.cat([x, garbage.expand(-1, x.shape[1], -1)]) for x in (query, key, value))
        width = max(map(len, self.tables.values())) + 2
        table = torch.full((len(lengths) + (padding > 0), width), 7777, dtype=torch.int32)  # never read
        for row, request in enumerate(lengths):
            table[row, : len(self.tables[request])] = torch.tensor(self.tables[request])
        if padding:
            starts.append(total)
            seqs.append(0)
        start = torch.tensor(starts, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=start.to(self.device),
            query_start_loc_cpu=start,
            seq_lens=torch.tensor(seqs, dtype=torch.int32, device=self.device),
            num_reqs=len(seqs),
            num_actual_tokens=rows,
            max_query_len=max(lengths.values()),
            max_seq_len=max(seqs),
            block_table_tensor=table.to(self.device),
            slot_mapping=torch.tensor(slots + [-1] * padding, dtype=torch.int64, device=self.device),
            causal=causal,
        )
        meta = self.builder.build(common_prefix_len=0, common_attn_metadata=common)
        output = torch.full((rows, self.heads * self.head_size), float("nan"), dtype=torch.bfloat16, device=self.device)
        on = [x.to(self.device) for x in (query, key, value)]
        back = self.impl.forward(None, *on, self.cache, meta, output.view(rows, self.heads, self.head_size))
        assert back.data_ptr() == output.data_ptr()
        done = output.view(rows, self.heads, self.head_size)[:total].cpu().split(list(lengths.values()))
        return [(part[0], *self.history[r], out) for r, part, out in zip(lengths, parts, done, strict=True)]
