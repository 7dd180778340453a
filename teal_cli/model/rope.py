"""Rotary position embedding: tables of cos and sin, and the rotation itself.

The frequencies come from transformers' own functions, so every scaling that `config` admits is theirs bit for
bit. This module does not know about caches or layers. Positions are ints on the host: nothing waits for a device.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig, Rope, rope_parameters

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""(cos, sin) for S positions, each [S, 1, head_dim]; the sign of the rotation is folded into sin."""

Rotations: TypeAlias = tuple[Rotation, ...]
"""The rotation of every layer; layers of a kind share one."""

_FIRST_POSITIONS = 512


class RopeTable:
    """cos and sin of every position met so far, for each kind of layer, in the model's dtype.

    Attributes:
        kinds: the rotations that occur in the model, each once.
        of_layer: per layer, which of them.

    The tables grow by doubling, so that a context of 131,072 costs no more than what is used of it. They are computed
    in float32 on the host and then cast, as transformers does, whatever the device.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.kinds = tuple(dict.fromkeys(config.ropes))
        self.of_layer = tuple(self.kinds.index(rope) for rope in config.ropes)
        self._frequencies = [_frequencies(config, kind) for kind in self.kinds]
        self._dtype = dtype
        self._device = device
        self._cos, self._sin = self._compute(min(_FIRST_POSITIONS, config.context))

    def at(self, position: int, count: int) -> Rotations:
        """The rotation of `count` positions from `position` on, for every layer; views, each [count, 1, head_dim]."""
        self._grow(position + count)
        here = slice(position, position + count)
        kinds = [(cos[here, None], sin[here, None]) for cos, sin in zip(self._cos, self._sin, strict=True)]
        return tuple(kinds[kind] for kind in self.of_layer)

    def tables(self, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `count` positions, each [kinds, count, head_dim]."""
        self._grow(count)
        return self._cos[:, :count].contiguous(), self._sin[:, :count].contiguous()

    def _grow(self, positions: int) -> None:
        if positions > self._cos.shape[1]:
            self._cos, self._sin = self._compute(max(positions, 2 * self._cos.shape[1]))

    def _compute(self, positions: int) -> tuple[Tensor, Tensor]:
        """[kinds, positions, head_dim]."""
        tables = []
        for frequencies, scaling in self._frequencies:
            angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
            cos, sin = angles.cos() * scaling, angles.sin() * scaling
            # rotate_half(x) * sin == swap_halves(x) * (-sin, sin): the negation moves from the step into the table.
            tables.append((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        cos, sin = (torch.stack(halves).to(dtype=self._dtype).to(self._device) for halves in zip(*tables, strict=True))
        return cos, sin


def rotate_(heads: Tensor, rotation: Rotation) -> None:
    """Rotates heads [S, n, head_dim] in place, rounding after each product and the sum as transformers does."""
    cos, sin = rotation
    swapped = torch.roll(heads, heads.shape[-1] // 2, -1).mul_(sin)
    heads.mul_(cos).add_(swapped)


def _frequencies(config: ModelConfig, rope: Rope) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2]; the factor on cos and sin, which is not 1 for yarn."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not rope.rotates:
        return torch.zeros(config.head_dim // 2), 1.0
    parameters = rope_parameters(config.hf, rope.layer_type)
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        of_type = {} if rope.layer_type is None else {"layer_type": rope.layer_type}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config.hf, torch.device("cpu"), **of_type)
        return frequencies, scaling
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
