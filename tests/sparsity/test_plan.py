"""Plans: uniform sparsity to thresholds, the ends of the range, and a way to disk and back that keeps every bit."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from teal_cli.errors import TealError, UsageError
from teal_cli.sparsity.calibration import Calibration, Provenance
from teal_cli.sparsity.histogram import MagnitudeHistogram
from teal_cli.sparsity.plan import Plan, dense_plan, uniform_plan
from teal_cli.sparsity.realised import realised
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, SITES

LAYERS = 3


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Normal activations whose spread grows with layer and site."""
    generator = torch.Generator().manual_seed(0)
    histogram = MagnitudeHistogram.empty(LAYERS, "bfloat16")
    for layer in range(LAYERS):
        for i, site in enumerate(SITES):
            histogram.add(layer, site, torch.randn(4000, generator=generator) * (1 + layer + 10 * i))
    made = Provenance(model="m", config_sha256="0", dataset="d", created="now", versions={})
    return Calibration("some-calibration", made, histogram)


def test_each_projection_has_the_threshold_of_its_site(calibration: Calibration) -> None:
    plan = uniform_plan(calibration, 0.5)
    assert plan.thresholds.dtype == np.float32
    assert plan.thresholds.shape == (LAYERS, 7)
    assert (plan.sparsity == 0.5).all()
    assert (plan.target, plan.allocation, plan.calibration) == (0.5, "uniform", "some-calibration")
    for layer in range(LAYERS):
        for projection in PROJECTIONS:
            site = PROJECTION_SITE[projection]
            t = plan.thresholds[layer, PROJECTION_INDEX[projection]]
            assert t == calibration.threshold(layer, site, 0.5) == plan.site_threshold(layer, site)
    assert plan.by_projection()["up"] == plan.by_projection()["gate"] == plan.thresholds[:, 4].tolist()


def test_sparsity_0_keeps_everything(calibration: Calibration) -> None:
    assert not uniform_plan(calibration, 0.0).thresholds.any()
    assert not dense_plan(LAYERS).thresholds.any()
    assert calibration.threshold(0, "mlp_in", 0.0) == 0.0


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_sparsity_outside_the_range_is_refused(calibration: Calibration, sparsity: float) -> None:
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        uniform_plan(calibration, sparsity)


@given(st.floats(0.0, 1.0, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_a_plan_realises_its_target_on_its_own_text(calibration: Calibration, sparsity: float) -> None:
    measured = realised(calibration.histogram, uniform_plan(calibration, sparsity))  # type: ignore[arg-type]
    assert len(measured.pairs) == LAYERS * len(SITES)
    assert all(sparsity <= pair.sparsity <= sparsity + 0.02 for pair in measured.pairs)


def test_higher_sparsity_means_higher_thresholds(calibration: Calibration) -> None:
    levels = [uniform_plan(calibration, s).thresholds for s in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)]
    assert (np.diff(levels, axis=0) > 0).all()


def test_to_disk_and_back(calibration: Calibration, tmp_path: Path) -> None:
    plan = uniform_plan(calibration, 1 / 3)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    assert again.thresholds.tobytes() == plan.thresholds.tobytes()
    assert again.sparsity.tobytes() == plan.sparsity.tobytes()


def test_a_plan_cannot_be_changed(calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="read-only"):
        uniform_plan(calibration, 0.5).thresholds[0, 0] = 0


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"target": 1, "allocation": "uniform"}'])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(TealError, match="plan"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_with_a_projection_missing(calibration: Calibration) -> None:
    value = json.loads(json.dumps(uniform_plan(calibration, 0.5).to_json()))
    del value["thresholds"]["k"]
    with pytest.raises(TealError, match="'k'"):
        Plan.from_json(value)


def test_a_site_is_cut_at_its_lowest_threshold() -> None:
    """As a greedy plan will have it: q, k and v differ on one input."""
    thresholds = np.arange(7, dtype=np.float32)[None] + 1
    plan = Plan(0.5, "greedy", np.full((1, 7), 0.5), thresholds, "c")
    assert [plan.site_threshold(0, site) for site in SITES] == [1.0, 4.0, 5.0, 7.0]


def test_realised_finds_the_furthest(calibration: Calibration) -> None:
    plan = uniform_plan(calibration, 0.5)
    other = MagnitudeHistogram.empty(LAYERS, "bfloat16")
    for layer in range(LAYERS):
        for i, site in enumerate(SITES):
            scale = 1 + layer + 10 * i
            if (layer, site) == (1, "attn_out"):
                scale *= 5
            other.add(layer, site, torch.randn(4000, generator=torch.Generator().manual_seed(7)) * scale)
    measured = realised(other, plan)
    worst = measured.furthest(1)[0]
    assert (worst.layer, worst.site) == (1, "attn_out")
    assert worst.deviation == pytest.approx(0.107 - 0.5, abs=0.02)
    assert measured.mean == pytest.approx(0.5 + worst.deviation / 12, abs=0.02)
    assert measured.p95 < abs(worst.deviation)
