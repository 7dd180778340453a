"""One layer of TEAL's published histograms as it lies in its repository, and the thresholds TEAL gives for it.

The archive holds the bins whole; bin centers are stored as differences of their bits, so that they take little room.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from teal_kernels.spec import SITES

_ARCHIVE = Path(__file__).parent / "sparsity" / "teal_mistral_7b_layer_0.npz"
_FILES = {"self_attn": ("attn_in", "attn_out"), "mlp": ("mlp_in", "mlp_mid")}


def expected() -> list[tuple[str, float, float]]:
    """(site, sparsity, threshold) as TEAL computes them."""
    with np.load(_ARCHIVE) as archive:
        return [
            (site, float(sparsity), float(threshold))
            for site, row in zip(SITES, archive["thresholds"], strict=True)
            for sparsity, threshold in zip(archive["sparsity"], row, strict=True)
        ]


def write_layer(folder: Path) -> Path:
    """Write the layer as TEAL does: self_attn/histograms.pt and mlp/histograms.pt."""
    with np.load(_ARCHIVE) as archive:
        counts = dict(zip(SITES, archive["counts"].astype(np.float32), strict=True))
        bits = np.cumsum(archive["center_bits"], axis=1, dtype=np.int32)
    centers = dict(zip(SITES, bits.view(np.float32), strict=True))
    for name, sites in _FILES.items():
        content = {}
        for key, site in zip(("h1", "h2"), sites, strict=True):
            content[key] = torch.from_numpy(counts[site])
            content[f"{key}_centers"] = torch.from_numpy(centers[site].copy())
        (folder / name).mkdir(parents=True)
        torch.save(content, folder / name / "histograms.pt")
    return folder
