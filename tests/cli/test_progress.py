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
        (("bench", "prefill", "--rounds", 2, "--no-transformers", "--tokens", 32, "--dtype", "float32"),
         "Reading 32 tokens", "rounds", 2),
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
    if command[0] == "bench":
        read = re.findall(r"^Loading the model: (\S+ \S+) /", run.err, re.MULTILINE)
        assert len(set(read)) == 4, run.err  # from none to three layers


@pytest.mark.usefixtures("ready", "every_step")
@pytest.mark.parametrize("memory", ["--layer-by-layer", "--resident"])
@pytest.mark.parametrize("levels", ["0.5", "0.5,0.9"])
def test_a_pass_tells_each_layer_before_any_row_is_written(
    teal: Teal, tmp_path: Path, memory: str, levels: str
) -> None:
    """Three layers of two sequences of 5 rows at each level; the tiny model has three layers."""
    run = teal("dump", "-d", "python-docs", "-n", 2, "--prompt-tokens", 8, "--max-new-tokens", 6, "-s", levels,
               "--follow", "text", memory, "-o", tmp_path / "made.zarr", *PLAIN)  # fmt: skip
    assert run.code == 0, run.err
    rows = 10 * len(levels.split(","))
    text = "Running s0.50" + (" to s0.90" if "," in levels else "")
    seen, written = steps(run.err, text, "rows"), steps(run.err, "Writing", "rows")
    assert seen == sorted(seen)
    assert seen[-1] == written[-1] == rows
    assert len(set(seen)) >= 6, run.err
    if memory == "--layer-by-layer":
        before = run.err[: run.err.index("Writing:")]
        assert len(set(steps(before, text, "rows"))) >= 6, run.err


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
    for told in (copied, teal("store", "verify", store).err):
        digested = steps(told, "Comparing the digest", "arrays")
        assert digested == list(range(1, digested[-1] + 1)), told
    assert len(set(re.findall(r"^Copying: (\S+ \S+) /", copied, re.MULTILINE))) > 1, copied
