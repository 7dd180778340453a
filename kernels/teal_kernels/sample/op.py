"""Choose the next token on the device: greedy, or at a temperature among the k most likely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from teal_kernels.configs import EXACT
from teal_kernels.sample.kernel import sample_kernel


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


class Chooser:
    """Writes the next token into a device tensor; can be captured in a graph.

    Args:
        sampling: the settings. `seed` may be changed later through the tensor of that name.
        device: where logits and token live.
    """

    def __init__(self, sampling: DeviceSampling, device: torch.device) -> None:
        self.sampling = sampling
        self.temperature = torch.tensor([sampling.temperature], dtype=torch.float32, device=device)
        self.seed = torch.tensor([sampling.seed], dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, position: Tensor, token: Tensor) -> None:
        """token [1] = choice from logits [vocab], for the step at `position` int64 [1]."""
        if self.sampling.temperature == 0 or self.sampling.top_k == 1:
            torch.argmax(logits, dim=0, keepdim=True, out=token)
            return
        values, ids = logits, None
        if 0 < self.sampling.top_k < len(logits):
            values, ids = torch.topk(logits, self.sampling.top_k)
        sample_kernel[(1,)](
            values, ids, self.temperature, self.seed, position, token, n=len(values), IDS=ids is not None,
            BLOCK=min(8192, triton.next_power_of_2(max(16, len(values)))), num_warps=8, **EXACT,
        )  # fmt: skip
