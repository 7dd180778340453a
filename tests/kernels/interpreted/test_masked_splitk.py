"""The baseline computes what we compute, or a comparison with it would mean nothing."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import operands, relative_error

from teal_kernels.baselines.masked_splitk.op import MaskedConfig, masked_splitk
from teal_kernels.ops.sparse_gemv.reference import sparse_gemv_reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_matches_the_reference(dtype):
    x, weight = operands(100, 70, dtype)
    out = torch.full((70,), torch.nan, dtype=dtype)
    masked_splitk(x, weight, 0.6, out, MaskedConfig(32, 64))
    wanted = sparse_gemv_reference(x.double(), weight.double(), torch.tensor([0.6]), (70,))
    assert relative_error(out, wanted) < (2e-3 if dtype == torch.float16 else 1e-6)
