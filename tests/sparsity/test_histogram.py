"""Counting magnitudes: against sorting with numpy, in every dtype, for whatever values hypothesis thinks of."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from teal_cli.errors import TealError
from teal_cli.sparsity import histogram as module
from teal_cli.sparsity.histogram import MAGNITUDES, MagnitudeHistogram, count_magnitudes, magnitudes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

grids = st.sampled_from(sorted(DTYPES))
sparsities = st.floats(0.0, 1.0, exclude_max=True) | st.integers(0, 99).map(lambda i: i / 100)


@st.composite
def activations(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """A vector of finite values of either 16-bit dtype, any bits, zeros of both signs and repeats among them."""
    dtype = draw(grids)
    bits = draw(hnp.arrays(np.uint16, st.integers(1, 200), elements=st.integers(0, 0xFFFF)))
    x = torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype])
    return dtype, torch.where(x.isfinite(), x, torch.zeros_like(x))


def counted(dtype: str, *parts: torch.Tensor) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram.empty(1, dtype)
    for part in parts:
        histogram.add(0, "mlp_mid", part)
    return histogram


@given(activations(), sparsities)
@settings(max_examples=200, deadline=None)
def test_threshold_is_the_smallest_that_drops_enough(given: tuple[str, torch.Tensor], sparsity: float) -> None:
    dtype, x = given
    ordered = np.sort(x.float().abs().numpy())
    needed = next(k for k in range(len(ordered) + 1) if k / len(ordered) >= sparsity)
    expected = ordered[needed - 1] if needed else 0.0
    assert counted(dtype, x).threshold(0, "mlp_mid", sparsity) == expected


@given(activations(), st.floats(-1e38, 1e38) | st.sampled_from([0.0, -0.0, 1.0]))
@settings(max_examples=200, deadline=None)
def test_cdf_is_what_a_comparison_drops(given: tuple[str, torch.Tensor], t: float) -> None:
    dtype, x = given
    dropped = (~(x.float().abs() > np.float32(t))).double().mean().item()
    assert counted(dtype, x).cdf(0, "mlp_mid", t) == pytest.approx(dropped, abs=1e-15)


@given(activations())
@settings(deadline=None)
def test_parts_add_up(given: tuple[str, torch.Tensor]) -> None:
    dtype, x = given
    whole, parts = counted(dtype, x), counted(dtype, x[: len(x) // 2], x[len(x) // 2 :])
    assert (whole.counts == parts.counts).all()
    assert whole.total(0, "mlp_mid") == len(x)
    assert whole.total(0, "mlp_in") == 0


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_magnitude_has_its_place(dtype: str) -> None:
    values = magnitudes(dtype)
    assert (np.diff(values) > 0).all()
    assert values[0] == 0
    assert values[-1] == torch.finfo(DTYPES[dtype]).max
    x = torch.from_numpy(values).to(DTYPES[dtype])
    counts = count_magnitudes(torch.cat((x, -x)), dtype)
    assert (counts[: len(values)] == 2).all()
    assert counts.shape == (MAGNITUDES,)
    assert counts[len(values) :].sum() == 0


def test_float32_is_rounded_to_the_nearest_bfloat16() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    histogram = counted("float32", x)
    assert histogram.dtype == "bfloat16"
    assert (histogram.counts == counted("bfloat16", x.bfloat16()).counts).all()
    dropped = (x.abs() <= histogram.threshold(0, "mlp_mid", 0.5)).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.003)


def test_large_activations_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = count_magnitudes(x, "bfloat16")
    monkeypatch.setattr(module, "_PIECE", 10)
    assert torch.equal(count_magnitudes(x, "bfloat16"), whole)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_not_finite_is_refused_by_name(dtype: str, bad: float) -> None:
    x = torch.ones(10, dtype=getattr(torch, dtype))
    x[3] = bad
    histogram = MagnitudeHistogram.empty(3, dtype)
    with pytest.raises(TealError, match="layer 2, attn_out: 1 of 10 activations are not finite"):
        histogram.add(2, "attn_out", x)
    assert histogram.counts.sum() == 0


def test_an_empty_histogram_has_no_thresholds() -> None:
    with pytest.raises(TealError, match="layer 0, mlp_in: the histogram is empty"):
        MagnitudeHistogram.empty(1, "bfloat16").threshold(0, "mlp_in", 0.5)


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((2, 4, 100), np.int64),
        np.zeros((2, 3, MAGNITUDES), np.int64),
        np.zeros((2, 4, MAGNITUDES), np.float32),
        np.full((1, 4, MAGNITUDES), -1, np.int64),
        np.ones((1, 4, MAGNITUDES), np.int64),  # some of them at infinity
    ],
)
def test_counts_that_cannot_be(counts: np.ndarray) -> None:
    with pytest.raises(TealError, match="histogram of magnitudes"):
        MagnitudeHistogram("bfloat16", counts)
