"""JSON that any reader takes, and progress that fits where it goes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from teal_cli.ui import progress as progress_module
from teal_cli.ui.output import Output, to_json
from teal_cli.ui.progress import amount, progress

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_json_is_strict_and_keeps_finite_values(value: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    def finite(item: Any) -> Any:
        if isinstance(item, float) and not np.isfinite(item):
            return None
        if isinstance(item, list):
            return [finite(part) for part in item]
        return {key: finite(part) for key, part in item.items()} if isinstance(item, dict) else item

    assert json.loads(to_json(value), parse_constant=refuse) == finite(value)


@dataclass
class Point:
    x: float
    where: Path


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Point(1.5, Path("a/b")), {"x": 1.5, "where": "a/b"}),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor(2), 2),
        ((1, 2), [1, 2]),
        ({1: "a"}, {"1": "a"}),
    ],
)
def test_json_of_what_commands_return(value: object, plain: object) -> None:
    assert json.loads(to_json({"value": value})) == {"value": plain}


def test_json_of_anything_else_is_a_defect() -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        to_json(object())


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (7, 30, "layers", "7/30 layers"),
        (1234, None, "rows", "1,234 rows"),
        (1, None, "sites", "1 site"),
        (3, 4, "", "3/4"),
        (999, None, "B", "999 B"),
        (12_500_000, 92_100_000, "B", "12.5 MB / 92.1 MB"),
        (2e12, None, "B", "2.00 TB"),
    ],
)
def test_amounts(done: float, total: float | None, unit: str, text: str) -> None:
    assert amount(done, total, unit) == text


def run(out: Output) -> None:
    with progress(out) as bars:
        task = bars.task("Calibrating", total=30, unit="layers")
        task.update(done=7)
        task.update(done=8)
        task.update(done=30)
        task.update(done=30)


def test_a_log_gets_first_and_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(Output(json=False, quiet=False))
    assert capsys.readouterr() == ("", "Calibrating: 7/30 layers\nCalibrating: 30/30 layers\n")


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    run(Output(json=False, quiet=False))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["Calibrating: 7/30 layers", "Calibrating: 8/30 layers"]


@pytest.mark.parametrize("out", [Output(json=True, quiet=False), Output(json=False, quiet=True)])
def test_quiet_and_json_get_none(out: Output, capsys: pytest.CaptureFixture[str]) -> None:
    run(out)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_task_shows_with_its_first_update(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """What refuses its arguments has announced nothing."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with progress(Output(json=False, quiet=False)) as bars:
        bars.task("Merging", unit="rows")
        begun = bars.task("Copying", unit="B")
        begun.update(done=0, total=10)
    err = capsys.readouterr().err
    assert "Copying" in err
    assert "Merging" not in err


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run(Output(json=False, quiet=False))
    drawn = capsys.readouterr()
    assert drawn.out == ""
    assert "30/30 layers" in drawn.err


def test_a_task_tells_rate_and_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress(Output(json=False, quiet=False)) as bars:
        rows = bars.task("Decoding", total=500, unit="rows", done=100)
        loaded = bars.task("Loading", total=90e6, unit="B")
        for task in (rows, loaded):
            task.update()
        now[0] += 12.5
        rows.update(done=125)
        loaded.update(done=30e6)
        now[0] += 3700
        rows.update(done=500)
    assert capsys.readouterr().err.splitlines()[2:] == [
        "Decoding: 125/500 rows, 2.0/s, 0:12, 3:07 left",
        "Loading: 30.0 MB / 90.0 MB, 2.4 MB/s, 0:12, 0:25 left",
        "Decoding: 500/500 rows, 0.1/s, 1:01:52",
    ]


def last_bar(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    text: str,
    total: float,
    done: float,
) -> str:
    """How a task is last drawn on a terminal of that width, 100 s after it began."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    now = [100.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress(Output(json=False, quiet=False)) as bars:
        task = bars.task(text, total=total, unit="rows")
        now[0] += 100
        task.update(done=done)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    return [line for line in re.split(r"[\r\n]+", drawn) if line.strip()][-1]


@pytest.mark.parametrize(("width", "shown"), [
    (40, "1,240,000/5,000,000 rows"), (60, "1,240,000/5,000,000 rows, 5:03 left"),
    (63, "1,240,000/5,000,000 rows, 12,400.0/s, 5:03 left"),
    (120, "1,240,000/5,000,000 rows, 12,400.0/s, 1:40, 5:03 left"),
])  # fmt: skip
def test_what_has_no_room_beside_a_bar_is_left_out_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, shown: str
) -> None:
    last = last_bar(capsys, monkeypatch, width, "Running s0.50", total=5e6, done=1.24e6)
    assert (last.startswith("Running s0.50"), last.rstrip().endswith(f" {shown}")) == (True, True), last
    assert "\u2026" not in last


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    last = last_bar(capsys, monkeypatch, width, "Decoding s0.50", total=5000, done=1240)
    assert last.rstrip().endswith("1,240/5,000 rows, 12.4/s, 1:40, 5:03 left")
    assert len(last) <= width
    assert ("\u2501" in last) == (width > 72)
