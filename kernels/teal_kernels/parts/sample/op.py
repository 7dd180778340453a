"""Choose the next token on the device: greedy, or at a temperature among the k most likely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from teal_kernels.configs import EXACT
from teal_kernels.parts.sample.kernel import sample_kernel


@dataclass(frozen=True, slots=True)
class DeviceSampling:
    """How tokens are drawn on the device.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely tokens can be drawn; 0 means all.
        seed: together with the position it decides every draw.
    """

    temperature: float
    top_k: int = 0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


class Chooser:
    """Chooses the next token in launches that a graph can hold.

    Args:
        sampling: the settings.
        device: where logits live.

    Attributes:
        choice: int64 [2]: the token, and 1 if the logits held NaN, which no rule can order.
    """

    def __init__(self, sampling: DeviceSampling, device: torch.device) -> None:
        self._greedy, self._top_k = sampling.greedy, sampling.top_k
        self._temperature = torch.tensor([sampling.temperature], dtype=torch.float32, device=device)
        self._seed = torch.tensor([sampling.seed], dtype=torch.int64, device=device)
        self.choice = torch.zeros(2, dtype=torch.int64, device=device)

    def adopt(self, sampling: DeviceSampling) -> bool:
        """Take other settings without another graph; False where that cannot be, as the launches are others."""
        if sampling.greedy != self._greedy or (not self._greedy and sampling.top_k != self._top_k):
            return False
        self._temperature.fill_(sampling.temperature)
        self._seed.fill_(sampling.seed)
        return True

    def __call__(self, logits: Tensor, position: Tensor) -> None:
        """Leave in `choice` what is chosen from logits [vocab] for the step at `position` int64 [1]."""
        if self._greedy:
            largest, token = logits.max(dim=0, keepdim=True)  # NaN, where there is one
            self.choice.copy_(torch.cat((token, largest.isnan().to(torch.int64))))
            return
        values, ids = logits, None
        if 0 < self._top_k < len(logits):
            values, ids = torch.topk(logits, self._top_k)
        sample_kernel[(1,)](
            values, ids, self._temperature, self._seed, position, self.choice, n=len(values), IDS=ids is not None,
            BLOCK=min(8192, triton.next_power_of_2(max(16, len(values)))), num_warps=8, **EXACT,
        )  # fmt: skip
