"""The keys and values of the tokens seen so far, in memory that is allocated once.

Knows how many positions are filled and refuses to overflow. Does not know about windows or sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.config import ModelConfig


class KVCache:
    """Static key-value cache of one sequence.

    Attributes:
        kv: [layers, 2, kv_heads, max_tokens, head_dim]; index 0 of the second axis holds the keys, 1 the values,
            so that a layer writes both in one copy.
        max_tokens: how many positions there is room for.
        length: how many positions are filled. Set it lower to take tokens back, 0 to begin anew.
    """

    def __init__(
        self, config: ModelConfig, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, 2, config.kv_heads, max_tokens, config.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    @property
    def k(self) -> Tensor:
        """Rotated keys, a view [layers, kv_heads, max_tokens, head_dim]."""
        return self.kv[:, 0]

    @property
    def v(self) -> Tensor:
        """Values, a view [layers, kv_heads, max_tokens, head_dim]."""
        return self.kv[:, 1]

    def check_room(self, position: int, count: int) -> None:
        """Raises unless `count` tokens can be written at `position`.

        Raises:
            UsageError: the cache is full.
            ValueError: the write would leave positions unfilled before it (a defect of the caller).
        """
        if position > self.length:
            raise ValueError(f"position {position} leaves a gap after the {self.length} filled positions")
        if position + count > self.max_tokens:
            raise UsageError(
                f"{position + count} tokens do not fit the key-value cache of {self.max_tokens}",
                hint="shorten the prompt, or ask for fewer new tokens",
            )
