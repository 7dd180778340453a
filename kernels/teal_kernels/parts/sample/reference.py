"""The sampling rule in plain Python and PyTorch: which token a sequence draws from its logits, on every device.

The random number of a draw is a function of (seed, sequence, position), so that a sequence comes out the same whatever
was drawn before it, and can be resumed at any token. It inverts the cumulative distribution of the softmax over the
candidates, in the order of their token ids. Candidates are the `top_k` most likely tokens, and of these the fewest
whose probability together reaches `top_p`; tokens that are as likely as the last one of either count as well, so that
equally likely tokens need no order.

Weights of the softmax are whole numbers: their sums are exact, and the same however a kernel divides the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from torch import Tensor

WEIGHT_BITS: Final = 32
"""The most likely token weighs 2**32; one that is less likely by more than that factor is never drawn."""

GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are greedy: logits that differ by 1e-3 have probabilities that differ by exp(100)."""

_WORD: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingRule:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 (and what is under `GREEDY_BELOW`) takes the most likely token.
        top_k: only the k most likely tokens can be drawn; 0 means all.
        top_p: of these only the fewest whose probability reaches it, in (0, 1]; 1 means all.
        seed: of the random numbers, in [0, 2**63).
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the first of the most likely tokens is taken, without a random number."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words from a key of two and a counter of four.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def random_bits(seed: int, sequence: int, position: int) -> int:
    """The 64 random bits of one draw.

    Args:
        seed: in [0, 2**63); the key.
        sequence: index of the sequence within its run; with the position, the counter.
        position: of the token whose logits are drawn from.
    """
    key = seed & _WORD, seed >> 32
    high, low, _, _ = philox(key, (position & _WORD, position >> 32, sequence & _WORD, sequence >> 32))
    return high << 32 | low


def top_p_bits(top_p: float) -> int:
    """The largest 64-bit fraction below `top_p`, which is what `nucleus` compares with."""
    return math.ceil(top_p * 2.0**64) - 1


def weights_reference(logits: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """exp((logits - peak) / temperature) in fixed point: int64 [n], `WEIGHT_BITS` after the point.

    Args:
        logits: [n]; peak: [], the largest of all; both are taken as float32.
    """
    return (((logits.float() - peak.float()) / temperature).exp() * 2.0**WEIGHT_BITS).long()


def lowest_reference(logits: Tensor, rule: SamplingRule) -> Tensor:
    """The smallest logit [] that is a candidate."""
    every = not 0 < rule.top_k < len(logits)
    if rule.top_p >= 1:
        return logits.min() if every else logits.topk(rule.top_k).values[-1]
    ranked = logits.sort(descending=True).values if every else logits.topk(rule.top_k).values
    total = weights_reference(logits[logits >= ranked[-1]], ranked[0], rule.temperature).sum()
    wanted = (top_p_bits(rule.top_p) * int(total) >> 64) + 1
    weights = weights_reference(ranked, ranked[0], rule.temperature)
    return ranked[weights.cumsum(0) - weights < wanted][-1]


def sample_reference(logits: Tensor, rule: SamplingRule, bits: int) -> int | None:
    """Draw one token.

    Args:
        logits: [vocab], any floating-point dtype.
        rule: the settings.
        bits: of `random_bits`; unused by a greedy rule.

    Returns:
        The token id; None where no rule can choose: a logit is NaN, or, unless the rule is greedy, none is finite or
        one is infinitely large.
    """
    peak, first = logits.max(0)  # NaN where there is one
    if math.isnan(peak) or not (rule.greedy or math.isfinite(peak)):
        return None
    if rule.greedy:
        return int(first)
    candidates = (logits >= lowest_reference(logits, rule)).nonzero().squeeze(1)
    through = weights_reference(logits[candidates], peak, rule.temperature).cumsum(0)
    target = bits * int(through[-1]) >> 64
    return int(candidates[int((through <= target).sum())])
