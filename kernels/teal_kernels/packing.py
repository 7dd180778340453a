"""Matrices of 8 or 4 bits a weight: rounding, packing and unpacking. Plain PyTorch; it defines what a packed matrix
means.

A matrix [K, N] is input-major and row k is what one kept entry of the input reads: first its codes, then its scales,
then padding to a whole number of cache lines. Layout version 1, little endian:

- Columns belong to projections (q, k, v) that lie side by side. Each is padded with zero codes to a multiple of
  UNIT = 64 columns, or of `group` where that is more. The padded columns are cut into units of 64.
- A unit of 8 bits is 64 int8, in the order of the columns.
- A unit of 4 bits is eight 32-bit words; bits 4m to 4m + 3 of word l, m < 4, are the code of column 16m + l, and bits
  16 + 4m to 19 + 4m that of column 16m + 8 + l. Codes are two's complement. So the words, laid out twice in sixteen
  lanes and shifted by 4m (and 16 more in the upper eight), have the codes of columns 16m to 16m + 15 in their lowest
  four bits.
- Then a bfloat16 scale for each group of `group` columns (a power of two, at least 32) of each projection.

weight = scale * code. Scales may be negative: -8 has no counterpart among the 4-bit codes, so the entry of the largest
magnitude may get it, whichever its sign. A group of zeros has the scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

VERSION = 1
UNIT = 64
LINE = 64
LIMITS = {8: (-127, 127), 4: (-8, 7)}
"""Bits -> the lowest and the highest code."""

FACTORS = {
    8: [1 / (-127 + offset) for offset in (-2, -1, 0, 1, 2, 3)],
    4: [factor / -8 for factor in torch.linspace(0.70, 1.25, 17).tolist()],
}
"""Bits -> scales that are tried, as multiples of the entry of the largest magnitude: that entry is clipped, gets the
lowest code, or (4 bits) a code above the lowest. Within 0.2% (4 bits) and 4% (8 bits) of the least possible error."""

LARGEST = 2.0**126
"""Weights beyond it are refused, so that no product of a scale and a code overflows."""
SMALLEST = torch.finfo(torch.bfloat16).tiny
"""Scales below the smallest normal number become zero: processors are slow with subnormals, or read them as zero."""
LOWEST_EXPONENT, HIGHEST_EXPONENT = -120, 126

ROWS = 1 << 20
"""Weights that are rounded at once: few enough to stay in a processor's cache."""

_GPU_ROWS = 1 << 26
"""The same on a GPU, where each of some 180 operations should be worth its launch; some 2 GB of memory, computed. Not
run on one."""


@dataclass(frozen=True)
class RowLayout:
    """Where things lie in a packed row.

    Attributes:
        bits: 8 or 4.
        group: columns that share a scale; a power of two from 32 up.
        widths: columns of each projection.

    Raises:
        ValueError: another number of bits, a group that is no power of two or below 32, a width below one.
    """

    bits: int
    group: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits not in LIMITS:
            raise ValueError(f"weights are packed in 8 or 4 bits, not {self.bits}")
        if self.group < 32 or self.group & (self.group - 1):
            raise ValueError(f"a group has 32, 64, 128 or another power of two of columns, not {self.group}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError("a matrix has at least one column")

    @property
    def unit_bytes(self) -> int:
        """Bytes of 64 codes."""
        return UNIT * self.bits // 8

    @cached_property
    def units(self) -> tuple[int, ...]:
        """First unit of each projection, and the number of all units."""
        step = max(UNIT, self.group)
        return (0, *accumulate(-(-width // step) * step // UNIT for width in self.widths))

    @property
    def padded(self) -> int:
        """Columns with padding."""
        return self.units[-1] * UNIT

    @property
    def scales(self) -> int:
        """Scales of a row."""
        return self.padded // self.group

    @property
    def scales_at(self) -> int:
        """Byte of a row at which its scales begin."""
        return self.units[-1] * self.unit_bytes

    @property
    def stride(self) -> int:
        """Bytes of a row, a multiple of a cache line."""
        return -(-(self.scales_at + 2 * self.scales) // LINE) * LINE

    @property
    def used(self) -> int:
        """Bytes of a row that mean something."""
        return sum(-(-width * self.bits // 8) + 2 * -(-width // self.group) for width in self.widths)


def quantize(weight: Tensor, layout: RowLayout) -> Tensor:
    """Rounds and packs a matrix.

    Args:
        weight: [K, N], floating point, N being the sum of `layout.widths`.

    Returns:
        uint8 [K, layout.stride].

    Raises:
        ValueError: another shape, or a weight that is not finite or beyond `LARGEST`.
    """
    if weight.dim() != 2 or weight.shape[1] != sum(layout.widths):
        raise ValueError(f"a matrix [K, {sum(layout.widths)}] was expected, not {list(weight.shape)}")
    packed = torch.empty(len(weight), layout.stride, dtype=torch.uint8, device=weight.device)
    step = max(1, (ROWS if weight.device.type == "cpu" else _GPU_ROWS) // layout.padded)
    for first in range(0, len(weight), step):
        block = weight[first : first + step].float()
        if not (block.abs() <= LARGEST).all():
            raise ValueError("it has weights that are not finite, or beyond 8e37")
        codes, scales = round_rows(_padded(block, layout), layout)
        packed[first : first + step] = pack(codes, scales, layout)
    return packed


def _padded(block: Tensor, layout: RowLayout) -> Tensor:
    """[K, N] -> [K, layout.padded]."""
    parts = zip(block.split(layout.widths, 1), layout.units, layout.units[1:], strict=False)
    return torch.cat([pad(part, (0, (end - start) * UNIT - part.shape[1])) for part, start, end in parts], 1)


def round_rows(weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """float32 [K, layout.padded] -> codes, int8 of the same shape, and scales, bfloat16 [K, layout.scales].

    The scale is the one, of those tried, with the least squared error; then the one that is best for the codes it gave
    (least squares), as long as that helps.
    """
    groups = weight.unflatten(1, (-1, layout.group))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    # Squares of what is left neither overflow nor vanish; powers of two change no digit of a scale.
    exponent = torch.frexp(extreme).exponent.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    groups, extreme = torch.ldexp(groups, -exponent), torch.ldexp(extreme, -exponent)
    best = _Rounding(groups.square().sum(2, keepdim=True), torch.zeros_like(extreme), torch.zeros_like(groups))
    for factor in FACTORS[layout.bits]:
        best = _better(best, groups, extreme * factor, LIMITS[layout.bits])
    for _ in range(2):
        squares = best.codes.square().sum(2, keepdim=True)
        fitted = (groups * best.codes).sum(2, keepdim=True) / squares.clamp_min(1)
        best = _better(best, groups, fitted, LIMITS[layout.bits])
    scales = torch.ldexp(best.scale, exponent)
    codes = torch.where(scales.abs() < SMALLEST, 0.0, best.codes)
    scales = torch.where(scales.abs() < SMALLEST, 0.0, scales)
    return codes.flatten(1).to(torch.int8), scales.squeeze(2).to(torch.bfloat16)


class _Rounding(NamedTuple):
    """error, scale [K, groups, 1], codes [K, groups, group], float32."""

    error: Tensor
    scale: Tensor
    codes: Tensor


def _better(best: _Rounding, groups: Tensor, scale: Tensor, limits: tuple[int, int]) -> _Rounding:
    """The better of two roundings, group by group: the best so far and that by a scale, rounded to bfloat16."""
    scale = scale.to(torch.bfloat16).float()
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round_().clamp_(*limits)
    error = torch.addcmul(groups, codes, scale, value=-1).square_().sum(2, keepdim=True)
    better = error < best.error
    return _Rounding(*(torch.where(better, new, old) for new, old in zip((error, scale, codes), best, strict=True)))


def pack(codes: Tensor, scales: Tensor, layout: RowLayout) -> Tensor:
    """codes int8 [K, layout.padded], scales bfloat16 [K, layout.scales] -> uint8 [K, layout.stride]."""
    count = len(codes)
    packed = torch.zeros(count, layout.stride, dtype=torch.uint8, device=codes.device)
    if layout.bits == 8:
        packed[:, : layout.scales_at] = codes.view(torch.uint8)
    else:
        # [K, unit, m, half, l] -> words [K, unit, l], a nibble at bit 4m + 16 half
        nibbles = (codes & 15).unflatten(1, (-1, 4, 2, 8)).to(torch.int32)
        words = torch.zeros(count, layout.units[-1], 8, dtype=torch.int32, device=codes.device)
        for m in range(4):
            for half in range(2):
                words |= nibbles[:, :, m, half] << (4 * m + 16 * half)
        packed[:, : layout.scales_at] = words.flatten(1).view(torch.uint8)
    packed[:, layout.scales_at : layout.scales_at + 2 * layout.scales] = scales.contiguous().view(torch.uint8)
    return packed


def unpack(packed: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: codes, int8 [K, layout.padded], and scales, bfloat16 [K, layout.scales]."""
    body = packed[:, : layout.scales_at].contiguous()
    if layout.bits == 8:
        codes = body.view(torch.int8)
    else:
        words = body.view(torch.int32).unflatten(1, (-1, 8))
        parts = [(words << (28 - 4 * m - 16 * half)) >> 28 for m in range(4) for half in range(2)]
        codes = torch.stack(parts, 2).flatten(1).to(torch.int8)
    return codes, _scales(packed, layout)


def _scales(packed: Tensor, layout: RowLayout) -> Tensor:
    return packed[:, layout.scales_at : layout.scales_at + 2 * layout.scales].contiguous().view(torch.bfloat16)


def check(packed: Tensor, layout: RowLayout, rows: int) -> None:
    """Refuses bytes that no `quantize` wrote.

    Raises:
        ValueError: another shape or dtype, or a scale that is not finite or is subnormal.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (rows, layout.stride):
        raise ValueError(
            f"packed rows must be torch.uint8 [{rows}, {layout.stride}], not {packed.dtype} {list(packed.shape)}"
        )
    scales = _scales(packed, layout).abs()
    if not ((scales == 0) | ((scales >= SMALLEST) & scales.isfinite())).all():
        raise ValueError("a scale is not finite, or too small")


def dequantize(packed: Tensor, layout: RowLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    """[K, N]: the matrix that a packed one stands for; products in float32, rounded to `dtype`."""
    codes, scales = unpack(packed, layout)
    whole = (codes.unflatten(1, (-1, layout.group)).float() * scales.float().unsqueeze(2)).flatten(1)
    parts = zip(layout.widths, layout.units, strict=False)
    return torch.cat([whole[:, unit * UNIT : unit * UNIT + width] for width, unit in parts], 1).to(dtype)
