"""A made-up criterion, with a scale of its own for every projection and channel, through every backend on a CPU.

The oracle computes scores as they are defined, |x_i - c_i| * scale_i > t, in float64; it shares nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from teal_cli.decoding.projector import empty_rows
from teal_cli.decoding.steps import NUMBA, TRITON_GRAPH, open_step
from teal_cli.model.config import ModelConfig
from teal_cli.model.transformer import Transformer
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.plan import Plan
from teal_kernels.backends import BackendError
from teal_kernels.matrix import Matrix
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES, columns
from teal_kernels.steps.cpu.compiled import unavailable

PROMPT = (3, 50, 7, 21)
TOKENS = (9, 33, 120)
BACKENDS = [
    "reference",
    "cpu",
    pytest.param(NUMBA, marks=pytest.mark.skipif(unavailable() is not None, reason="numba")),
]


@pytest.fixture
def model(tiny: Callable[[str], Path]) -> Transformer:
    return Transformer.from_checkpoint(tiny("llama3"), torch.float32)


def made_up(config: ModelConfig, *, centred: bool = False) -> Plan:
    random = np.random.default_rng(0)
    scale, centre = {}, {}
    for site, group in SITE_PROJECTIONS.items():
        factors = random.uniform(0.3, 3, (config.layers, len(group), config.channels(site)))
        factors[random.random(factors.shape) < 0.05] = 0
        scale[site] = factors.astype(np.float32)
        centre[site] = random.normal(0, 0.2, (config.layers, config.channels(site))).astype(np.float32)
    table = random.uniform(0.05, 0.8, (config.layers, len(PROJECTIONS))).astype(np.float32)
    scoring = Scoring("made-up", scale, centre if centred else {})
    return Plan(0.5, "uniform", np.full(table.shape, 0.5), table, None, scoring)


class Oracle:
    """A `Project` by the definition of a score."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows: dict[str, list[Tensor]] = {site: [] for site in SITES}
        self.kept = np.zeros(plan.thresholds.shape, np.int64)

    def __call__(self, layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        scoring, group = self.plan.scoring, columns(site)
        scale = torch.from_numpy(scoring.scale[site][layer]).double()
        limits = torch.tensor(self.plan.thresholds[layer, group]).double()
        centre = torch.zeros(x.shape[1])
        if site in scoring.centre:
            centre = torch.from_numpy(scoring.centre[site][layer])
        moved = x[0] - centre
        keeps = moved.double().abs() * scale > limits[:, None]
        self.rows[site].append(torch.where(keeps.any(0), moved, 0))
        self.kept[layer, group] += keeps.sum(1).numpy()
        parts = matrix.tensor().double().split(matrix.segments, dim=1)
        product = torch.cat([torch.where(own, moved, 0).double() @ w for own, w in zip(keeps, parts, strict=True)])
        return (product + centre.double() @ matrix.tensor().double()).to(x.dtype)[None]


def compare(model: Transformer, plan: Plan, backend: str) -> None:
    oracle, wanted_cache, cache = Oracle(plan), model.cache(16), model.cache(16)
    for each in (wanted_cache, cache):
        model.forward(torch.tensor(PROMPT), 0, each)
    step = open_step(model, cache, plan.applied(), backend, 0.5)
    rows = empty_rows(model.config, model.dtype, model.device)
    for position, token in enumerate(TOKENS, len(PROMPT)):
        oracle.rows = {site: [] for site in SITES}
        wanted = model.forward(torch.tensor([token]), position, wanted_cache, oracle)
        torch.testing.assert_close(step(token, position, rows), wanted, rtol=1e-4, atol=1e-4)
        for site in SITES:
            expected = torch.stack(oracle.rows[site])
            assert torch.equal(rows[site] == 0, expected == 0), site
            torch.testing.assert_close(rows[site], expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(step.kept(), oracle.kept)
    assert len(set(oracle.kept[0, :3].tolist())) == 3, "q, k and v keep other entries"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_keeps_what_the_score_says(model: Transformer, backend: str) -> None:
    compare(model, made_up(model.config), backend)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_centre_is_taken_away_and_its_product_added(model: Transformer, backend: str) -> None:
    compare(model, made_up(model.config, centred=True), backend)


@pytest.mark.parametrize("backend", [NUMBA, TRITON_GRAPH])
def test_a_backend_that_cannot_take_a_centre_names_those_that_can(model: Transformer, backend: str) -> None:
    plan = made_up(model.config, centred=True)
    with pytest.raises(BackendError, match="cannot run a criterion with a centre; reference, cpu, triton can"):
        open_step(model, model.cache(16), plan.applied(), backend, 0.5)
