"""The Triton contenders of `teal bench kernels` pass its checks, the published method among them."""

from __future__ import annotations

import pytest
import torch

from teal_cli.bench.kernels import KernelRequest, bench_kernels
from teal_cli.bench.rows import KernelRow
from teal_cli.bench.shapes import MatrixShape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_are_right(dtype):
    matrix = MatrixShape("qkv", ("m",), "attn_in", 96, (40, 16, 16))
    asked = KernelRequest([matrix], (dtype,), (0.5,), torch.device("cpu"), 2, pool_bytes=1 << 16, probe_bytes=1 << 16)
    rows = [event for event in bench_kernels(asked) if isinstance(event, KernelRow)]
    found = {row.product: row for row in rows if row.sparsity}
    assert {"triton", "triton-step", "masked split-K"} <= set(found)
    assert {row.check for row in rows} == {"passed"}
    assert found["masked split-K"].role == "published"
