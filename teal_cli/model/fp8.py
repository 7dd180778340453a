"""Matrices in 8-bit floats with scales beside them, as DeepSeek, Qwen3-FP8 and compressed-tensors store them.

A matrix `weight`, float8_e4m3fn [N, K], stands for weight * scale. The scale is one number, one for each row, or one
for each block of rows and columns; it lies beside the matrix as `weight_scale_inv` or `weight_scale`, which mean the
same. How activations were quantised while such a model served is not followed: teal computes with floats.

Nothing is imported here: `registry` asks the same, without torch.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

SECTION: Final = "quantization_config"
STORED: Final = "F8_E4M3"
"""What safetensors calls float8_e4m3fn."""
SCALES: Final = ("_scale_inv", "_scale")
"""What a matrix's name is followed by in that of its scales."""
SCALE_DTYPES: Final = ("BF16", "F16", "F32", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Fp8:
    """How a checkpoint scales its matrices.

    Attributes:
        block: rows and columns that share a scale; None where a matrix or each of its rows has one.
    """

    block: tuple[int, int] | None

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that the scales of a matrix [rows, columns] may have."""
        if self.block is None:
            return (), (1,), (1, 1), (rows,), (rows, 1)
        return ((-(-rows // self.block[0]), -(-columns // self.block[1])),)

    def multiply(self, weight: Tensor, scales: Tensor, rows: slice) -> Tensor:
        """Rows of a matrix [N, K] with its scales, of one of `shapes` -> float32 [rows, K], new memory."""
        weight, scales = weight[rows].float(), scales.float()
        if self.block is None:
            column = scales.reshape(-1, 1)
            return weight.mul_(column[rows] if len(column) > 1 else column)
        height, width = self.block
        mine = scales.repeat_interleave(height, dim=0)[rows]
        for index, columns in enumerate(weight.split(width, dim=1)):
            columns.mul_(mine[:, index, None])
        return weight


def scale_name(weight: str, names: Container[str]) -> str:
    """What the scales of a matrix are called, of a checkpoint with these tensors; the first name, if none is there."""
    return next((weight + end for end in SCALES if weight + end in names), weight + SCALES[0])


def fp8_of(config: Mapping[str, Any]) -> Fp8 | None:
    """How the matrices of a checkpoint with this config.json are scaled; None where it says that they are not.

    Raises:
        ValueError: they are quantised in another way, which is named.
    """
    section = config.get(SECTION)
    if not section:
        return None
    method = section.get("quant_method", "unnamed") if isinstance(section, dict) else "unnamed"
    found = _READERS[method](section) if isinstance(method, str) and method in _READERS else None
    if found is None:
        raise ValueError(
            f"the checkpoint is quantised ({method}); teal reads bf16, fp16, fp32, and fp8 with a scale for each "
            "matrix, row or block"
        )
    return found


def _fine_grained(section: Mapping[str, Any]) -> Fp8 | None:
    return None if section.get("fmt", "e4m3") != "e4m3" else _scaled_by(section.get("weight_block_size"))


def _compressed(section: Mapping[str, Any]) -> Fp8 | None:
    """All groups alike, 8-bit floats, not packed."""
    groups = section.get("config_groups")
    if section.get("format") not in ("float-quantized", "naive-quantized") or not isinstance(groups, dict):
        return None
    found = {_compressed_group(group) for group in groups.values()}
    return found.pop() if len(found) == 1 else None


def _compressed_group(group: Any) -> Fp8 | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or (weights.get("num_bits"), weights.get("type")) != (8, "float"):
        return None
    strategy = weights.get("strategy", "tensor")
    return Fp8(None) if strategy in ("tensor", "channel") else _scaled_by(weights.get("block_structure") or 0)


def _scaled_by(block: Any) -> Fp8 | None:
    if block is None:
        return Fp8(None)
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return Fp8((block[0], block[1]))
    return None


_READERS: Final = {
    "fp8": _fine_grained,
    "fbgemm_fp8": lambda section: Fp8(None),
    "compressed-tensors": _compressed,
}
"""`quant_method` -> how its section is read; None where teal does not read what it says."""
