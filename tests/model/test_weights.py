"""Weights as they come out of safetensors: layout, sharing, and what is wrong with a damaged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_tiny import make_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint, LayerWeights, config_sha256
from teal_kernels.experts import Experts
from teal_kernels.matrix import Matrix

WEIGHTS = "model.safetensors"


def tensors_of(weights: LayerWeights) -> dict[str, Tensor]:
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    tensors = {name: value.tensor() if isinstance(value, Matrix) else value for name, value in values.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def fused(part: dict[str, Tensor], parent: str, names: Sequence[str]) -> Tensor:
    whole = part.get(f"{parent}.{'_'.join(names) if parent == 'mlp' else names}_proj.weight")
    return torch.cat([part[f"{parent}.{p}_proj.weight"] for p in names]) if whole is None else whole


def experts(part: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(gate and up, down) of each expert, as linear layers have them; stored stacked, or in tensors of their own."""
    if "block_sparse_moe.input_linear.weight" in part:
        return list(zip(*(part[f"block_sparse_moe.{name}_linear.weight"] for name in ("input", "output")), strict=True))
    gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe.experts.0.w1.weight" in part else (
        "gate_proj", "up_proj", "down_proj")  # fmt: skip
    found = {tuple(name.rsplit(".", 3)[-3:-1]): tensor for name, tensor in part.items()
             if ".experts." in name and not name.startswith("model.")}  # fmt: skip
    numbers = sorted({number for number, _ in found}, key=int)
    return [(torch.cat([found[n, gate], found[n, up]]), found[n, down]) for n in numbers]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_matrices_are_fused_and_input_major(tiny_model: Path) -> None:
    stored = load_file(tiny_model / WEIGHTS)
    checkpoint = Checkpoint(tiny_model)
    config = checkpoint.config
    for index in range(config.layers):
        weights = checkpoint.layer(index, torch.float32)
        part = {name.removeprefix(f"model.layers.{index}."): t for name, t in stored.items()}
        qkv = fused(part, "self_attn", "qkv")
        if config.rotary_dim != config.head_dim:
            heads = qkv.view(-1, 12, 72)
            rotated = config.heads + config.kv_heads
            heads[:rotated] = heads[:rotated, [0, 1, 2, 3, 8, 9, 4, 5, 6, 7, 10, 11]]
        assert torch.equal(weights.qkv.tensor(), qkv.t())
        assert torch.equal(weights.attn_out.tensor(), part["self_attn.o_proj.weight"].t())
        if weights.router is None:
            gate_up = fused(part, "mlp", ("gate", "up"))
            assert torch.equal(weights.gate_up.tensor(), gate_up.t())
            assert torch.equal(weights.down.tensor(), part["mlp.down_proj.weight"].t())
            assert all(t.is_contiguous() for t in tensors_of(weights).values())
        else:
            assert isinstance(weights.gate_up, Experts)
            assert isinstance(weights.down, Experts)
            for (gate_up, down), mine, out in zip(experts(part), weights.gate_up.each, weights.down.each, strict=True):
                assert torch.equal(mine.tensor(), gate_up.t())
                assert torch.equal(out.tensor(), down.t())
                assert mine.tensor().is_contiguous()
                assert out.tensor().is_contiguous()
        for site, matrix in zip(
            ("attn_in", "attn_out", "mlp_in", "mlp_mid"),
            (weights.qkv, weights.attn_out, weights.gate_up, weights.down),
            strict=True,
        ):
            assert matrix.shape == (config.channels(site), sum(config.segments(site)))


def test_a_matrix_taller_than_one_piece_is_turned_whole(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "llama3", intermediate_size=777)
    stored = load_file(folder / WEIGHTS)
    weights = Checkpoint(folder).layer(1, torch.bfloat16)
    expected = torch.cat([stored[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    assert torch.equal(weights.gate_up.tensor(), expected.t().bfloat16())


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_cast_as_transformers_casts_them(tmp_path: Path, stored: str, dtype: torch.dtype) -> None:
    folder = make_tiny(tmp_path, "qwen3", dtype=stored)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).model.layers[2]
    ours = Checkpoint(folder).layer(2, dtype)
    assert {t.dtype for t in tensors_of(ours).values()} == {dtype}
    assert torch.equal(ours.attn_out.tensor(), theirs.self_attn.o_proj.weight.t())
    assert torch.equal(ours.q_norm, theirs.self_attn.q_norm.weight)
    assert Transformer.from_checkpoint(folder).dtype == getattr(torch, stored)


def test_a_tied_head_is_the_embedding_itself(tiny: Callable[[str], Path]) -> None:
    model = Transformer.from_checkpoint(tiny("llama3"))
    assert model.lm_head is model.embedding
    untied = Transformer.from_checkpoint(tiny("llama2"))
    assert not torch.equal(untied.lm_head.tensor(), untied.embedding.tensor())


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_wins_if_it_differs(tmp_path: Path, same: bool) -> None:
    folder = make_tiny(tmp_path, "llama3")
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * (1 if same else -1)}))
    model = Transformer.from_checkpoint(folder)
    assert (model.lm_head is model.embedding) == same
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.tensor(), theirs.lm_head.weight)


def test_shards_hold_the_same_model(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    sharded = make_tiny(tmp_path, "qwen2", max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = Checkpoint(tiny("qwen2")), Checkpoint(sharded)
    for index in range(one.config.layers):
        expected = tensors_of(one.layer(index, torch.float32))
        found = tensors_of(many.layer(index, torch.float32))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["phi3", "llama3"])
def test_tensors_that_lie_anywhere_in_two_files(name: str, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """Fused or tied, each second one in the other file, and none at a multiple of its dtype's size."""
    stored = load_file(tiny(name) / WEIGHTS)
    index = {tensor: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, tensor in enumerate(stored)}
    for file in set(index.values()):
        save_file({tensor: stored[tensor] for tensor, of in index.items() if of == file}, tmp_path / file)
        data = (tmp_path / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        (tmp_path / file).write_bytes(
            (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((tiny(name) / "config.json").read_text())
    one, two = Transformer.from_checkpoint(tiny(name)), Transformer.from_checkpoint(tmp_path)
    assert two.lm_head is two.embedding
    assert torch.equal(one.forward(torch.arange(5), 0, one.cache(8)), two.forward(torch.arange(5), 0, two.cache(8)))


@pytest.mark.parametrize(
    ("name", "tensor", "role"),
    [
        ("olmo2", "model.layers.2.post_feedforward_layernorm.weight", "mlp_post_norm of the family olmo2"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "q, k, v of the family phi3"),
        ("granite", "model.embed_tokens.weight", "embedding of the family granite"),
    ],
)
def test_the_part_of_the_row_is_named(name: str, tensor: str, role: str, tmp_path: Path, tiny: Any) -> None:
    stored = load_file(tiny(name) / WEIGHTS)
    (tmp_path / "config.json").write_text((tiny(name) / "config.json").read_text())
    for change, said in (({}, "lacks"), ({tensor: torch.ones(3)}, r"has the shape \[3\]")):
        save_file({**{n: t for n, t in stored.items() if n != tensor}, **change}, tmp_path / WEIGHTS)
        with pytest.raises(TealError, match=said) as caught:
            Checkpoint(tmp_path)
        assert tensor in caught.value.message
        assert f"({role})" in caught.value.message


def test_loading_reports_every_layer(tiny: Callable[[str], Path]) -> None:
    seen: list[tuple[int, int]] = []
    Transformer.from_checkpoint(tiny("mistral"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """They are copies: a checkpoint can be removed, or rewritten, under a running model."""
    folder = make_tiny(tmp_path, "llama2")
    model = Transformer.from_checkpoint(folder)
    before = model.forward(torch.arange(5), 0, model.cache(8))
    (folder / WEIGHTS).write_bytes(bytes((folder / WEIGHTS).stat().st_size))
    assert torch.equal(model.forward(torch.arange(5), 0, model.cache(8)), before)


@pytest.mark.parametrize("kept", [0, 5, 3000, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    folder = make_tiny(tmp_path)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(kept * len(data)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(TealError, match=r"model\.safetensors is truncated or damaged") as caught:
        Checkpoint(folder)
    assert "teal models verify" in str(caught.value.hint)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, max_shard_size="50KB")
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(NotFoundError, match=shard.name):
        Checkpoint(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "qwen2")
    edit(folder, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(TealError, match=r"lacks the tensor model\.layers\.1\.self_attn\.k_proj\.bias"):
        Checkpoint(folder)


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "llama2")
    edit(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(TealError, match=r"lacks the tensor lm_head\.weight"):
        Checkpoint(folder)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    edit(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(99, 72)}))
    with pytest.raises(TealError, match=r"mlp\.up_proj\.weight has the shape \[99, 72\].*\[100, 72\]"):
        Checkpoint(folder)


def test_a_quantised_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(UsageError, match="stored as F8_E4M3"):
        Checkpoint(folder)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, max_shard_size="50KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weights": {}}))
    with pytest.raises(TealError, match=r"index\.json is damaged"):
        Checkpoint(folder)


def test_weights_in_another_format_are_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(NotFoundError, match="no safetensors"):
        Checkpoint(folder)


def test_config_sha256_follows_the_config(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path)
    first = config_sha256(folder)
    assert config_sha256(folder) == first
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("256", "512"))
    assert config_sha256(folder) != first
