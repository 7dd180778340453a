"""As `test_oracle`, of models in int8 and int4: transformers' model has the weights that their rows stand for."""

from __future__ import annotations

import pytest
from fixtures_tiny import TINY_FAMILIES
from oracle import assert_agrees, calibrated, dequantised, make_dump, prompt_file

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.quantize import quantize_model


@pytest.mark.parametrize(
    ("name", "width", "head", "backend"),
    [
        *((n, ("int4", "int8")[i % 2], ("int4", "int8")[i % 2], "triton-graph") for i, n in enumerate(TINY_FAMILIES)),
        ("llama3", "int4", "int4", "triton"),
        ("llama3", "int4", "int8", "triton-graph"),
        ("llama3", "int4", "int8", "triton"),
    ],
)
def test_quantised_tiny_models(name, width, head, backend, tiny, teal_home, tmp_path):
    fetch(str(tiny(name)), name="tiny")
    calibrated("tiny", 2, 64)
    *_, made = quantize_model(Registry(), "tiny", width, head=head)
    prompts = prompt_file(tmp_path, "The quick brown fox")
    path = tmp_path / "out.zarr"
    dump = make_dump(made.entry.name, path, levels=(0.0, 0.5), prompts=prompts, max_new_tokens=3, backend=backend)
    assert_agrees(dump, path, dequantised(tiny(name), made.entry.path))
