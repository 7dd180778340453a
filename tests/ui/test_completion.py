"""What TAB offers: asked as a shell asks, over a registry and a store on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teal_cli.model.quantized import WIDTHS
from teal_cli.runs.quantize import HEADS
from teal_cli.ui import completion

Complete = Callable[..., list[str]]


@pytest.fixture
def home(teal_home: Path) -> Path:
    """A registry with two models, one of them calibrated, and one broken entry."""
    for name, size in (("smollm2-135m", 269_000_000), ("mistral-7b-v0.3", 14_496_047_104)):
        folder = teal_home / "models" / name
        folder.mkdir(parents=True)
        entry = {"name": name, "size_bytes": size, "family": "llama", "dtype": "bfloat16"}
        (folder / "model.json").write_text(json.dumps(entry))
    calibration = teal_home / "models" / "smollm2-135m" / "calibrations" / "docs-10x2048"
    calibration.mkdir(parents=True)
    (calibration / "calibration.json").write_text(json.dumps({"dataset": "python-docs", "dtype": "bfloat16"}))
    broken = teal_home / "models" / "broken"
    broken.mkdir()
    (broken / "model.json").write_text('{"name": ')
    return teal_home


@pytest.fixture
def complete(home: Path) -> Complete:
    """complete("teal generate -m ") -> the lines a shell gets back."""

    def ask(line: str, shell: str = "fish") -> list[str]:
        env = {
            "_TEAL_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_TYPER_COMPLETE_ARGS": line,
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        command = [sys.executable, "-m", "teal_cli"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=True)
        assert result.stderr == ""
        return result.stdout.strip().splitlines()

    return ask


def test_models_with_sizes(complete: Complete) -> None:
    assert complete("teal generate -m ") == [
        "broken",
        "mistral-7b-v0.3\t14.5 GB, llama, bfloat16",
        "smollm2-135m\t269 MB, llama, bfloat16",
    ]
    assert complete("teal generate -m smo", shell="bash") == ["smollm2-135m"]
    assert complete("teal generate -m smo", shell="zsh") == [
        """_arguments '*: :(("smollm2-135m":"269 MB, llama, bfloat16"))'"""
    ]


def test_commands_and_options(complete: Complete) -> None:
    assert complete("teal doc") == ["doctor\tWhat this machine can do, and what is missing."]
    assert complete("teal doctor --off") == ["--offline\tUse only what is on this machine already."]


def test_calibrations_of_the_model_on_the_line(complete: Complete) -> None:
    found = ["docs-10x2048\tsmollm2-135m, python-docs, bfloat16"]
    assert complete("teal generate -m smollm2-135m -c ") == found
    assert complete("teal generate -c ") == found
    assert complete("teal generate -m mistral-7b-v0.3 -c ") == []


def test_levels_of_the_store_on_the_line(complete: Complete, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    for level, tokens in (("s0.50", 1000), ("s0.90", 20)):
        (store / level).mkdir(parents=True)
        attributes = {"teal": {"target": float(level[1:]), "tokens_committed": tokens}}
        (store / level / "zarr.json").write_text(json.dumps({"node_type": "group", "attributes": attributes}))
    assert complete(f"teal store stats {store} --level ") == ["s0.50\t1000 tokens", "s0.90\t20 tokens"]
    assert complete(f"teal store stats {store} --level s0.9") == ["s0.90\t20 tokens"]
    assert complete("teal store stats --level ") == []


def test_datasets_and_recipes_come_from_the_shipped_files(complete: Complete) -> None:
    datasets = dict(line.split("\t") for line in complete("teal dump -d "))
    assert {"wikitext", "alpaca", "c4", "python-docs"} <= set(datasets)
    assert all(datasets.values())
    recipes = dict(line.split("\t") for line in complete("teal dump --recipe "))
    assert recipes
    assert all(recipes.values())


@pytest.mark.parametrize(
    ("option", "offered"),
    [
        ("--dtype", completion.DTYPES),
        ("--backend", completion.BACKENDS),
        ("--device", completion.DEVICES),
        ("--sparsity", completion.SPARSITIES),
    ],
)
def test_fixed_choices(complete: Complete, option: str, offered: tuple[str, ...]) -> None:
    assert complete(f"teal generate {option} ") == list(offered)


@pytest.mark.parametrize(("option", "offered"), [("--to", WIDTHS), ("--head", HEADS)])
def test_widths_of_quantised_weights(complete: Complete, option: str, offered: dict[str, object]) -> None:
    assert complete(f"teal quantize {option} ") == list(offered)


def test_catalog_for_downloads() -> None:
    found = dict(completion.catalog("smollm2-135"))
    assert found["smollm2-135m"].startswith("269 MB")


def test_no_registry_is_no_offer(teal_home: Path) -> None:
    assert completion.models("") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_for_the_shell(shell: str) -> None:
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "teal_cli", "--show-completion", shell]
    script = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert f"_TEAL_COMPLETE=complete_{shell}" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, check=False).returncode == 0
