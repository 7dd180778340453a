"""Rotary position embedding: tables of cos and sin, and the rotation itself.

The frequencies come from transformers' own functions, so every scaling that `config` admits is theirs bit for
bit. This module does not know about caches or layers. Positions are ints on the host: nothing waits for a device.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
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

    Where `rope_switch` is set, a sequence of at most so many positions has the short factors, a longer one the long
    factors for all of its positions. The last of the positions that are asked for decides, as in transformers. Keys
    that were rotated by the one cannot be compared with queries that were rotated by the other; see `check_rotation`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self.kinds = tuple(dict.fromkeys(config.ropes))
        self.of_layer = tuple(self.kinds.index(rope) for rope in config.ropes)
        self._switch = config.rope_switch
        lengths = (1,) if self._switch is None else (1, self._switch + 1)
        self._tables = tuple(
            _Table(config, [_frequencies(config, kind, length) for kind in self.kinds], dtype, device)
            for length in lengths
        )

    def at(self, position: int, count: int) -> Rotations:
        """The rotation of `count` positions from `position` on, for every layer; views, each [count, 1, head_dim]."""
        end = position + count
        table = self._tables[self._switch is not None and end > self._switch]
        kinds = [(cos[position:, None], sin[position:, None]) for cos, sin in zip(*table.first(end), strict=True)]
        return tuple(kinds[kind] for kind in self.of_layer)

    def tables(self, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first `count` positions, for steps of one position each: [kinds, count, head_dim]."""
        ends = (count,) if self._switch is None else (min(count, self._switch), count)
        starts = (0, *ends[:-1])
        parts = [
            [part[:, start:] for part in table.first(end)]
            for table, start, end in zip(self._tables, starts, ends, strict=True)
        ]
        cos, sin = (torch.cat(halves, dim=1) for halves in zip(*parts, strict=True))
        return cos, sin


class _Table:
    """cos and sin of every position met so far, under one set of frequencies for each kind of layer."""

    def __init__(
        self,
        config: ModelConfig,
        frequencies: list[tuple[Tensor, float]],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._head_dim, self._frequencies, self._dtype, self._device = config.head_dim, frequencies, dtype, device
        self._cos, self._sin = self._compute(min(_FIRST_POSITIONS, config.context))

    def first(self, positions: int) -> tuple[Tensor, Tensor]:
        """Views, each [kinds, positions, head_dim]."""
        if positions > self._cos.shape[1]:
            self._cos, self._sin = self._compute(max(positions, 2 * self._cos.shape[1]))
        return self._cos[:, :positions], self._sin[:, :positions]

    def _compute(self, positions: int) -> tuple[Tensor, Tensor]:
        """[kinds, positions, head_dim]."""
        tables = []
        for frequencies, scaling in self._frequencies:
            angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
            still = (0, self._head_dim // 2 - len(frequencies))  # what is not rotated is not scaled either
            cos, sin = F.pad(angles.cos() * scaling, still, value=1.0), F.pad(angles.sin() * scaling, still)
            # rotate_half(x) * sin == swap_halves(x) * (-sin, sin): the negation moves from the step into the table.
            tables.append((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        cos, sin = (torch.stack(halves).to(dtype=self._dtype).to(self._device) for halves in zip(*tables, strict=True))
        return cos, sin


def rotate_(heads: Tensor, rotation: Rotation) -> None:
    """Rotates heads [S, n, head_dim] in place, rounding after each product and the sum as transformers does."""
    cos, sin = rotation
    swapped = torch.roll(heads, heads.shape[-1] // 2, -1).mul_(sin)
    heads.mul_(cos).add_(swapped)


def head_order(config: ModelConfig) -> Tensor | None:
    """Where the channels of a head of q and k must come from, for `rotate_`; None where a checkpoint has them so.

    `rotate_` pairs a channel with the one half a head away. Where only the first channels of a head are rotated, a
    checkpoint has the partner half of these away. q and k in another order, the same for both, give the same scores.

    Returns:
        int64 [head_dim]: channel i here is channel order[i] of the checkpoint.
    """
    if config.rotary_dim == config.head_dim:
        return None
    rotated, still = torch.arange(config.head_dim).split((config.rotary_dim, config.head_dim - config.rotary_dim))
    return torch.cat([half for halves in zip(rotated.chunk(2), still.chunk(2), strict=True) for half in halves])


def _frequencies(config: ModelConfig, rope: Rope, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [rotary_dim / 2], none where a layer does not rotate, of a sequence of so many
    positions; the factor on cos and sin, which is not 1 for yarn and longrope."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not rope.rotates:
        return torch.zeros(0), 1.0
    parameters = rope_parameters(config.hf, rope.layer_type)
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        of_type = {} if rope.layer_type is None else {"layer_type": rope.layer_type}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config.hf, torch.device("cpu"), seq_len=length, **of_type)
        return frequencies, scaling
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0
