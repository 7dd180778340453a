"""SwiGLU in plain PyTorch, rounded where transformers rounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """partial [S, 2 I] shares of gate, then up -> SiLU(gate) * up [I]."""
    gate, up = partial.float().sum(0).to(dtype).chunk(2)
    return F.silu(gate) * up
