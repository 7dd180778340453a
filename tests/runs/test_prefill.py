"""Rows of prompts, against transformers' own model: dense as they are, sparse with masks from the first position on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from oracle import reference_model
from reference_model import MODULES, relative_rms

from teal_cli import open_store
from teal_cli.registry.registry import Registry
from teal_cli.runs.recipe import KEYS
from teal_cli.store.schema import PHASES
from teal_kernels.spec import PROJECTION_INDEX

pytestmark = pytest.mark.usefixtures("ready")
PROMPT, NEW = 8, 6


def dump(teal: Teal, path: Path, *options: object) -> None:
    arguments = ("dump", "-d", "python-docs", "-n", 2, "--prompt-tokens", PROMPT, "--max-new-tokens", NEW)
    made = ("-s", "0,0.5", "--dtype", "float32", "--backend", "reference", "--ignore-eos")
    ran = teal(*arguments, *made, "-o", path, *options)
    assert ran.code == 0, ran.err


@torch.no_grad()
def forced(tokens: list[int], start: int, thresholds: np.ndarray) -> dict[Any, torch.Tensor]:
    """(layer, projection) -> what transformers' linear layers read, entries masked from position `start` on."""
    model, seen = reference_model(Registry().get("tiny").path), {}
    for index, layer in enumerate(model.model.layers):
        for projection, parent in MODULES.items():
            t = float(thresholds[index, PROJECTION_INDEX[projection]])

            def hook(module: Any, inputs: Any, key: Any = (index, projection), t: float = t) -> tuple[torch.Tensor]:
                x = inputs[0].clone()
                x[:, start:][x[:, start:].abs() <= t] = 0
                seen[key] = x[0]
                return (x,)

            getattr(getattr(layer, parent), f"{projection}_proj").register_forward_pre_hook(hook)
    model(torch.tensor([tokens]))
    return seen


@pytest.mark.parametrize("follow", ["free", "text"])
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_rows_of_prompts_are_those_of_transformers(teal: Teal, tmp_path: Path, follow: str, prefill: str) -> None:
    path = tmp_path / "out.zarr"
    dump(teal, path, "--follow", follow, "--prefill", prefill)
    ran = teal("store", "verify", path, "--replay", 1000, "--json")
    assert ran.code == 0, ran.err
    assert all(row["equal"] for row in ran.json["replay"])
    store = open_store(path)
    for target in (0, 0.5):
        level = store.level(target)
        for sequence, prompt in enumerate(store.header.prompts["token_ids"]):
            rows = level.rows(sequence)
            tokens = level.tokens.token_id[rows].astype(int).tolist()
            assert tokens[:PROMPT] == prompt
            assert level.tokens.position[rows].tolist() == list(range(PROMPT + NEW - 1))
            decoded = PHASES["decode" if follow == "free" else "forced"]
            assert level.tokens.phase[rows].tolist() == [PHASES["prefill"]] * PROMPT + [decoded] * (NEW - 1)
            seen = forced(tokens, PROMPT if prefill == "dense" else 0, level.thresholds)
            for (layer, projection), expected in seen.items():
                found = torch.from_numpy(np.array(level.projection(layer, projection)[rows]))
                assert relative_rms(found, expected) < 1e-4, (layer, projection)
    sparse = store.level(0.5)
    dropped = [np.asarray(sparse.projection(0, "down")[sparse.rows(0)][:PROMPT] == 0).mean(), sparse.realised()[0, 6]]
    assert (dropped[0] < 0.01) == (prefill == "dense")
    assert 0.3 < dropped[1] < 0.7  # rows of a dense prompt do not count


def test_rows_of_prompts_change_no_other_row(teal: Teal, tmp_path: Path) -> None:
    dump(teal, tmp_path / "without.zarr")
    dump(teal, tmp_path / "with.zarr", "--prefill", "dense")
    without, both = (open_store(tmp_path / name).level(0.5) for name in ("without.zarr", "with.zarr"))
    later = np.flatnonzero(both.tokens.phase == PHASES["decode"])
    np.testing.assert_array_equal(both.tokens.token_id[later], without.tokens.token_id)
    for site in ("attn_in", "mlp_mid"):
        np.testing.assert_array_equal(both.site(2, site)[later], np.asarray(without.site(2, site)))


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_an_interrupted_dump_of_prompts_goes_on(
    teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefill: str
) -> None:
    from teal_cli.store.writer import LevelWriter

    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    dump(teal, whole, "--prefill", prefill)
    add, ended = LevelWriter.add, []

    def stopped(self: LevelWriter, *told: Any, **columns: float) -> None:
        add(self, *told, **columns)
        ended.append(self)
        if len(ended) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(LevelWriter, "add", stopped)
        dump(teal, broken, "--prefill", prefill)
    assert teal("dump", "--resume", "-o", broken).code == 0
    assert open_store(broken).state.digest == open_store(whole).state.digest
    refused = teal("dump", "--resume", "-o", broken, "--prefill", "none")
    assert (refused.code, "prefill" in refused.err) == (2, True)


def test_a_recipe_may_say_it() -> None:
    assert {"follow", "prefill"} <= set(KEYS)
