"""Gemma 3 270M as its wheels bring it, in float32: greedy tokens and the sparse rows before transformers' own model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import assert_agrees, judge, make_dump, reference_model

from teal_cli.registry.registry import ModelEntry, Registry
from teal_cli.runs.calibrate import Text, calibrate
from teal_cli.store.reader import open_store


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_tokens_and_sparse_rows(gemma3: ModelEntry, teal_home: Path, tmp_path: Path) -> None:
    registry = Registry(teal_home)
    registry.add(replace(gemma3, home=registry.model_home("gemma"), name="gemma"))
    text = Text("python-docs", num_sequences=4, seq_len=256)
    for _ in calibrate(Registry(), "gemma", text, dtype="float32", device=torch.device("cpu")):
        pass
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\nOnce upon a time, there was a")
    sparse = make_dump("gemma", tmp_path / "s", levels=(0.5,), prompts=prompts, max_new_tokens=65, backend="auto")
    assert_agrees(sparse, tmp_path / "s")
    # One token more than the 64 that are compared: the last one is fed to no step, so no row has it. Not which entries
    # are exactly zero: the residual stream cancels at times (159.2228 - 159.2229), to zero or to its last bits.
    dense = make_dump("gemma", tmp_path / "d", levels=(0.0,), prompts=prompts, max_new_tokens=65, backend="auto")
    level, reference = open_store(tmp_path / "d").level(0.0), reference_model(dense.session.entry.path)
    for index, prompt in enumerate(dense.prompts):
        tokens = [int(token) for token in level.tokens.token_id[level.rows(index)]]
        verdict = judge(reference, level, prompt.token_ids, tokens, sequence=index)
        assert len(tokens) == 64
        assert verdict.logit_gap < 1e-3
        assert verdict.row_rms < 1e-4
