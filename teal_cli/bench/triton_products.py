"""The Triton contenders: our gather, as an op and as a step launches it, and the published masked split-K method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from teal_cli.bench.inputs import Operands
from teal_cli.bench.timing import replayed
from teal_kernels.baselines.masked_splitk.op import CONFIGS, MaskedConfig, masked_splitk
from teal_kernels.configs import gemv_config
from teal_kernels.ops.kept.op import KeptList, launch_compact
from teal_kernels.ops.sparse_gemv.op import launch_gather, launch_reduce

_TRIAL_CALLS = 64
_TRIALS = 3


class Named(NamedTuple):
    """A contender: its name, whether it is the published method, and the call."""

    name: str
    published: bool
    call: Callable[[int], Tensor]


def triton_products(operands: Operands) -> Iterator[Named]:
    """`triton` is the whole op. `triton-step` is the gather alone: in a step, the kernel before it lists what is kept
    and the one after it adds the shares up, each as part of its own work."""
    x, weight, _ = operands.at(0)
    inputs, outputs = weight.shape
    segments = operands.matrix.segments
    config = gemv_config(inputs, outputs, weight.element_size(), operands.sparsity, weight.device)
    limits = operands.vectors.thresholds[:, None].repeat(1, len(segments)).clamp_min(0)
    lists = [KeptList.empty(inputs, x.dtype, x.device) for _ in operands.vectors.x]
    for number, kept in enumerate(lists):
        launch_compact(operands.vectors.x[number], limits[number], kept)
    partial = torch.empty(config.splits, outputs, dtype=torch.float32, device=x.device)
    out = torch.empty(outputs, dtype=x.dtype, device=x.device)
    scratch = KeptList.empty(inputs, x.dtype, x.device)

    def whole(turn: int) -> Tensor:
        x, weight, number = operands.at(turn)
        launch_compact(x, limits[number], scratch)
        launch_gather(scratch, weight, limits[number], segments, partial, config)
        launch_reduce(partial, out)
        return out

    def gather(turn: int) -> Tensor:
        _, weight, number = operands.at(turn)
        launch_gather(lists[number], weight, limits[number], segments, partial, config)
        return partial

    yield Named("triton", False, whole)
    yield Named("triton-step", False, gather)
    yield Named("masked split-K", True, _published(operands))


def _published(operands: Operands) -> Callable[[int], Tensor]:
    """The published method in the fastest of its configurations for this shape, dtype and sparsity."""
    x, weight, _ = operands.at(0)
    half = x.dtype == torch.float16
    out = torch.empty(weight.shape[1], dtype=torch.float16 if half else torch.float32, device=x.device)

    def with_config(config: MaskedConfig) -> Callable[[int], Tensor]:
        def call(turn: int) -> Tensor:
            x, weight, number = operands.at(turn)
            masked_splitk(x, weight, operands.vectors.limits[number], out, config)
            return out

        return call

    def seconds(config: MaskedConfig) -> float:
        call = with_config(config)
        replay = replayed(lambda: [call(turn) for turn in range(min(len(operands.copies), _TRIAL_CALLS))])
        return min(replay() for _ in range(_TRIALS))

    if x.device.type != "cuda":  # under Triton's interpreter there is nothing to choose by
        return with_config(CONFIGS[0])
    return with_config(min(CONFIGS, key=seconds))
