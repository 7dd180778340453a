"""Choosing the next token from logits.

A sampler belongs to one sequence: its random stream depends on (seed, sequence) alone, so that a sequence comes out the
same whether it is generated first, last, or again after an interruption. Nothing here knows models or stores.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: only the k most likely tokens can be drawn; 0 means all of them.
        seed: seeds the random stream of every sequence.

    Raises:
        UsageError: a negative or non-finite temperature, a negative top_k or seed.
    """

    temperature: float = 0.8
    top_k: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UsageError(
                f"temperature must be 0 or a positive number, not {self.temperature}",
                hint="0 is greedy decoding; 0.8 is a usual value",
            )
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (all tokens) or positive, not {self.top_k}")
        if self.seed < 0:
            raise UsageError(f"seed must not be negative, got {self.seed}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def stream(self, sequence: int) -> int:
        """Seeds the random stream of one sequence: 63 bits, since torch takes an int64."""
        return int(np.random.SeedSequence([self.seed, sequence]).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


class Sampler:
    """Draws the tokens of one sequence.

    Args:
        sampling: the settings.
        sequence: index of the sequence within its run; together with the seed it fixes the random stream.
        device: where the logits live.
    """

    def __init__(self, sampling: Sampling, *, sequence: int = 0, device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self._random = torch.Generator(device).manual_seed(sampling.stream(sequence))

    def __call__(self, logits: Tensor) -> int:
        """Take logits float32 [vocab] and return a token id.

        Raises:
            TealError: the logits hold NaN, which no sampling rule can order.
        """
        if self.sampling.greedy:
            largest, token = logits.max(0)
            if math.isnan(largest):  # max returns a NaN where there is one
                raise nan_logits()
            return int(token)
        scaled = logits / self.sampling.temperature
        if 0 < self.sampling.top_k < scaled.numel():
            values, tokens = scaled.topk(self.sampling.top_k)
        else:
            values, tokens = scaled, None
        probabilities = values.softmax(-1)
        if math.isnan(float(probabilities[0])):
            raise nan_logits()
        choice = int(torch.multinomial(probabilities, 1, generator=self._random))
        return choice if tokens is None else int(tokens[choice])


def nan_logits() -> TealError:
    """What is raised where no token can be chosen."""
    return TealError(
        "the model produced NaN logits, so no token can be chosen",
        hint="try --dtype float32 (float16 overflows on some models), or `teal models verify`",
    )
