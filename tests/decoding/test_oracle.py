"""What a dump holds, judged step by step by transformers' own model with hooks on its linear layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_tiny import TINY, TINY_FAMILIES
from oracle import assert_agrees, make_dump

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate

LEVELS = (0.0, 0.25, 0.5, 0.9)


def calibrated(name: str, sequences: int, seq_len: int) -> None:
    text = Text("python-docs", num_sequences=sequences, seq_len=seq_len)
    for _ in calibrate(Registry(), name, text, dtype="float32", device=torch.device("cpu")):
        pass


def prompt_file(folder: Path, *prompts: str) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts))
    return file


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
