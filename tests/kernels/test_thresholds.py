"""The thresholds that every backend and the store compare with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES, Geometry, columns
from teal_kernels.thresholds import Thresholds, channel_thresholds, lowest, site_thresholds

TABLE = np.arange(14, dtype=np.float32).reshape(2, 7)
POSITIVE = st.floats(np.float32(1e-30), np.float32(1e30), width=32)


@given(t=st.floats(0, np.float32(1e30), width=32), scale=st.lists(POSITIVE, min_size=1, max_size=9))
def test_a_channels_threshold_is_the_rounded_quotient(t, scale):
    got = channel_thresholds(t, np.array(scale, np.float32))
    assert got.dtype == np.float32
    with np.errstate(over="ignore"):
        wanted = [np.float32(np.float64(np.float32(t)) / np.float64(s)) for s in scale]
    assert got.tolist() == wanted


@pytest.mark.parametrize("t", [0.0, 0.5])
def test_a_scale_of_zero_keeps_nothing(t):
    assert channel_thresholds(t, np.array([0, 1], np.float32)).tolist() == [np.inf, t]


def test_a_site_has_the_columns_of_its_projections():
    for site in SITES:
        assert PROJECTIONS[columns(site)] == SITE_PROJECTIONS[site]
        assert site_thresholds(TABLE, site).tolist() == TABLE[:, columns(site)].tolist()


def test_what_any_projection_keeps_is_kept():
    scale = np.array([[1, 2, 4], [4, 1, 1], [1, 1, 1]], np.float32)
    limits = site_thresholds(np.array([8, 4, 6, 0, 0, 0, 0], np.float32), "attn_in", scale)
    assert limits.tolist() == [[8, 4, 2], [1, 4, 4], [6, 6, 6]]
    assert lowest(limits, projections=-2).tolist() == [1, 4, 2]


def test_thresholds_of_a_model():
    scale = np.full((2, 2, 5), 2, np.float32)
    thresholds = Thresholds(TABLE, {"mlp_in": scale})
    assert thresholds.site(1, "attn_in").tolist() == [7, 8, 9]
    assert thresholds.lowest(1, "attn_in") == 7
    assert thresholds.site(1, "mlp_in").tolist() == [[5.5] * 5, [6] * 5]
    assert thresholds.lowest(1, "mlp_in").tolist() == [5.5] * 5
    thresholds.check_widths(dict.fromkeys(SITES, 5))
    with pytest.raises(ValueError, match="scale of mlp_in has 5 channels, the model 6"):
        thresholds.check_widths(dict.fromkeys(SITES, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-TABLE,), "not negative"),
        ((TABLE[:, :6],), "layers, 7"),
        ((TABLE.astype(np.float64),), "float32"),
        ((TABLE, {"attn_in": np.ones((2, 2, 4), np.float32)}), r"scale of attn_in must be float32 \[2, 3, 'K'\]"),
        ((TABLE, {"attn_in": np.full((2, 3, 4), np.nan, np.float32)}), "finite"),
        ((TABLE, {"attn_in": np.full((2, 3, 4), -1, np.float32)}), "not negative"),
        ((TABLE, {}, {"attn_in": np.ones((1, 4), np.float32)}), "centre of attn_in"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(*arguments)


def test_geometry():
    geometry = Geometry(hidden=96, intermediate=160, heads=6, kv_heads=2, head_dim=10)
    assert [geometry.channels(site) for site in SITES] == [96, 60, 96, 160]
    assert [geometry.segments(site) for site in SITES] == [(60, 20, 20), (96,), (160, 160), (96,)]
    assert geometry.inputs() == (96, 96, 96, 60, 96, 96, 160)
    assert geometry.outputs() == (60, 20, 20, 96, 160, 160, 96)
    assert geometry.projection_sizes()["k"] == 96 * 20
