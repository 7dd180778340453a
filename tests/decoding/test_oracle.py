"""What a dump holds, judged step by step by transformers' own model with hooks on its linear layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_tiny import TINY, TINY_FAMILIES
from oracle import assert_agrees, calibrated, dequantised, make_dump, prompt_file

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.quantize import quantize_model

LEVELS = (0.0, 0.25, 0.5, 0.9)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "auto") for name in sorted(TINY)),
        *((name, backend) for name in TINY_FAMILIES for backend in ("cpu", "reference")),
    ],
)
def test_tiny_models(name: str, backend: str, tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path) -> None:
    fetch(str(tiny(name)), name="tiny")
    calibrated("tiny", 2, 64)
    prompts = prompt_file(tmp_path, "The quick brown fox", "def keep")
    dump = make_dump("tiny", tmp_path / "out.zarr", levels=LEVELS, prompts=prompts, max_new_tokens=20, backend=backend)
    assert_agrees(dump, tmp_path / "out.zarr")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["triton-graph", "triton"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_tiny_models_on_a_gpu(
    name: str, backend: str, tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path
) -> None:
    fetch(str(tiny(name)), name="tiny")
    calibrated("tiny", 2, 64)
    prompts = prompt_file(tmp_path, "The quick brown fox", "def keep")
    out = tmp_path / "out.zarr"
    dump = make_dump("tiny", out, levels=LEVELS, prompts=prompts, max_new_tokens=20, backend=backend, device="cuda")
    assert_agrees(dump, out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_quantised_tiny_models_on_a_gpu(
    name: str, width: str, tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path
) -> None:
    fetch(str(tiny(name)), name="tiny")
    calibrated("tiny", 2, 64)
    *_, made = quantize_model(Registry(), "tiny", width, head=width)
    prompts, out = prompt_file(tmp_path, "The quick brown fox"), tmp_path / "out.zarr"
    dump = make_dump(
        made.entry.name,
        out,
        levels=(0.0, 0.5),
        prompts=prompts,
        max_new_tokens=10,
        backend="triton-graph",
        device="cuda",
    )
    assert_agrees(dump, out, dequantised(tiny(name), made.entry.path))
