"""From a GGUF's quantised tensors to one bfloat16 model.safetensors, a slab of rows at a time.

Peak memory is one slab (64 MiB of float32), whatever the model's size, and no torch is imported: the safetensors format
is a length, a JSON header and the tensors' bytes, and bfloat16 is the upper half of a float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from gguf import ReaderTensor, dequantize

from teal_cli.errors import UsageError
from teal_cli.model.families import FAMILIES, TOP
from teal_cli.registry.convert.reader import GgufFile, damaged
from teal_cli.registry.events import Progress

_SLAB: Final = 64 << 20  # bytes of float32 dequantised at once

# What became part of config.json, there and of one family.
_METADATA_TENSORS: Final = frozenset({"rope_freqs.weight"})
_FAMILY_TENSORS: Final = {"phi3": frozenset({"rope_factors_long.weight", "rope_factors_short.weight"})}


def convert_weights(gguf: GgufFile, config: dict[str, Any], target: Path) -> Iterator[Progress]:
    """Write `target` (model.safetensors): the tensors dequantised, rounded to nearest-even bfloat16.

    Args:
        gguf: the opened file.
        config: its config.json, from `model_config`.
        target: where to write; overwritten.

    Yields:
        Progress of stage "convert", in bytes written.

    Raises:
        UsageError: a tensor that this architecture has no place for, or a quantisation gguf cannot read.
        TealError: a tensor is missing, has another shape than config.json says, or holds NaN or infinity.
    """
    family = FAMILIES[config["model_type"]]
    names = _names(gguf, config)
    shapes = {hf: [int(n) for n in reversed(gguf.tensors[name].shape)] for name, hf in names.items()}
    _check_shapes(gguf, config, shapes)
    header, total = _header(shapes)
    done = 0
    with target.open("wb") as file:
        file.write(header)
        for name, hf in names.items():
            heads = _permuted_heads(config, hf)
            offset = family.gguf_norm_offset if hf.endswith("norm.weight") else 0.0
            for slab in _bfloat16_slabs(gguf, gguf.tensors[name], heads, offset):
                file.write(slab.data)
                done += slab.nbytes
                yield Progress("convert", done, total)


def _names(gguf: GgufFile, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every tensor, in the file's order; anything unknown is refused."""
    family = FAMILIES[config["model_type"]]
    parts = family.parts(SimpleNamespace(attention_bias=False))
    wanted = {name: hf for hf, name in TOP.values() if name != "output.weight" or name in gguf.tensors}
    for i in range(config["num_hidden_layers"]):
        for hf, name in parts.values():
            wanted[f"blk.{i}.{name}"] = f"model.layers.{i}.{hf}"
    missing = [name for name in wanted if name not in gguf.tensors]
    if missing:
        raise damaged(gguf.path, f"{len(missing)} tensors are missing, the first is {missing[0]}")
    read = _METADATA_TENSORS | _FAMILY_TENSORS.get(config["model_type"], frozenset())
    unknown = [name for name in gguf.tensors if name not in wanted and name not in read]
    if unknown:
        raise UsageError(
            f"{gguf.path.name} has {len(unknown)} tensors that {config['model_type']} has no place for, "
            f"the first is {unknown[0]}",
            hint="download the original checkpoint of this model from the hub instead",
        )
    return {name: wanted[name] for name in gguf.tensors if name in wanted}


def _check_shapes(gguf: GgufFile, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    hidden, inter, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    wide = FAMILIES[config["model_type"]].wide_head_norms
    expected = {
        "embed_tokens.weight": [config["vocab_size"], hidden],
        "lm_head.weight": [config["vocab_size"], hidden],
        "q_proj.weight": [q, hidden], "k_proj.weight": [kv, hidden], "v_proj.weight": [kv, hidden],
        "o_proj.weight": [hidden, q], "gate_proj.weight": [inter, hidden], "up_proj.weight": [inter, hidden],
        "down_proj.weight": [hidden, inter], "q_proj.bias": [q], "k_proj.bias": [kv], "v_proj.bias": [kv],
        "q_norm.weight": [q if wide else head], "k_norm.weight": [kv if wide else head],
        "qkv_proj.weight": [q + 2 * kv, hidden], "gate_up_proj.weight": [2 * inter, hidden],
    }  # fmt: skip
    for name, shape in shapes.items():
        last = ".".join(name.split(".")[-2:])
        if shape != expected.get(last, [hidden]):  # what is not listed is a norm over the hidden size
            raise damaged(gguf.path, f"{name} has shape {shape}, not {expected.get(last, [hidden])}")


def _header(shapes: dict[str, list[int]]) -> tuple[bytes, int]:
    """The safetensors header for bfloat16 tensors in this order, and the bytes of data that follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of eight
    return len(text).to_bytes(8, "little") + text, offset


def _permuted_heads(config: dict[str, Any], hf_name: str) -> int | None:
    """Number of heads whose rows llama.cpp has interleaved for its RoPE, None for an untouched tensor."""
    if not FAMILIES[config["model_type"]].gguf_interleaved:
        return None
    if hf_name.endswith("q_proj.weight"):
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if hf_name.endswith("k_proj.weight") else None


def _bfloat16_slabs(
    gguf: GgufFile, tensor: ReaderTensor, heads: int | None, offset: float
) -> Iterator[np.ndarray[Any, Any]]:
    """The tensor as bfloat16 bits, uint16 [rows, columns], a slab at a time, in Hugging Face's row order.

    Args:
        heads: number of heads whose rows are interleaved; None where rows are in order.
        offset: what llama.cpp's converter added to every value.
    """
    data = tensor.data if tensor.data.ndim > 1 else tensor.data[None]
    rows = data.shape[0]
    order = np.arange(rows)
    if heads is not None:  # rows (head, pair, half) -> (head, half, pair); quantisation runs along a row, so rows move
        order = order.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    step = max(1, _SLAB // (4 * int(tensor.shape[0])))
    for start in range(0, rows, step):
        try:
            values = dequantize(data[order[start : start + step]], tensor.tensor_type)
        except NotImplementedError as error:
            raise UsageError(
                f"{gguf.path.name} is quantised as {tensor.tensor_type.name}, which cannot be dequantised",
                hint="use a file in Q8_0, Q6_K, Q5_K, Q4_K, F16 or BF16",
            ) from error
        if not np.isfinite(values).all():
            raise damaged(gguf.path, f"{tensor.name} holds NaN or infinity")
        yield _round_to_bfloat16(values - np.float32(offset) if offset else values)


def _round_to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Finite float values -> the uint16 bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
