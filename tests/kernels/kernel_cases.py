"""Inputs shared by the tests of `sparse_gemv`, and the precision each dtype owes."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
"""Largest relative error in the norm: one rounding to the dtype, plus summation order in float32."""

SHAPES = (
    (1, (5,)),
    (63, (1000,)),
    (1000, (21, 42)),
    (576, (576, 192, 192)),
    (1536, (576,)),
    (63, (11008,)),
    (11008, (63,)),
)
"""(K, segments): odd sizes, K = 1, widths no tile divides, and the sites of a small model."""


def operands(
    inputs: int, outputs: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random x [K] and weight [K, N]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, generator=generator).to(dtype)
    weight = torch.randn(inputs, outputs, generator=generator).to(dtype)
    return x.to(device), weight.to(device)


def threshold_sets(x: Tensor, segments: int) -> dict[str, Tensor]:
    """Thresholds that keep everything, half, different amounts per segment, a single entry, nothing."""
    magnitude = x.float().abs().cpu()
    below_largest = magnitude.sort().values[-2].item() if len(x) > 1 else 0.0
    values = {
        "all": [0.0] * segments,
        "half": [magnitude.median().item()] * segments,
        "mixed": [0.3 + 0.4 * (segments - i) for i in range(segments)],
        "one": [below_largest] * segments,
        "none": [magnitude.max().item()] * segments,
    }
    return {name: torch.tensor(v, dtype=torch.float32, device=x.device) for name, v in values.items()}


def channel_limits(x: Tensor, segments: int, seed: int = 5) -> Tensor:
    """Thresholds [segments, K] of which every segment keeps other channels, some of them never."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.rand(segments, len(x), generator=generator) * 1.5
    limits[torch.rand(limits.shape, generator=generator) < 0.1] = torch.inf
    return limits.to(x.device)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||, and 0 only if both are zero; NaN never passes a comparison."""
    difference = (got.double().cpu() - wanted.double().cpu()).norm().item()
    return difference / max(wanted.double().norm().item(), 1e-30)
