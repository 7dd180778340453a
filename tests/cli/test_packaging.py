"""What an installation must contain, as far as the checkout can tell."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import teal_cli
import teal_kernels
from teal_cli.settings import configs

ROOT = Path(__file__).parents[2]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [
    Requirement(line)
    for line in [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
]


def key(requirement: Requirement) -> str:
    """A package's name as an index compares it."""
    return requirement.name.lower().replace("_", "-")


def test_every_folder_with_code_is_a_package() -> None:
    """setup.py finds packages by their __init__.py; a folder without one would be missing from the wheel."""
    for package in (teal_cli, teal_kernels):
        for path in Path(package.__path__[0]).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_kernels_is_no_package() -> None:
    """Hugging Face's `kernels` has that name, and transformers imports it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_shipped_files_are_toml() -> None:
    found = 0
    for folder in ("models", "calibrate", "dump"):
        for file in (configs() / folder).iterdir():
            assert file.name.endswith(".toml")
            assert tomllib.loads(file.read_text(encoding="utf-8"))
            found += 1
    assert found


@pytest.mark.parametrize(("group", "name"), [("console_scripts", "teal"), ("xarray.backends", "teal")])
def test_entry_points_lead_somewhere(group: str, name: str) -> None:
    (entry,) = metadata.distribution("teal-cli").entry_points.select(group=group, name=name)
    assert callable(entry.load())


def test_pins_lie_within_the_ranges() -> None:
    pins = {key(pin): pin for pin in PINS}
    for wanted in WANTED:
        if key(wanted) in pins:
            (pin,) = pins[key(wanted)].specifier
            assert wanted.specifier.contains(pin.version), f"{pins[key(wanted)]} is not within {wanted}"


def test_every_requirement_is_pinned() -> None:
    left_out = {"triton", "teal-cli", "pre-commit", "llama-cpp-python"}  # constraints.txt says why
    assert {key(wanted) for wanted in WANTED} - {key(pin) for pin in PINS} <= left_out
