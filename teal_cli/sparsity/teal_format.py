"""TEAL's own calibrations: the `histograms/` folders that its authors publish, read and asked as TEAL asks them.

TEAL keeps 10,000 bins of the signed activation x: equal ones between the 1% and the 99% quantile, and one
wide bin at either end. Its rule for a threshold supposes that x is symmetric around zero (`rule="teal"`);
`rule="abs"` takes the quantile of |x| from the same bins instead. Next to `histograms/` TEAL has a `lookup/`
folder of greedy paths, which is a plan's business and not read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.errors import NotFoundError, TealError
from teal_kernels.spec import SITE_INDEX, SITES

if TYPE_CHECKING:
    from torch import Tensor

RULES: Final = ("teal", "abs")

# Our site -> TEAL's folder and key.
_NAMES: Final = {
    "attn_in": ("self_attn", "h1"),
    "attn_out": ("self_attn", "h2"),
    "mlp_in": ("mlp", "h1"),
    "mlp_mid": ("mlp", "h2"),
}
_GIVE: Final = "give the `histograms` folder that TEAL wrote for a model, such as TEAL/models/Mistral-7B/histograms"
_FETCH: Final = "Fetch the whole `histograms` folder of the model again."
_LAYER: Final = re.compile(r"layer-(\d{1,18})", re.ASCII)
_MAX_BINS: Final = 1 << 20  # TEAL has 10,000


@dataclass(frozen=True, slots=True, eq=False)
class TealHistogram:
    """TEAL's bins of every layer and site, and the rule that turns them into thresholds.

    Attributes:
        counts: float32 [layers, 4, bins], as TEAL stores them.
        centers: float32 [layers, 4, bins], ascending.
        rule: `teal` or `abs`.
    """

    counts: NDArray[np.float32]
    centers: NDArray[np.float32]
    rule: str

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.counts)

    def total(self, layer: int, site: str) -> int:
        """How many entries were counted; TEAL's float32 counts make it exact to some seven digits only."""
        return round(float(self.counts[layer, SITE_INDEX[site]].sum(dtype=np.float64)))

    def threshold(self, layer: int, site: str, sparsity: float) -> float:
        """The threshold for a sparsity in (0, 1) by this histogram's rule.

        With the rule `teal` it can be slightly negative at low sparsity, where zero is not the median of x or a bin is
        wider than the quantile looked for. As |x| > t then holds for every x, such a threshold keeps all.
        """
        counts, centers = self.counts[layer, SITE_INDEX[site]], self.centers[layer, SITE_INDEX[site]]
        quantile = _symmetric_quantile if self.rule == "teal" else _magnitude_quantile
        return quantile(counts, centers, sparsity)


def _symmetric_quantile(counts: NDArray[np.float32], centers: NDArray[np.float32], sparsity: float) -> float:
    """TEAL's icdf(0.5 + s/2), operation by operation in torch's float32, so that its figures come out exactly."""
    import torch

    values, heights = torch.from_numpy(centers.copy()), torch.from_numpy(counts.copy())
    cumulative = torch.cumsum(heights, dim=0)
    target = (0.5 + sparsity / 2) * heights.sum()
    right = int(torch.searchsorted(cumulative, target))
    if right == 0:
        return float(values[0])
    if right == len(values):
        return float(values[-1])
    fraction = (target - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
    return float(values[right - 1] + fraction * (values[right] - values[right - 1]))


def _magnitude_quantile(counts: NDArray[np.float32], centers: NDArray[np.float32], sparsity: float) -> float:
    """The t with P(|x| <= t) = s, taking x as uniform within a bin."""
    edges = _edges(centers.astype(np.float64))
    cumulative = np.concatenate(([0.0], np.cumsum(counts, dtype=np.float64)))
    # P(|x| <= t) = F(t) - F(-t) is a straight line between any two of these.
    knots = np.unique(np.abs(np.append(edges, 0.0)))
    share = (np.interp(knots, edges, cumulative) - np.interp(-knots, edges, cumulative)) / cumulative[-1]
    return float(np.interp(sparsity, share, knots))


def _edges(centers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bin edges [bins + 1] from TEAL's centers [bins]: all bins but the first and the last are of one width."""
    half = (centers[-2] - centers[1]) / (len(centers) - 3) / 2
    inner = np.append(centers[1:-1] - half, centers[-2] + half)
    return np.concatenate(([2 * centers[0] - inner[0]], inner, [2 * centers[-1] - inner[-1]]))


def read_histograms(folder: Path, rule: str = "teal") -> TealHistogram:
    """Read TEAL's `histograms/` folder, or a folder that holds one.

    Only tensors are unpickled (`weights_only=True`), so a file from anywhere is safe to read.

    Raises:
        NotFoundError: no such folder, or no layers in it.
        TealError: a layer, file or key is missing, or a file is damaged.
    """
    folder = folder / "histograms" if (folder / "histograms").is_dir() else folder
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
        raise NotFoundError(f"{what}, and TEAL's histograms are a folder", hint=_GIVE)
    found = {int(m[1]) for entry in folder.iterdir() if (m := _LAYER.fullmatch(entry.name))}
    if not found:
        raise NotFoundError(
            f"{folder} has no folders layer-0, layer-1, ...: it is not one of TEAL's histograms/",
            hint=_GIVE,
        )
    missing = max(found) + 1 - len(found)
    if missing:
        first = list(islice((index for index in count() if index not in found), min(missing, 4)))
        raise TealError(f"{folder} lacks {_listed(first, missing)}, though it has layer-{max(found)}", hint=_FETCH)
    layers = [read_layer(folder / f"layer-{index}") for index in sorted(found)]
    counts, centers = (np.stack(parts) for parts in zip(*layers, strict=True))
    return TealHistogram(counts, centers, rule)


def _listed(first: list[int], number: int) -> str:
    names = ", ".join(f"layer-{index}" for index in first)
    return names if number == len(first) else f"{names} and {number - len(first)} more layers"


def read_layer(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Counts and centers, each float32 [4, bins], of one `layer-N` folder.

    Raises:
        TealError: a file or key is missing, or a file is damaged.
    """
    files = {name: _load(folder / name / "histograms.pt") for name in ("self_attn", "mlp")}
    rows = [_bins(folder / name / "histograms.pt", files[name], key) for name, key in _NAMES.values()]
    if len({counts.shape for counts, _ in rows}) > 1:
        raise TealError(f"{folder} has histograms of different numbers of bins", hint=_FETCH)
    counts, centers = zip(*rows, strict=True)
    return np.stack(counts), np.stack(centers)


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TealError(f"{file} is missing", hint=_FETCH) from error
    except Exception as error:  # on damaged bytes the unpickler raises whatever comes
        raise TealError(f"{file} is damaged, or not a file of tensors", hint=_FETCH) from error
    if not isinstance(content, dict):
        raise TealError(f"{file} does not hold TEAL's histograms", hint=_FETCH)
    return content


def _bins(file: Path, content: dict[str, Any], key: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Counts and centers of one key, checked."""
    import torch

    heights, values = content.get(key), content.get(f"{key}_centers")
    if not isinstance(heights, torch.Tensor) or not isinstance(values, torch.Tensor):
        raise TealError(f"{file} lacks {key} or {key}_centers", hint=_FETCH)
    if not (_plain(heights) and _plain(values)):
        raise TealError(f"{file}: {key} is no plain tensor of at most {_MAX_BINS:,} numbers", hint=_FETCH)
    counts, centers = heights.float().flatten().numpy(), values.float().flatten().numpy()
    sound = len(counts) == len(centers) >= 4 and np.isfinite(counts).all() and np.isfinite(centers).all()
    if not sound or (counts < 0).any() or (np.diff(centers) < 0).any() or counts.sum() == 0:
        raise TealError(f"{file}: the bins of {key} make no histogram", hint=_FETCH)
    return counts, centers


def _plain(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at, and are not more than there could be: a few bytes can say billions."""
    import torch

    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and (tensor.is_floating_point() or tensor.dtype in (torch.int32, torch.int64))
        and not tensor.requires_grad
        and tensor.numel() <= _MAX_BINS
    )


def check_widths(histogram: TealHistogram, channels: dict[str, int]) -> None:
    """Compare how often each site was counted with how wide it is in a model: every token counts once per channel.

    Args:
        channels: site -> K of the model.

    Raises:
        TealError: the sites were counted in another ratio, so the histograms are another model's.
    """
    for layer in range(histogram.layers):
        tokens = {site: histogram.total(layer, site) / channels[site] for site in SITES}
        if max(tokens.values()) > 1.01 * min(tokens.values()):
            raise TealError(
                f"layer {layer} of these histograms was counted on vectors of other widths than the model's: "
                + ", ".join(f"{site} {channels[site]}" for site in SITES),
                hint="name the model that the histograms were made for with -m",
            )
