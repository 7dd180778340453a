"""Launches the two kernels of decode attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from teal_kernels.configs import launch_options
from teal_kernels.ops.kept.op import Sink, chunk_warps
from teal_kernels.parts.attention.kernel import attention_kernel, join_kernel
from teal_kernels.traits import LLAMA, Traits

BLOCK_T = 32


@dataclass(frozen=True, slots=True)
class AttentionShares:
    """Scratch between the two launches.

    Attributes:
        mixed: float32 [heads, shares, head_dim]; peak, total: float32 [heads, shares].
    """

    mixed: Tensor
    peak: Tensor
    total: Tensor

    @classmethod
    def empty(cls, heads: int, head_dim: int, shares: int, device: torch.device) -> AttentionShares:
        """Uninitialised scratch."""
        peak = torch.empty(heads, shares, dtype=torch.float32, device=device)
        mixed = torch.empty(heads, shares, head_dim, dtype=torch.float32, device=device)
        return cls(mixed, peak, torch.empty_like(peak))


def launch_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    window: int | None,
    scratch: AttentionShares,
    sink: Sink,
    traits: Traits = LLAMA,
) -> None:
    """What q attends to goes to `sink` as a vector [heads * head_dim].

    Args:
        q: [heads, head_dim], rotated; keys, values: [kv_heads, max_tokens, head_dim].
        position: int64 [1] on the device: this token's place; the cache is filled up to it, itself included.
        window: how many positions are attended to, its own included; None for all.
    """
    heads, head_dim = q.shape
    kv_heads, shares = len(keys), scratch.peak.shape[1]
    group = heads // kv_heads
    scale = head_dim**-0.5 if traits.attention_scale is None else traits.attention_scale
    cap = traits.score_cap
    attention_kernel[(kv_heads, shares)](
        q, keys, values, position, scratch.mixed, scratch.peak, scratch.total, keys.stride(0), scale, cap or 1.0,
        GROUP=group, D=head_dim, SHARES=shares, WINDOW=window or 0, BLOCK_G=triton.next_power_of_2(max(16, group)),
        BLOCK_D=triton.next_power_of_2(max(16, head_dim)), BLOCK_T=BLOCK_T, CAPPED=cap is not None,
        num_warps=4, **launch_options(q.device),
    )  # fmt: skip
    arguments = sink.arguments(heads * head_dim)
    join_kernel[(arguments["CHUNKS"],)](
        scratch.mixed, scratch.peak, scratch.total, q, **arguments, D=head_dim, SHARES=shares,
        num_warps=chunk_warps(sink.chunk), **launch_options(q.device),
    )  # fmt: skip
