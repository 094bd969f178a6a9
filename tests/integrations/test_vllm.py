# SPDX-License-Identifier: Apache-2.0
"""The vLLM backend against a stand-in of vLLM's interface: selection, cache, steps of a runner. Not inside vLLM."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from helpers import ROOT, vllm_stub  # noqa: E402

from fmha_runtime.errors import InputError, UnsupportedProblem  # noqa: E402
from fmha_runtime.integrations import vllm as adapter  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.fixture(params=["NHD", "HND"])
def layout(request):
    return request.param


@pytest.fixture
def backend(monkeypatch, layout):
    vllm_stub.install(monkeypatch, layout)
    adapter._classes.cache_clear()
    yield adapter.FmhaBackend
    adapter._classes.cache_clear()


def expected(query, key, value, *, causal=True, **options):
    """One request: its queries are the last of its keys."""
    window = options.get("sliding_window")
    slopes = options.get("alibi_slopes")
    out, _ = reference.attention(
        query[None], key[None], value[None], causal=causal, window=None if window is None else (window - 1, 0),
        softcap=options.get("logits_soft_cap") or 0.0, sinks=options.get("sinks"),
        alibi_slopes=None if slopes is None else torch.tensor(slopes),
    )  # fmt: skip
    return out[0]


def agree(parts, **options):
    for query, key, value, out in parts:
        want = expected(query, key, value, **options)
        # The output is rounded to bfloat16 (2^-9 of it) after weights that were rounded too.
        assert (out.double() - want).abs().max().item() <= 2**-7 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 5}, {"logits_soft_cap": 0.7}, {"sinks": SINKS}, {"alibi_slopes": SLOPES},
     {"sliding_window": 9, "sinks": SINKS}],
    ids=lambda options: "+".join(options) or "plain",
)  # fmt: skip
def test_steps_of_a_runner(backend, options, device):
    """Whole prompts, a chunk of one, decoding, a draft of three: each step against the request's whole history."""
    runner = vllm_stub.Runner(backend, device=device, **options)
    for lengths in ({0: 21, 1: 5}, {0: 1, 1: 1, 2: 40}, {0: 1, 2: 13, 1: 3}, {1: 1, 2: 1}, {0: 16}):
        agree(runner.step(lengths), **options)


@pytest.mark.parametrize("device", DEVICES)
def test_options_change_the_result(backend, device):
    outs = []
    for options in ({}, {"sliding_window": 5}, {"logits_soft_cap": 0.7}, {"sinks": SINKS}, {"alibi_slopes": SLOPES}):
        runner = vllm_stub.Runner(backend, device=device, **options)
        outs.append(runner.step({0: 21})[0][3])
    for i, one in enumerate(outs):
        for other in outs[:i]:
            assert (one.float() - other.float()).abs().max() > 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
def test_block_sizes_and_grouped_heads(backend, block_size, device):
    runner = vllm_stub.Runner(backend, heads=(8, 1), block_size=block_size, head_size=64, device=device)
    for lengths in ({0: 21, 1: 5}, {0: 1, 1: 70}, {1: 1, 0: 1}):
        agree(runner.step(lengths))


@pytest.mark.parametrize("device", DEVICES)
def test_padding_of_a_captured_graph_changes_nothing(backend, device):
    """Rows without a slot, full of NaN, and a request without tokens."""
    runner = vllm_stub.Runner(backend, device=device)
    agree(runner.step({0: 17, 1: 3}))
    before = runner.cache.clone()
    agree(runner.step({0: 1, 1: 1}, padding=6))
    changed = (runner.cache.nan_to_num(7.0) != before.nan_to_num(7.0)).flatten(3).any(-1)
    assert changed.sum() == 2 * 2  # a key and a value of two requests
    agree(runner.step({0: 1, 1: 2}))


@pytest.mark.parametrize("device", DEVICES)
def test_attention_without_causality(backend, device):
    runner = vllm_stub.Runner(backend, device=device)
    agree(runner.step({0: 9, 1: 20}, causal=False), causal=False)


def test_store_writes_slots_and_nothing_else():
    keys, values = (torch.zeros(3, 4, 1, 8) for _ in range(2))
    new = torch.arange(1.0, 6.0)[:, None, None].expand(5, 1, 8)
    adapter.store(new, -new, keys, values, torch.tensor([-1, 9, -1, 2]))  # the fifth row has no slot
    want = torch.zeros(12)
    want[9], want[2] = 2.0, 4.0
    assert torch.equal(keys.flatten(0, 1)[:, 0, 0], want)
    assert torch.equal(values, -keys)
    before = keys.clone()
    adapter.store(new, new, keys, values, torch.full((5,), -1))
    adapter.store(new[:0], new[:0], keys, values, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(keys, before)


def test_keys_come_before_values_in_a_block(backend):
    """What moves blocks between machines relies on the declared shape."""
    runner = vllm_stub.Runner(backend)
    ((_, keys, values, _),) = runner.step({0: 20})
    pages = runner.cache[runner.tables[0]]
    assert torch.equal(pages[:, 0].flatten(0, 1)[:20], keys)
    assert torch.equal(pages[:, 1].flatten(0, 1)[:20], values)


def test_layers_that_share_a_cache_do_not_write(backend):
    runner = vllm_stub.Runner(backend)
    agree(runner.step({0: 9}))
    before = runner.cache.clone()
    runner.impl.kv_sharing_target_layer_name = "layer.0"
    runner.step({0: 1})
    assert torch.equal(runner.cache.nan_to_num(7.0), before.nan_to_num(7.0))


def test_memory_measurement_without_metadata(backend):
    runner = vllm_stub.Runner(backend)
    x = torch.ones(3, 4, 32, dtype=torch.bfloat16)
    assert not runner.impl.forward(None, x, x, x, runner.cache, None, x.clone()).any()


def test_sinks_loaded_later_are_seen(backend):
    """Weights come after the layer is built."""
    sinks = torch.zeros(4, dtype=torch.bfloat16)  # as a model holds them: what kernels read is a copy
    runner = vllm_stub.Runner(backend, sinks=sinks)
    agree(runner.step({0: 5}), sinks=sinks)
    sinks.copy_(SINKS)
    runner.impl.process_weights_after_loading(torch.bfloat16)
    agree(runner.step({0: 5}), sinks=SINKS)


@pytest.mark.gpu
def test_a_captured_decoding_step_replays(backend):
    """The step is captured once; lengths, pages and slots change in place."""
    runner = vllm_stub.Runner(backend, device="cuda", sinks=SINKS)
    runner.step({0: 17, 1: 30})
    q, k, v = (torch.randn(2, n, 32, device="cuda").bfloat16() for n in (4, 2, 2))
    out = torch.empty_like(q)
    table = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32, device="cuda")
    meta = adapter.FmhaMetadata(
        num_actual_tokens=2, max_query_len=1, query_start_loc=torch.arange(3, dtype=torch.int32, device="cuda"),
        seq_lens=torch.tensor([18, 31], dtype=torch.int32, device="cuda"), block_table=table,
        slot_mapping=torch.tensor([2 * 16 + 1, 5 * 16 + 14], device="cuda"), causal=True,
    )  # fmt: skip

    def run():
        runner.impl.forward(None, q, k, v, runner.cache, meta, out)

    runner.cache.copy_(torch.randn(runner.cache.shape, device="cuda"))
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths, slots in (([19, 32], [2 * 16 + 2, 5 * 16 + 15]), ([33, 1], [3 * 16, 4 * 16])):
        meta.seq_lens.copy_(torch.tensor(lengths))
        meta.slot_mapping.copy_(torch.tensor(slots))
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        graph.replay()
        for i, length in enumerate(lengths):
            pages = runner.cache[table[i].long()].cpu()
            keys, values = (pages[:, j].flatten(0, 1)[:length] for j in (0, 1))
            agree([(q[i : i + 1].cpu(), keys, values, out[i : i + 1].cpu())], sinks=SINKS)


def test_what_vllm_asks_before_it_chooses(backend, layout):
    assert backend.get_name() == "CUSTOM"
    assert backend.__name__ == "FmhaBackend"
    assert f"{backend.__module__}.{backend.__qualname__}" == adapter.CLASS_PATH
    assert issubclass(backend, vllm_stub.AttentionBackend)
    assert issubclass(backend.get_impl_cls(), vllm_stub.AttentionImpl)
    assert issubclass(backend.get_builder_cls(), vllm_stub.AttentionMetadataBuilder)
    assert backend.get_builder_cls()._cudagraph_support is vllm_stub.AttentionCGSupport.UNIFORM_BATCH
    assert backend.get_kv_cache_shape(5, 16, 2, 64) == (5, 2, 16, 2, 64)
    assert backend.get_kv_cache_stride_order() == ((0, 1, 2, 3, 4) if layout == "NHD" else (0, 1, 3, 2, 4))
    with pytest.raises(NotImplementedError):
        backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    assert {64, 72, 128, 256} <= set(backend.get_supported_head_sizes())
    assert backend.supports_head_size(128)
    assert not backend.supports_head_size(100)
    assert backend.supports_block_size(16)
    assert backend.supports_block_size(528)  # cut into pages
    assert not backend.supports_block_size(12)
    assert backend.supported_dtypes == [torch.float16, torch.bfloat16]
    assert backend.supports_attn_type("decoder")
    assert not backend.supports_attn_type("encoder_only")
    assert backend.get_kv_cache_shape(5, 24, 2, 64) == (5, 2, 24, 2, 64)
    with pytest.raises(InputError, match="multiples of 8"):
        backend.get_kv_cache_shape(5, 12, 2, 64)


def test_selection_speaks_of_the_table(backend):
    def why(head_size, major, minor, dtype=torch.bfloat16):
        capability = SimpleNamespace(major=major, minor=minor)
        named = {"use_mm_prefix": False, "device_capability": capability}
        arguments = (head_size, dtype, "auto", 16, False, False, False)
        reason = backend.supports_combination(*arguments, *named.values())
        assert backend.supports_combination(*arguments, **named) == reason
        return reason

    assert why(128, 9, 0) is None
    assert why(72, 8, 0, torch.float16) is None
    assert "nearest row" in why(100, 9, 0)
    assert "compute capability" in why(128, 7, 5)
    assert backend.supports_compute_capability(SimpleNamespace(major=8, minor=9))
    assert not backend.supports_compute_capability(SimpleNamespace(major=7, minor=5))


def test_what_the_backend_cannot_do_is_refused(backend):
    make = backend.get_impl_cls()
    with pytest.raises(UnsupportedProblem, match="fp8"):
        make(4, 32, 1.0, 2, None, None, "fp8")
    with pytest.raises(UnsupportedProblem, match="encoder_only"):
        make(4, 32, 1.0, attn_type="encoder_only")
    with pytest.raises(UnsupportedProblem, match="use_alibi_sqrt"):
        make(4, 32, 1.0, use_alibi_sqrt=True)
    make(4, 32, 1.0, use_alibi_sqrt=False, chunk_lookback=-1)  # vLLM's ways to say no
    runner = vllm_stub.Runner(backend, sliding_window=4)
    with pytest.raises(UnsupportedProblem, match="without causality"):
        runner.step({0: 3}, causal=False)
    with pytest.raises(UnsupportedProblem, match="request by request"):
        runner.step({0: 3}, causal=torch.tensor([True]))
    x = torch.ones(1, 4, 32, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedProblem, match="output_scale"):
        runner.impl.forward(None, x, x, x, runner.cache, None, x, output_scale=torch.ones(1))
    with pytest.raises(InputError, match="output is None"):
        runner.impl.forward(None, x, x, x, runner.cache, None)


def test_registration(monkeypatch):
    registry = vllm_stub.install(monkeypatch)
    slot = registry.AttentionBackendEnum.CUSTOM
    assert adapter.register()
    assert adapter.register()  # every process of vLLM, perhaps twice
    module, _, name = registry.taken[slot].rpartition(".")
    assert getattr(importlib.import_module(module), name).get_name() == "CUSTOM"
    adapter._classes.cache_clear()


def test_another_plugin_keeps_the_slot(monkeypatch, caplog):
    registry = vllm_stub.install(monkeypatch)
    slot = registry.AttentionBackendEnum.CUSTOM
    registry.register_backend(slot, "someone.Else")
    assert not adapter.register()
    assert registry.taken[slot] == "someone.Else"
    assert "someone.Else" in caplog.text


def test_without_vllm_nothing_happens(caplog):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    assert adapter.register() is False
    assert "does not serve vLLM" in caplog.text
    with pytest.raises(ImportError):
        _ = adapter.FmhaBackend
    with pytest.raises(AttributeError):
        _ = adapter.Nothing


def test_the_entry_point_loads_neither_vllm_nor_torch():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["vllm.general_plugins"]["fmha"]
    module, _, name = target.partition(":")
    code = f"""
import sys
from {module} import {name}
assert {name}() is False
assert not {{"torch", "vllm", "cuda.bindings"}} & set(sys.modules)
"""
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
