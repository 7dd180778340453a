"""Help: every option says what it is without being given, and every example at the end of a help text runs."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures_ranks
import numpy as np
import pytest
import torch
from fixtures_cli import Teal
from fixtures_tiny import make_tiny
from reference_teal import write_layer

from teal_cli.app import COMMANDS
from teal_cli.model.config import load_config
from teal_cli.registry.download import fetch
from teal_cli.registry.registry import Registry
from teal_cli.runs.calibrate import Text, calibrate
from teal_cli.ui.lazy import TealContext, load

NAME = "smollm2-135m"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "amd-epyc-2-cores"


def commands() -> Iterator[tuple[str, Any]]:
    """(words, command) of every command that runs."""

    def below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        for name, child in getattr(command, "commands", {}).items():
            yield from below(f"{words} {name}", child)
        if not hasattr(command, "commands"):
            yield words, command

    for entry in COMMANDS:
        yield from below(entry.name, load(entry))


def examples(help_text: str) -> list[str]:
    """The lines below `Examples:`."""
    return [line.strip() for line in help_text.partition("Examples:\n")[2].splitlines() if line.strip()]


LEAVES = dict(commands())
EXAMPLES = [line for words, command in LEAVES.items() for line in examples(str(command.epilog))]


@pytest.mark.parametrize("words", LEAVES)
def test_help_ends_with_its_examples(teal: Teal, words: str) -> None:
    shown = examples(teal(*words.split(), "--help").out)
    assert 2 <= len(shown) <= 3
    for line in shown:
        assert line.startswith(f"teal {words}")
        assert line in EXAMPLES


@pytest.mark.parametrize("words", LEAVES)
def test_an_option_says_what_it_is_without_being_given(words: str) -> None:
    """Its default in words or figures, or that it is required; a switch is off, unless its help says otherwise."""
    context = TealContext(LEAVES[words], info_name=words, default_map=LEAVES[words].context_settings["default_map"])
    for option in LEAVES[words].params:
        record = option.get_help_record(context)
        if option.param_type_name == "option" and record is not None:
            is_switch = getattr(option, "is_flag", False) and not option.secondary_opts
            assert is_switch or "default: " in record[1] or "required" in record[1], record
            assert "(" not in record[1].partition("default: ")[2], record


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name, once: a model of one layer with calibrations, a store, texts, and files of TEAL."""
    folder = tmp_path_factory.mktemp("examples")
    size = {"num_hidden_layers": 1, "intermediate_size": 252, "max_position_embeddings": 4096}
    checkpoint = make_tiny(folder / "checkpoint", **size)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "notes.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    (folder / "prompt.txt").write_text("The quick")
    (folder / "prompts.txt").write_text("The quick\nSparse activations\n")
    registry = Registry(folder / "home")
    for name in (NAME, "mine"):
        fetch(str(checkpoint), registry=registry, name=name)
    for text, called in ((Text("python-docs", None, None, 2, 256), None),
                         (Text(str(folder / "notes.txt"), None, None, 2, 512), "notes")):  # fmt: skip
        for _ in calibrate(registry, NAME, text, device=torch.device("cpu"), name=called):
            pass
    write_layer(folder / "TEAL" / "histograms" / "layer-0")
    _write_lookup(folder / "TEAL" / "lookup" / "layer-0", checkpoint)
    for kind in ("kernels", f"decode-{NAME}"):
        shutil.copy(RESULTS / f"{kind}.json", folder / f"{kind.partition('-')[0]}.json")
    assert fixtures_ranks.together(folder / "collection.zarr", 1) == [None]
    return folder


def _write_lookup(folder: Path, checkpoint: Path) -> None:
    sizes = np.array(list(load_config(checkpoint).projection_sizes().values()), float)
    rows, levels = ["Effective Sparsity,Activation Error,Baseline Error,q,k,v,o,gate,up,down"], np.zeros(7)
    for step in range(7 * 18):
        levels[step % 7] += 0.05
        rows.append(",".join(map(str, (float(levels @ sizes / sizes.sum()), 0.0, 0.0, *levels))))
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text("\n".join(rows))


NEEDS = {
    "activations.zarr": ("dump", "-d", "python-docs", "-n", 2, "-s", "0.5,0.9", "--max-new-tokens", 6, "-o",
                         "activations.zarr"),
    "fisher-0.5": ("plan", "make", "--allocation", "uniform", "--name", "fisher-0.5"),
    "plot eval": ("eval", "-s", "0,0.5", "-d", "python-docs", "-n", 1, "--window", 96, "-o", "eval.json"),
    "plan rm even": ("plan", "make", "--allocation", "uniform", "--name", "even"),
}  # fmt: skip
"""What an example goes on with -> the command that makes it, unless the example does."""


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_runs(
    prepared: Path, teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    here = tmp_path / "here"
    shutil.copytree(prepared, here)
    monkeypatch.setenv("TEAL_HOME", str(here / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(here)
    words = shlex.split(line)[1:]
    for named, command in NEEDS.items():
        if named in line and (words[:2] != ["dump", "-d"]):
            made = teal(*command)
            assert made.code == 0, made.err
    if words[0] == "bench":  # writes what a plot needs
        Path(words[words.index("-o") + 1] if "-o" in words else "none").unlink(missing_ok=True)
    typed = "The quick"
    if "<" in words:
        typed, words = (here / words[-1]).read_text(), words[: words.index("<")]
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    ran = teal(*words)
    assert ran.code == 0, ran.err
    if "-o" in words and "--dry-run" not in words:
        assert (here / words[words.index("-o") + 1]).exists()
