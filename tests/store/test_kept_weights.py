"""The weight rows of kept channels are those of transformers' matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_store import HEADER
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from teal_cli import open_store
from teal_cli.errors import UsageError
from teal_cli.store.export import convert
from teal_cli.store.selection import select
from teal_cli.store.writer import LevelHeader, StoreWriter


def test_weight_rows(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("llama2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    hidden, middle = config.hidden_size, config.intermediate_size
    width = model.model.layers[0].self_attn.o_proj.in_features
    channels = {"attn_in": hidden, "attn_out": width, "mlp_in": hidden, "mlp_mid": middle}
    sha = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    header = replace(
        HEADER, config_sha256=sha, layers=config.num_hidden_layers, channels=channels, dtype="float32",
        value_dtype="float32",
    )  # fmt: skip
    level = LevelHeader(0.5, "uniform", np.full((header.layers, 7), 1.5, np.float32), 3)
    generator = torch.Generator().manual_seed(0)
    with StoreWriter.create(tmp_path / "in.zarr", header, [level]) as writer:
        for token in range(3):
            _, views = writer.level("s0.50").room()
            for site, width in channels.items():
                x = torch.randn(header.layers, width, generator=generator)
                views[site][:, 0].copy_(torch.where(x.abs() > 1.5, x, 0))
            writer.level("s0.50").add(token, token, 0)
        writer.level("s0.50").finish()
        writer.complete()
    store = open_store(tmp_path / "in.zarr")
    chosen = select(store, layers=[1], names=["v", "down", "mlp_in"])
    events = list(convert(store, tmp_path / "out", "npz", chosen, model=folder))
    assert (len(events), events[-1].done, events[-1].total) == (6, 6, 6)
    layer = model.model.layers[1]
    matrices = {
        "v": layer.self_attn.v_proj.weight,
        "down": layer.mlp.down_proj.weight,
        "mlp_in": torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
    }
    for name, weight in matrices.items():
        with np.load(tmp_path / f"out/s0.50/layer_1/{name}.npz") as data:
            rows = torch.from_numpy(data["rows"])
        found = load_file(tmp_path / f"out/weights/s0.50/layer_1/{name}.safetensors")
        assert found["channels"].tolist() == np.flatnonzero(rows.numpy().any(axis=0)).tolist()
        assert torch.equal(found["weight"], weight.T[found["channels"]])
        torch.testing.assert_close(rows[:, found["channels"]] @ found["weight"], rows @ weight.T)


def test_another_model_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from fixtures_store import write_store

    write_store(tmp_path / "in.zarr", 20)
    store = open_store(tmp_path / "in.zarr")
    with pytest.raises(UsageError, match="is not the model that wrote"):
        list(convert(store, tmp_path / "out", "npz", select(store), model=tiny("llama2")))
    assert not (tmp_path / "out").exists()
