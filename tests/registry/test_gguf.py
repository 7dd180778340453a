"""GGUF to checkpoint: weights bit for bit, config, special tokens, tokenizer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from fixtures_gguf import write_gguf
from fixtures_tiny import LONGROPE, make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.registry.checkpoint import verify
from teal_cli.registry.convert import weights as conversion
from teal_cli.registry.download import dry_run, fetch
from teal_cli.registry.registry import Registry

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "llama2": {},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 12},
    "mistral": {"sliding_window": None},
    "qwen2.5": {},
    "qwen3": {"use_sliding_window": False},
    "gemma": {},
    "gemma3": {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 20},  # the period is six layers
    "gemma2": {"layer_types": None, "query_pre_attn_scalar": 20},
    "granite": {},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None, "use_sliding_window": False, "sliding_window": None},
    "olmo2": {},
    "phi3": {"rope_parameters": {key: value for key, value in LONGROPE.items() if key != "attention_factor"}},
    "phi3-4k": {"original_max_position_embeddings": 256},
}
TEXT = "def keep(x, t): return abs(x) > t  # half of 12345 columns rest\n\n  «naïve» 漢字"


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny-llama"), "llama2")


@pytest.fixture
def registry(teal_home: Path) -> Registry:
    return Registry(teal_home)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_what_went_in(name: str, tmp_path: Path, registry: Registry) -> None:
    original = make_tiny(tmp_path / "original", name, **MODELS[name])
    entry = fetch(str(write_gguf(original, tmp_path / f"{name}.gguf")), registry=registry)
    before = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    after = AutoModelForCausalLM.from_pretrained(entry.path)
    assert after.dtype == torch.bfloat16
    weights = dict(after.named_parameters())
    assert {key: value.shape for key, value in before.named_parameters()} == {
        key: value.shape for key, value in weights.items()
    }
    assert all(torch.equal(value, weights[key]) for key, value in before.named_parameters())
    tokens = torch.arange(20)[None] * 7 % 300
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits), "rotary table and norms included"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (original, entry.path)]
    assert tokenizers[0](TEXT).input_ids == tokenizers[1](TEXT).input_ids
    assert tokenizers[1].decode(tokenizers[1](TEXT).input_ids) == TEXT
    assert entry.revision == "sha256:" + _sha256(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_weights_become_the_nearest_bfloat16(quantisation: str, tmp_path: Path, registry: Registry) -> None:
    original = make_tiny(tmp_path / "m", "llama2", hidden_size=64, intermediate_size=96, num_attention_heads=4,
                         num_key_value_heads=4)  # fmt: skip
    file = write_gguf(original, tmp_path / "m.gguf", quantisation=quantisation)
    after = AutoModelForCausalLM.from_pretrained(fetch(str(file), registry=registry).path)
    tensor = next(item for item in gguf.GGUFReader(file).tensors if item.name == "blk.1.ffn_down.weight")
    expected = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
    assert torch.equal(after.model.layers[1].mlp.down_proj.weight, expected)


@pytest.mark.parametrize(
    "kind", [kind for kind in gguf.quants._type_traits if kind.name != "BF16"], ids=lambda k: k.name
)
def test_every_type_that_gguf_takes_apart_is_read_in_slabs(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gguf cannot write most of them: any bytes are codes, and small ones are finite scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    codes = np.random.default_rng(0).integers(0, 0x40, (6, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    monkeypatch.setattr(conversion, "_SLAB", 2 * 4 * 512)
    slabs = list(conversion._bfloat16_slabs(SimpleNamespace(path=tmp_path / "m.gguf"), tensor, None, 0.0))
    assert [len(slab) for slab in slabs] == [2, 2, 2]
    expected = torch.tensor(gguf.dequantize(codes, kind)).to(torch.bfloat16)
    assert expected.shape == (6, 512)
    assert expected.count_nonzero() > 0
    assert np.array_equal(np.concatenate(slabs), expected.view(torch.int16).numpy().view(np.uint16))


def test_rounding_is_to_nearest_even() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=10_000), [0.0, -0.0, 1.00390625, 1.01171875, 3e38]])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(conversion._round_to_bfloat16(values), expected)


def test_special_tokens_and_chat_template(tiny_llama: Path, tmp_path: Path, registry: Registry) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    extra = {
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.padding_token_id": 7,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": template,
    }
    path = fetch(str(write_gguf(tiny_llama, tmp_path / "m.gguf", extra=extra)), registry=registry).path
    eos = json.loads((tiny_llama / "config.json").read_text())["eos_token_id"]
    settings = GenerationConfig.from_pretrained(path)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (5, [eos, 6], 7)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (5, eos, 7)
    assert tokenizer("hello").input_ids[0] == 5
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
    end = tokenizer.convert_ids_to_tokens(eos)
    assert tokenizer(f"a{end}b", add_special_tokens=False).input_ids[1] == eos, "one token, not its letters"


PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁t",
    "he",
    "▁the",
    "▁",
    "t",
    "h",
    "e",
    "a",
    "▁a",
]


def test_a_sentencepiece_vocabulary(tmp_path: Path, registry: Registry) -> None:
    original = make_tiny(tmp_path / "m", "llama2", vocab_size=len(PIECES))
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-i) for i in range(len(PIECES) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
        "tokenizer.ggml.merges": ["a b"],  # as for every array of this vocabulary, its scores count
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    path = fetch(str(write_gguf(original, tmp_path / "m.gguf", extra=extra)), registry=registry).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the  a\né").input_ids)
    assert tokens == ["<s>", "▁the", "▁", "▁a", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer("the  a\né").input_ids, skip_special_tokens=True) == "the  a\né"


def test_gemma_vocabulary(tmp_path: Path, registry: Registry) -> None:
    """No space before a text; runs of spaces and line ends are tokens of their own, matched in the text as it is."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "\n\n", "  ", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁the", "the", "th", "▁", "t", "h", "e"]
    original = make_tiny(tmp_path / "m", "gemma3", vocab_size=len(pieces) + len(words), **MODELS["gemma3"])
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*pieces, *words],
        "tokenizer.ggml.scores": [-1000.0] * 263 + [float(-i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [3, 3, 3, 3, 4, 4, 4] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    path = fetch(str(write_gguf(original, tmp_path / "m.gguf", extra=extra)), registry=registry).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "the the  the\n\n\né"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    assert tokens == ["<bos>", "the", "▁the", "  ", "the", "\n\n", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"extra": {"general.architecture": "mamba"}}, UsageError, "mamba"),
        ({"tensors": {"rope_factors_long.weight": np.ones(6, np.float32)}}, UsageError, "rope_factors_long"),
        ({"extra": {"llama.expert_count": 8}}, UsageError, "mixture of experts"),
        ({"extra": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}}, UsageError, "longrope"),
        ({"extra": {"split.count": 3}}, UsageError, "one of 3 parts"),
        ({"extra": {"tokenizer.ggml.model": "bert"}}, UsageError, "bert"),
        ({"pre": "viking"}, UsageError, "viking"),
        ({"extra": {"tokenizer.ggml.eos_token_id": 100_000}}, TealError, "100000"),
        ({"extra": {"tokenizer.ggml.merges": ["q@ @q"]}}, TealError, "merges"),
        ({"extra": {"llama.feed_forward_length": 99}}, TealError, "shape"),
        ({"drop": ("blk.2.ffn_up.weight",)}, TealError, "blk.2.ffn_up.weight"),
        ({"tensors": {"blk.0.mystery.weight": np.ones(4, np.float32)}}, UsageError, "mystery"),
        ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 4, 5, 6], np.float32)}}, UsageError, "RoPE"),
    ],
)
def test_files_that_cannot_be_decoded(
    tiny_llama: Path, tmp_path: Path, registry: Registry, changes: dict, kind: type, match: str
) -> None:
    file = write_gguf(tiny_llama, tmp_path / "m.gguf", **changes)
    with pytest.raises(kind, match=match) as refused:
        fetch(str(file), registry=registry)
    assert refused.value.hint
    assert registry.names() == ()


@pytest.mark.parametrize(("scaling", "expected"), [
    ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 64},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
])  # fmt: skip
def test_rope_scaling_is_kept(
    tiny_llama: Path, tmp_path: Path, registry: Registry, scaling: dict, expected: dict
) -> None:
    extra = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    path = fetch(str(write_gguf(tiny_llama, tmp_path / "m.gguf", extra=extra)), registry=registry).path
    assert json.loads((path / "config.json").read_text())["rope_scaling"] == expected


def test_olmo3_is_told_from_olmo2(tmp_path: Path, registry: Registry) -> None:
    original = make_tiny(tmp_path / "m", "olmo2")
    with pytest.raises(UsageError, match="OLMo 3"):
        fetch(
            str(write_gguf(original, tmp_path / "m.gguf", extra={"olmo2.attention.sliding_window": 8})),
            registry=registry,
        )


@pytest.mark.parametrize(("extra", "expected"), [
    ({"phi3.rope.scaling.attn_factor": 1.5}, {"attention_factor": 1.5}),
    ({"phi3.rope.scaling.attn_factor": 1.0690449}, {}),
])  # fmt: skip
def test_factor_on_scores_of_longrope(tmp_path: Path, registry: Registry, extra: dict, expected: dict) -> None:
    """sqrt(1 + log(256 / 128) / log(128)) is what the lengths imply, and is left to them."""
    original = make_tiny(tmp_path / "m", "phi3")
    path = fetch(str(write_gguf(original, tmp_path / "m.gguf", extra=extra)), registry=registry).path
    scaling = json.loads((path / "config.json").read_text())["rope_scaling"]
    wanted = {"type": "longrope"} | {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    assert scaling == wanted | expected


def test_a_file_that_is_no_gguf(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 a zip, say")
    with pytest.raises(UsageError, match="not a GGUF") as refused:
        fetch(str(tmp_path / "m.gguf"), registry=registry)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("kept", [6, 100, 3000, -1000])
def test_a_truncated_file(tiny_llama: Path, tmp_path: Path, registry: Registry, kept: int) -> None:
    file = write_gguf(tiny_llama, tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(TealError, match="damaged") as refused:
        fetch(str(file), registry=registry)
    assert refused.value.exit_code == 1
    assert registry.names() == ()


def test_a_tensor_beyond_all_files(tiny_llama: Path, tmp_path: Path, registry: Registry) -> None:
    file = write_gguf(tiny_llama, tmp_path / "m.gguf")
    data, name = bytearray(file.read_bytes()), b"blk.1.attn_norm.weight"
    offset = data.index(name) + len(name) + 4 + 8 + 4  # after its number of axes, its one axis and its type
    data[offset : offset + 8] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(TealError, match="damaged"):
        fetch(str(file), registry=registry)


def test_weights_that_are_not_finite(tiny_llama: Path, tmp_path: Path, registry: Registry) -> None:
    file = write_gguf(tiny_llama, tmp_path / "m.gguf", drop=("blk.1.attn_norm.weight",),
                      tensors={"blk.1.attn_norm.weight": np.full(72, np.nan, np.float32)})  # fmt: skip
    with pytest.raises(TealError, match=r"blk\.1\.attn_norm\.weight holds NaN"):
        fetch(str(file), registry=registry)


def test_no_such_file(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        fetch(str(tmp_path / "absent.gguf"), registry=registry)


def test_dry_run_says_what_it_will_write(tiny_llama: Path, tmp_path: Path, registry: Registry) -> None:
    file = write_gguf(tiny_llama, tmp_path / "My Model.Q8.gguf")
    found = dry_run(str(file), registry=registry)
    assert (found.name, found.plan.architecture) == ("my-model.q8", "LlamaForCausalLM")
    written = (fetch(str(file), registry=registry).path / "model.safetensors").stat().st_size
    assert found.plan.writes == pytest.approx(written, rel=0.05)


def test_the_gguf_is_not_needed_afterwards(tiny_llama: Path, tmp_path: Path, registry: Registry) -> None:
    file = write_gguf(tiny_llama, tmp_path / "m.gguf")
    entry = fetch(str(file), registry=registry)
    file.unlink()
    assert registry.get("m").path == entry.path
    *_, read, found = verify(entry)
    assert (read.done, found.problems) == (entry.size_bytes, ())
    moved = registry.home.rename(tmp_path / "moved")
    assert Registry(moved).get("m").path.is_relative_to(moved), "$TEAL_HOME can move"
    assert not list((moved / "staging").iterdir())


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
