"""Rotary position embedding: tables of cos and sin, and the rotation itself.

The frequencies come from transformers' own functions, so every scaling that `config` admits is theirs bit for
bit. This module does not know about caches or layers. Positions are ints on the host: nothing waits for a device.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""(cos, sin) for S positions, each [S, 1, head_dim]; the sign of the rotation is folded into sin."""

_FIRST_POSITIONS = 512


class RopeTable:
    """cos and sin of every position met so far, in the model's dtype.

    The table grows by doubling, so that a context of 131,072 costs no more than what is used of it. It is computed
    in float32 on the host and then cast, as transformers does, whatever the device.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self._frequencies, self._scaling = _frequencies(config)
        self._dtype = dtype
        self._device = device
        self._cos, self._sin = self._compute(min(_FIRST_POSITIONS, config.context))

    def at(self, position: int, count: int) -> Rotation:
        """The rotation of `count` positions from `position` on; views, each [count, 1, head_dim]."""
        end = position + count
        if end > len(self._cos):
            self._cos, self._sin = self._compute(max(end, 2 * len(self._cos)))
        return self._cos[position:end], self._sin[position:end]

    def _compute(self, positions: int) -> Rotation:
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos() * self._scaling, angles.sin() * self._scaling
        # rotate_half(x) * sin == swap_halves(x) * (-sin, sin): the negation moves from the step into the table.
        table = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        cos, sin = (half[:, None].to(dtype=self._dtype).to(self._device) for half in table)
        return cos, sin


def rotate_(heads: Tensor, rotation: Rotation) -> None:
    """Rotates heads [S, n, head_dim] in place, rounding after each product and the sum as transformers does."""
    cos, sin = rotation
    swapped = torch.roll(heads, heads.shape[-1] // 2, -1).mul_(sin)
    heads.mul_(cos).add_(swapped)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2]; the factor on cos and sin, which is not 1 for yarn."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config.hf, torch.device("cpu"))
        return frequencies, scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
