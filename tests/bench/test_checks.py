"""A check must see a single wrong row, and must let rounding pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from teal_cli.bench.checks import Check, Follower, check_greedy, check_logits, check_product, exact_product
from teal_kernels.matrix import FloatMatrix
from teal_kernels.thresholds import Thresholds

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [-1.0, 0.7])
def test_rounding_passes_and_a_missing_row_does_not(dtype: torch.dtype, threshold: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator).to(dtype)
    weight = torch.randn(4096, 64, generator=generator).to(dtype)
    wanted = exact_product(x, weight, threshold)
    kept = torch.where(x.float().abs() > threshold, x, 0).double()
    torch.testing.assert_close(wanted.double(), kept @ weight.double(), rtol=1e-4, atol=1e-3)
    assert check_product(wanted.to(dtype), wanted, dtype).passed
    kept[int(kept.abs().argmax())] = 0
    assert not check_product((kept @ weight.double()).to(dtype), wanted, dtype).passed


def test_shares_are_added_up() -> None:
    wanted = torch.arange(1.0, 9.0)
    assert check_product(torch.stack((wanted / 4, 3 * wanted / 4)), wanted, torch.float32).passed


def test_a_result_that_is_no_number_fails_and_can_be_written() -> None:
    check = check_product(torch.full((4,), math.nan), torch.ones(4), torch.bfloat16)
    assert not check.passed
    assert check.finite is None
    assert str(check).startswith("failed")
    assert str(Check(0.0, 0.1)) == "passed"


def test_logits_may_differ_by_a_constant() -> None:
    logits = torch.randn(3, 100)
    assert check_logits(logits + 5, logits, torch.float32).passed
    assert not check_logits(logits.roll(1, dims=1), logits, torch.bfloat16).passed


def test_greedy_allows_near_equals_only() -> None:
    logits = torch.linspace(0, 10, 1000)[None].repeat(2, 1)
    assert check_greedy(logits, torch.tensor([999, 998])).passed
    assert not check_greedy(logits, torch.tensor([999, 500])).passed


def test_a_follower_multiplies_what_the_step_kept_and_counts_what_it_would_not_have() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.1]])
    rows = {"mlp_mid": torch.tensor([[0.0, -2.0, 3.0, 0.0]])}
    thresholds = Thresholds(np.full((1, 7), 0.5, np.float32))
    follower = Follower(rows, thresholds)
    out = follower(0, "mlp_mid", x, FloatMatrix(torch.eye(4)))
    assert out.tolist() == [[0.0, -2.0, 3.0, 0.0]]
    assert (follower.differing, follower.decided) == (1, 4)
    assert not follower.check().passed
