"""The promises that only a real model can keep: SmolLM2-135M, calibrated and dumped as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures_cli import Teal
from oracle import assert_agrees, make_dump

from teal_cli import open_store
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Checked, Text, calibrate, check
from teal_cli.store.stats import statistics

pytestmark = pytest.mark.slow
NAME = "smollm2-135m"
CPU = torch.device("cpu")


@pytest.fixture
def calibrated(smollm2_home: Path) -> Registry:
    registry = Registry(smollm2_home)
    text = Text("python-docs", split="train", num_sequences=4, seq_len=512)
    for _ in calibrate(registry, NAME, text, device=CPU):
        pass
    return registry


def test_every_step_agrees_with_transformers(calibrated: Registry, tmp_path: Path) -> None:
    """float32, greedy, 64 tokens, two prompts, four levels; the decode path that `auto` takes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\nOnce upon a time, in a village by the sea,\n")
    path = tmp_path / "out.zarr"
    dump = make_dump(NAME, path, levels=(0.0, 0.25, 0.5, 0.9), prompts=prompts, max_new_tokens=64, backend="auto")
    assert_agrees(dump, path)


def test_thresholds_hold_on_text_that_was_not_calibrated_on(calibrated: Registry) -> None:
    text = Text("python-docs", split="test", num_sequences=2, seq_len=512)
    *_, checked = check(calibrated, NAME, None, text, device=CPU)
    assert isinstance(checked, Checked)
    assert [level.target for level in checked.levels] == [0.25, 0.4, 0.5, 0.65, 0.9]
    for level in checked.levels:
        assert abs(level.mean - level.target) < 0.015
        assert level.p95 < 0.07


def test_a_store_is_near_the_entropy_of_its_contents(teal: Teal, calibrated: Registry, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    run = teal(
        "dump", "-s", "0.5,0.75", "-d", "python-docs", "--split", "test", "-n", 2, "--prompt-tokens", 32,
        "--max-new-tokens", 129, "--ignore-eos", "-o", store,
    )  # fmt: skip
    assert run.code == 0, run.err
    opened = open_store(store)
    for level in opened.levels:
        sites = list(statistics(opened, [level]))
        assert len(sites) == 4
        assert sum(site.stored_bytes for site in sites) < 1.05 * sum(site.bound_bytes for site in sites)
