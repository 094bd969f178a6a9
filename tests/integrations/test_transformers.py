# SPDX-License-Identifier: Apache-2.0
"""Models of transformers give what their own attention gives, or a refusal: nothing is dropped."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from helpers import model_zoo  # noqa: E402

from fmha_runtime.errors import InputError, UnsupportedProblem  # noqa: E402
from fmha_runtime.integrations import transformers as adapter  # noqa: E402
from fmha_runtime.integrations.transformers_masks import layer_mask  # noqa: E402

BF16 = torch.bfloat16


@pytest.fixture
def name():
    registration = adapter.register("fmha_test")
    yield "fmha_test"
    registration.remove()


def bert(attn, **options):
    config = transformers.BertConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=99,
        attn_implementation=attn,
        **options,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval().to(BF16)


def decoder(attn, kind="Llama", **options):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=99,
        attn_implementation=attn,
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval().to(BF16)


def tokens(batch, length):
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state.float()


def worst(got, want, mask=None):
    difference = (got - want).abs()
    return (difference if mask is None else difference * mask[..., None]).max().item()


def check(make, name, mask=None, **inputs):
    """The largest difference from eager attention on real tokens, held to the noise of bf16.

    Two bf16 runs differ by about twice the distance of one from an fp32 run of the same weights.
    """
    eager = make("eager")
    want = hidden(eager, **inputs)
    exact = hidden(eager.float(), **inputs)
    got = hidden(make(name), **inputs)
    assert torch.isfinite(got).all()
    assert worst(got, exact, mask) <= 2 * worst(want, exact, mask)


@pytest.mark.parametrize("lengths", [[7, 3, 5], [7, 7, 7], [1, 7, 2]])
def test_padded_encoder(name, lengths):
    mask = padding(lengths, 7)
    check(bert, name, mask, input_ids=tokens(3, 7), attention_mask=mask)


def test_padding_mask_matters(name):
    mask = padding([7, 3, 5], 7)
    model = bert(name)
    with_mask = hidden(model, input_ids=tokens(3, 7), attention_mask=mask)
    without = hidden(model, input_ids=tokens(3, 7), attention_mask=torch.ones_like(mask))
    assert worst(with_mask, without, mask) > 0.05


def test_encoder_without_mask(name):
    check(bert, name, input_ids=tokens(2, 9))


def test_causal_decoder(name):
    check(decoder, name, input_ids=tokens(2, 33))


def test_right_padded_decoder(name):
    mask = padding([20, 9], 20)
    check(decoder, name, mask, input_ids=tokens(2, 20), attention_mask=mask)


@pytest.mark.parametrize("window", [1, 4])
def test_sliding_window(name, window):
    def make(attn):
        return decoder(attn, "Mistral", sliding_window=window)

    check(make, name, input_ids=tokens(2, 17))
    wide = hidden(decoder(name, "Mistral", sliding_window=None), input_ids=tokens(2, 17))
    assert worst(hidden(make(name), input_ids=tokens(2, 17)), wide) > 0.05


def test_window_and_padding(name):
    mask = padding([17, 6], 17)

    def make(attn):
        return decoder(attn, "Mistral", sliding_window=5)

    check(make, name, mask, input_ids=tokens(2, 17), attention_mask=mask)


def test_softcap_reaches_the_call(name):
    def make(attn):
        return decoder(attn, "Gemma2", attn_logit_softcapping=0.05, query_pre_attn_scalar=1)

    check(make, name, input_ids=tokens(2, 11))
    plain = decoder(name, "Gemma2", attn_logit_softcapping=None, query_pre_attn_scalar=1)
    capped = make(name)
    difference = worst(hidden(capped, input_ids=tokens(2, 11)), hidden(plain, input_ids=tokens(2, 11)))
    assert difference > 0.01


def refusal(model, match, **inputs):
    with torch.no_grad(), pytest.raises(UnsupportedProblem, match=match):
        model(**inputs)


@pytest.mark.parametrize("flip", [False, True])
def test_softcap_with_padding_on_either_side(name, flip):
    mask = padding([7, 3], 7)
    mask = mask.flip(1) if flip else mask

    def make(attn):
        return decoder(attn, "Gemma2", attn_logit_softcapping=0.8, query_pre_attn_scalar=4)

    check(make, name, mask, input_ids=tokens(2, 7), attention_mask=mask)


def test_holes_are_honoured(name):
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]])
    check(bert, name, mask, input_ids=tokens(2, 5), attention_mask=mask)
    check(decoder, name, mask, input_ids=tokens(2, 5), attention_mask=mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, BF16])
def test_ready_made_mask_is_honoured(name, kind):
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(2, 1, 6, 6, generator=generator) < 0.5
    seen |= torch.eye(6, dtype=torch.bool)
    eager = torch.where(seen, 0.0, torch.finfo(BF16).min).to(BF16)
    ours = seen if kind is torch.bool else torch.where(seen, 0.0, torch.finfo(kind).min).to(kind)
    exact = hidden(bert("eager").float(), input_ids=tokens(2, 6), attention_mask=eager.float())
    want = hidden(bert("eager"), input_ids=tokens(2, 6), attention_mask=eager)
    got = hidden(bert(name), input_ids=tokens(2, 6), attention_mask=ours)
    assert worst(got, exact) <= 2 * worst(want, exact)
    assert worst(got, hidden(bert(name), input_ids=tokens(2, 6))) > 0.05


def test_a_mask_tensor_is_packed_once_and_again_when_it_changes():
    registration = adapter.Registration(None, frozenset())
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    first = registration.bits(mask, 4)
    assert registration.bits(mask, 4) is first
    mask[..., 2] = False
    assert registration.bits(mask, 4) is not first
    assert registration.bits(mask.clone(), 4).words.equal(registration.bits(mask, 4).words)
    assert registration.bits(mask, 3).cols == 3


def test_inference_mode(name):
    """Tensors of inference mode have no version counter; nothing may ask for it."""
    seen = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    want = hidden(bert(name), input_ids=tokens(1, 5), attention_mask=seen)
    with torch.inference_mode():
        got = bert(name)(input_ids=tokens(1, 5), attention_mask=seen.clone()).last_hidden_state
        padded = padding([3, 5], 5)
        decoder(name)(input_ids=tokens(2, 5), attention_mask=padded.flip(1))
    assert torch.equal(got.float(), want)


def test_mask_that_is_a_bias_is_refused(name):
    mask = torch.full((1, 1, 5, 5), 0.5)
    refusal(bert(name), "position bias", input_ids=tokens(1, 5), attention_mask=mask)


def test_position_bias_of_t5_is_refused(name):
    config = transformers.T5Config(d_model=128, d_kv=32, num_heads=4, num_layers=2, vocab_size=99, d_ff=64)
    model = transformers.T5EncoderModel(config).eval().to(BF16)
    model.set_attn_implementation(name)
    refusal(model, "position bias", input_ids=tokens(1, 5))


@pytest.mark.parametrize("kind", ["Bloom", "Mpt"])
def test_models_with_attention_of_their_own_are_refused(name, kind):
    """They never ask the AttentionInterface: without this they would run their own code under our name."""
    sizes = {"hidden_size": 128, "n_head": 4, "n_layer": 2}
    if kind == "Mpt":
        sizes = {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, vocab_size=99, attn_implementation=name)
    model = getattr(transformers, f"{kind}Model")(config).eval().to(BF16)
    refusal(model, "in its own code", input_ids=tokens(1, 5))


def test_bloom_attention_by_hand():
    """What a user of an ALiBi model can do: call the library where the model computes attention."""
    import fmha_runtime

    config = transformers.BloomConfig(hidden_size=128, n_head=4, n_layer=1, vocab_size=99, initializer_range=0.15)
    torch.manual_seed(0)
    model = transformers.BloomModel(config).eval().to(BF16)
    layer = model.h[0].self_attention
    seen = {}
    layer.query_key_value.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    layer.dense.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    with torch.no_grad():
        model(input_ids=tokens(2, 19), use_cache=False)
        want, (q, k, v) = seen["out"], seen["qkv"].unflatten(-1, (4, 3, 32)).unbind(3)
        model.float()(input_ids=tokens(2, 19), use_cache=False)
        slopes = fmha_runtime.alibi_slopes(4)
        got = fmha_runtime.attention(q, k, v, causal=True, alibi_slopes=slopes).flatten(2)
        without = fmha_runtime.attention(q, k, v, causal=True).flatten(2)
    rounding = worst(want, seen["out"])
    assert worst(got, seen["out"]) <= 2 * rounding
    assert worst(without, seen["out"]) > 4 * rounding


def test_fp32_is_refused(name):
    refusal(bert(name).float(), r"model.to\(torch.bfloat16\)", input_ids=tokens(1, 5))


def test_dropout_is_refused(name):
    refusal(bert(name).train(), r"model.eval\(\)", input_ids=tokens(1, 5))


def test_gradients_are_refused(name):
    with pytest.raises(UnsupportedProblem, match="no_grad"):
        bert(name)(input_ids=tokens(1, 5))


class Layer:
    is_causal = False


def call(mask=None, length=4, **kwargs):
    x = torch.ones(1, 2, length, 32, dtype=BF16)
    harmless = frozenset(kwargs.pop("harmless", ()))
    return adapter._forward(adapter.Registration(None, harmless), Layer(), x, x, x, mask, **kwargs)


@pytest.mark.parametrize("argument", ["output_attentions", "head_mask", "position_bias", "indices", "block_indices"])
def test_what_no_kernel_computes_is_refused(argument):
    with pytest.raises(UnsupportedProblem, match=argument):
        call(**{argument: torch.ones(1) if argument != "output_attentions" else True})
    call(**{argument: None})


def test_unknown_arguments_are_refused_unless_declared_harmless():
    with pytest.raises(UnsupportedProblem, match=r"register\(harmless=\['temperature'\]\)"):
        call(temperature=2.0)
    call(temperature=2.0, harmless=["temperature"])
    call(temperature=None)


def test_sinks_of_another_shape_are_refused():
    call(s_aux=torch.zeros(2))
    with pytest.raises(UnsupportedProblem, match="one for each of 2 heads"):
        call(s_aux=torch.zeros(1, 2, 4, 1))


def test_block_tables_are_refused():
    with pytest.raises(UnsupportedProblem, match="max_blocks_per_request=0"):
        call(cache=object(), block_table=torch.zeros(1, 1, dtype=torch.int32))


def test_mask_made_for_other_lengths_is_refused():
    with pytest.raises(UnsupportedProblem, match="4 x 5"):
        call(layer_mask(1, q_length=4, kv_length=5))


def test_packed_sequences_with_padding_are_refused():
    cu = torch.tensor([0, 1, 4], dtype=torch.int32)
    with pytest.raises(UnsupportedProblem, match="only one of the two"):
        call(layer_mask(1, q_length=4, kv_length=8), cu_seq_lens_q=cu, cu_seq_lens_k=cu)


def dense(mask, batch):
    """The keys that a mask shows, bool [batch, queries, keys]: what the layers make of it."""
    from fmha_runtime import unpack_mask
    from fmha_runtime.ops.forward import reference

    if mask.bits is not None:
        return unpack_mask(mask.bits)[:, 0].expand(batch, -1, -1)
    used = [mask.kv_length] * batch if mask.seqused_k is None else mask.seqused_k.tolist()
    q, k = torch.zeros(batch, mask.q_length, 1, 8), torch.zeros(batch, mask.kv_length, 1, 8)
    eye = torch.eye(mask.kv_length)[None, :, None].expand(batch, -1, -1, -1)
    cut = {"window": (mask.left, mask.right), "attention_chunk": mask.chunk}
    if mask.cu_seqlens is not None:
        flat = (x.flatten(0, 1) for x in (q, k, torch.eye(batch * mask.kv_length)[None, :, None]))
        out = reference.attention_varlen(*flat, mask.cu_seqlens, mask.cu_seqlens, **cut)[0][:, 0]
        blocks = out.unflatten(0, (batch, -1)).unflatten(2, (batch, -1))
        assert sum(blocks[i, :, j].sum() for i in range(batch) for j in range(batch) if i != j) == 0
        return torch.stack([blocks[i, :, i] for i in range(batch)]) > 0
    out = reference.attention(q, k, eye, seqused_k=torch.tensor(used), **cut)[0]
    return out[:, :, 0] > 0


def functions(real=None):
    """Mask functions by name; ``real`` is the tokenizer's mask, whose padding on the left moves chunks."""
    from transformers import masking_utils as m

    left = torch.zeros(2, dtype=torch.int64) if real is None else (real.cumsum(1) == 0).sum(1)
    both = getattr(m, "bidirectional_mask_function", None)
    every = {
        "causal": m.causal_mask_function,
        "window": m.sliding_window_causal_mask_function(3),
        "chunk": m.chunked_causal_mask_function(4, left),
        "or": m.or_masks(m.sliding_window_causal_mask_function(2), lambda b, h, q, k: k == 0),
        "own": lambda b, h, q, k: (k <= q) & (k % 2 == 0) | (k == q),
    }
    if both is not None:
        every["full"] = both
        every["two-sided window"] = m.sliding_window_bidirectional_mask_function(2)
    return every


# q_length, kv_length, q_offset, kv_offset
PLACES = [(7, 7, 0, 0), (1, 9, 8, 0), (3, 9, 6, 0), (3, 9, 4, 0), (2, 8, 10, 4), (1, 6, 10, 5), (2, 7, 10, 5)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("padding_of", ["no", "right", "left", "holes"])
@pytest.mark.parametrize("pattern", functions())
def test_masks_are_those_of_transformers(pattern, padding_of, place):
    """Each pattern, place in a cache and padding, key by key, for the rows of real tokens."""
    from transformers import masking_utils

    q_length, kv_length, q_offset, kv_offset = place
    total = q_offset + q_length
    real = torch.ones(2, max(total, kv_offset + kv_length), dtype=torch.bool)
    real[:, total:] = False
    if padding_of == "right":
        real[1, total - 1 :] = False
    elif padding_of == "left":
        real[1, :2] = False
    elif padding_of == "holes":
        real[1, total // 2] = False
    arguments = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": functions(None if padding_of == "no" else real)[pattern],
        "attention_mask": None if padding_of == "no" else real,
    }
    if padding_of == "no" and total < kv_offset + kv_length and pattern in {"full", "two-sided window"}:
        pytest.skip("nothing says that the last keys do not exist")
    want = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
    rows = real[:, q_offset:total]
    got = dense(layer_mask(**arguments), 2)
    assert torch.equal(got & rows[..., None], want & rows[..., None])


def test_known_masks_cost_no_bits():
    """Patterns of everyday models are numbers: bits are for what cannot be said otherwise."""
    for pattern in ("causal", "window", "chunk", "full"):
        mask = layer_mask(2, 7, 7, mask_function=functions()[pattern], attention_mask=padding([7, 5], 7).bool())
        assert mask.bits is None, pattern


def test_packed_rows_of_a_batch():
    from transformers import masking_utils as m

    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 1, 2]])
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    chunks = m.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.int64))
    for inner in (m.causal_mask_function, m.sliding_window_causal_mask_function(2), chunks):
        apart = m.packed_sequence_mask_function(segments)
        if remap := getattr(m, "remap_positions_for_packed_sequence", None):  # newer than 5.17
            function = m.and_masks(apart, remap(inner, positions))
        else:
            function = m.and_masks(apart, inner)
        mask = layer_mask(2, 5, 5, mask_function=function)
        if inner is not chunks:  # positions may start inside a chunk: bits
            assert mask.cu_seqlens.tolist() == [0, 3, 5, 7, 10]
        want = m.sdpa_mask(2, 5, 5, mask_function=function, allow_is_causal_skip=False)[:, 0]
        assert torch.equal(dense(mask, 2), want)


def test_queries_after_the_last_key_are_refused():
    with pytest.raises(UnsupportedProblem, match="end after the last key"):
        layer_mask(1, q_length=3, kv_length=4, q_offset=4)


def test_masks_move_between_devices():
    visible = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = adapter.LayerMask(4, 4, bits=adapter.ready_made(visible, 4), seqused_k=torch.tensor([3]))
    moved = mask.to("meta")
    assert {moved.bits.words.device.type, moved.bits.any.device.type, moved.seqused_k.device.type} == {"meta"}
    assert mask.contiguous() is mask
    assert layer_mask(1, 4, 4, attention_mask=mask) is mask


def test_signature_of_transformers_4():
    mask = layer_mask(batch_size=2, cache_position=torch.arange(6, 9), kv_length=16, kv_offset=0)
    assert (mask.q_length, mask.right) == (3, 0)
    assert mask.seqused_k.tolist() == [9, 9]


@pytest.mark.parametrize("wrong", ["flash_fmha", "paged|fmha", "me/fmha"])
def test_names_with_a_meaning_are_refused(wrong):
    with pytest.raises(InputError, match="use another"):
        adapter.register(wrong)


def test_the_batching_manager_is_given_back():
    batching = pytest.importorskip("transformers.generation.continuous_batching")
    manager = batching.ContinuousBatchingManager
    before = manager.switch_to_cb_friendly_attn
    first, second = adapter.register("fmha_one"), adapter.register("fmha_two")
    first.remove()  # out of order: the second one stays on top
    assert manager.switch_to_cb_friendly_attn is not before
    second.remove()
    model = decoder("sdpa")
    manager.switch_to_cb_friendly_attn(manager.__new__(manager), model)
    assert model.config._attn_implementation.endswith("sdpa")


def test_registration_can_be_undone():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    registration = adapter.register("fmha_other")
    assert "fmha_other" in AttentionInterface._global_mapping
    inner = adapter.register("fmha_other", device="emulator")
    inner.remove()
    assert "fmha_other" in AttentionMaskInterface._global_mapping
    registration.remove()
    registration.remove()
    assert "fmha_other" not in AttentionInterface._global_mapping
    assert "fmha_other" not in AttentionMaskInterface._global_mapping


@pytest.mark.emulator
@pytest.mark.parametrize("case", ["Bert-padded", "Llama-packed", "GptOss-sinks", "Llama-left-padded"])
def test_models_on_the_emulator(case):
    """The same batches through the kernels themselves: lengths, varlen, sinks and windows, packed masks."""
    case = next(each for each in model_zoo.CASES if each.name == case)
    registration = adapter.register("fmha_emulated", device="emulator")
    try:
        inputs = case.inputs()
        exact = hidden(case.make("eager", torch.float32), **inputs)
        want = hidden(case.make("eager"), **inputs)
        got = hidden(case.make("fmha_emulated"), **inputs)
        mask = inputs.get(case.mask)
        assert registration.calls == 2
        assert worst(got, exact, mask) <= 2 * worst(want, exact, mask)
    finally:
        registration.remove()
