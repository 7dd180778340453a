"""Exact histograms of activation magnitudes (TEAL, section 4.1, without its sorting, binning and clipping).

A 16-bit float has 32,768 magnitudes, its bits without the sign, and their order is the order of the integers.
Counting each one is exact and streaming: no range pass, nothing held but the counts, no outlier clipped. This
module knows layers and sites as indices into counts; it does not know where activations come from or what a
threshold is used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.errors import TealError
from teal_kernels.spec import SITE_INDEX, SITES

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDES: Final = 1 << 15
DTYPES: Final = ("bfloat16", "float16")

# The bits of infinity; every magnitude from here on is infinite or not a number.
_INFINITE: Final[Mapping[str, int]] = {"bfloat16": 0x7F80, "float16": 0x7C00}
# Bits are copied to lose their sign, 8 MiB at a time.
_PIECE: Final = 1 << 22


def magnitudes(dtype: str) -> NDArray[np.float32]:
    """The finite magnitudes of a 16-bit float in ascending order, float32 [n]; bit pattern i is entry i."""
    bits = np.arange(_INFINITE[dtype], dtype=np.uint16)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


class MagnitudeHistogram:
    """How often each magnitude occurs, per layer and site.

    Args:
        dtype: `bfloat16` or `float16`, the grid of magnitudes.
        counts: int64 [layers, 4, 32768].

    Raises:
        TealError: counts of another shape, negative ones, or ones at magnitudes that are not finite.
    """

    def __init__(self, dtype: str, counts: NDArray[np.int64]) -> None:
        if dtype not in DTYPES or counts.dtype != np.int64 or counts.shape[1:] != (len(SITES), MAGNITUDES):
            raise TealError(f"this is no histogram of magnitudes: {counts.dtype} {list(counts.shape)}, {dtype}")
        if counts.min(initial=0) < 0 or counts[..., _INFINITE[dtype] :].any():
            raise TealError("the histogram of magnitudes is damaged: it holds counts that cannot be")
        self.dtype = dtype
        self.counts = counts
        self._magnitudes = magnitudes(dtype)

    @classmethod
    def empty(cls, layers: int, dtype: str) -> MagnitudeHistogram:
        """No counts yet. float32 activations are counted on the bfloat16 grid."""
        grid = "bfloat16" if dtype == "float32" else dtype
        return cls(grid, np.zeros((layers, len(SITES), MAGNITUDES), np.int64))

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.counts)

    def add(self, layer: int, site: str, x: Tensor) -> None:
        """Count every entry of x, any shape. A wider dtype is rounded to the grid first, to nearest even.

        Raises:
            TealError: an entry is infinite or not a number.
        """
        found = count_magnitudes(x, self.dtype).cpu().numpy()
        wrong = int(found[_INFINITE[self.dtype] :].sum())
        if wrong:
            raise TealError(
                f"layer {layer}, {site}: {wrong:,} of {x.numel():,} activations are not finite",
                hint="try --dtype bfloat16 or float32; if that fails too, the weights are damaged",
            )
        self.counts[layer, SITE_INDEX[site]] += found

    def total(self, layer: int, site: str) -> int:
        """How many entries were counted."""
        return int(self.counts[layer, SITE_INDEX[site]].sum())

    def threshold(self, layer: int, site: str, sparsity: float) -> float:
        """The smallest magnitude t with P(|x| <= t) >= sparsity, for sparsity in [0, 1).

        Raises:
            TealError: nothing was counted there.
        """
        cumulative = np.cumsum(self.counts[layer, SITE_INDEX[site]])
        total = cumulative[-1]
        if total == 0:
            raise TealError(f"layer {layer}, {site}: the histogram is empty")
        # Dividing before comparing: k/n is rounded just as the decimal `sparsity` is, so equal means equal.
        return float(self._magnitudes[np.searchsorted(cumulative / total, sparsity, side="left")])

    def cdf(self, layer: int, site: str, t: float) -> float:
        """P(|x| <= t): the sparsity that threshold t realises on what was counted.

        A negative t drops nothing.
        """
        counts = self.counts[layer, SITE_INDEX[site]]
        below = np.searchsorted(self._magnitudes, np.float32(t), side="right")
        return float(counts[:below].sum() / counts.sum())


def count_magnitudes(x: Tensor, dtype: str) -> Tensor:
    """How often each magnitude of a 16-bit float occurs in x: int64 [32768] on the device of x."""
    import torch

    flat = x.reshape(-1).to(getattr(torch, dtype))
    counts = torch.zeros(MAGNITUDES, dtype=torch.int64, device=x.device)
    for piece in flat.split(_PIECE):
        counts += torch.bincount(piece.view(torch.int16).bitwise_and(MAGNITUDES - 1), minlength=MAGNITUDES)
    return counts
