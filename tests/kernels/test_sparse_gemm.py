"""The product of many sparse rows against float64."""

from __future__ import annotations

from math import inf

import pytest
import torch

from teal_kernels.matrix import FloatMatrix
from teal_kernels.ops.sparse_gemm import op
from teal_kernels.ops.sparse_gemm.op import skips_from, skips_zeros, sparse_gemm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_the_product_and_a_row_does_not_know_of_others(dtype: torch.dtype) -> None:
    """Odd sizes, more than one tile each way; a projection by itself and a row by itself give the same bits."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 203, generator=generator).to(dtype), torch.randn(203, 90, generator=generator).to(dtype)
    x[torch.rand(7, 203, generator=generator) < 0.6] = 0
    x[2], x[3, 1:] = 0, 0
    matrix = FloatMatrix(weight, (70, 20))
    assert skips_zeros(matrix)
    found = sparse_gemm(x, matrix)
    exact = x.double() @ weight.double()
    assert found.dtype == dtype
    near = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(found.double(), exact, rtol=near, atol=max(near * 0.1, 1e-5))
    assert torch.equal(sparse_gemm(x, matrix, 1), found[:, 70:])
    assert torch.equal(sparse_gemm(x[4:5], matrix), found[4:5])


@pytest.mark.parametrize(
    ("features", "dtype", "share"),
    [
        ({"avx2"}, torch.bfloat16, 0.5),
        ({"avx2", "avx512f"}, torch.bfloat16, 0.8),
        ({"avx2", "avx512f", "avx512bf16"}, torch.bfloat16, inf),
        ({"avx2", "avx512f", "amx-bf16"}, torch.bfloat16, inf),
        ({"avx2", "avx512f", "avx512bf16"}, torch.float32, 0.8),
    ],
)
def test_skipping_is_chosen_by_processor_and_dtype(
    features: set[str], dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_features", lambda: frozenset(features))
    assert skips_from(FloatMatrix(torch.zeros(4, 8, dtype=dtype))) == share
    assert skips_from(FloatMatrix(torch.zeros(4, 8, dtype=dtype, device="meta"))) == inf


def test_what_is_dropped_is_not_read() -> None:
    weight = torch.randn(10, 8)
    weight[3] = torch.inf
    x = torch.randn(4, 10)
    x[:, 3] = 0
    assert torch.isfinite(sparse_gemm(x, FloatMatrix(weight))).all()
