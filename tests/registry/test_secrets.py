"""A token of the hub is in nothing that teal writes: screen, JSON, registry, caches, stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures_cli import Result, Teal
from fixtures_hub import GOOD_TOKEN, WEAK_TOKEN, Hub
from huggingface_hub import constants

from teal_cli.registry.download import download
from teal_cli.registry.registry import Registry
from teal_cli.registry.resolve import Options

GREEDY = ("--temperature", 0, "--max-new-tokens", 4)


@pytest.fixture
def gated(hub: Hub, tiny: Callable[[str], Path]) -> Hub:
    """A gated model that decodes."""
    hub.add("org/Tiny", {file.name: file.read_bytes() for file in tiny("llama3").iterdir()}, gated=True)
    return hub


def below(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def assert_untold(folder: Path, *runs: Result) -> None:
    """Neither what was printed nor any name or byte below a folder has a token."""
    for token in (GOOD_TOKEN, WEAK_TOKEN):
        for run in runs:
            assert token not in run.out + run.err
        for file in below(folder):
            assert token not in str(file)
            assert token.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("given", ["in a variable", "in the hub's file"])
def test_no_token_is_told(
    gated: Hub, teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory, given: str,
) -> None:  # fmt: skip
    runs = []
    for token in (WEAK_TOKEN, "hf_good\x07", GOOD_TOKEN):
        if given == "in a variable":
            monkeypatch.setenv("HF_TOKEN", token)
        else:
            file = tmp_path_factory.mktemp("hub") / "token"  # beside what is looked through
            file.write_text(token)
            monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(file))
        runs += [teal(*options) for options in (("download", "org/Tiny"), ("download", "org/Tiny", "--json"))]
    assert [run.code for run in runs[:2]] == [4, 4]
    assert runs[-1].code == 0, runs[-1].err
    store = tmp_path / "out.zarr"
    runs += [
        teal("calibrate", "-d", "python-docs", "-n", 1, "--seq-len", 32, "--json"),
        teal("generate", "-p", "The quick", *GREEDY, "--dump", tmp_path / "one.zarr", "--json"),
        teal("dump", "-s", "0,0.5", "-d", "python-docs", "-n", 1, "--prompt-tokens", 8, *GREEDY, "-o", store),
        teal("store", "info", store, "--json"),
        teal("models", "info", "tiny", "--json"),
        teal("models", "verify", "tiny"),
        teal("doctor", "--json"),
    ]
    assert [run.code for run in runs[6:-1]] == [0] * 6
    assert json.loads(runs[9].out)
    assert_untold(tmp_path, *runs)


def test_a_token_given_in_python_is_not_kept(gated: Hub, teal_home: Path, tmp_path: Path) -> None:
    events = list(download("org/Tiny", registry=Registry(teal_home), options=Options(token=GOOD_TOKEN)))
    assert GOOD_TOKEN not in repr(events)
    assert GOOD_TOKEN not in repr(Options(token=GOOD_TOKEN)), "an error's traceback may show it"
    assert_untold(tmp_path)
