"""`bench_plan`: a plan in turn with the uniform plan that reads as many bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal

from teal_cli.bench.decode import DecodeRequest, bench_plan
from teal_cli.bench.rows import DecodeRow
from teal_cli.bench.subjects import registered
from teal_cli.errors import HardwareError, UsageError
from teal_cli.model.weights import config_sha256
from teal_cli.registry.registry import Registry
from teal_cli.runs.plans import Level, plan_folder
from teal_cli.runs.session import Session, open_session
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.named import NamedPlan
from teal_cli.sparsity.plan import Plan, dense_plan
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS
from teal_kernels.steps.cpu.compiled import unavailable

REQUEST = DecodeRequest((), (), new_tokens=6, rounds=2, probe_bytes=1 << 16)
BACKENDS = [
    "reference",
    pytest.param("numba", marks=pytest.mark.skipif(unavailable() is not None, reason="numba")),
]


def uneven(session: Session, *, per_channel: bool = False, centred: bool = False) -> Plan:
    """Each projection of each layer at a level of its own, and with `per_channel` factors for channels, too."""
    random, config, calibration = np.random.default_rng(0), session.config, session.calibration
    levels = random.uniform(0.25, 0.75, (config.layers, len(PROJECTIONS)))
    thresholds = np.zeros(levels.shape, np.float32)
    for layer, column in np.ndindex(levels.shape):
        site = PROJECTION_SITE[PROJECTIONS[column]]
        thresholds[layer, column] = calibration.threshold(layer, site, levels[layer, column])
    scale, centre = {}, {}
    for site, group in SITE_PROJECTIONS.items():
        factors = random.uniform(0.7, 1.4, (config.layers, len(group), config.channels(site)))
        scale[site] = factors.astype(np.float32)
        centre[site] = random.normal(0, 0.1, (config.layers, config.channels(site))).astype(np.float32)
    scoring = Scoring("made-up", scale if per_channel or centred else {}, centre if centred else {})
    return Plan(0.5, "uneven", levels, thresholds, calibration.id, scoring)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_is_timed_beside_a_uniform_one_of_as_many_bytes(ready: Path, backend: str, per_channel: bool) -> None:
    session = open_session("tiny", dtype="float32", device="cpu", backend=backend)
    subject = registered(session, (), 8)
    level = Level("uneven-0.5", uneven(session, per_channel=per_channel))
    plan, uniform = (
        row for row in bench_plan(subject, level, session.calibration, REQUEST) if isinstance(row, DecodeRow)
    )
    assert (plan.label, uniform.label) == ("teal uneven-0.5", "teal uniform for uneven-0.5")
    assert plan.check == uniform.check == "passed"
    assert plan.backend == backend
    assert 0.3 < plan.realised < 0.7
    assert uniform.realised == pytest.approx(plan.realised, abs=0.02)  # in so few steps of a tiny model
    assert plan.bytes == pytest.approx(uniform.bytes, rel=0.02)
    assert plan.to_uniform is not None
    assert plan.to_uniform > 0
    assert uniform.to_uniform is None


def test_bad_input(ready: Path, teal: Teal) -> None:
    session = open_session("tiny", dtype="float32", device="cpu", backend="reference")
    subject = registered(session, (), 8)
    with pytest.raises(UsageError, match="is dense"):
        list(bench_plan(subject, Level("d", dense_plan(session.config.layers)), session.calibration, REQUEST))
    if unavailable() is None:
        numba = registered(open_session("tiny", dtype="float32", device="cpu", backend="numba"), (), 8)
        centred = Level("c", uneven(session, centred=True))
        with pytest.raises(HardwareError, match="centre"):
            list(bench_plan(numba, centred, session.calibration, REQUEST))
    ran = teal("bench", "decode", "-m", "tiny", "--plan", "none")
    assert (ran.code, "has no plan called 'none'" in ran.err) == (3, True)
    ran = teal("bench", "decode", "--stack", "llama-2-7b:1", "--plan", "p")
    assert (ran.code, "a stack of random layers has no plans" in ran.err) == (2, True)


def test_the_command_shows_the_ratio(ready: Path, teal: Teal, tmp_path: Path) -> None:
    entry, session = Registry().get("tiny"), open_session("tiny", dtype="float32", device="cpu", backend="reference")
    made = NamedPlan("uneven", uneven(session), "tiny", config_sha256(entry.path), "2026-01-01T00:00:00+00:00", {})
    made.save(plan_folder(entry, "uneven"))
    arguments = ("bench", "decode", "-m", "tiny", "--plan", "uneven", "-s", 0.5, "--no-dump", "--no-transformers")
    small = ("--tokens", 5, "--rounds", 2, "--prompt-tokens", 4, "--dtype", "float32", "--backend", "reference")
    ran = teal(*arguments, *small, "-o", tmp_path / "result.json")
    assert ran.code == 0, ran.err
    assert "x uniform" in ran.out
    assert "teal uniform for uneven" in ran.out
    assert teal("plot", "bench", tmp_path / "result.json", "-o", tmp_path / "picture.svg").code == 0
