"""Matrices of 8-bit floats with scales, against transformers' model of what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from fixtures_tiny import make_tiny
from reference_model import run_ours, run_theirs, tokens_for, unfused
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from teal_cli.errors import TealError, UsageError
from teal_cli.model.fp8 import fp8_of
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.registry.download import download
from teal_cli.registry.events import Note
from teal_cli.registry.registry import Registry
from teal_cli.runs.quantize import quantize_model

WEIGHTS = "model.safetensors"
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [36, 24]}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


def store_fp8(folder: Path, section: dict[str, Any], grid: tuple[int, int] | str, end: str = "_scale_inv") -> Path:
    """Turns the matrices of a checkpoint into fp8; scales for blocks of `grid`, for each row, or one ("tensor")."""
    stored = load_file(folder / WEIGHTS)
    for name, matrix in list(stored.items()):
        if matrix.dim() != 2 or not name.startswith("model.layers.") or name.endswith(".gate.weight"):
            continue  # routers stay as they are, too
        rows, columns = matrix.shape
        height, width = {"row": (1, columns), "tensor": (rows, columns)}.get(grid, grid)  # type: ignore[call-overload]
        scales = torch.tensor(
            [[float(block.abs().max()) / 448 for block in part.split(width, dim=1)] for part in matrix.split(height)]
        )
        stored[name] = (matrix / wide(scales, matrix, (height, width))).to(torch.float8_e4m3fn)
        stored[name + end] = scales.reshape(()) if grid == "tensor" else scales
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder


def wide(scales: Tensor, matrix: Tensor, block: tuple[int, int]) -> Tensor:
    whole = np.kron(scales.numpy(), np.ones(block, np.float32))
    return torch.from_numpy(whole[: matrix.shape[0], : matrix.shape[1]].copy())


def reference(plain: Path, folder: Path, block: tuple[int, int], end: str) -> Any:
    """transformers' float32 model of `plain` with the matrices that those in `folder` stand for."""
    model, stored = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval(), load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name + end in stored:
                scales, values = stored[name + end], stored[name].float()
                parameter.copy_(values * wide(scales.reshape(scales.shape or (1, 1)), values, block))
    return unfused(model)


CASES = {
    "blocks": ("qwen3", BLOCKS, (36, 24), "_scale_inv"),
    "blocks that end early": ("llama3", BLOCKS | {"weight_block_size": [32, 40]}, (32, 40), "_scale_inv"),
    "fused": ("phi3", BLOCKS | {"weight_block_size": [32, 40]}, (32, 40), "_scale_inv"),
    "one scale": ("llama3", BLOCKS | {"weight_block_size": None}, "tensor", "_scale_inv"),
    "a scale per tensor": ("qwen2", compressed("tensor"), "tensor", "_scale"),
    "a scale per row": ("phi3", compressed("channel"), "row", "_scale"),
    "compressed blocks": ("llama3", compressed("block", block_structure=[32, 40]), (32, 40), "_scale"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_numbers_stand_for_is_computed_with(case: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    name, section, grid, end = CASES[case]
    folder = store_fp8(make_tiny(tmp_path, name), section, grid, end)
    block = {"row": (1, 1000), "tensor": (1000, 1000)}.get(grid, grid)  # type: ignore[call-overload]
    ours, theirs = Transformer.from_checkpoint(folder), reference(tiny(name), folder, block, end)
    tokens = tokens_for(ours.config.vocab)
    torch.testing.assert_close(run_ours(ours, tokens), run_theirs(theirs, tokens), rtol=1e-4, atol=1e-4)


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """Its own way from fp8 to floats, where blocks end with the matrix."""
    folder = store_fp8(make_tiny(tmp_path, "qwen3", intermediate_size=144), BLOCKS, (36, 24))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours, layer = Checkpoint(folder).layer(1, torch.float32), theirs.model.layers[1]
    assert torch.equal(ours.down.tensor(), layer.mlp.down_proj.weight.t())
    assert torch.equal(ours.attn_out.tensor(), layer.self_attn.o_proj.weight.t())


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_multiplied_out_each_by_its_own_scales(name: str, tmp_path: Path) -> None:
    folders = [make_tiny(tmp_path / kind, name) for kind in ("plain", "fp8")]
    stored = load_file(store_fp8(folders[1], BLOCKS, (36, 24)) / WEIGHTS)
    plain = load_file(folders[0] / WEIGHTS)
    scaled = [weight for weight in plain if weight + "_scale_inv" in stored]
    assert sum("experts" in weight for weight in scaled) >= 3 * 2 * 4
    for weight in scaled:
        values = stored[weight].float()
        plain[weight] = values * wide(stored[weight + "_scale_inv"], values, (36, 24))
    save_file(plain, folders[0] / WEIGHTS, {"format": "pt"})
    tokens = tokens_for(320)
    theirs, ours = (Transformer.from_checkpoint(folder, torch.float32) for folder in folders)
    assert torch.equal(*(model.forward(tokens, 0, model.cache(len(tokens))) for model in (theirs, ours)))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_fp8(make_tiny(tmp_path_factory.mktemp("fp8"), "qwen3", dtype="bfloat16"), BLOCKS, (36, 24))


DOWN = "model.layers.1.mlp.down_proj.weight"


def poison(tensors: dict[str, Tensor]) -> None:
    codes = tensors[DOWN].view(torch.uint8)
    codes[3, 5] = 0x7F
    tensors[DOWN] = codes.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(f"{DOWN}_scale_inv"), TealError, r"lacks the tensor \S+down_proj\.weight_scale_inv"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(2, 4)}), TealError, r"shape \[2, 4\].* asks for \[2, 5\]"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(())}), TealError, r"shape \[\].* asks for \[2, 5\]"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(2, 5).int()}), UsageError, "_inv is stored as I32"),
        (lambda t: t.update({DOWN: t[DOWN].float().to(torch.float8_e5m2)}), UsageError, "weight is stored as F8_E5M2"),
        (poison, TealError, r"down_proj\.weight has numbers that are not finite"),
        (lambda t: t[f"{DOWN}_scale_inv"][0].fill_(torch.nan), TealError, "weight_scale_inv has numbers that are not"),
    ],
    ids=[
        "no scales",
        "wrong shape",
        "a scale for all",
        "integers",
        "other floats",
        "a weight is NaN",
        "a scale is NaN",
    ],
)
def test_damage_is_named(
    change: Callable[[dict[str, Tensor]], object], error: type[TealError], message: str, blocks: Path, tmp_path: Path
) -> None:
    tensors = load_file(blocks / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_text((blocks / "config.json").read_text())
    with pytest.raises(error, match=message) as caught:
        Checkpoint(tmp_path).layer(1, torch.float32)
    assert "(down of the family qwen3)" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": ["fp8"]},
        BLOCKS | {"fmt": "e5m2"},
        BLOCKS | {"weight_block_size": [128]},
        compressed("group"),
        compressed("block"),
        compressed("tensor", num_bits=4),
        compressed("tensor", type="int"),
        compressed("tensor") | {"format": "pack-quantized"},
        compressed("tensor") | {"config_groups": {"a": 3}},
    ],
)
def test_other_quantisation_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is quantised"):
        fp8_of({"quantization_config": section})


def test_a_model_of_fp8_says_so_and_is_quantised_like_any_other(blocks: Path, teal_home: Path, teal: Teal) -> None:
    *events, done = download(str(blocks), name="tiny8")
    assert (done.entry.dtype, done.entry.stored) == ("bfloat16", "fp8")
    stored = load_file(blocks / WEIGHTS)
    assert done.entry.parameters == sum(t.numel() for name, t in stored.items() if "scale" not in name)
    note = "tiny8 is stored in fp8, and becomes bfloat16 as it is read"
    assert note in [event.text for event in events if isinstance(event, Note)]
    assert "fp8 with scales" in teal("models", "info", "tiny8").out
    *_, made = quantize_model(Registry(), "tiny8", "int8")
    assert made.entry.stored is None
    ours, whole = (Checkpoint(path).layer(2, torch.float32).down.tensor() for path in (made.entry.path, blocks))
    assert float((ours - whole).abs().max() / whole.abs().max()) < 0.01
