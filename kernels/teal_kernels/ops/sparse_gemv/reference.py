"""What `sparse_gemv` computes, in plain PyTorch: the definition the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.ops.threshold.reference import keep_mask


def sparse_gemv_reference(x: Tensor, weight: Tensor, thresholds: Tensor, segments: tuple[int, ...]) -> Tensor:
    """`y[j] = sum over kept i of x[i] * weight[i, j]`, where segment p of the outputs keeps `|x| >
    thresholds[p]`, or `|x[i]| > thresholds[p, i]`.

    Rows whose entry is dropped are left out of the sum, not multiplied by zero: an infinity in such a row
    does no harm. Sums are in float32 (float64 if `x` is float64, which only tests use), rounded once to the
    dtype of `x`.

    Args:
        x: [K], the input vector; weight: [K, N], input-major; thresholds: [P] or [P, K] float32; segments: P
            widths, sum N.

    Returns:
        [N], dtype of `x`.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for part, threshold in zip(weight.split(segments, dim=1), thresholds, strict=True):
        kept = keep_mask(x, threshold)
        parts.append(x[kept].to(accumulate) @ part[kept].to(accumulate))
    return torch.cat(parts).to(x.dtype)
