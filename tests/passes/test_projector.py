"""The quick cut of many rows against the reference that defines it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from teal_cli.passes.projector import count_kept, shrink
from teal_kernels.ops.threshold.reference import threshold_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_drops_what_the_reference_drops(dtype: torch.dtype) -> None:
    """At thresholds on the grid of the dtype, a little below and above it, 0, and beyond every entry; same bits."""
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, 65504.0, -65504.0], dtype=dtype)
    on_grid = [float(value) for value in x.float().abs().flatten()[10:30]]
    beside = [float(np.nextafter(np.float32(t), np.float32(way))) for t in on_grid for way in (0, 10)]
    for t in (0.0, 1e-8, 1e6, *on_grid, *beside):
        found, expected = shrink(x, t), threshold_reference(x, torch.tensor(t))
        assert torch.equal(found, expected), t
        assert not torch.signbit(found[found == 0]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_entries_are_counted(dtype: torch.dtype) -> None:
    """NaN and the smallest number are entries; rows that are parts of wider ones count by themselves."""
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[x < 0.3] = 0
    x[0, :2] = torch.tensor([torch.nan, torch.finfo(dtype).smallest_normal], dtype=dtype)
    for rows in (x, x[:, 3:20], x[2:5], x[:0]):
        assert count_kept(rows) == int(torch.count_nonzero(rows))
