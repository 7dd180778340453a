"""Whether what is about to be timed computes the right thing: no check passed, no time.

Errors are relative to the exact result in the norm, so that a single missing row of a matrix of thousands is more than
the rounding that a dtype allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teal_cli.decoding.projector import Rows
from teal_kernels.matrix import Matrix
from teal_kernels.thresholds import Thresholds

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

    @property
    def finite(self) -> float | None:
        """The error, or None where it is no number, which JSON could not say."""
        return self.error if math.isfinite(self.error) else None

    def __str__(self) -> str:
        return "passed" if self.passed else f"failed: error {self.error:.2g}, allowed {self.limit:.2g}"


def exact_product(x: Tensor, weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Sum of x[i] * weight[i] over |x[i]| > threshold, in float32 (float64 for float32 inputs).

    Args:
        x: [K]; weight: [K, N], any strides.
        threshold: a number or float32 [], or [K] with one for each channel; negative keeps everything.
    """
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    kept = (x.float().abs() > threshold).nonzero().squeeze(1)
    total = torch.zeros(weight.shape[1], dtype=wide, device=x.device)
    for rows in kept.split(_ROWS):
        total += x[rows].to(wide) @ weight[rows].to(wide)
    return total


def check_product(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> Check:
    """One rounding costs a third of an epsilon; sums in 16 bits, as the published method has them, some more."""
    if got.ndim == 2:  # shares, which the kernel after it would add up
        got = got.sum(0)
    return Check(_relative_error(got, wanted), torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 32))


class Follower:
    """The reference for a sparse step: a `Project` that keeps the very entries that the step kept.

    Two right implementations round differently, and then an entry at the edge is kept by one and dropped by the other,
    which changes logits by tenths. So the reference takes the step's choice, and counts how often its own would differ.

    Args:
        rows: what the step consumed, site -> [layers, K].
        thresholds: those of the step.

    Attributes:
        differing, decided: entries on which the two chose differently, and all that both chose on.
    """

    def __init__(self, rows: Rows, thresholds: Thresholds) -> None:
        self._rows, self._thresholds = rows, thresholds
        self.differing = self.decided = 0

    def __call__(self, layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        own, taken = x[0].float(), self._rows[site][layer].float()
        parts = []
        columns = matrix.tensor().split(matrix.segments, dim=1)
        limits = torch.from_numpy(self._thresholds.site(layer, site)).to(own.device)
        for threshold, part in zip(limits, columns, strict=True):
            kept = taken.abs() > threshold
            self.differing += int((kept != (own.abs() > threshold)).sum())
            self.decided += len(own)
            parts.append(exact_product(torch.where(kept, x[0], 0), part, 0.0))
        return torch.cat(parts).to(x.dtype)[None]

    def check(self) -> Check:
        """Rounding moves one entry in a hundred across the threshold, a wrong threshold many more."""
        return Check(self.differing / max(1, self.decided), 0.03)


def check_logits(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> Check:
    """Logits of whole steps, [steps, vocab]; their means, which change no probability, are taken out."""
    limit = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}[dtype]
    centred = [logits.double() - logits.double().mean(-1, keepdim=True) for logits in (got, wanted)]
    return Check(_relative_error(*centred), limit)


def check_greedy(logits: Tensor, tokens: Tensor, bits: int = 16) -> Check:
    """Whether each token is the most likely one, or all but: how far its logit lies below the best, in standard
    deviations of its step's logits. Other arithmetic may choose otherwise only between near equals; weights that were
    rounded to 4 bits may between more (one token of 128 of llama.cpp's Q4_0 of SmolLM2-135M lies 1.01 behind), but a
    wrong model lies several deviations behind.

    Args:
        logits: [steps, vocab] of our dense model along these tokens; tokens: int64 [steps].
        bits: of a weight of ours or of the engine's, whichever are fewer.
    """
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]
    return Check(float((behind / logits.std(-1)).amax()), 0.25 if bits >= 8 else 1.5)


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    difference = torch.linalg.vector_norm(got.double().cpu() - wanted.double().cpu())
    return float(difference / torch.linalg.vector_norm(wanted.double().cpu()).clamp_min(1e-300))
