"""How well hidden states predict the tokens that follow: log-likelihood, and the distance of sparse from dense.

Logits of a whole window would be its length times the vocabulary in float32, 400 MB for 2,048 tokens of SmolLM2, so
they are made and used a few rows at a time. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.passes.forward import States
from teal_cli.passes.layers import Head, Predictions, logit_rows

_LOGIT_BYTES: Final = 16 << 20
"""Of float32 logits at a time. With four times as many an evaluation of SmolLM2 at five levels has 1.53 GB in memory at
its peak in place of 1.24, and takes 1.2 times as long (windows of 2,048, two cores of a Xeon with AMX, 2026-11-26)."""


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the scored tokens of one window, under one plan.

    Attributes:
        tokens: scored tokens.
        nll: negative log-likelihood of the tokens, in nats.
        kl: Kullback-Leibler divergence of the sparse from the dense distribution, KL(dense || sparse), in nats; a dense
            position adds 0.
        top1: positions at which the most likely token is that of the dense model; a dense position is one.
    """

    tokens: int
    nll: float
    kl: float
    top1: int


@torch.inference_mode()
def score(head: Head, vocab: int, states: States, targets: NDArray[np.int64], starts: Sequence[int]) -> list[Score]:
    """Score the last `len(targets)` positions of a sequence: row i predicts target i.

    Args:
        states: of the sequence after the last layer, every position dense, with one variant per entry of `starts`.
        starts: where each variant becomes sparse.

    Returns:
        The score of the dense model, then of each variant.

    Raises:
        TealError: logits are not finite.
    """
    first = len(states.dense) - len(targets)
    sums = np.zeros((len(starts) + 1, 3))
    for part in logit_rows(vocab, len(targets), _LOGIT_BYTES):
        begin, stop = first + part.start, first + part.stop
        wanted = torch.from_numpy(targets[part]).to(states.dense.device)[:, None]
        dense = head.predictions(states.dense[begin:stop])
        cuts = [min(max(start, begin), stop) - begin for start in starts]  # rows that are dense, of this part
        each = zip(states.sparse, starts, cuts, strict=True)
        sparse = [head.predictions(rows[begin + cut - start : stop - start]) for rows, start, cut in each]
        for span in dense.spans():
            sums += _score_few(dense[span], sparse, cuts, span, wanted[span])
    if not np.isfinite(sums).all():
        raise _not_finite()
    return [Score(len(targets), nll, max(0.0, kl), int(top1)) for nll, kl, top1 in sums]


def _score_few(
    dense: Tensor, sparse: Sequence[Predictions], cuts: Sequence[int], span: slice, wanted: Tensor
) -> NDArray[np.float64]:
    """nll, KL and equal choices of a few rows, added up: float64 [1 + variants, 3].

    Args:
        dense: log-probabilities [rows, vocab]. wanted: int64 [rows, 1].
        sparse: of each variant, from the row `cuts` says on; before it the variant is dense.
        span: which rows these are.
    """
    sums = np.zeros((len(sparse) + 1, 3))
    nll = -dense.gather(1, wanted)[:, 0].double()
    sums[0] = float(nll.sum()), 0.0, len(dense)
    best, shares = dense.argmax(-1), dense.exp() if sparse else dense
    for number, (variant, cut) in enumerate(zip(sparse, cuts, strict=True), 1):
        before = min(max(cut - span.start, 0), len(dense))
        sums[number] = float(nll[:before].sum()), 0.0, before
        if before < len(dense):
            own = variant[span.start + before - cut : span.stop - cut]
            same = (own.argmax(-1) == best[before:]).sum()
            kl = divergence(dense[before:], own, shares[before:]).sum()
            sums[number] += float(-own.gather(1, wanted[before:]).double().sum()), float(kl), int(same)
    return sums


@torch.inference_mode()
def log_probabilities(head: Head, vocab: int, states: Tensor, targets: Tensor, best: Tensor | None = None) -> Tensor:
    """How likely each target is after the hidden states [S, hidden] of its row: its log-probability, float32 [S].

    Args:
        best: int64 [S], filled with the most likely token of each row.

    Raises:
        TealError: a log-probability is not finite.
    """
    found = states.new_zeros(len(targets), dtype=torch.float32)
    for part in logit_rows(vocab, len(targets), _LOGIT_BYTES):
        predicted = head.predictions(states[part])
        for span in predicted.spans():
            rows = slice(part.start + span.start, part.start + span.stop)
            few = predicted[span]
            found[rows] = few.gather(1, targets[rows, None])[:, 0]
            if best is not None:
                best[rows] = few.argmax(-1)
    if not torch.isfinite(found).all():
        raise _not_finite()
    return found


@torch.inference_mode()
def differences(head: Head, vocab: int, dense: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """How far the predictions of sparse rows are from those of dense ones, row by row.

    Args:
        dense, sparse: hidden states [S, hidden] after the last layer, of the same tokens.

    Returns:
        KL(dense || sparse) in nats, float64 [S], and whether both find the same token most likely, bool [S].

    Raises:
        TealError: a divergence is not finite.
    """
    kl = dense.new_zeros(len(dense), dtype=torch.float64)
    same = torch.zeros(len(dense), dtype=torch.bool, device=dense.device)
    for part in logit_rows(vocab, len(dense), _LOGIT_BYTES):
        predicted, own = head.predictions(dense[part]), head.predictions(sparse[part])
        for span in predicted.spans():
            rows = slice(part.start + span.start, part.start + span.stop)
            p, q = predicted[span], own[span]
            kl[rows] = divergence(p, q).clamp(min=0)
            same[rows] = p.argmax(-1) == q.argmax(-1)
    if not torch.isfinite(kl).all():
        raise _not_finite()
    return kl, same


def divergence(p: Tensor, q: Tensor, shares: Tensor | None = None) -> Tensor:
    """KL(p || q) of log-probabilities [S, vocab], in nats: float64 [S]. `shares` is p.exp(), where that is known."""
    return torch.linalg.vecdot(p.exp() if shares is None else shares, p - q).double()


def _not_finite() -> TealError:
    return TealError(
        "the model produced logits that are not finite, so nothing can be scored",
        hint="try --dtype float32 (float16 overflows on some models), or `teal models verify`",
    )


def standard_error(scores: Sequence[Score], units: Sequence[int]) -> float | None:
    """Standard error of the mean over tokens, where tokens of one unit belong together; None for a single unit."""
    totals: dict[int, list[float]] = {}
    for found, unit in zip(scores, units, strict=True):
        total = totals.setdefault(unit, [0.0, 0.0])
        total[0] += found.nll
        total[1] += found.tokens
    sums, counts = np.array(list(totals.values())).T
    if len(sums) < 2:
        return None
    residuals = sums - counts * sums.sum() / counts.sum()
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (residuals**2).sum()) / counts.sum())
