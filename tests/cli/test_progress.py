"""Long commands tell how far they are: a pipe gets lines with what is done, of how much, in the unit of the work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fixtures_cli import Teal

PLAIN = ("--dtype", "float32", "--backend", "reference")


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each update in place of one every ten seconds."""
    monkeypatch.setattr("teal_cli.ui.progress.LINE_EVERY_S", 0.0)


def steps(err: str, text: str, unit: str) -> list[int]:
    """What was done at each line of a task."""
    lines = re.findall(rf"^{re.escape(text)}: ([\d,]+)(?:/[\d,]+)? {unit}", err, re.MULTILINE)
    return [int(number.replace(",", "")) for number in lines]


@pytest.mark.usefixtures("ready", "every_step")
@pytest.mark.parametrize(
    ("command", "text", "unit", "most"),
    [
        (("calibrate", "-d", "python-docs", "-n", 3, "--seq-len", 32, "--name", "other"), "Calibrating on python-docs",
         "layers", 3),
        (("eval", "-s", "0.5", "-d", "python-docs", "-n", 3, "--window", 48), "Scoring", "windows", 3),
        (("bench", "decode", "--quick", "--rounds", 2, "--no-transformers", "--no-dump", "-s", 0.5, *PLAIN),
         "Decoding tiny", "rounds", 2),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_work_on_a_model(teal: Teal, command: tuple[object, ...], text: str, unit: str, most: int) -> None:
    run = teal(*command)
    assert run.code == 0, run.err
    seen = steps(run.err, text, unit)
    assert seen == sorted(seen)
    assert len(set(seen)) > 1, run.err
    assert seen[-1] == most


@pytest.mark.usefixtures("ready", "every_step")
def test_work_on_a_store(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "made.zarr"
    made = teal("dump", "-d", "python-docs", "-n", 2, "--prompt-tokens", 8, "--max-new-tokens", 6, "-s", "0.5,0.9",
                "-o", store, *PLAIN)  # fmt: skip
    assert made.code == 0, made.err
    for command, text, unit in (
        (("verify", store), "Verifying", "blocks"),
        (("stats", store), "Reading", "layers"),
        (("convert", store, "--format", "npz", "-o", tmp_path / "npz"), "Converting", "arrays"),
    ):
        run = teal("store", *command)
        assert run.code == 0, run.err
        seen = steps(run.err, text, unit)
        assert seen == sorted(seen)
        assert len(set(seen)) > 1, run.err
    copied = teal("store", "copy", store, "-o", tmp_path / "copy.zarr").err
    assert len(set(re.findall(r"^Copying: (\S+ \S+) /", copied, re.MULTILINE))) > 1, copied
