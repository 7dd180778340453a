"""A tiny model that converses: it has a chat template, and says only what its tokenizer would write in the same way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
LETTERS = "BCFGHJKLMNPQRUVWXYZ"
"""No merge of the tiny tokenizer joins these, so that any row of them is encoded as it was decoded."""


@pytest.fixture(scope="session")
def talker_folder(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint: the head of the tiny llama2 with zeros for all but `LETTERS`."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(tiny("llama2"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    kept = [tokenizer.token_to_id(letter) for letter in LETTERS]
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    letters = head[kept].clone()
    head.zero_()[kept] = letters
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def talker_home(talker_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A $TEAL_HOME with the model "talker" and a calibration of it. Not to be written to: take `talker`."""
    registry = Registry(tmp_path_factory.mktemp("talker-home") / "home")
    fetch(str(talker_folder), registry=registry, name="talker")
    text = Text("python-docs", num_sequences=1, seq_len=64)
    for _ in calibrate(registry, "talker", text, device=torch.device("cpu")):
        pass
    return registry.home


@pytest.fixture
def talker(talker_home: Path, teal_home: Path) -> Path:
    """This test's own copy of `talker_home`, which $TEAL_HOME names."""
    shutil.copytree(talker_home, teal_home, dirs_exist_ok=True)
    return teal_home
