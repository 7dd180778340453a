"""What thresholding means, in plain PyTorch: every other implementation must give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mask(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Which entries are kept: `|x| > threshold`, compared in float32 (TEAL, section 4.1).

    The comparison is spelled out because PyTorch would cast a Python float, or a 0-d tensor, to the dtype of
    `x`: with bfloat16 activations the threshold would lose 16 of its 24 bits and a different set of entries
    would survive.

    Args:
        x: any shape, any floating dtype.
        threshold: a float, or a float32 tensor that broadcasts against `x`; not negative.

    Returns:
        bool, the shape of `x`. NaN is not greater than anything, so it is dropped, and so is a zero of
        either sign.
    """
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=x.device)
    return x.to(torch.float32).abs() > threshold


def threshold_reference(x: Tensor, threshold: float | Tensor) -> Tensor:
    """`x` where it is kept, +0.0 elsewhere; shape and dtype of `x`."""
    return torch.where(keep_mask(x, threshold), x, torch.zeros((), dtype=x.dtype, device=x.device))
