"""From what the user calls a dataset to its rows of text: a name, that is a TOML file in configs/calibrate, a
repository of the hub, local files, or the text that Python carries.

Rows come lazily, and hub sets are streamed, so a calibration on C4 fetches some megabytes. With HF_DATASETS_OFFLINE or
HF_HUB_OFFLINE set, hub sets are read from the cache of `datasets`. This module does not know about tokens.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from teal_cli.checks import did_you_mean
from teal_cli.data.hub import hub_splits
from teal_cli.data.local import is_local, local_rows
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.settings import configs

PYTHON_DOCS = "python-docs"
PYTHON_DOCS_SPLITS = ("train", "test")
_BETWEEN = re.compile(r"\n{2,}")
_SECTION_CHARS = 8192
_HELD_OUT_EVERY = 5

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_HELD_OUT_NAMES = ("test", "validation")

_ALPACA = (
    "Below is an instruction that describes a task{further}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
)
_ALPACA_FURTHER = ", paired with an input that provides further context"


@dataclass(frozen=True, slots=True)
class NamedDataset:
    """A dataset of configs/calibrate.

    Attributes:
        name: what the user types.
        description: what it is, in a few words.
        hub: repository on the hub, None for the text that Python carries.
        config: configuration of that repository, None for its only one.
        text: column that holds the text.
        separator: put between rows.
        split: split to calibrate on.
        held_out: split to check a calibration on; None where there is none.
    """

    name: str
    description: str
    hub: str | None
    config: str | None
    text: str | None
    separator: str
    split: str
    held_out: str | None


@cache
def named_datasets() -> dict[str, NamedDataset]:
    """Every named dataset, by name, in alphabetical order."""
    folder = configs() / "calibrate"
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda entry: entry.name)
    datasets = (parse(entry.name.removesuffix(".toml"), entry.read_text(encoding="utf-8")) for entry in found)
    return {dataset.name: dataset for dataset in datasets}


def parse(name: str, text: str) -> NamedDataset:
    """Read one file of configs/calibrate.

    Raises:
        ValueError: not TOML, or a key that is missing or unknown: the file is part of teal, so this is a
            defect.
    """
    table = tomllib.loads(text)
    splits = table.pop("splits")
    dataset = NamedDataset(
        name=name,
        description=table.pop("description"),
        hub=table.pop("hub", None),
        config=table.pop("config", None),
        text=table.pop("text", None),
        separator=table.pop("separator"),
        split=splits.pop("calibrate"),
        held_out=splits.pop("held_out", None),
    )
    unknown = [*table, *splits]
    if unknown:
        raise ValueError(f"configs/calibrate/{name}.toml has unknown keys: {', '.join(unknown)}")
    return dataset


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset that is known to be there.

    Attributes:
        name: as the user named it.
        split: the split that is read; None for local files, which have none.
        separator: what belongs between two rows when they are joined.
        documents: call it for the rows' text, in order, from the first; it may raise what `open_source`
            raises.
    """

    name: str
    split: str | None
    separator: str
    documents: Callable[[], Iterator[str]]


def open_source(
    dataset: str, *, split: str | None = None, text_column: str | None = None, held_out: bool = False
) -> Source:
    """Find a dataset and check its split.

    Args:
        dataset: a name of configs/calibrate, `org/name` or `org/name:config` of the hub, or a local .txt,
            .jsonl or .parquet file, a folder of such, or a glob.
        split: which split; None takes the one meant for calibration, or with `held_out` the one meant for
            checking.
        text_column: the column that holds the text; None takes `text`, or Alpaca's columns, whichever is
            there.
        held_out: see `split`. Local files have no splits, they are read whole.

    Raises:
        NotFoundError: no such dataset, file or split; a hub set that is not in the cache while offline.
        AuthError: a gated hub set.
        UsageError: a split where there are none, or no column of text.
        TealError: the hub cannot be reached, or a file cannot be read.
    """
    named = named_datasets().get(dataset)
    if dataset == PYTHON_DOCS:
        chosen = _choose(dataset, split, PYTHON_DOCS_SPLITS, held_out)
        return Source(dataset, chosen, "\n\n", lambda: python_docs(chosen))
    if named is not None:
        return _hub_source(dataset, named, split, text_column, held_out)
    if is_local(dataset):
        if split is not None:
            raise UsageError(
                f"{dataset} is read from local files, which have no splits, so there is no {split!r}",
                hint="leave the split away, or name the files of that split",
            )
        separator, rows = local_rows(dataset)
        return Source(dataset, None, separator, lambda: _texts(dataset, rows(), text_column))
    if _HUB_ID.fullmatch(dataset):
        repository, _, config = dataset.partition(":")
        unnamed = NamedDataset(dataset, "", repository, config or None, None, "\n\n", "train", None)
        return _hub_source(dataset, unnamed, split, text_column, held_out)
    raise _unknown(dataset)


def _unknown(dataset: str) -> NotFoundError:
    names = list(named_datasets())
    return NotFoundError(
        f"there is no dataset {dataset!r}",
        hint=f"{did_you_mean(dataset, names)}name one of {', '.join(names)}, a repository of the hub (org/name), or "
        "a local .txt, .jsonl or .parquet file",
    )


def _hub_source(dataset: str, where: NamedDataset, split: str | None, column: str | None, held_out: bool) -> Source:
    splits = hub_splits(where.hub or "", where.config)
    preferred = where.held_out if held_out else where.split
    chosen = _choose(dataset, split, tuple(splits), held_out, preferred)
    return Source(dataset, chosen, where.separator, lambda: _texts(dataset, splits[chosen](), column or where.text))


def _choose(
    dataset: str, split: str | None, there: tuple[str, ...], held_out: bool, preferred: str | None = None
) -> str:
    if split is not None:
        if split in there:
            return split
        raise NotFoundError(f"{dataset} has no split {split!r}", hint=f"its splits: {', '.join(there)}")
    if preferred in there:
        return str(preferred)
    if not held_out:
        return there[0]
    for name in _HELD_OUT_NAMES:
        if name in there:
            return name
    raise UsageError(
        f"{dataset} has no split that is held out",
        hint=f"check on another dataset, or name a split; it has {', '.join(there)}",
    )


def _texts(dataset: str, rows: Iterator[dict[str, Any]], column: str | None) -> Iterator[str]:
    """The text of each row; rows without any are left out."""
    for row in rows:
        text = _text(dataset, row, column)
        if text is None:
            continue
        if not isinstance(text, str):
            raise UsageError(
                f"{dataset}: the column {column or 'text'!r} holds {type(text).__name__}, not text",
                hint=f"name another column with --text-column; there are {', '.join(row)}",
            )
        yield text


def _text(dataset: str, row: dict[str, Any], column: str | None) -> object:
    if column in row or (column is None and "text" in row):
        return row[column or "text"]
    if column in (None, "text") and {"instruction", "output"} <= row.keys():
        given = row.get("input")
        return _ALPACA.format(
            instruction=row["instruction"],
            output=row["output"],
            further=_ALPACA_FURTHER if given else "",
            input=f"### Input:\n{given}\n\n" if given else "",
        )
    raise UsageError(
        f"{dataset} has no column {column or 'text'!r}; its columns are {', '.join(row)}",
        hint="name the column that holds the text with --text-column",
    )


def python_docs(split: str) -> Iterator[str]:
    """The language reference behind `help()`, which every Python carries, in sections of about 8,192 characters.

    Every fifth section is `test`, the others are `train`. The topics repeat each other (`specialnames` holds much of
    `numeric-types`, say), so a paragraph counts only where it comes first; otherwise the held-out part would be no such
    thing. Releases of Python differ in the text; the fingerprint of the tokens says which one was used.
    """
    for index, section in enumerate(_sections()):
        if (index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == (split == "test"):
            yield section


def _sections() -> Iterator[str]:
    section: list[str] = []
    size = 0
    for paragraph in _paragraphs():
        section.append(paragraph)
        size += len(paragraph)
        if size >= _SECTION_CHARS:
            yield "\n\n".join(section)
            section, size = [], 0
    if section:
        yield "\n\n".join(section)


def _paragraphs() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        for paragraph in _BETWEEN.split(topics[name].strip("\n")):
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph
