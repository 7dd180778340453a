"""The dense pass that counts the magnitudes at every site, with one transformer layer in memory at a time.

Peak memory is a layer, the hidden states of all sequences and the histograms, whatever the size of the model:
`expected_peak` computes it, and a calibration records what was measured. This module does not know where tokens come
from or where histograms go.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.weights import Checkpoint
from teal_cli.passes.forward import Advance, Where, forward
from teal_cli.passes.layers import StreamedLayers
from teal_cli.sparsity.histogram import MAGNITUDES, ExpertHistogram, MagnitudeHistogram
from teal_kernels.spec import SITES


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """The end of a pass.

    Attributes:
        histogram: of every layer and site.
        seconds: wall-clock time of the pass.
        peak_memory_bytes: most resident memory of this process until now; None where the system does not
            tell.
        peak_device_bytes: most memory that PyTorch gave out on the GPU during the pass; None on a CPU.
    """

    histogram: MagnitudeHistogram
    seconds: float
    peak_memory_bytes: int | None
    peak_device_bytes: int | None


def observe(
    checkpoint: Checkpoint, tokens: NDArray[np.int64], dtype: torch.dtype, device: torch.device
) -> Iterator[Advance | Observed]:
    """Run token blocks through a model layer by layer and count |x| at each site.

    Args:
        tokens: int64 [sequences, seq_len]; each row is a sequence of its own, from position 0.
        dtype: bfloat16, float16 or float32; activations are counted as they are computed in it.

    Yields:
        Advance after each layer of a sequence, and Observed at the end.

    Raises:
        UsageError: the sequences are longer than the model's context.
        TealError: an activation is not finite, a token is not in the vocabulary, or the checkpoint is
            damaged.
    """
    layers = StreamedLayers(checkpoint, dtype, device)
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    config, mixture = layers.config, layers.config.mixture
    histogram = MagnitudeHistogram.empty(config.layers, str(dtype).removeprefix("torch."))
    if mixture is not None:
        histogram.experts = ExpertHistogram.empty(histogram.dtype, config.layers, mixture.experts, mixture.width)

    def count(where: Where, x: Tensor, kept: Tensor) -> None:
        histogram.add(where.layer, where.site, x)
        if where.experts is not None and histogram.experts is not None:
            histogram.experts.add(where.layer, x, where.experts)

    yield from forward(layers, tokens, visit=count)
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    yield Observed(histogram, time.perf_counter() - start, peak_resident_bytes(), on_device)


def peak_resident_bytes() -> int | None:
    """The most memory this process ever had resident; None on Windows, which does not tell it this way."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


@dataclass(frozen=True, slots=True)
class ExpectedPeak:
    """Peak memory of a pass, by its parts, in bytes.

    Attributes:
        embedding: all of it is held once, before the first layer.
        layer: the weights of one layer.
        mapped: on a CPU, the part of the checkpoint's files that is mapped while a layer is copied out of it; the
            embedding is copied likewise.
        hidden: hidden states of all sequences.
        histogram: the counts of all layers and sites, on the host.
        workspace: intermediate values of one sequence in one layer.
    """

    embedding: int
    layer: int
    mapped: int
    hidden: int
    histogram: int
    workspace: int

    @property
    def total(self) -> int:
        """The peak: in the layers, or before them if the vocabulary is large; mappings go before work begins."""
        in_layers = self.layer + max(self.mapped, self.workspace) + self.histogram + self.hidden
        before = self.embedding + max(self.embedding if self.mapped else 0, self.hidden)
        return max(in_layers, before)


def expected_peak(
    config: ModelConfig, *, sequences: int, seq_len: int, itemsize: int, device: str = "cpu"
) -> ExpectedPeak:
    """What `observe` will need beyond Python and its libraries; `itemsize` is that of the dtype to run in."""
    layer = max(map(config.layer_entries, range(config.layers))) * itemsize
    hidden = seq_len * config.hidden
    counted = len(SITES) + (0 if config.mixture is None else config.mixture.experts)
    # The widest moment is the MLP: its input and output, gate and up, their product; float32 inside the norm.
    workspace = (4 * hidden + 3 * seq_len * config.intermediate) * itemsize + 8 * hidden
    return ExpectedPeak(
        embedding=config.vocab * config.hidden * itemsize,
        layer=layer,
        mapped=layer if device == "cpu" else 0,
        hidden=sequences * hidden * itemsize,
        histogram=config.layers * counted * MAGNITUDES * 8 if device == "cpu" else 0,
        workspace=workspace,
    )
