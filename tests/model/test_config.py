"""What config.json is read as, in older and newer spellings, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from fixtures_tiny import MIXTURES, TINY

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.model.config import ModelConfig, load_config
from teal_cli.model.families import FAMILIES
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS

SIZES = {
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def write(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **fields}))
    return folder


def read(folder: Path, **fields: Any) -> ModelConfig:
    return load_config(write(folder, **fields))


def test_widths_of_every_site(tmp_path: Path) -> None:
    config = read(tmp_path, model_type="qwen3", head_dim=16)
    assert {site: config.channels(site) for site in SITE_PROJECTIONS} == {
        "attn_in": 72,
        "attn_out": 96,
        "mlp_in": 72,
        "mlp_mid": 100,
    }
    assert config.segments("attn_in") == (96, 32, 32)
    assert config.segments("mlp_in") == (100, 100)
    sizes = config.projection_sizes()
    assert tuple(sizes) == PROJECTIONS
    assert sizes["v"] == 72 * 32
    assert sizes["down"] == 100 * 72


def test_every_tiny_model_is_of_a_supported_family(tiny: Callable[[str], Path]) -> None:
    families = {load_config(tiny(name)).family for name in TINY | MIXTURES}
    assert families == set(FAMILIES)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
    ],
    ids=["oldest", "old", "new"],
)
def test_rope_is_read_in_every_spelling(tmp_path: Path, fields: dict[str, Any]) -> None:
    rope = read(tmp_path, **fields).hf.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("linear", 5e5, 2.0)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama"}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 9}, (9,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 9}, (None,) * 4),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            (None, None, None, 9),
        ),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (9, None, 9, None),
        ),
    ],
)
def test_sliding_windows(tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(tmp_path, **fields).sliding_windows == windows


def test_biases_and_norms_by_family(tmp_path: Path) -> None:
    found = {}
    for family in FAMILIES:
        config = read(tmp_path, model_type=family)
        found[family] = (config.qkv_bias, config.o_bias, config.qk_norm)
    assert found == {
        "llama": (False, False, False),
        "mistral": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (False, False, True),
        "gemma": (False, False, False),
        "gemma3_text": (False, False, True),
        "gemma2": (False, False, False),
        "granite": (False, False, False),
        "smollm3": (False, False, False),
        "olmo2": (False, False, True),
        "olmo3": (False, False, True),
        "phi3": (False, False, False),
        "mixtral": (False, False, False),
        "qwen3_moe": (False, False, True),
        "olmoe": (False, False, True),
        "granitemoe": (False, False, False),
    }
    biased = read(tmp_path, attention_bias=True)
    assert (biased.qkv_bias, biased.o_bias) == (True, True)


def test_the_readme_lists_every_family() -> None:
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert f"({', '.join(family.title for family in FAMILIES.values())})" in readme


@pytest.mark.parametrize("document", families.DOCUMENTS, ids=lambda path: path.name)
def test_lists_of_families_are_those_of_the_table(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- families: " in text
    assert families.renewed(text) == text, "write it anew: python -m tests.families"


LONG = {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]}


def test_a_partial_rotation_with_two_sets_of_factors(tmp_path: Path) -> None:
    """As Phi-4-mini spells it."""
    fields = {"rope_scaling": LONG, "partial_rotary_factor": 0.34, "original_max_position_embeddings": 64}
    config = read(tmp_path, model_type="phi3", **fields)
    assert (config.head_dim, config.rotary_dim, config.rope_switch) == (12, 4, 64)
    plain = read(tmp_path, model_type="phi3", sliding_window=9)
    assert (plain.rotary_dim, plain.rope_switch, plain.sliding_windows) == (12, None, (9,) * 4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "phi3", "partial_rotary_factor": 0.25}, "3 of 12 channels"),
        ({"rope_scaling": LONG}, "must be 6 numbers"),
        ({"rope_scaling": LONG | {"short_factor": ["1"] * 6, "long_factor": [1.0] * 6}}, "must be 6 numbers"),
    ],
)
def test_rotations_that_cannot_be(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(TealError, match=named):
        read(tmp_path, **fields)


@pytest.mark.parametrize("name", ["rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", ["x", -1.0, 0, True, [], float("nan"), float("inf")])
def test_rotary_numbers_are_numbers(tmp_path: Path, name: str, value: object) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    with pytest.raises(TealError, match="not a valid config"):
        read(tmp_path, rope_parameters=rope | {name: value})


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=3).eos_ids == (3,)
    assert read(tmp_path, eos_token_id=[3, 4]).eos_ids == (3, 4)
    assert read(tmp_path, eos_token_id=None).eos_ids == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read(tmp_path, eos_token_id=3).eos_ids == (7, 8)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read(tmp_path, eos_token_id=3).eos_ids == (3,)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({}, "float32"),
    ],
)
def test_dtype_the_checkpoint_asks_for(tmp_path: Path, fields: dict[str, Any], dtype: str) -> None:
    assert read(tmp_path, **fields).torch_dtype == dtype


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["gpt2", "GPT2LMHeadModel", *FAMILIES]),
        ({"model_type": "not-even-in-transformers"}, ["not-even-in-transformers", *FAMILIES]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised", "gptq"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "llama3", "yarn"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["0.5"]),
    ],
)
def test_what_teal_cannot_run_is_named(tmp_path: Path, fields: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, **fields)
    assert all(word in caught.value.message for word in named)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "many"},
        {"num_key_value_heads": 4},
        {"head_dim": 13},
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
    ],
)
def test_a_config_that_contradicts_itself_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(TealError, match=r"config\.json is not a valid config") as caught:
        read(tmp_path, **fields)
    assert "\n" not in caught.value.message


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TealError, match=r"config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**9), ("num_hidden_layers", 0),
                                             ("num_attention_heads", 0), ("hidden_size", "72"), ("vocab_size", True),
                                             ("model_type", ["llama"])])  # fmt: skip
def test_a_size_that_lies_is_refused_before_anything_is_made_of_it(tmp_path: Path, name: str, value: object) -> None:
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], name: value}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(TealError, match=r"must be 1 to|is not supported"):
        load_config(tmp_path)
