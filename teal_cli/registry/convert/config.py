"""From a GGUF's metadata to config.json and generation_config.json.

Written out by hand because transformers' own GGUF reader drops what decoding depends on: the RoPE scaling of Llama 3.1
(which GGUF stores as a tensor of frequency divisors), YaRN and linear scaling, and the second end-of-turn token.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.model.families import FAMILIES
from teal_cli.registry.architectures import unsupported
from teal_cli.registry.convert.reader import GgufFile, damaged

# llama.cpp writes Mistral as "llama": the two compute the same where no sliding window is set.
_FAMILIES: Final[dict[str, str]] = {row.gguf: family for family, row in FAMILIES.items() if row.gguf}
_GEMMA3_PERIOD: Final = 6
_GEMMA3_27B_LAYERS: Final = 62
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
    own = _gemma3(gguf, config) if family == "gemma3_text" else {"hidden_act": "silu"}
    return config | own | _token_ids(gguf)


def _gemma3(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """What a GGUF of Gemma 3 leaves to the architecture: every release has these, and llama.cpp has them in its code.

    One layer in six attends to everything; the others have a window, and a rotation that no scaling touches.
    """
    layers, heads, head_dim = config["num_hidden_layers"], config["num_attention_heads"], config["head_dim"]
    widest = layers == _GEMMA3_27B_LAYERS  # the one size whose scores are not scaled by the size of a head
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if widest else head_dim,
        "sliding_window": int(gguf.require("attention.sliding_window")),
        "layer_types": [
            "sliding_attention" if (layer + 1) % _GEMMA3_PERIOD else "full_attention" for layer in range(layers)
        ],
        "rope_local_base_freq": _plain(gguf.get("rope.freq_base_swa", 10000.0)),
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


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
