"""From calibration to export, with a model of each kind that differs from Llama in its own way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_store import digest
from oracle import assert_agrees, calibrated, make_dump, prompt_file

from teal_cli import open_store
from teal_cli.registry.download import fetch

KINDS = {
    "norms after": "olmo2",
    "fused tensors": "phi3",
    "multipliers": "granite",
    "caps": "gemma2",
    "layers without rotary": "smollm3",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dump_that_was_cut_off_is_finished_verified_and_exported(
    kind: str, tiny: Callable[[str], Path], teal: Teal, tmp_path: Path
) -> None:
    fetch(str(tiny(KINDS[kind])), name="tiny")
    calibrated("tiny", 2, 64)
    prompts = prompt_file(tmp_path, "The quick brown fox", "def keep")
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    dump = make_dump("tiny", whole, levels=(0.5, 0.9), prompts=prompts, max_new_tokens=6, backend="cpu")
    events = dump.run(cut)
    next(events)
    events.close()
    assert teal("store", "verify", cut).code == 1, "it is not complete"
    assert teal("dump", "-o", cut, "--resume").code == 0
    assert digest(cut) == digest(whole)
    assert_agrees(dump, cut)
    checked = teal("store", "verify", cut, "--replay", 1000, "--json")
    assert checked.code == 0, checked.err
    assert len(checked.json["replay"]) == 2 * 2 * 5
    assert all(row["equal"] for row in checked.json["replay"])
    chosen = ("--layers", "2", "--names", "k,down")
    assert teal("store", "convert", cut, "--format", "npz", "-o", tmp_path / "out", *chosen).code == 0
    for level in ("s0.50", "s0.90"):
        for projection in ("k", "down"):
            with np.load(tmp_path / "out" / level / "layer_2" / f"{projection}.npz") as data:
                stored = open_store(cut).level(level).projection(2, projection)
                assert np.array_equal(data["rows"], stored[:])
                assert np.count_nonzero(data["rows"])
