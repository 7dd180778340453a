"""What a dataset's name leads to: shipped names, the text that Python carries, local files. The hub comes apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teal_cli.data import sources
from teal_cli.data.sources import named_datasets, open_source, parse
from teal_cli.errors import NotFoundError, TealError, UsageError


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(dataset: object, **options: Any) -> list[str]:
    return list(open_source(str(dataset), **options).documents())


class TestNames:
    def test_shipped(self) -> None:
        datasets = named_datasets()
        assert set(datasets) == {"alpaca", "c4", "python-docs", "wikitext"}
        for dataset in datasets.values():
            assert dataset.description
            assert (dataset.hub is None) == (dataset.name == "python-docs")

    def test_each_shipped_one_reads_the_place_its_file_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def hub_splits(repository: str, config: str | None) -> dict[str, Any]:
            asked.append((repository, config))
            return {split: lambda: iter([{"text": "row"}]) for split in ("other", "train", "test", "validation")}

        monkeypatch.setattr(sources, "hub_splits", hub_splits)
        for dataset in named_datasets().values():
            source = open_source(dataset.name)
            assert (source.name, source.split, source.separator) == (dataset.name, dataset.split, dataset.separator)
            if dataset.hub:
                assert asked[-1] == (dataset.hub, dataset.config)
                assert list(source.documents()) == ["row"]
            assert open_source(dataset.name, held_out=True).split == (dataset.held_out or "test")

    def test_a_file_with_a_misspelt_key(self) -> None:
        with pytest.raises(ValueError, match="unknown keys: huub"):
            parse("x", 'description = ""\nhuub = ""\nseparator = ""\n[splits]\ncalibrate = "train"\n')

    def test_unknown_with_a_guess(self) -> None:
        with pytest.raises(NotFoundError, match="no dataset 'wikitxt'") as error:
            open_source("wikitxt")
        assert str(error.value.hint).startswith("did you mean wikitext? ")

    def test_unknown_without_a_guess(self) -> None:
        with pytest.raises(NotFoundError) as error:
            open_source("zzz")
        assert str(error.value.hint).startswith("name one of alpaca, c4, python-docs, wikitext,")

    def test_no_held_out_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "hub_splits", lambda *_: {"train": lambda: iter(())})
        with pytest.raises(UsageError, match="alpaca has no split that is held out"):
            open_source("alpaca", held_out=True)


class TestPythonDocs:
    def test_two_parts_that_share_no_paragraph(self) -> None:
        parts = {name: "\n\n".join(texts("python-docs", split=name)) for name in ("train", "test")}
        assert len(parts["train"]) > 200_000
        assert len(parts["test"]) > 40_000
        paragraphs = {name: part.split("\n\n") for name, part in parts.items()}
        assert not set(paragraphs["train"]) & set(paragraphs["test"])
        assert "finally" in parts["train"] + parts["test"]

    def test_the_same_each_time(self) -> None:
        assert texts("python-docs") == texts("python-docs", split="train")
        assert texts("python-docs", held_out=True) == texts("python-docs", split="test")

    def test_unknown_split_lists_those_there_are(self) -> None:
        with pytest.raises(NotFoundError, match="no split 'dev'") as error:
            open_source("python-docs", split="dev")
        assert error.value.hint == "its splits: train, test"


class TestLocal:
    def test_text_keeps_every_character(self, tmp_path: Path) -> None:
        text = "one\n\n  two é 日本 \n\tthree\f\x85four\u2028five"
        (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
        source = open_source(str(tmp_path / "a.txt"))
        assert (source.split, source.separator) == (None, "")
        assert "".join(source.documents()) == text

    def test_jsonl(self, tmp_path: Path) -> None:
        source = open_source(str(jsonl(tmp_path / "a.jsonl", {"text": "one", "id": 1}, {"text": "two", "id": 2})))
        assert list(source.documents()) == ["one", "two"]
        assert source.separator == "\n\n"

    def test_parquet(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == ["one", "two"]

    def test_another_column(self, tmp_path: Path) -> None:
        file = jsonl(tmp_path / "a.jsonl", {"text": "one", "body": "two"})
        assert texts(file, text_column="body") == ["two"]

    def test_no_such_column_lists_those_there_are(self, tmp_path: Path) -> None:
        file = jsonl(tmp_path / "a.jsonl", {"title": "one", "body": "two"})
        with pytest.raises(UsageError, match="no column 'text'; its columns are title, body"):
            texts(file)
        with pytest.raises(UsageError, match="no column 'content'"):
            texts(file, text_column="content")

    def test_a_column_that_is_not_text(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="'id' holds int, not text"):
            texts(jsonl(tmp_path / "a.jsonl", {"text": "one", "id": 1}), text_column="id")

    def test_alpaca_without_its_text_column(self, tmp_path: Path) -> None:
        rows = (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Go.", "input": "", "output": "Ok"},
        )
        with_input, without = texts(jsonl(tmp_path / "a.jsonl", *rows))
        assert with_input == (
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
            "### Response:\n3"
        )
        assert without == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nGo.\n\n### Response:\nOk"
        )

    def test_a_folder_in_the_order_of_names(self, tmp_path: Path) -> None:
        (tmp_path / "deeper").mkdir()
        for name in ("b", "a", "deeper/c"):
            (tmp_path / f"{name}.txt").write_text(name)
        (tmp_path / "picture.png").write_bytes(b"\x89")
        assert texts(tmp_path) == ["a", "b", "deeper/c"]
        assert texts(tmp_path / "*.txt") == ["a", "b"]

    def test_mixed_kinds(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        jsonl(tmp_path / "b.jsonl", {"text": "b"})
        with pytest.raises(UsageError, match="mixes json and text files"):
            open_source(str(tmp_path))

    def test_a_split_where_there_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        with pytest.raises(UsageError, match="local files, which have no splits"):
            open_source(str(tmp_path / "a.txt"), split="train")

    @pytest.mark.parametrize("name", ["a.txt", "./a", "folder/a.jsonl", "*.txt", "~nobody-of-that-name/a"])
    def test_nothing_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(NotFoundError):
            open_source(name)

    def test_a_kind_that_is_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_bytes(b"%PDF")
        with pytest.raises(UsageError, match="not a kind of file"):
            open_source(str(tmp_path / "a.pdf"))

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("a.txt", b"fine\n\xff\xfe", "is not UTF-8 text"),
            ("a.jsonl", b'{"text": "a"}\n{"text', "cannot be read as json"),
            ("a.parquet", b"PAR1 but no more", "cannot be read as parquet"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path: Path, name: str, content: bytes, says: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TealError, match=says) as error:
            texts(tmp_path / name)
        assert name in error.value.message
