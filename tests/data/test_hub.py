"""Datasets of the hub, against a local stand-in; in child processes, as `datasets` reads its address when imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from datasets_hub import datasets_hub
from fixtures_hub import Hub

_ASK = """
import json, sys
from teal_cli.data.sources import open_source
from teal_cli.errors import TealError

for dataset, options in json.load(sys.stdin):
    try:
        source = open_source(dataset, **options)
        answer = {"split": source.split, "documents": list(source.documents())}
    except TealError as error:
        answer = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
    print(json.dumps(answer))
"""
_CACHE = "import datasets; datasets.load_dataset('acme/plain')"

_TWO = b"---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"

Env = Callable[..., dict[str, str]]


def ask(env: dict[str, str], *questions: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Open these datasets in one child process; what came of each."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK], input=json.dumps(questions), env=env, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def filled(hub_server: Hub) -> Hub:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    hub_server.add("acme/plain", {"train.jsonl": lines, "test.jsonl": b'{"text": "three"}\n'})
    hub_server.add("acme/two", {"README.md": _TWO, "a.jsonl": b'{"body": "one"}\n', "b.jsonl": lines})
    hub_server.add("acme/closed", {"train.jsonl": lines}, gated=True)
    return hub_server


def test_streaming_and_refusals(filled: Hub, hub_env: Env) -> None:
    with datasets_hub(filled) as url:
        plain, held_out, split, two, config, column, other, missing, gated = ask(
            hub_env(HF_ENDPOINT=url),
            ("acme/plain", {}),
            ("acme/plain", {"held_out": True}),
            ("acme/plain", {"split": "dev"}),
            ("acme/two", {}),
            ("acme/two:b", {}),
            ("acme/two:a", {}),
            ("acme/two:c", {}),
            ("acme/none", {}),
            ("acme/closed", {}),
        )
    assert plain == {"split": "train", "documents": ["one", "two"]}
    assert held_out == {"split": "test", "documents": ["three"]}
    assert (split["exit_code"], split["hint"]) == (3, "its splits: train, test")
    assert (two["exit_code"], two["hint"]) == (2, "name one as acme/two:CONFIG; there are 'a', 'b'")
    assert config["documents"] == ["one", "two"]
    assert column["message"] == "acme/two:a has no column 'text'; its columns are body"
    assert (other["exit_code"], "'c' not found" in other["message"]) == (2, True)
    assert (missing["exit_code"], missing["message"][:27]) == (3, "the hub has no dataset acme")
    assert (gated["exit_code"], "gated" in gated["message"]) == (4, True)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_reads_what_was_cached_and_nothing_else(filled: Hub, hub_env: Env, variable: str) -> None:
    with datasets_hub(filled) as url:
        env = hub_env(HF_ENDPOINT=url)
        subprocess.run([sys.executable, "-c", _CACHE], env=env, check=True, capture_output=True)
        before = len(filled.requests)
        cached, absent = ask(env | {variable: "1"}, ("acme/plain", {}), ("acme/two", {}))
        assert cached["documents"] == ["one", "two"]
        assert (absent["exit_code"], "not in the cache" in absent["message"]) == (3, True)
        assert len(filled.requests) == before


def test_no_network(hub_env: Env) -> None:
    (answer,) = ask(hub_env(HF_ENDPOINT="http://127.0.0.1:9"), ("wikitext", {}))
    assert answer["exit_code"] == 1
    assert answer["message"] == "the hub cannot be reached for the dataset Salesforce/wikitext"
    assert "python-docs" in answer["hint"]
