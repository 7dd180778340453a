"""Drawing a token from logits by inverting the cumulative distribution, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_reference(values: Tensor, temperature: float, uniform: float) -> int:
    """The first i at which the cumulative probability of softmax(values / temperature) exceeds `uniform`.

    Args:
        values: [n] logits; temperature: above 0; uniform: in [0, 1).
    """
    cumulative = torch.softmax(values.double() / temperature, dim=0).cumsum(0)
    return int((cumulative <= uniform).sum().clamp_max(len(values) - 1))
