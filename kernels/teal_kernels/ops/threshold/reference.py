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


def row_thresholds(x: Tensor, dropped: Tensor) -> Tensor:
    """The threshold of each row where a count of entries is dropped: its n-th smallest magnitude (`topk`).

    Entries that tie with it are dropped too, so that no order of equal entries matters: at least n are dropped.

    Args:
        x: [..., K], any floating dtype.
        dropped: [P] or [..., P], how many entries each projection drops, whole numbers in [0, K).

    Returns:
        float32 [..., P]; 0.0 where nothing is dropped.
    """
    ordered = x.to(torch.float32).abs().sort(-1).values
    places = dropped.to(torch.int64).expand(*x.shape[:-1], -1)
    return torch.where(places > 0, ordered.gather(-1, (places - 1).clamp(0, x.shape[-1] - 1)), 0.0)
