"""The datasets that have a name: one TOML file each in configs/calibrate, where to find it and how to calibrate on it.

Reading the names costs no more than a few small files, so completion can list them. This module does not know
how rows are fetched; `sources` does.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from teal_cli.settings import configs

PYTHON_DOCS = "python-docs"


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
