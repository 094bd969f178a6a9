# SPDX-License-Identifier: Apache-2.0
"""Models of transformers give what their own attention gives, or a refusal: nothing is dropped."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from fmha_runtime.errors import UnsupportedProblem  # noqa: E402
from fmha_runtime.integrations import transformers as adapter  # noqa: E402

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


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@torch.no_grad()
def test_cached_decoding(name, kind, cache):
    """A prompt, a chunk of three tokens and one token: each step as if all had come at once."""
    ids = tokens(1, 12)
    options = {"sliding_window": 4} if kind == "Mistral" else {}
    model = decoder(name, kind, **options)
    whole = hidden(model, input_ids=ids)
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=16)
    else:
        past = transformers.DynamicCache(config=model.config)
    steps = [ids[:, :8], ids[:, 8:11], ids[:, 11:]]
    got = torch.cat([hidden(model, input_ids=s, past_key_values=past) for s in steps], 1)
    assert worst(got, whole) <= 0.06  # two bf16 roundings of values near 3


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


def test_left_padding_is_refused(name):
    mask = padding([7, 3], 7).flip(1)
    refusal(bert(name), "padding_side = 'right'", input_ids=tokens(2, 7), attention_mask=mask)
    refusal(decoder(name), "padding_side = 'right'", input_ids=tokens(2, 7), attention_mask=mask)


def test_holes_are_refused(name):
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    refusal(bert(name), "holes", input_ids=tokens(1, 5), attention_mask=mask)


def test_ready_made_mask_is_refused(name):
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    refusal(bert(name), "ready-made mask", input_ids=tokens(1, 5), attention_mask=mask)


def test_packed_sequences_are_refused(name):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    inputs = {"input_ids": tokens(1, 5), "position_ids": positions, "use_cache": False}
    refusal(decoder(name), "mask pattern", **inputs)


def test_fp32_is_refused(name):
    refusal(bert(name).float(), r"model.to\(torch.bfloat16\)", input_ids=tokens(1, 5))


def test_dropout_is_refused(name):
    refusal(bert(name).train(), r"model.eval\(\)", input_ids=tokens(1, 5))


def test_gradients_are_refused(name):
    with pytest.raises(UnsupportedProblem, match="no_grad"):
        bert(name)(input_ids=tokens(1, 5))


def test_attention_weights_are_refused(name):
    class Layer:
        is_causal = False

    x = torch.zeros(1, 2, 4, 32, dtype=BF16)
    with pytest.raises(UnsupportedProblem, match="output_attentions"):
        adapter._forward(None, Layer(), x, x, x, None, output_attentions=True)


def test_mask_made_for_other_lengths_is_refused():
    class Layer:
        is_causal = False

    x = torch.zeros(1, 2, 4, 32, dtype=BF16)
    mask = adapter.band_mask(1, q_length=4, kv_length=5)
    with pytest.raises(UnsupportedProblem, match="4 x 5"):
        adapter._forward(None, Layer(), x, x, x, mask)


def test_two_sided_window_over_padding_is_refused():
    from transformers.masking_utils import sliding_window_bidirectional_mask_function

    function = sliding_window_bidirectional_mask_function(2)
    free = adapter.band_mask(2, q_length=5, kv_length=5, mask_function=function)
    assert (free.left, free.right, free.seqused_k) == (2, 2, None)
    with pytest.raises(UnsupportedProblem, match="two-sided window"):
        adapter.band_mask(
            2,
            q_length=5,
            kv_length=5,
            mask_function=function,
            attention_mask=padding([5, 3], 5).bool(),
        )


def test_signature_of_transformers_4():
    mask = adapter.band_mask(batch_size=2, cache_position=torch.arange(6, 9), kv_length=16, kv_offset=0)
    assert (mask.q_length, mask.right) == (3, 0)
    assert mask.seqused_k.tolist() == [9, 9]


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


def test_encoder_on_the_emulator():
    """The same padded batch through the kernel itself."""
    registration = adapter.register("fmha_emulated", device="emulator")
    try:
        mask = padding([7, 3, 5], 7)
        check(bert, "fmha_emulated", mask, input_ids=tokens(3, 7), attention_mask=mask)
    finally:
        registration.remove()
