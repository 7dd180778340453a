"""Quantised models: judged by transformers with the dequantised weights; made whole or not at all; refused by name."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_cli import Teal
from fixtures_tiny import TINY_FAMILIES, make_tiny
from oracle import assert_agrees, dequantised, make_dump
from safetensors.torch import load_file, save_file

from teal_cli.errors import TealError, UsageError
from teal_cli.model.quantized import SECTION
from teal_cli.model.weights import Checkpoint
from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs import quantize as library
from teal_cli.runs.calibrate import Text, calibrate
from teal_cli.runs.quantize import Made, quantize_model
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout, quantize

LEVELS = (0.0, 0.5, 0.9)
CPU = torch.device("cpu")


def made(model: str = "tiny", width: str = "int4", **options: object) -> Made:
    *_, last = quantize_model(Registry(), model, width, **options)  # type: ignore[arg-type]
    assert isinstance(last, Made)
    return last


@pytest.mark.parametrize(
    ("name", "width", "group", "head", "backend"),
    [
        *((name, ("int8", "int4")[i % 2], 64, ("int8", "int4")[i % 2], "auto") for i, name in enumerate(TINY_FAMILIES)),
        ("llama3", "int4", 32, "int4", "auto"),
        ("llama2", "int4", 128, "int4", "auto"),
        ("llama3", "int4", 64, "none", "auto"),
        ("qwen3", "int8", 64, "none", "auto"),
        ("gemma3", "int4", 128, "int4", "auto"),
        ("gemma3", "int4", 64, "int4", "cpu"),
        ("llama2", "int8", 64, "int8", "cpu"),
        ("llama3", "int4", 64, "int4", "reference"),
        ("llama3", "int4", 64, "int8", "auto"),
        ("gemma3", "int4", 32, "int8", "auto"),
        ("qwen2", "int8", 64, "int4", "auto"),
        ("llama2", "int4", 64, "int8", "cpu"),
    ],
)
def test_transformers_with_the_dequantised_weights_agrees(
    name: str,
    width: str,
    group: int,
    head: str,
    backend: str,
    tiny: Callable[[str], Path],
    teal_home: Path,
    tmp_path: Path,
) -> None:
    fetch(str(tiny(name)), name="tiny")
    text = Text("python-docs", num_sequences=2, seq_len=64)
    for _ in calibrate(Registry(), "tiny", text, dtype="float32", device=CPU):
        pass
    entry = made(width=width, group=group, head=head).entry
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\ndef keep")
    out = tmp_path / "out.zarr"
    dump = make_dump(entry.name, out, levels=LEVELS, prompts=prompts, max_new_tokens=12, backend=backend)
    assert_agrees(dump, out, dequantised(tiny(name), entry.path))


@pytest.mark.slow
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_smollm2_agrees_with_transformers(width: str, smollm2_home: Path, tmp_path: Path) -> None:
    registry, name = Registry(smollm2_home), "smollm2-135m"
    for _ in calibrate(registry, name, Text("python-docs", num_sequences=4, seq_len=512), device=CPU):
        pass
    entry = made(name, width).entry
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is")
    out = tmp_path / "out.zarr"
    dump = make_dump(entry.name, out, levels=(0.0, 0.5), prompts=prompts, max_new_tokens=32, backend="auto")
    assert_agrees(dump, out, dequantised(registry.get(name).path, entry.path))


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
    y = torch.randn(5, sum(widths)).to(dtype)
    turned = y.double() @ matrix.tensor().double().t()
    assert (matrix.dense_transposed(y) - turned).norm() <= limit * turned.norm()


def test_gradients_flow_through_packed_matrices() -> None:
    """Columns are unpacked into memory that the next tile overwrites, which a gradient must not see."""
    layout = RowLayout(4, 64, (130, 40))
    matrix, other = (PackedMatrix(quantize(torch.randn(90, 170), layout), layout, torch.float32) for _ in range(2))
    for product, width, weight in (
        (PackedMatrix.dense, 90, matrix.tensor()),
        (PackedMatrix.dense_transposed, 170, matrix.tensor().t()),
    ):
        x = torch.randn(3, width, requires_grad=True)
        result = product(matrix, x)
        product(other, torch.randn(3, width))
        error = torch.randn_like(result)
        result.backward(error)
        torch.testing.assert_close(x.grad, error @ weight.t())


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


@pytest.mark.parametrize(
    ("options", "name", "bits"),
    [
        ((), "tiny-int4", 8),
        (("--head", "int4"), "tiny-int4-int4-head", 4),
        (("--head", "none"), "tiny-int4-float-head", None),
    ],
)
def test_embedding_and_head_are_int8_unless_told_otherwise(
    options: tuple[str, ...], name: str, bits: int | None, ready: Path, teal: Teal
) -> None:
    assert teal("quantize", "tiny", "--to", "int4", *options, "--json").json["name"] == name
    quantization = Checkpoint(Registry().get(name).path).quantization
    assert quantization is not None
    assert (quantization.bits, quantization.head) == (4, bits)


@pytest.mark.parametrize(("head", "flag"), [("int4", True), ("none", False)])
def test_a_model_from_before_the_head_had_a_width(head: str, flag: bool, ready: Path) -> None:
    """Its section says only whether embedding and head are packed, in as many bits as the rest."""
    folder = made(head=head).entry.path
    before = Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config[SECTION]["head"] = flag
    (folder / "config.json").write_text(json.dumps(config))
    after = Checkpoint(folder)
    assert after.quantization == before.quantization
    tables = (found.embedding(torch.float32).tensor() for found in (before, after))
    assert torch.equal(*tables)


def test_refusals(ready: Path, teal: Teal) -> None:
    wrong = teal("quantize", "tiny", "--to", "int4", "--head", "int3")
    assert wrong.code != 0
    assert "--head is int8 or int4 or none, not int3" in wrong.err
    assert "hint: " in wrong.err
    assert "not to int3" in teal("quantize", "tiny", "--to", "int3").err
    assert "not 48" in teal("quantize", "tiny", "--to", "int4", "--group", "48").err
    assert teal("quantize", "tiny", "--to", "int4").code == 0
    assert "quantised already, from tiny" in teal("quantize", "tiny-int4", "--to", "int8").err
    assert "already the name of" in teal("quantize", "tiny", "--to", "int8", "--name", "tiny-int4").err
    assert "no download" in teal("download", "tiny-int4").err


def test_no_space(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_cli.files.free_space", lambda path: 10)
    with pytest.raises(TealError, match="are needed"):
        made()
    assert Registry().names() == ("tiny",)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(value: float, name: str, teal_home: Path, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fetch(str(folder), name="tiny")
    with pytest.raises(TealError, match=f"{re.escape(name)} has weights that are not finite"):
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


KILLED = """
import os, signal, sys
from teal_cli.registry.registry import Registry
from teal_cli.runs import quantize as library

owner, name, call = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner = {"library": library, "registry": Registry, "path": library.Path}[owner]
original, calls = getattr(owner, name), 0

def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, killed)
list(library.quantize_model(Registry(), "tiny", "int4", force=True))
"""


@pytest.mark.parametrize(
    "at",
    [("library", "save_file", "2"), ("library", "sha256_of", "3"), ("path", "rename", "1"), ("registry", "add", "1")],
    ids=lambda at: at[1],
)
def test_killed_at_any_moment_the_registry_is_as_it_was(at: tuple[str, str, str], ready: Path, teal: Teal) -> None:
    before = made().entry
    done = subprocess.run([sys.executable, "-c", KILLED, *at], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Registry().get("tiny-int4") == before
    assert teal("models", "verify", "tiny-int4").code == 0
    after = made(force=True).entry
    assert after.revision == before.revision
    assert teal("models", "verify", "tiny-int4").code == 0
    assert len(list(after.home.glob("weights-*"))) == 1, "what the killed run left is gone"


def test_plans_of_the_parent_serve(ready: Path, teal: Teal, tmp_path: Path) -> None:
    assert teal("plan", "make", "-m", "tiny", "-s", 0.5, "--allocation", "uniform").code == 0
    made()
    said = ("--prompt", "The", "--max-new-tokens", 4, "--temperature", 0, "--plan", "uniform-0.5", "--json")
    assert teal("generate", "-m", "tiny-int4", *said).json["plan"] == teal("generate", "-m", "tiny", *said).json["plan"]
    scored = ("--plan", "uniform-0.5", "-d", "python-docs", "--num-sequences", 1, "--window", 32, "--json")
    assert teal("eval", "-m", "tiny-int4", *scored).json["levels"][0]["plan"] == "uniform-0.5"


def test_an_evaluation_of_other_weights_is_not_resumed(ready: Path, teal: Teal, tmp_path: Path) -> None:
    """Parent and child have one config and one tokenizer, and a child may be made again in another width."""
    made(width="int8", name="child")
    scored = ("-s", 0, "-d", "python-docs", "--num-sequences", 1, "--window", 32, "-o", tmp_path / "e.json")
    assert teal("eval", "-m", "child", *scored).code == 0
    assert teal("eval", "-m", "child", *scored, "--resume").code == 0
    assert "what differs: model, quantised" in teal("eval", "-m", "tiny", *scored, "--resume").err
    made(width="int4", name="child", force=True)
    refused = teal("eval", "-m", "child", *scored, "--resume")
    assert refused.code == 2
    assert "what differs: quantised" in refused.err


def test_damaged_tables_are_refused(ready: Path, tmp_path: Path) -> None:
    entry = made().entry
    folder = tmp_path / "damaged"
    shutil.copytree(entry.path, folder)
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    tensors = load_file(file)
    name = "model.embed_tokens.packed"
    assert set(tensors) == {name, "model.norm.weight"}, "a tied head is stored once"
    save_file({**tensors, name: tensors[name][:, :-64].contiguous()}, file)
    with pytest.raises(TealError, match=r"model\.embed_tokens\.packed has the shape"):
        Checkpoint(folder)
    save_file({**tensors, name: torch.full_like(tensors[name], 255)}, file)
    with pytest.raises(TealError, match="a scale is not finite"):
        Checkpoint(folder).embedding(torch.float32)


def test_a_changed_byte_is_found_by_its_checksum(ready: Path, teal: Teal) -> None:
    file = sorted(made().entry.path.glob("model-*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = teal("models", "verify", "tiny-int4")
    assert found.code != 0
    assert file.name in found.out + found.err
    assert teal("quantize", "tiny", "--to", "int4", "--force").code == 0
    assert teal("models", "verify", "tiny-int4").code == 0


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
