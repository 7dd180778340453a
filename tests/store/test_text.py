"""The text of a store's tokens, from Python and from `teal store info`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fixtures_cli import Teal

from teal_cli import open_store
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.registry.registry import Registry

pytestmark = pytest.mark.usefixtures("ready")


@pytest.fixture
def store(teal: Teal, tmp_path: Path) -> Path:
    prompts, path = tmp_path / "p.txt", tmp_path / "out.zarr"
    prompts.write_text("The quick\ndef keep\n")
    options = ("--temperature", 1.5, "--seed", 3, "--max-new-tokens", 24, "--ignore-eos")
    assert teal("dump", "--prompts", prompts, "-s", "0.5,0.9", "-o", path, "--backend", "reference", *options).code == 0
    return path


def test_each_row_has_its_text(store: Path) -> None:
    opened, tokenizer = open_store(store), load_tokenizer(Registry().get("tiny").path)
    for level in opened.levels:
        rows = opened.level(level).rows(1)
        ids = opened.level(level).tokens.token_id[rows].tolist()
        texts = opened.text(1, level)
        assert len(texts) == len(ids) == 23
        # What ends inside a character at the end has not come out.
        assert tokenizer.decode(ids, skip_special_tokens=False).startswith("".join(texts))
    assert opened.text(1) == opened.text(1, 0.5)
    assert opened.text(0) != opened.text(1)


def test_store_info_lists_them(teal: Teal, store: Path) -> None:
    found = teal("store", "info", store, "--sequence", 1, "--level", 0.9, "--json").json["tokens"]
    level = open_store(store).level(0.9)
    rows = level.rows(1)
    assert [token["row"] for token in found] == list(range(rows.start, rows.stop))
    assert [token["token_id"] for token in found] == level.tokens.token_id[rows].tolist()
    assert [token["text"] for token in found] == open_store(store).text(1, 0.9)
    shown = teal("store", "info", store, "--sequence", 1, "--level", 0.9).out
    assert all(repr(token["text"]) in shown for token in found)
    assert "tokens" not in teal("store", "info", store, "--json").json


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--sequence", 2), 3, "no row of sequence 2\n  hint: it has 2 sequences, 0 to 1"),
        (("--level", 0.5), 2, "--sequence"),
        (("--sequence", 0, "--level", 0.7), 3, "no level"),
    ],
)
def test_bad_input(teal: Teal, store: Path, options: tuple[object, ...], code: int, says: str) -> None:
    run = teal("store", "info", store, *options)
    assert run.code == code
    assert says in run.err


def test_another_model_of_that_name_is_not_believed(store: Path, ready: Path) -> None:
    entry = Registry().get("tiny")
    moved = ready / "moved"
    shutil.copytree(entry.path, moved)
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    file = entry.home / "model.json"
    file.write_text(file.read_text().replace(str(entry.path), str(moved)))
    with pytest.raises(UsageError, match="not the model"):
        open_store(store).text(0)
    shutil.rmtree(entry.home)
    with pytest.raises(NotFoundError):
        open_store(store).text(0)
