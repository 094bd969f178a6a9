# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers, one a feature, with weights that make attention matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 99
SMALL = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.15,  # scores of several units: attention is far from an average
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
HYBRID = ["sliding_attention", "full_attention"]


def tokens(batch, length, seed=1):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def right(lengths, width):
    """The tokenizer's mask of right-padded sequences."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what to change in its configuration so that the feature is gone."""

    name: str
    config: str
    model: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    without: dict[str, Any] = field(default_factory=dict)
    generates: str = ""  # the class that generates text
    mask: str = ""  # name of the input that says which rows of the output count
    prepare: Callable[[Any], None] = lambda model: None

    def __str__(self):
        return self.name

    def make(self, attn, dtype=torch.bfloat16, device="cpu", head=False, **changes):
        """The model with seeded weights, the same whatever ``attn`` and ``dtype`` are."""
        changes = {**self.options, **changes}
        config = getattr(transformers, self.config)(**changes, attn_implementation=attn)
        torch.manual_seed(0)
        model = getattr(transformers, self.generates if head else self.model)(config).eval()
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(weight, 1.0)
        self.prepare(model)
        # Weights that bfloat16 holds: the fp32 model is then the exact value of the bfloat16 one.
        return model.to(torch.bfloat16).to(dtype).to(device)


def plain(batch=2, length=33):
    return lambda: {"input_ids": tokens(batch, length)}


def padded(lengths, width):
    return lambda: {"input_ids": tokens(len(lengths), width), "attention_mask": right(lengths, width)}


def left_padded(lengths, width):
    return lambda: {"input_ids": tokens(len(lengths), width), "attention_mask": right(lengths, width).flip(1)}


def packed(lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return lambda: {"input_ids": tokens(1, sum(lengths)), "position_ids": positions, "use_cache": False}


def decoder(name, inputs=None, without=None, mask="", kind=None, **options):
    kind = kind or name.partition("-")[0]
    config = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    model = f"{kind}TextModel" if kind == "Gemma3" else f"{kind}Model"
    options = {**DECODER, **options}
    return Case(name, config, model, options, inputs or plain(), without or {}, f"{kind}ForCausalLM", mask)


def whisper():
    options = {
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 32,
        "init_std": 0.15,
        **{name: SMALL[name] for name in ("vocab_size", "pad_token_id", "bos_token_id")},
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }

    def inputs():
        sound = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(2))
        return {"input_features": sound, "decoder_input_ids": tokens(2, 9)}

    return Case("Whisper-cross", "WhisperConfig", "WhisperModel", options, inputs)


def bart(name, mask):
    options = {
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "init_std": 0.15,
        "vocab_size": VOCABULARY,
    }

    def inputs():
        return {"input_ids": tokens(2, 13), "attention_mask": mask, "decoder_input_ids": tokens(2, 9, seed=3)}

    return Case(name, "BartConfig", "BartModel", options, inputs)


BERT = {**SMALL, "max_position_embeddings": 64}
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 2, "layer_types": HYBRID, "sliding_window": 5}
GEMMA2 = {"attn_logit_softcapping": 0.8, "query_pre_attn_scalar": 4, "layer_types": HYBRID, "sliding_window": 5}

LLAMA4 = {
    "attention_chunk_size": 8,
    "num_local_experts": 1,
    "intermediate_size_mlp": 64,
    "interleave_moe_layer_step": 3,
    "use_qk_norm": False,
    "no_rope_layers": [1, 0],
}
MODERN_BERT = {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}


def llama4(name, inputs, mask=""):
    options = {**DECODER, **LLAMA4}
    without = {"attention_chunk_size": 9}
    return Case(name, "Llama4TextConfig", "Llama4TextModel", options, inputs, without, "Llama4ForCausalLM", mask)


def modern_bert(name, inputs, mask=""):
    options = {**SMALL, **MODERN_BERT, "initializer_range": 0.3}
    return Case(name, "ModernBertConfig", "ModernBertModel", options, inputs, {"local_attention": 8}, "", mask)


CASES = [
    decoder("Llama"),
    decoder("Llama-right-padded", padded([20, 9], 20), mask="attention_mask"),
    decoder("Llama-left-padded", left_padded([20, 9], 20), mask="attention_mask"),
    decoder("Llama-packed", packed([5, 1, 9, 2])),
    decoder("Qwen2"),
    decoder("Qwen3"),
    decoder("Mistral-window", plain(2, 17), {"sliding_window": None}, sliding_window=4),
    decoder("Mistral-window-1", plain(2, 17), {"sliding_window": 2}, sliding_window=1),
    decoder("Mistral-window-padded", padded([17, 6], 17), {"sliding_window": 6}, "attention_mask", sliding_window=5),
    decoder("Mistral-window-left-padded", left_padded([17, 6], 17), mask="attention_mask", sliding_window=5),
    decoder("Mistral-window-packed", packed([5, 1, 9, 2]), {"sliding_window": 4}, sliding_window=3),
    decoder("Gemma2-softcap", plain(2, 19), {"attn_logit_softcapping": None}, **GEMMA2),
    decoder("Gemma2-window", plain(2, 19), {"sliding_window": 6}, **GEMMA2),
    decoder("Gemma2-packed", packed([7, 3, 9]), {"attn_logit_softcapping": None}, **GEMMA2),
    decoder("Gemma3-window", plain(2, 19), {"sliding_window": 6}, layer_types=HYBRID, sliding_window=5),
    decoder("GptOss-sinks", plain(2, 19), {"sliding_window": 6}, **GPT_OSS),
    decoder("GptOss-left-padded", left_padded([19, 8], 19), {"sliding_window": 6}, "attention_mask", **GPT_OSS),
    Case("Bert", "BertConfig", "BertModel", BERT, plain(2, 9)),
    Case("Bert-padded", "BertConfig", "BertModel", BERT, padded([7, 3, 5], 7), mask="attention_mask"),
    Case("Bert-left-padded", "BertConfig", "BertModel", BERT, left_padded([7, 3, 5], 7), mask="attention_mask"),
    modern_bert("ModernBert-window", plain(2, 19)),
    modern_bert("ModernBert-window-padded", padded([19, 8], 19), "attention_mask"),
    llama4("Llama4-chunk", plain(2, 19)),
    llama4("Llama4-chunk-left-padded", left_padded([19, 8], 19), "attention_mask"),
    Case("DeepseekV3-192x128", "DeepseekV3Config", "DeepseekV3Model", {**SMALL, **MLA}, plain(2, 19)),
    whisper(),
    bart("Bart-cross-padded", right([13, 6], 13)),
    bart("Bart-cross-left-padded", right([13, 6], 13).flip(1)),
]
GENERATING = {
    "Llama4-chunk",
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral-window",
    "Gemma2-window",
    "Gemma3-window",
    "GptOss-sinks",
}
GENERATORS = [case for case in CASES if case.name in GENERATING]
