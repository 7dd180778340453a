"""A made-up criterion, with a scale of its own for every projection and channel, through every backend on a CPU, and
from a named plan through dump, reader and verify.

The oracle computes scores as they are defined, |x_i - c_i| * scale_i > t, in float64; it shares nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from fixtures_cli import Teal
from torch import Tensor

from teal_cli import open_store
from teal_cli.decoding.projector import empty_rows
from teal_cli.decoding.steps import NUMBA, TRITON_GRAPH, open_step
from teal_cli.model.config import ModelConfig
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import config_sha256
from teal_cli.registry.registry import Registry
from teal_cli.runs.plans import plan_folder
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.named import NamedPlan
from teal_cli.sparsity.plan import Plan
from teal_cli.store.packing import row_thresholds as stored_row_thresholds
from teal_cli.store.verify import Problem, verify
from teal_kernels.backends import BackendError
from teal_kernels.matrix import Matrix
from teal_kernels.ops.threshold.reference import row_thresholds
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS, SITES, columns
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
        scale = torch.from_numpy(scoring.scale[site][layer]).double() if site in scoring.scale else torch.ones(1, 1)
        limits = torch.tensor(self.plan.thresholds[layer, group]).double()
        centre = torch.zeros(x.shape[1])
        if site in scoring.centre:
            centre = torch.from_numpy(scoring.centre[site][layer])
        moved = x[0] - centre
        score = moved.double().abs() * scale
        if scoring.criterion == "topk":
            score = 1.0 + (moved.abs()[None] < moved.abs()[:, None]).sum(1)[None]
        keeps = score > limits[:, None]
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


def counted(config: ModelConfig) -> Plan:
    """A fixed count per row, another one for each projection."""
    channels = np.array(config.inputs())
    shares = np.random.default_rng(3).uniform(0.3, 0.7, (config.layers, len(PROJECTIONS)))
    return Plan(0.5, "uniform", shares, np.ceil(shares * channels).astype(np.float32), None, Scoring("topk"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_fixed_count_keeps_the_largest_of_each_row(model: Transformer, backend: str) -> None:
    compare(model, counted(model.config), backend)


@pytest.mark.parametrize("backend", [NUMBA, TRITON_GRAPH, "triton"])
def test_a_backend_that_cannot_count_names_those_that_can(model: Transformer, backend: str) -> None:
    with pytest.raises(BackendError, match="cannot run a fixed count per row; reference, cpu can"):
        open_step(model, model.cache(16), counted(model.config).applied(), backend, 0.5)


def test_equal_entries_at_the_count_are_dropped_together() -> None:
    rows = torch.tensor([[3.0, -1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 5.0, -5.0]])
    found = row_thresholds(rows, torch.tensor([0.0, 1.0, 2.0, 4.0]))
    assert found.tolist() == [[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]]
    for count, limit in zip((0, 1, 2, 4), found.T, strict=True):
        assert stored_row_thresholds(rows.numpy(), count).tolist() == limit.tolist()


def test_a_dump_of_a_fixed_count(teal: Teal, ready: Path, tmp_path: Path) -> None:
    """Each projection's view holds the largest entries of its row, as many as its count says; verify counts them."""
    entry = Registry().get("tiny")
    model = Transformer.from_checkpoint(entry.path, torch.float32)
    plan, path = counted(model.config), tmp_path / "out.zarr"
    digest = config_sha256(entry.path)
    NamedPlan("odd", plan, "tiny", digest, "2026-01-01T00:00:00+00:00").save(plan_folder(entry, "odd"))
    ran = teal("dump", "-m", "tiny", "--plan", "odd", "-d", "python-docs", "-n", 1, "--prompt-tokens", 6, "--dtype",
               "float32", "--max-new-tokens", 6, "--ignore-eos", "--backend", "cpu", "-o", path)  # fmt: skip
    assert ran.code == 0, ran.err
    store = open_store(path)
    assert store.header.criterion == {"name": "topk"}
    level = store.level(0.5)
    channels = np.array(model.config.inputs())
    for projection, column in PROJECTION_INDEX.items():
        for layer in range(model.config.layers):
            rows = level.projection(layer, projection)
            assert (rows.row_nnz == channels[column] - plan.thresholds[layer, column]).all()
            kept, site = np.abs(rows[:]), np.abs(level.site(layer, PROJECTION_SITE[projection])[:])
            smallest = np.where(kept > 0, kept, np.inf).min(axis=1)
            assert (np.where(kept > 0, 0, site).max(axis=1) < smallest).all()
    np.testing.assert_allclose(level.realised(), plan.thresholds / channels)
    assert all(not isinstance(found, Problem) for found in verify(path))
    assert teal("store", "stats", path).code == 0
    stored = zarr.open_array(path / "s0.50" / "thresholds", mode="r+")
    stored[1, column] += 1
    found = [problem for problem in verify(path) if isinstance(problem, Problem)]
    assert any("mlp_mid" in problem.where and "a row keeps more than the" in problem.what for problem in found), found
    refused = teal("generate", "-m", "tiny", "--plan", "odd", "-p", "a", "--max-new-tokens", 4, "--backend", "numba")
    assert refused.code == 5
    assert "cannot run a fixed count per row; reference, cpu can" in refused.err


def named(ready: Path, *, centred: bool) -> tuple[Plan, Transformer]:
    """The made-up criterion as a plan of the registered model; a scale of zero is not one that a plan may have."""
    entry = Registry().get("tiny")
    model = Transformer.from_checkpoint(entry.path, torch.float32)
    plan = made_up(model.config, centred=centred)
    scale = {site: np.maximum(factors, np.float32(1e-3)) for site, factors in plan.scoring.scale.items()}
    plan = replace(plan, scoring=replace(plan.scoring, scale=scale))
    digest = config_sha256(entry.path)
    NamedPlan("odd", plan, "tiny", digest, "2026-01-01T00:00:00+00:00").save(plan_folder(entry, "odd"))
    return plan, model


@pytest.mark.parametrize(
    ("backend", "centred"),
    [("reference", False), ("cpu", True), pytest.param(NUMBA, False, marks=BACKENDS[2].marks)],
)
def test_a_dump_says_what_was_kept_and_why(
    teal: Teal, ready: Path, tmp_path: Path, backend: str, centred: bool
) -> None:
    plan, model = named(ready, centred=centred)
    path = tmp_path / "out.zarr"
    ran = teal("dump", "-m", "tiny", "--plan", "odd", "-d", "python-docs", "-n", 1, "--prompt-tokens", 6, "--dtype",
               "float32", "--max-new-tokens", 6, "--ignore-eos", "--backend", backend, "-o", path)  # fmt: skip
    assert ran.code == 0, ran.err
    store = open_store(path)
    assert store.header.criterion == {"name": "made-up"}
    level = store.level(0.5)
    oracle, cache = Oracle(plan), model.cache(16)
    prompt = store.header.prompts["token_ids"][0]
    model.forward(torch.tensor(prompt), 0, cache)
    for row, token in enumerate(level.tokens.token_id.tolist()):
        oracle.rows = {site: [] for site in SITES}
        model.forward(torch.tensor([token]), len(prompt) + row, cache, oracle)
        for layer in range(model.config.layers):
            for site in SITES:
                wanted = oracle.rows[site][layer].numpy()
                got = np.asarray(level.site(layer, site)[row : row + 1])[0]
                assert np.array_equal(got == 0, wanted == 0), (row, layer, site)
                np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
                scores = np.abs(got.astype(np.float64)) * plan.scoring.scale[site][layer]
                for number, projection in enumerate(SITE_PROJECTIONS[site]):
                    keeps = scores[number] > plan.thresholds[layer, columns(site)][number]
                    view = np.asarray(level.projection(layer, projection)[row : row + 1])[0]
                    assert np.array_equal(view, np.where(keeps, got, 0)), projection
    dropped = 1 - oracle.kept / (len(level) * np.array(model.config.inputs()))
    np.testing.assert_allclose(level.realised(), dropped)
    assert all(not isinstance(found, Problem) for found in verify(path))


def test_verify_finds_a_row_that_another_scale_would_not_have_kept(teal: Teal, ready: Path, tmp_path: Path) -> None:
    plan, _ = named(ready, centred=False)
    path = tmp_path / "out.zarr"
    ran = teal("dump", "-m", "tiny", "--plan", "odd", "-d", "python-docs", "-n", 1, "--prompt-tokens", 6, "--dtype",
               "float32", "--max-new-tokens", 6, "--ignore-eos", "--backend", "reference", "-o", path)  # fmt: skip
    assert ran.code == 0, ran.err
    scale = zarr.open_array(path / "s0.50" / "mlp_mid" / "scale", mode="r+")
    scale[1, 0] = plan.scoring.scale["mlp_mid"][1, 0] / 2
    found = [problem for problem in verify(path) if isinstance(problem, Problem)]
    assert any("mlp_mid" in problem.where and "threshold" in problem.what for problem in found), found
