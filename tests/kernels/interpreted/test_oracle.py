"""Dumps made by the Triton backends, interpreted, before transformers' own model: the same judge as for the CPU's."""

from __future__ import annotations

import pytest
from fixtures_tiny import TINY_FAMILIES
from oracle import assert_agrees, calibrated, make_dump, prompt_file

from teal_cli.registry.download import fetch


@pytest.mark.parametrize(
    ("name", "backend", "levels"),
    [
        *((name, "triton-graph", (0.0, 0.5, 0.9)) for name in TINY_FAMILIES),
        ("llama3", "triton", (0.25, 0.9)),
        ("olmoe", "triton", (0.5,)),  # a mixture: the plain step by Triton's ops
    ],
)
def test_tiny_models(name, backend, levels, tiny, teal_home, tmp_path):
    fetch(str(tiny(name)), name="tiny")
    calibrated("tiny", 2, 64)
    prompts = prompt_file(tmp_path, "The quick brown fox")
    path = tmp_path / "out.zarr"
    # Nine steps in all, of three levels: interpreted ones are slow.
    dump = make_dump("tiny", path, levels=levels, prompts=prompts, max_new_tokens=4, backend=backend)
    assert_agrees(dump, path)
