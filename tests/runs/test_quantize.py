"""Quantised models: judged by transformers with the dequantised weights; made whole or not at all; refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_cli import Teal
from fixtures_tiny import make_tiny
from oracle import assert_agrees, make_dump, reference_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from teal_cli.errors import HardwareError, TealError, UsageError
from teal_cli.model.weights import Checkpoint
from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs import quantize as library
from teal_cli.runs.calibrate import Text, calibrate
from teal_cli.runs.quantize import Made, quantize_model
from teal_cli.runs.session import open_session
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout, quantize
from teal_kernels.spec import SITE_PROJECTIONS
from teal_kernels.steps.spec import MATRICES

LEVELS = (0.0, 0.5, 0.9)
CPU = torch.device("cpu")


def made(model: str = "tiny", width: str = "int4", **options: object) -> Made:
    *_, last = quantize_model(Registry(), model, width, **options)  # type: ignore[arg-type]
    assert isinstance(last, Made)
    return last


def dequantised(parent: Path, quantised: Path) -> PreTrainedModel:
    """transformers' own float32 model of the parent, with the weights that the packed rows stand for."""
    model, checkpoint = reference_model(parent), Checkpoint(quantised)
    for index, layer in enumerate(model.model.layers):
        weights = checkpoint.layer(index, torch.float32)
        for field, site in MATRICES.items():
            matrix = getattr(weights, field)
            assert isinstance(matrix, PackedMatrix)
            for part, columns in zip(SITE_PROJECTIONS[site], matrix.tensor().split(matrix.segments, 1), strict=True):
                owner = layer.self_attn if part in "qkvo" else layer.mlp
                owner.get_submodule(f"{part}_proj").weight.data.copy_(columns.t())
    return model


@pytest.mark.parametrize(
    ("name", "width", "group", "backend"),
    [
        ("llama3", "int8", 64, "auto"),
        ("llama3", "int4", 32, "auto"),
        ("qwen3", "int4", 64, "auto"),
        ("gemma3", "int8", 128, "auto"),
        ("gemma3", "int4", 64, "cpu"),
        ("llama3", "int4", 64, "reference"),
    ],
)
def test_transformers_with_the_dequantised_weights_agrees(
    name: str, width: str, group: int, backend: str, tiny: Callable[[str], Path], teal_home: Path, tmp_path: Path
) -> None:
    fetch(str(tiny(name)), name="tiny")
    text = Text("python-docs", num_sequences=2, seq_len=64)
    for _ in calibrate(Registry(), "tiny", text, dtype="float32", device=CPU):
        pass
    entry = made(width=width, group=group).entry
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\ndef keep")
    out = tmp_path / "out.zarr"
    dump = make_dump(entry.name, out, levels=LEVELS, prompts=prompts, max_new_tokens=12, backend=backend)
    assert_agrees(dump, out, dequantised(tiny(name), entry.path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "group", "widths"), [(8, 64, (100, 65)), (4, 32, (64, 64)), (4, 256, (300, 30, 1))])
def test_dense_products(dtype: torch.dtype, bits: int, group: int, widths: tuple[int, ...]) -> None:
    layout = RowLayout(bits, group, widths)
    matrix = PackedMatrix(quantize(torch.randn(90, sum(widths)), layout), layout, dtype)
    x = torch.randn(7, 90).to(dtype)
    wanted = x.double() @ matrix.tensor().double()
    limit = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert (matrix.dense(x) - wanted).norm() <= limit * wanted.norm()
    for number, part in enumerate(wanted.split(widths, 1)):
        assert (matrix.dense(x, number) - part).norm() <= limit * part.norm()


def test_the_command_line(ready: Path, teal: Teal) -> None:
    result = teal("quantize", "tiny", "--to", "int8", "--json")
    assert result.code == 0, result.err
    assert result.json["name"] == "tiny-int8"
    assert result.json["parent"] == "tiny"
    assert 8 < result.json["bits_per_weight"] < 32
    assert result.json["calibrations"] == teal("models", "info", "tiny", "--json").json["calibrations"]
    assert teal("models", "verify", "tiny-int8").code == 0
    assert "bits" in teal("models", "ls").out
    assert "tiny, whose calibrations" in teal("models", "info", "tiny-int8").out
    assert teal("quantize", "tiny", "--to", "int8", "--json").json["reused"]
    text = ("-m", "tiny-int8", "-s", "0.5", "--prompt", "The", "--max-new-tokens", 4, "--temperature", 0, "--json")
    assert teal("generate", *text).json["model"] == "tiny-int8"
    scored = ("-m", "tiny-int8", "-s", "0,0.5", "-d", "python-docs", "--num-sequences", 1, "--window", 32, "--json")
    assert teal("eval", *scored).code == 0
    again = ("-m", "tiny-int8", "-d", "python-docs", "--num-sequences", 1, "--seq-len", 32, "--json")
    assert teal("calibrate", *again).code == 0


def test_refusals(ready: Path, teal: Teal) -> None:
    assert "not to int3" in teal("quantize", "tiny", "--to", "int3").err
    assert "not 48" in teal("quantize", "tiny", "--to", "int4", "--group", "48").err
    assert teal("quantize", "tiny", "--to", "int4").code == 0
    assert "quantised already, from tiny" in teal("quantize", "tiny-int4", "--to", "int8").err
    assert "already the name of" in teal("quantize", "tiny", "--to", "int8", "--name", "tiny-int4").err
    assert "no download" in teal("download", "tiny-int4").err


def test_a_backend_that_cannot_is_refused(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made()
    monkeypatch.setattr("teal_cli.runs.session.choose_step", lambda device, backend: ("triton-graph", None))
    with pytest.raises(HardwareError, match="triton-graph backend cannot multiply by the quantised") as error:
        open_session("tiny-int4", device="cpu")
    assert "--device cpu" in str(error.value.hint)


def test_no_space(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.files.free_space", lambda path: 10)
    with pytest.raises(TealError, match="are needed"):
        made()
    assert Registry().names() == ("tiny",)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float, teal_home: Path, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fetch(str(folder), name="tiny")
    with pytest.raises(TealError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has weights that are not finite"):
        made()
    assert Registry().names() == ("tiny",)


def test_a_run_that_is_cut_off_is_finished_by_the_next(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(name="whole").entry
    events = quantize_model(Registry(), "tiny", "int4", name="cut")
    next(events)
    events.close()
    assert "cut" not in Registry().names()
    packed: list[int] = []
    original = library._layer
    monkeypatch.setattr(library, "_layer", lambda c, q, i: packed.append(i) or original(c, q, i))
    entry = made(name="cut").entry
    assert packed == list(range(1, Checkpoint(entry.path).config.layers))
    assert entry.revision == whole.revision


def test_damage_is_refused(ready: Path, tmp_path: Path) -> None:
    entry = made().entry
    files = sorted(entry.path.glob("model-*.safetensors"))

    def damaged(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(entry.path, folder)
        tensors = load_file(folder / files[0].name)
        change(tensors)
        save_file(tensors, folder / files[0].name)
        return folder

    name = "model.layers.0.qkv.packed"
    with pytest.raises(TealError, match="has the shape"):
        Checkpoint(damaged(lambda t: t.update({name: t[name][:, :64].contiguous()})))
    with pytest.raises(TealError, match="a scale is not finite"):
        Checkpoint(damaged(lambda t: t[name].fill_(255))).layer(0, torch.float32)
    with pytest.raises(UsageError, match="is stored as"):
        Checkpoint(damaged(lambda t: t.update({name: t[name].view(torch.int8)})))
    folder = damaged(lambda t: None)
    config = json.loads((folder / "config.json").read_text())
    for change, says in (({"layout": 9}, "layout 9"), ({"group": 7}, "damaged"), ({"bits": 5}, "damaged")):
        section = {**config["teal_quantization"], **change}
        (folder / "config.json").write_text(json.dumps({**config, "teal_quantization": section}))
        with pytest.raises(TealError, match=says):
            Checkpoint(folder)
