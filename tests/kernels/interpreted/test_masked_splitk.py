"""The baseline computes what we compute, or a comparison with it would mean nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from kernel_cases import operands, relative_error

from teal_kernels.sparse_gemv.reference import sparse_gemv_reference

FILE = Path(__file__).parents[3] / "kernels" / "benchmarks" / "masked_splitk.py"


@pytest.fixture(scope="module")
def baseline():
    import sys

    specification = importlib.util.spec_from_file_location("masked_splitk", FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules["masked_splitk"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_matches_the_reference(baseline, dtype):
    x, weight = operands(100, 70, dtype)
    out = torch.full((70,), torch.nan, dtype=dtype)
    baseline.masked_splitk(x, weight, 0.6, out, baseline.MaskedConfig(32, 64))
    wanted = sparse_gemv_reference(x.double(), weight.double(), torch.tensor([0.6]), (70,))
    assert relative_error(out, wanted) < (2e-3 if dtype == torch.float16 else 1e-6)
