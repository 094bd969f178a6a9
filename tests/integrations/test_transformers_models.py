# SPDX-License-Identifier: Apache-2.0
"""Every kind of model gives what its own eager attention gives: forward, generation with a cache, continuous batching.

Tolerance: an fp32 eager run of the same bfloat16 weights is taken as exact. The same model in bfloat16 with eager
attention misses it by e, which is rounding alone; we may miss it by 2 e at most (both round as often, in another
order). Models are chosen so that a feature that is left out moves the result by more than twice that.
"""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from helpers import model_zoo  # noqa: E402
from helpers.model_zoo import CASES, GENERATORS, tokens  # noqa: E402

from fmha_runtime.integrations import transformers as adapter  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def fmha():
    registration = adapter.register("fmha_test")
    yield registration
    registration.remove()


def worst(got, want, mask=None):
    difference = (got.float() - want.float()).abs()
    return (difference if mask is None else difference * mask[..., None]).max().item()


@torch.no_grad()
def hidden(model, inputs):
    return model(**inputs).last_hidden_state


def placed(case, device):
    def place(x):
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return {name: place(x) for name, x in case.inputs().items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_that_of_eager_attention(fmha, case, device):
    inputs = placed(case, device)
    mask = inputs.get(case.mask)

    def run(attn, dtype=torch.bfloat16, **changes):
        given = {n: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs.items()}
        return hidden(case.make(attn, dtype, device, **changes), given)

    exact = run("eager", torch.float32)
    rounding = worst(run("eager"), exact, mask)
    got = run("fmha_test")
    assert fmha.calls > 0
    assert torch.isfinite(got).all()
    assert worst(got, exact, mask) <= 2 * rounding
    if case.without:
        assert worst(run("eager", torch.float32, **case.without), exact, mask) > 4 * rounding


def check_generation(case, device, mask, **options):
    """Logits of each step of a greedy generation against a forward pass over the finished text without a cache."""
    prompt = tokens(2, 8).to(device)
    model = case.make("fmha_test", device=device, head=True)
    with torch.no_grad():
        done = model.generate(
            prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **options,
        )  # fmt: skip
    text, logits = done.sequences, torch.stack(done.logits, 1)
    whole = torch.nn.functional.pad(mask, (0, text.shape[1] - 8), value=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)

    def teach(dtype):
        with torch.no_grad():
            model = case.make("eager", dtype, device, head=True)
            seen = model(input_ids=text, attention_mask=whole, position_ids=positions, use_cache=False).logits
        return seen[:, 7:-1]

    exact = teach(torch.float32)
    assert worst(logits, exact) <= 2 * worst(teach(torch.bfloat16), exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", GENERATORS, ids=str)
def test_generation_is_that_of_eager_attention(fmha, case, cache, padding, device, monkeypatch):
    if padding and case.name.startswith("Gemma2"):  # bits and softcap are core at head dims 128 and 256 only
        monkeypatch.setenv("FMHA_BUILD_ON_DEMAND", "1")
    if cache == "static" and case.name.startswith("Llama4"):
        makers = inspect.signature(transformers.masking_utils.create_chunked_causal_mask).parameters
        if "block_sequence_ids" not in makers:
            pytest.skip(f"transformers {transformers.__version__} cannot generate with chunks and a static cache")
    mask = torch.ones(2, 8, dtype=torch.long, device=device)
    if padding:
        mask[1, :3] = 0
    check_generation(case, device, mask, cache_implementation=cache, disable_compile=True)
    assert fmha.calls > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in {"Llama", "Mistral-window", "Gemma2-window"}], ids=str)
@torch.no_grad()
def test_chunks_of_a_prompt(fmha, case, cache, device):
    """A prompt, a chunk of three tokens and one token: each step as if all had come at once."""
    ids = tokens(1, 12).to(device)
    exact = hidden(case.make("eager", torch.float32, device), {"input_ids": ids})
    rounding = worst(hidden(case.make("eager", device=device), {"input_ids": ids}), exact)
    model = case.make("fmha_test", device=device)
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=16)
    else:
        past = transformers.DynamicCache(config=model.config)
    steps = [ids[:, :8], ids[:, 8:11], ids[:, 11:]]
    got = torch.cat([hidden(model, {"input_ids": s, "past_key_values": past}) for s in steps], 1)
    assert worst(got, exact) <= 2 * rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in {"Llama", "Mistral-window"}], ids=str)
def test_packed_sequences_by_cu_seq_lens(fmha, case, device):
    """The keyword arguments of DataCollatorWithFlattening: each sequence as if it were alone."""
    lengths = [5, 1, 9, 2]
    ids = tokens(1, sum(lengths)).to(device)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    packing = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)

    def alone(attn, dtype):
        model = case.make(attn, dtype, device)
        return torch.cat([hidden(model, {"input_ids": part}) for part in ids.split(lengths, 1)], 1)

    exact = alone("eager", torch.float32)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, **packing}
    got = hidden(case.make("fmha_test", device=device), inputs)
    rounding = worst(alone("eager", torch.bfloat16), exact)
    assert worst(got, exact) <= 2 * rounding
    unpacked = hidden(case.make("eager", torch.float32, device), {"input_ids": ids, "position_ids": positions[:, :1]})
    assert worst(unpacked, exact) > 4 * rounding


def batching(model, prompts, **options):
    """transformers' continuous batching: the tokens that each prompt is continued with."""
    config = transformers.ContinuousBatchingConfig
    page = "page_size" if "page_size" in inspect.signature(config).parameters else "block_size"
    config = config(**{page: 16}, num_blocks=32, max_batch_tokens=16, **options)
    greedy = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        done = model.generate_batch(
            inputs=prompts, generation_config=greedy, continuous_batching_config=config, progress_bar=False
        )
    except MemoryError:
        pytest.skip("transformers sizes a cache on the CPU with psutil, which is not installed")
    assert [result.error for result in done.values()] == [None] * len(prompts)
    return [done[name].generated_tokens for name in sorted(done, key=lambda name: int(name.rpartition("_")[2]))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fmha_test", "paged|fmha_test"])
@pytest.mark.parametrize(
    "case", [c for c in GENERATORS if c.name in {"Llama", "Mistral-window", "GptOss-sinks"}], ids=str
)
@pytest.mark.filterwarnings("ignore:The `paged|` prefix:FutureWarning")
def test_continuous_batching(fmha, case, name, device):
    """Prompts longer than a batch of 16 tokens come in chunks, short ones share batches with decoding steps.

    Each token must be one that eager attention in fp32 ranks within rounding of its best.
    """
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no ContinuousBatchingConfig")
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (20, 2, 3, 37)]
    model = case.make("eager", device=device, head=True)
    model.set_attn_implementation(name)
    texts = batching(model, prompts)
    assert fmha.calls > 0
    judge, peer = (case.make("eager", dtype, device, head=True) for dtype in (torch.float32, torch.bfloat16))
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == 5
        whole = torch.tensor([prompt + text], device=device)
        with torch.no_grad():
            exact = judge(whole).logits[0, len(prompt) - 1 : -1]
            rounding = worst(peer(whole).logits[0, len(prompt) - 1 : -1], exact)
        chosen = exact.gather(1, torch.tensor(text, device=device)[:, None])[:, 0]
        assert (exact.amax(1) - chosen).max().item() <= 4 * rounding
        assert exact.amax(1).sub(exact.median(1).values).min() > 8 * rounding  # not any token would do


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_model(fmha, device):
    """torch.compile around the adapter changes nothing, whether it traces the call or steps around it."""
    case = model_zoo.decoder("Mistral-window", sliding_window=4)
    inputs = {"input_ids": tokens(2, 17).to(device), "use_cache": False}
    model = case.make("fmha_test", device=device)
    plain = hidden(model, inputs)
    compiled = hidden(torch.compile(model, backend="eager"), inputs)
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in {"Llama", "Gemma2-softcap", "Gemma3-window"}], ids=str)
@torch.no_grad()
def test_compiled_decoding_step(fmha, case, device):
    """What generate() compiles: a step over a static cache, its masks made ahead. One graph, whatever the position."""
    from torch._dynamo.testing import CompileCounter
    from transformers.masking_utils import create_masks_for_generate

    model = case.make("fmha_test", device=device, head=True)
    parameters = inspect.signature(create_masks_for_generate).parameters

    def decode(step):
        past = transformers.StaticCache(config=model.config, max_cache_len=32)
        model(input_ids=tokens(2, 8).to(device), past_key_values=past)
        logits = []
        for position in range(8, 12):
            made = {
                "config": model.config,
                "inputs_embeds": torch.empty(2, 1, 0, dtype=torch.bfloat16, device=device),
                "attention_mask": torch.ones(2, position + 1, dtype=torch.long, device=device),
                "past_key_values": past,
                "cache": past,  # its name since transformers 5.24
            }
            masks = create_masks_for_generate(**{name: x for name, x in made.items() if name in parameters})
            one = tokens(2, 1, seed=position).to(device)
            logits.append(step(input_ids=one, attention_mask=masks, past_key_values=past).logits)
        return torch.cat(logits, 1)

    torch._dynamo.reset()
    compiler = CompileCounter()
    compiled = decode(torch.compile(model, backend=compiler, fullgraph=True))
    assert torch.equal(compiled, decode(model))
    assert compiler.frame_count <= 2  # the second one learns that positions change


@pytest.mark.gpu
@pytest.mark.parametrize("case", GENERATORS[:2], ids=str)
def test_generation_compiles_by_itself(fmha, case):
    """A static cache makes generate() compile the decoding step on a GPU, with inductor."""
    torch._dynamo.reset()
    mask = torch.ones(2, 8, dtype=torch.long, device="cuda")
    check_generation(case, "cuda", mask, cache_implementation="static")
