"""Tiny random checkpoints of every supported family, made by transformers itself, with a small real tokenizer.

Sizes are odd on purpose (hidden 72, intermediate 100), weights are large enough for attention to be far from
uniform, norms and biases are random, so that nothing passes by being one or zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from teal_cli.model.families import FAMILIES

VOCAB = 320
EOS = "<|end|>"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.7,  # 8 of 12 channels
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.5, 5.0, 9.0],
    "attention_factor": 1.2,
}


@dataclass(frozen=True)
class Tiny:
    """How one tiny model differs from `_COMMON`."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)


TINY: dict[str, Tiny] = {
    "llama2": Tiny("llama", {"num_key_value_heads": 6, "tie_word_embeddings": False}),
    "llama3": Tiny("llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear": Tiny("llama", {"rope_parameters": _LINEAR_ROPE}),
    "llama-yarn": Tiny("llama", {"rope_parameters": _YARN_ROPE}),
    "llama-biased": Tiny("llama", {"attention_bias": True}),
    "mistral": Tiny("mistral", {"sliding_window": 8, "tie_word_embeddings": False}),
    "mistral-v0.3": Tiny("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": Tiny(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen2.5": Tiny("qwen2", {"sliding_window": 8, "tie_word_embeddings": True}),
    "qwen3": Tiny(
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "gemma": Tiny("gemma", {"head_dim": 20, "tie_word_embeddings": True, "pad_token_id": None}),
    "gemma3": Tiny(
        "gemma3_text",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 13,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": Tiny(
        "gemma2",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 13,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Tiny(
        "granite",
        {
            "attention_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.37,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": Tiny(
        "smollm3",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
    ),
    "olmo2": Tiny("olmo2", {"tie_word_embeddings": False, "pad_token_id": None}),
    "olmo3": Tiny(
        "olmo3",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": _YARN_ROPE,
            },
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "phi3": Tiny(
        "phi3",
        {
            "sliding_window": 8,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
    ),
    "phi3-long": Tiny(
        "phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 2, "pad_token_id": None}
    ),
    "phi3-4k": Tiny("phi3", {"tie_word_embeddings": False, "pad_token_id": None}),
}
"""Name of a tiny model -> what it is: every family, every rotary type, every kind of bias and window."""

_MIXTURE = {"intermediate_size": 28, "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": None}
MIXTURES: dict[str, Tiny] = {
    "mixtral": Tiny("mixtral", _MIXTURE | {"num_local_experts": 5, "sliding_window": 8}),
    "qwen3-moe": Tiny(
        "qwen3_moe",
        _MIXTURE
        | {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "intermediate_size": 60,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "olmoe": Tiny("olmoe", _MIXTURE | {"num_experts": 4}),
    "granite-moe": Tiny(
        "granitemoe",
        _MIXTURE
        | {
            "num_local_experts": 4,
            "attention_multiplier": 0.4,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.37,
            "logits_scaling": 2.5,
        },
    ),
}
"""As `TINY`, mixtures of experts; no whole-step backend takes them."""

TINY_FAMILIES = (
    "llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "gemma2", "granite", "smollm3", "olmo2", "olmo3", "phi3",
)  # fmt: skip
"""One model per family, for tests that need not meet every variant."""

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Decoding one token at a time reads every weight once.",
    "Sparse activations let half of the columns rest.",
    "def keep(x, t): return abs(x) > t",
)


def make_tokenizer(folder: Path) -> int:
    """Writes a byte-level BPE that encodes any text, as transformers stores it; returns the id of EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.token_to_id(EOS))


def make_tiny(
    folder: Path,
    name: str = "llama3",
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Writes the tiny checkpoint `name` of `TINY` or `MIXTURES` into `folder` and returns it.

    Args:
        dtype: what the weights are stored in, and config.json says so.
        max_shard_size: "50KB" makes many shards and an index.
        changes: further fields of the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    eos = make_tokenizer(folder)
    tiny = (TINY | MIXTURES)[name]
    fields = {**_COMMON, "eos_token_id": eos, "bos_token_id": None, **tiny.changes, **changes}
    config = AutoConfig.for_model(tiny.family, **fields)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 - FAMILIES[tiny.family].norm_offset + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function: name in `TINY` or `MIXTURES` -> folder of that float32 checkpoint, made once. Do not write there."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(tmp_path_factory.mktemp(name.replace(".", "_")), name)
        return made[name]

    return get


@pytest.fixture(params=sorted(TINY | MIXTURES))
def tiny_model(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    """The folder of every tiny checkpoint in turn."""
    return tiny(request.param)


@pytest.fixture(params=TINY_FAMILIES)
def tiny_family(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    """The folder of one tiny checkpoint of each family in turn."""
    return tiny(request.param)
