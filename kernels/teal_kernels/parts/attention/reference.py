"""Attention of one token in plain PyTorch, in float32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.traits import LLAMA, Traits


def attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, length: int, window: int | None, traits: Traits = LLAMA
) -> Tensor:
    """q [heads, D], keys and values [kv_heads, max_tokens, D] filled up to `length` -> [heads * D]."""
    first = 0 if window is None else max(0, length - window)
    k, v = keys[:, first:length].float(), values[:, first:length].float()
    grouped = q.float().view(len(keys), -1, q.shape[1])
    scale = q.shape[1] ** -0.5 if traits.attention_scale is None else traits.attention_scale
    scores = grouped @ k.transpose(1, 2) * scale
    if traits.score_cap is not None:
        scores = torch.tanh(scores / traits.score_cap) * traits.score_cap
    weights = torch.softmax(scores, dim=-1)
    return (weights @ v).to(q.dtype).reshape(-1)
