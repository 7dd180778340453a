"""SwiGLU in plain PyTorch, rounded where transformers rounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_kernels.parts.reference import product_reference
from teal_kernels.traits import GELU_TANH, SILU


def swiglu_reference(partial: Tensor, dtype: torch.dtype, activation: str = SILU) -> Tensor:
    """partial sums [S, 2 I] of gate, then up -> activation(gate) * up [I]."""
    gate, up = product_reference(partial, dtype).chunk(2)
    return (F.gelu(gate, approximate="tanh") if activation == GELU_TANH else F.silu(gate)) * up
