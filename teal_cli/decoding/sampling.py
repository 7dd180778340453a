"""Choosing the next token from logits; the rule itself is `teal_kernels.parts.sample.reference`.

A draw depends on (seed, sequence, position) alone, so that a sequence comes out the same whether it is generated first,
last, or again after an interruption. Nothing here knows models or stores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_kernels.parts.sample.reference import SamplingRule, random_bits, sample_reference


@dataclass(frozen=True)
class Sampling(SamplingRule):
    """A `SamplingRule` with its usual values, and checked.

    Raises:
        UsageError: a temperature that is negative or no finite float32, a negative top_k, a top_p outside (0, 1], a
            seed outside [0, 2**63).
    """

    temperature: float = 0.8
    top_k: int = 200

    def __post_init__(self) -> None:
        if math.isnan(self.temperature) or not 0 <= self.temperature < 2.0**127:
            raise UsageError(
                f"temperature must be 0 or a positive number, not {self.temperature}",
                hint="0 is greedy decoding; 0.8 is a usual value",
            )
        if self.top_k < 0:
            raise UsageError(f"top-k must be 0 (all tokens) or positive, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(
                f"top-p must be above 0 and at most 1, not {self.top_p}",
                hint="1 is all tokens; --temperature 0 takes the most likely one",
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be at least 0 and below 2**63, not {self.seed}")


class Sampler:
    """Draws the tokens of one sequence.

    Args:
        rule: the settings.
        sequence: index of the sequence within its run.
    """

    def __init__(self, rule: SamplingRule, *, sequence: int = 0) -> None:
        self.rule, self.sequence = rule, sequence

    def __call__(self, logits: Tensor, position: int) -> int:
        """Return the token id drawn from the logits [vocab] that follow the token at `position`.

        Raises:
            TealError: the logits hold NaN, which no sampling rule can order.
        """
        token = sample_reference(logits, self.rule, self.bits(position))
        if token is None:
            raise nan_logits()
        return token

    def bits(self, position: int) -> int:
        """The random bits with which it draws after the token at `position`; 0 if it draws none."""
        return 0 if self.rule.greedy else random_bits(self.rule.seed, self.sequence, position)


def nan_logits() -> TealError:
    """What is raised where no token can be chosen."""
    return TealError(
        "the model produced NaN or infinite logits, so no token can be chosen",
        hint="try --dtype float32 (float16 overflows on some models), or `teal models verify`",
    )
