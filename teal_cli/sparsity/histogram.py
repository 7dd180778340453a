"""Exact histograms of activation magnitudes (TEAL, section 4.1, without its sorting, binning and clipping).

A 16-bit float has 32,768 magnitudes, its bits without the sign, and their order is the order of the integers.
Counting each one is exact and streaming: no range pass, nothing held but the counts, no outlier clipped. This
module knows layers and sites as indices into counts; it does not know where activations come from or what a
threshold is used for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

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

    Attributes:
        experts: of a mixture of experts, the same for each expert at `mlp_mid`; else None.

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
        self.experts: ExpertHistogram | None = None

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
        counts = self.counts[layer, SITE_INDEX[site]]
        if not counts.any():
            raise TealError(f"layer {layer}, {site}: the histogram is empty")
        return quantile(counts, self._magnitudes, sparsity)

    def cdf(self, layer: int, site: str, t: float) -> float:
        """P(|x| <= t): the sparsity that threshold t realises on what was counted.

        A negative t drops nothing.
        """
        counts = self.counts[layer, SITE_INDEX[site]]
        below = np.searchsorted(self._magnitudes, np.float32(t), side="right")
        return float(counts[:below].sum() / counts.sum())


def quantile(counts: NDArray[np.int64], values: NDArray[np.float32], share: float) -> float:
    """The smallest of ascending values t with P(value <= t) >= share, for counts [n] that are not all 0."""
    cumulative = np.cumsum(counts)
    # Dividing before comparing: k/n is rounded just as the decimal `share` is, so equal means equal.
    return float(values[np.searchsorted(cumulative / cumulative[-1], share, side="left")])


def count_magnitudes(x: Tensor, dtype: str) -> Tensor:
    """How often each magnitude of a 16-bit float occurs in x: int64 [32768] on the device of x."""
    import torch

    flat = x.reshape(-1).to(getattr(torch, dtype))
    counts = torch.zeros(MAGNITUDES, dtype=torch.int64, device=x.device)
    for piece in flat.split(_PIECE):
        counts += torch.bincount(piece.view(torch.int16).bitwise_and(MAGNITUDES - 1), minlength=MAGNITUDES)
    return counts


class ExpertHistogram:
    """How often each magnitude occurs at `mlp_mid`, per layer and expert of a mixture, over the tokens that passed it.

    A vector there is that of a token's first expert, then of its second, and so on (`teal_kernels.experts`).

    Args:
        dtype: the grid of magnitudes, as in `MagnitudeHistogram`.
        counts: int64 [layers, E, 32768]; zeros in a layer without experts.
        width: of an expert.
    """

    def __init__(self, dtype: str, counts: NDArray[np.int64], width: int) -> None:
        self.dtype, self.counts, self.width = dtype, counts, width
        self._magnitudes = magnitudes(dtype)

    @classmethod
    def empty(cls, dtype: str, layers: int, experts: int, width: int) -> ExpertHistogram:
        """No counts yet. Memory that is never counted in is never touched: most magnitudes never occur."""
        return cls(dtype, np.zeros((layers, experts, MAGNITUDES), np.int64), width)

    def add(self, layer: int, x: Tensor, experts: Tensor) -> None:
        """Count the entries of x [S, k width] of tokens that passed experts [S, k]; all of them are finite."""
        parts = x.unflatten(1, (experts.shape[1], self.width))
        for expert in experts.unique().tolist():
            self.counts[layer, expert] += count_magnitudes(parts[experts == expert], self.dtype).cpu().numpy()

    def tokens(self, layer: int) -> NDArray[np.int64]:
        """How many tokens passed each expert, int64 [E]."""
        return self.counts[layer].sum(-1) // self.width

    def threshold(self, layer: int, expert: int, sparsity: float) -> float:
        """As `MagnitudeHistogram.threshold`, of an expert that saw a token."""
        return quantile(self.counts[layer, expert], self._magnitudes, sparsity)

    def dropped(self, layer: int, thresholds: NDArray[np.float32]) -> float:
        """The share of all entries of a layer that thresholds [E] drop, each of its expert's."""
        below = np.searchsorted(self._magnitudes, thresholds, side="right")
        counts = self.counts[layer]
        return float(sum(row[:stop].sum() for row, stop in zip(counts, below, strict=True)) / counts.sum())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a file holds: the counts from the first magnitude that occurs to the last."""
        found = np.flatnonzero(self.counts.any((0, 1)))
        first, stop = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
        return {
            "expert_counts": self.counts[..., first:stop],
            "expert_first": np.array(first),
            "expert_width": np.array(self.width),
        }

    @classmethod
    def of_arrays(cls, dtype: str, layers: int, arrays: Mapping[str, Any]) -> ExpertHistogram:
        """What `arrays` gave.

        Raises:
            ValueError: it is damaged.
        """
        counts, first, width = arrays["expert_counts"], int(arrays["expert_first"]), int(arrays["expert_width"])
        stop = first + counts.shape[-1]
        if counts.dtype != np.int64 or counts.ndim != 3 or len(counts) != layers or counts.min(initial=0) < 0:
            raise ValueError(f"counts of experts are {counts.dtype} {list(counts.shape)}")
        if first < 0 or stop > len(magnitudes(dtype)) or width < 1 or (counts.sum(-1) % width).any():
            raise ValueError("counts of experts are not those of whole tokens")
        found = cls.empty(dtype, layers, counts.shape[1], width)
        found.counts[..., first:stop] = counts
        return found
