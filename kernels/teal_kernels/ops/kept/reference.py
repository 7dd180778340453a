"""What a kept list holds, in plain PyTorch: the definition that the kernels which write one are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.ops.threshold.reference import keep_mask


def kept_reference(x: Tensor, thresholds: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a vector that at least one projection keeps, in ascending order.

    Args:
        x: [K]; thresholds: float32 [P], or [P, K] with one for each channel, of the P projections that read it.
        chunk: entries of the vector per chunk of the list.

    Returns:
        index int32 [kept], value [kept] in the dtype of `x`, and count int32 [ceil(K / chunk)], how many of them lie in
        each chunk. The kernels store the entries of chunk c from place c * chunk on; what lies between is not defined.
    """
    kept = keep_mask(x, thresholds.amin(0))
    index = kept.nonzero()[:, 0]
    count = torch.stack([part.sum() for part in kept.split(chunk)])
    return index.int(), x[index], count.int()


def tally_reference(x: Tensor, thresholds: Tensor, chunk: int) -> Tensor:
    """How many entries each projection keeps, by chunk: int64 [P, ceil(K / chunk)]. Arguments as `kept_reference`."""
    kept = keep_mask(x, thresholds if thresholds.ndim == 2 else thresholds[:, None])
    return torch.stack([part.sum(1) for part in kept.split(chunk, dim=1)], dim=1)
