"""Whether what is about to be timed computes the right thing: no check passed, no time.

Errors are relative to the exact result in the norm, so that a single missing row of a matrix of thousands is more than
the rounding that a dtype allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 512


@dataclass(frozen=True)
class Check:
    """What a comparison with the reference found.

    Attributes:
        error: ||got - wanted|| / ||wanted||.
        limit: what is allowed.
    """

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return "passed" if self.passed else f"failed: error {self.error:.2g}, allowed {self.limit:.2g}"


def exact_product(x: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Sum of x[i] * weight[i] over |x[i]| > threshold, in float32 (float64 for float32 inputs).

    Args:
        x: [K]; weight: [K, N], any strides; threshold: negative keeps everything.
    """
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    kept = (x.float().abs() > threshold).nonzero().squeeze(1)
    total = torch.zeros(weight.shape[1], dtype=wide, device=x.device)
    for rows in kept.split(_ROWS):
        total += x[rows].to(wide) @ weight[rows].to(wide)
    return total


def check_product(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> Check:
    """One rounding to the dtype costs a third of an epsilon; 16-bit partial sums, as the published method has, a few."""
    return Check(_relative_error(got, wanted), torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 32))


def check_logits(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> Check:
    """Logits of whole steps, [steps, vocab]; the means, which change no probability, are taken out.

    Rounding differs at every layer, and with thresholds an entry at the edge is kept by one and dropped by the other.
    """
    limit = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 2e-3}[dtype]
    centred = [logits.double() - logits.double().mean(-1, keepdim=True) for logits in (got, wanted)]
    return Check(_relative_error(*centred), limit)


def check_greedy(logits: Tensor, tokens: Tensor) -> Check:
    """Whether each token is the most likely one, or all but: how far its logit lies below the best, in standard
    deviations of its step's logits. Other arithmetic may choose otherwise only between near equals.

    Args:
        logits: [steps, vocab] of our dense model along these tokens; tokens: int64 [steps].
    """
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    return Check(float((behind / logits.std(-1)).amax()), 0.25)


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.double().cpu() - wanted.double().cpu())
    return float(difference / torch.linalg.vector_norm(wanted.double().cpu()).clamp_min(1e-300))
