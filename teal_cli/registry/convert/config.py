"""From a GGUF's metadata to config.json and generation_config.json.

Written out by hand because transformers' own GGUF reader drops what decoding depends on: the RoPE scaling of Llama 3.1
(which GGUF stores as a tensor of frequency divisors), YaRN and linear scaling, and the second end-of-turn token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.model.families import FAMILIES
from teal_cli.registry.checkpoint import unsupported
from teal_cli.registry.convert.reader import GgufFile, damaged

# llama.cpp writes Mistral as "llama": the two compute the same where no sliding window is set.
_FAMILIES: Final[dict[str, str]] = {row.gguf: family for family, row in FAMILIES.items() if row.gguf}
_GEMMA3_PERIOD: Final = 6
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
_SMOLLM3_PERIOD: Final = 4
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192  # every released Llama 3.1, 3.2 and 3.3


def _plain(value: float) -> float:
    """A float32 of the file as the decimal that was meant: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def model_config(gguf: GgufFile) -> dict[str, Any]:
    """The config.json of a GGUF file, in the keys that hub checkpoints of the same family use.

    Raises:
        UsageError: an architecture, a mixture of experts or a RoPE scaling that teal does not decode.
        TealError: a key that decoding needs is missing.
    """
    if gguf.architecture not in _FAMILIES:
        raise unsupported(gguf.architecture, gguf.path.name)
    if gguf.get("expert_count", 0):
        raise unsupported(f"{gguf.architecture} with a mixture of experts", gguf.path.name)
    family = _FAMILIES[gguf.architecture]
    hidden, heads = int(gguf.require("embedding_length")), int(gguf.require("attention.head_count"))
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise damaged(gguf.path, "the tensor token_embd.weight is missing")
    head_dim = gguf.get("attention.key_length") or gguf.get("rope.dimension_count") or hidden // heads
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": int(embedding.shape[1]),  # GGUF lists dimensions fastest first: [hidden, vocab]
        "hidden_size": hidden,
        "intermediate_size": int(gguf.require("feed_forward_length")),
        "num_hidden_layers": int(gguf.require("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(gguf.get("attention.head_count_kv", heads)),
        "head_dim": int(head_dim),
        "max_position_embeddings": int(gguf.require("context_length")),
        "rms_norm_eps": _plain(gguf.require("attention.layer_norm_rms_epsilon")),
        "rope_theta": _plain(gguf.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(gguf, int(head_dim)),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    own = _OWN[family](gguf, config) if family in _OWN else {"hidden_act": "silu"}
    # null where the file names none: otherwise transformers takes the ids of the first model of the family.
    return config | own | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | _token_ids(gguf)


def _gemma(gguf: GgufFile, config: dict[str, Any], period: int, widest: int) -> dict[str, Any]:
    """What a GGUF of Gemma leaves to the architecture: every release has these, and llama.cpp has them in its code.

    Args:
        period: one layer in so many attends to everything; the others have a window.
        widest: layers of the one size whose scores are not scaled by the size of a head.
    """
    layers, heads, head_dim = config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == widest else head_dim,
        "sliding_window": int(gguf.require("attention.sliding_window")),
        "layer_types": ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)],
        "attention_bias": False,
    }


def _gemma2(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    return _gemma(gguf, config, 2, _GEMMA2_27B_LAYERS) | {
        name: _plain(gguf.require(name)) for name in ("attn_logit_softcapping", "final_logit_softcapping")
    }


def _gemma3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Layers with a window have a rotation that no scaling touches."""
    return _gemma(gguf, config, _GEMMA3_PERIOD, _GEMMA3_27B_LAYERS) | {
        "rope_local_base_freq": _plain(gguf.get("rope.freq_base_swa", 10000.0)),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _granite(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The converter leaves out a factor of 0; llama.cpp then takes 1, or 1 / sqrt(head size) for scores."""
    return {
        "hidden_act": "silu",
        "attention_multiplier": _plain(gguf.get("attention.scale") or config["head_dim"] ** -0.5),
        "embedding_multiplier": _plain(gguf.get("embedding_scale") or 1.0),
        "residual_multiplier": _plain(gguf.get("residual_scale") or 1.0),
        "logits_scaling": _plain(gguf.get("logit_scale") or 1.0),
    }


def _smollm3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer does not rotate: llama.cpp has this in its code."""
    rotates = [int((layer + 1) % _SMOLLM3_PERIOD != 0) for layer in range(config["num_hidden_layers"])]
    return {"hidden_act": "silu", "no_rope_layers": rotates, "use_sliding_window": False}


def _olmo2(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    if gguf.get("attention.sliding_window"):
        raise unsupported("olmo2 with a sliding window (OLMo 3)", gguf.path.name)
    return {"hidden_act": "silu"}


def _phi3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Longrope's factors are tensors; a window of 0 is none."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    original = int(gguf.get("rope.scaling.original_context_length", config["max_position_embeddings"]))
    own = {
        "hidden_act": "silu",
        "head_dim": head_dim,
        "partial_rotary_factor": int(gguf.get("rope.dimension_count", head_dim)) / head_dim,
        "original_max_position_embeddings": original,
        "sliding_window": int(gguf.get("attention.sliding_window", 0)) or None,
    }
    if "rope_factors_long.weight" not in gguf.tensors:
        return own
    scaling: dict[str, Any] = {"type": "longrope"}
    for name in ("short", "long"):
        factors = gguf.tensors.get(f"rope_factors_{name}.weight")
        if factors is None:
            raise damaged(gguf.path, f"the tensor rope_factors_{name}.weight is missing")
        scaling[f"{name}_factor"] = [_plain(factor) for factor in factors.data]
    if original < 2:
        raise damaged(gguf.path, f"rope.scaling.original_context_length is {original}")
    ratio = config["max_position_embeddings"] / original
    implied = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    stored = float(gguf.get("rope.scaling.attn_factor", implied))
    if not math.isclose(stored, implied, rel_tol=1e-5):
        scaling["attention_factor"] = _plain(stored)
    return own | {"rope_scaling": scaling}


_OWN: Final[dict[str, Callable[[GgufFile, dict[str, Any]], dict[str, Any]]]] = {
    "gemma": lambda gguf, config: {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "granite": _granite,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "phi3": _phi3,
}
"""What a family has in its config.json besides Llama's keys."""


def generation_config(gguf: GgufFile) -> dict[str, Any]:
    """The generation_config.json: the ids that start, end and pad a text."""
    return _token_ids(gguf)


def _token_ids(gguf: GgufFile) -> dict[str, Any]:
    """bos, eos and pad ids. eos is a list where an end of turn or message is named besides it."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [gguf.metadata.get(f"tokenizer.ggml.{name}") for name in names]
    ends = list(dict.fromkeys(int(token) for token in found if token is not None))
    ids = {
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else (ends or None),
        "pad_token_id": gguf.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _rope_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, head_dim)
    kind = gguf.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = float(gguf.require("rope.scaling.factor"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = int(gguf.require("rope.scaling.original_context_length"))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UsageError(
        f"{gguf.path.name} scales RoPE by {kind!r}, which teal does not support",
        hint="supported are unscaled, linear, yarn and llama3",
    )


def _llama3_scaling(gguf: GgufFile, head_dim: int) -> dict[str, Any]:
    """Recover the parameters of Llama 3.1's RoPE from the divisors that llama.cpp computed with them.

    The largest divisor is `factor`; the others are constants of every release. The divisors are computed again from the
    recovered parameters and must agree, so a fine-tune with other parameters is refused, never decoded wrongly.
    """
    divisors = np.asarray(gguf.tensors["rope_freqs.weight"].data, dtype=np.float64)
    factor = _plain(float(divisors.max()))
    theta = float(gguf.get("rope.freq_base", 10000.0))
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = (_LLAMA3_ORIGINAL / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(wavelength > _LLAMA3_ORIGINAL / _LLAMA3_LOW, factor, expected)
    expected = np.where(wavelength < _LLAMA3_ORIGINAL / _LLAMA3_HIGH, 1.0, expected)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UsageError(
            f"{gguf.path.name} carries RoPE frequency factors that are not those of Llama 3.1, 3.2 or 3.3",
            hint="download the original checkpoint of this model from the hub instead",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }
