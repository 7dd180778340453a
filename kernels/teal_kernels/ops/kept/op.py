"""Buffers of kept lists, and where the fused kernels of a decode step put a site's vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from teal_kernels.configs import EXACT

CHUNK: Final = 2048
"""Entries per program that compacts. The longer they are, the fewer counts the reader of the list has to add up."""


def chunk_for(size: int, chunk: int = CHUNK) -> int:
    """`chunk`, or the power of two that holds a shorter vector of `size` entries."""
    return min(chunk, max(16, 1 << (size - 1).bit_length()))


def chunk_warps(chunk: int) -> int:
    """Warps of a program that handles a chunk: four entries per thread, so that many loads are in flight."""
    return max(1, chunk // 128)


@dataclass(frozen=True, slots=True)
class KeptList:
    """Device buffers of a chunked kept list (see `kernel.py`); their contents are written by kernels only.

    Attributes:
        index: int32 [chunks * chunk]; value: [chunks * chunk], dtype of the vector; count: int32 [chunks].
        chunk: entries of the vector per chunk, a power of two.
    """

    index: Tensor
    value: Tensor
    count: Tensor
    chunk: int

    @classmethod
    def empty(cls, size: int, dtype: torch.dtype, device: torch.device, chunk: int = CHUNK) -> KeptList:
        """Uninitialised buffers for a vector of `size` entries."""
        chunk = chunk_for(size, chunk)
        chunks = -(-size // chunk)
        return cls(
            index=torch.empty(chunks * chunk, dtype=torch.int32, device=device),
            value=torch.empty(chunks * chunk, dtype=dtype, device=device),
            count=torch.empty(chunks, dtype=torch.int32, device=device),
            chunk=chunk,
        )


@dataclass(frozen=True, slots=True)
class Capture:
    """A ring of rows on the device: row `slot[0]` receives what the product of this site consumes.

    Attributes:
        ring: [slots, K] contiguous, dtype of the vector.
        slot: int64 [1], below `slots`.
    """

    ring: Tensor
    slot: Tensor


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a fused kernel leaves a site's vector [K]: a kept list for a sparse product, or a row for a dense one.

    Attributes:
        chunk: entries each program of the fused kernel handles, a power of two; the chunk of the list.
        kept, thresholds, tally: the list, float32 [P] or [P, K], and int64 [P, chunks] that grows by the entries each
            projection keeps; None for a dense product.
        row: [K], for a dense product; None for a sparse one.
        capture: a ring that gets a copy, thresholded at the lowest threshold; None for no copy.
    """

    chunk: int
    kept: KeptList | None
    thresholds: Tensor | None
    tally: Tensor | None
    row: Tensor | None
    capture: Capture | None

    def arguments(self, size: int) -> dict[str, Any]:
        """The arguments of `emit` for a vector of `size` entries."""
        kept, capture = self.kept, self.capture
        return {
            "thresholds_ptr": self.thresholds,
            "index_ptr": None if kept is None else kept.index,
            "value_ptr": None if kept is None else kept.value,
            "count_ptr": None if kept is None else kept.count,
            "tally_ptr": self.tally,
            "row_ptr": self.row,
            "ring_ptr": None if capture is None else capture.ring,
            "slot_ptr": None if capture is None else capture.slot,
            "K": size,
            "P": 1 if self.thresholds is None else len(self.thresholds),
            "CHUNKS": -(-size // self.chunk),
            "CHUNK": self.chunk,
            "SPARSE": 0 if self.thresholds is None else self.thresholds.dim(),
            "RING": capture is not None,
        }


def launch_compact(x: Tensor, thresholds: Tensor, kept: KeptList) -> None:
    """Fill `kept` with the entries of x [K] above the lowest of the thresholds float32 [P] or [P, K]."""
    from teal_kernels.ops.kept.kernel import compact_kernel

    compact_kernel[(len(kept.count),)](
        x, thresholds, kept.index, kept.value, kept.count, len(x),
        P=len(thresholds), CHUNK=kept.chunk, PER_CHANNEL=thresholds.dim() == 2,
        num_warps=chunk_warps(kept.chunk), **EXACT,
    )  # fmt: skip
