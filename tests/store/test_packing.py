"""Rows to bitmap and packed values and back, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from teal_cli.store.packing import contains_nan, exceeds, magnitude_bits, pack, to_float, unpack, unpack_mask

DTYPES = ("<u2", "<f2", "<f4")
MAGNITUDE = {2: 0x7FFF, 4: 0x7FFFFFFF}
INFINITY = {"<u2": 0x7F80, "<f2": 0x7C00, "<f4": 0x7F800000}


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Rows of any bits that are no NaN, many of them zeros of either sign."""
    dtype = draw(st.sampled_from(DTYPES))
    unsigned = np.dtype(f"<u{np.dtype(dtype).itemsize}")
    sign = MAGNITUDE[unsigned.itemsize] + 1
    magnitude = st.integers(0, INFINITY[dtype]) | st.sampled_from([0, 1])
    element = st.builds(lambda m, s: m | (sign if s else 0), magnitude, st.booleans())
    shape = draw(st.tuples(st.integers(0, 9), st.integers(1, 70)))
    return draw(hnp.arrays(unsigned, shape, elements=element)).view(dtype)


@given(rows(), st.integers(0, 50))
def test_every_kept_bit_comes_back(dense: np.ndarray, spare: int) -> None:
    packed = pack(dense, slots=dense.size + spare)
    kept = unpack_mask(packed.mask, dense.shape[1])
    back = unpack(packed.values, kept)
    bits = np.dtype(f"<u{dense.dtype.itemsize}")
    nonzero = magnitude_bits(dense) != 0
    assert (kept == nonzero).all()
    assert (packed.row_nnz == nonzero.sum(axis=1)).all()
    assert (back.view(bits) == np.where(nonzero, dense.view(bits), 0)).all()  # -0.0 comes back as +0.0
    assert not packed.values[int(packed.row_nnz.sum()) :].any()
    assert np.bitwise_count(packed.mask).sum() == nonzero.sum()  # so padding bits are 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_are_those_of_torch(dtype: str) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    values = bits.view(getattr(torch, dtype)) if dtype != "float32" else bits.float() / 7
    stored = bits.numpy().view(np.uint16) if dtype == "bfloat16" else values.numpy()
    np.testing.assert_array_equal(to_float(stored), values.float().numpy())  # NaN equals NaN here
    for threshold in (0.0, 0.3, 1e-5):
        expected = values.float().abs() > torch.tensor(threshold, dtype=torch.float32)
        assert (exceeds(stored, threshold) == expected.numpy()).all()


def test_threshold_is_not_rounded_to_the_type_of_the_values() -> None:
    value = torch.tensor([0.3], dtype=torch.bfloat16)  # 0.30078125
    stored = value.view(torch.int16).numpy().view(np.uint16)
    assert exceeds(stored, 0.3007).all()  # 0.3007 rounds to 0.30078125 in bfloat16
    assert not exceeds(stored, 0.30078125).any()


@pytest.mark.parametrize(
    ("dtype", "nan", "infinity"),
    [("<u2", 0x7F81, 0x7F80), ("<f2", 0x7C01, 0x7C00), ("<f4", 0x7FC00000, 0x7F800000)],
)
def test_nan_is_refused_and_infinity_is_not(dtype: str, nan: int, infinity: int) -> None:
    bits = np.dtype(f"<u{np.dtype(dtype).itemsize}")
    row = np.zeros((2, 5), bits)
    row[1, 3] = infinity
    assert pack(row.view(dtype), slots=10).row_nnz.tolist() == [0, 1]
    row[1, 3] = nan
    assert contains_nan(row.view(dtype))
    with pytest.raises(ValueError, match="NaN"):
        pack(row.view(dtype), slots=10)
