"""GGUF files and wheels made on the spot: a tiny checkpoint written as llama.cpp's converter would write it.

The writer is the opposite of our conversion, made from what llama.cpp does and not from our code: heads of q and k
interleaved for its RoPE, Llama 3's RoPE as a tensor of divisors, norms in float32.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURE = {"mistral": "llama", "gemma3_text": "gemma3"}
"""What llama.cpp calls a family, where it does not call it as transformers does."""
INTERLEAVED = ("llama", "granite", "smollm3")
NORM_OFFSET = ("gemma", "gemma2", "gemma3")
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
POST_NORM_NAMES = LAYER_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str, layer_names: dict[str, str] = LAYER_NAMES) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, suffix = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{layer_names[part]}.{suffix}"


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows (head, half, pair) -> (head, pair, half), as llama.cpp permutes q and k."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    checkpoint: Path,
    target: Path,
    *,
    quantisation: str = "F32",
    pre: str = "smollm",
    drop: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Write a Hugging Face checkpoint as GGUF.

    Args:
        checkpoint: with config.json, model.safetensors in float32 and tokenizer.json (byte-level BPE).
        target: the file to write.
        quantisation: ggml type of every matrix.
        pre: the pre-tokenizer to name.
        drop: tensors to leave out.
        extra: further metadata, replacing what would be written.
        tensors: further tensors.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, ARCHITECTURE.get(config["model_type"], config["model_type"]))
    metadata = _hyperparameters(config, writer.arch) | _vocabulary(checkpoint, pre) | (extra or {})
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        out = gguf_name(name, POST_NORM_NAMES if writer.arch in ("gemma2", "gemma3", "olmo2") else LAYER_NAMES)
        if out in drop or (out == "output.weight" and config["tie_word_embeddings"]):
            continue
        if writer.arch in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            weight = interleaved(weight, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if writer.arch in NORM_OFFSET and name.endswith("norm.weight"):
            weight = _bfloat16(weight) + 1  # as llama.cpp's converter does, of the bfloat16 that checkpoints hold
        kind = gguf.GGMLQuantizationType[quantisation if weight.ndim > 1 else "F32"]
        writer.add_tensor(out, gguf.quantize(weight, kind), raw_dtype=kind)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    for name, weight in (tensors or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def llama3_divisors(config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The divisors of the RoPE frequencies, float32 [head_dim / 2], one at a time as llama.cpp computes them."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    original = rope["original_max_position_embeddings"]
    low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    divisors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def _bfloat16(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest bfloat16, in float32."""
    import torch

    return torch.from_numpy(weight).to(torch.bfloat16).float().numpy()


def _hyperparameters(config: dict[str, Any], arch: str) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    own: dict[str, Any] = {}
    if arch == "gemma3":
        rope = rope["full_attention"]
        own = {f"{arch}.attention.sliding_window": config["sliding_window"]}
        if rope["rope_type"] == "linear":
            own |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": float(rope["factor"])}
    if arch == "gemma2":
        own = {f"{arch}.{key}": config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
        own |= {f"{arch}.attention.sliding_window": config["sliding_window"]}
    if arch == "granite":
        scales = {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
                  "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}  # fmt: skip
        own = {f"{arch}.{key}": config[name] for key, name in scales.items()}
    if arch == "phi3":
        original = config["original_max_position_embeddings"]
        own = {
            f"{arch}.rope.scaling.original_context_length": original,
            f"{arch}.rope.dimension_count": int(rope["partial_rotary_factor"] * head_dim),
            f"{arch}.attention.sliding_window": config["sliding_window"] or 0,
        }
        if rope["rope_type"] == "longrope":
            ratio = config["max_position_embeddings"] / original
            own |= {f"{arch}.rope.scaling.attn_factor": math.sqrt(1 + math.log(ratio) / math.log(original))}
    else:
        own |= {f"{arch}.attention.key_length": head_dim}
    return own | {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
    }


def _vocabulary(checkpoint: Path, pre: str) -> dict[str, Any]:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    model = tokenizer["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    eos = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": eos,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def make_wheel(
    folder: Path,
    files: dict[str, Path | bytes],
    *,
    name: str = "tiny_model",
    version: str = "1.0",
    requires: tuple[str, ...] = (),
) -> Path:
    """A wheel that pip accepts, with these files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": "\n".join(
            [
                "Metadata-Version: 2.1",
                f"Name: {name}",
                f"Version: {version}",
                *(f"Requires-Dist: {requirement}" for requirement in requires),
                "",
            ]
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in {**files, **metadata}.items():
            archive.writestr(path, content.read_bytes() if isinstance(content, Path) else content)
    return wheel
