"""`teal quickstart`: from nothing to a verified store, again, and beside what it must leave alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures_cli import Teal
from fixtures_tiny import make_tiny

from teal_cli.commands import quickstart


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that chats and has the context that the calibration wants."""
    folder = make_tiny(tmp_path / "model", max_position_embeddings=1024)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = "{{ messages[0]['content'] }}"
    file.write_text(json.dumps(settings))
    return folder


def test_it_runs_and_replaces_only_what_is_its_own(
    teal: Teal, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "SEQUENCES", 2)
    first = teal("quickstart", "-m", model, "--dtype", "float32", "--json").json
    assert (first["verified"], first["problems"]) == (True, [])
    assert first["store"] == "teal-quickstart.zarr"
    again = teal("quickstart", "-m", model, "--dtype", "float32")
    assert again.code == 0, again.err
    assert "teal-quickstart.zarr is verified" in again.out
    assert f"generate -m {first['model']} -s 0.4 --chat -p" in again.out, "a level at which answers read well"

    mine = tmp_path / "mine.zarr"
    assert teal("generate", "-p", "The quick", "-s", 0.5, "--max-new-tokens", 4, "--dump", mine).code == 0
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    refused = teal("quickstart", "-m", model, "-o", mine)
    assert (refused.code, "--force" in refused.err, "1/4" in refused.err) == (2, True, False)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
