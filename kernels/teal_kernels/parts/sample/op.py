"""Choose the next token on the device: greedy, or drawn by the rule of `reference.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from teal_kernels.configs import EXACT
from teal_kernels.parts.sample.kernel import draw_kernel, nucleus_kernel, totals_kernel
from teal_kernels.parts.sample.reference import SamplingRule, top_p_bits

BLOCK = 1024


class Chooser:
    """Chooses the next token in launches that a graph can hold.

    Args:
        rule: the settings.
        sequence: index of the sequence within its run.
        device: where logits live.

    Attributes:
        choice: int64 [2]: the token, and 1 if none can be chosen (see `sample_reference`).
    """

    def __init__(self, rule: SamplingRule, sequence: int, device: torch.device) -> None:
        self._rule = rule
        self._temperature = torch.empty(1, dtype=torch.float32, device=device)
        self._top_p = torch.empty(1, dtype=torch.int64, device=device)
        self._stream = torch.empty(2, dtype=torch.int64, device=device)
        self.choice = torch.zeros(2, dtype=torch.int64, device=device)
        self._fill(rule, sequence)

    def adopt(self, rule: SamplingRule, sequence: int) -> bool:
        """Take other settings without another graph; False where that cannot be, as the launches are others."""
        if _launches(rule) != _launches(self._rule):
            return False
        self._fill(rule, sequence)
        return True

    def _fill(self, rule: SamplingRule, sequence: int) -> None:
        bits = top_p_bits(rule.top_p)
        self._temperature.fill_(rule.temperature)
        self._top_p.fill_(bits - 2**64 if bits >= 2**63 else bits)
        self._stream.copy_(torch.tensor([rule.seed, sequence]))

    def __call__(self, logits: Tensor, position: Tensor) -> None:
        """Leave in `choice` what is chosen from logits [vocab] for the step at `position` int64 [1]."""
        rule, n = self._rule, len(logits)
        if rule.greedy:
            largest, token = logits.max(dim=0, keepdim=True)  # NaN, where there is one
            self.choice.copy_(torch.cat((token, largest.isnan().to(torch.int64))))
            return
        lowest = None
        if 0 < rule.top_k < n:
            ranked = torch.topk(logits, rule.top_k).values
            lowest = ranked[-1:]
        elif rule.top_p < 1:
            ranked = logits.sort(descending=True).values
        else:
            ranked = logits.max(dim=0, keepdim=True).values
        chunks = triton.cdiv(n, BLOCK)
        sizes = {"chunks": chunks, "CHUNKS": triton.next_power_of_2(chunks), "BLOCK": BLOCK, **EXACT}
        totals = torch.empty(chunks, dtype=torch.int64, device=logits.device)
        totals_kernel[(chunks,)](logits, ranked, lowest, self._temperature, totals, n=n, BLOCK=BLOCK, **EXACT)
        if rule.top_p < 1:
            lowest = torch.empty_like(ranked[:1])
            nucleus_kernel[(1,)](ranked, totals, self._temperature, self._top_p, lowest, ranked=len(ranked), **sizes)
            totals_kernel[(chunks,)](logits, ranked, lowest, self._temperature, totals, n=n, BLOCK=BLOCK, **EXACT)
        draw_kernel[(1,)](
            logits, ranked, lowest, self._temperature, totals, self._stream, position, self.choice, n=n, **sizes
        )


def _launches(rule: SamplingRule) -> tuple[bool, int, bool]:
    """What decides which kernels run; the rest is read from buffers."""
    return (True, 0, False) if rule.greedy else (False, rule.top_k, rule.top_p < 1)
