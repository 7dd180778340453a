"""benchmarks/dataset.py on tiny shapes: every part writes rows that say what was measured. No figure is judged here."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIELDS = {"name", "unit", "p20", "p50", "p80", "rounds", "shape", "goal", "at_most", "met"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run one part with arguments; its result."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(importlib.import_module("synthetic").SHAPES, "tiny", (2, (256, 256, 256, 512)))
    module = importlib.import_module("dataset")

    def one(part: str, *arguments: str) -> Any:
        common = ["dataset.py", "--output", str(tmp_path / "out"), "--folder", str(tmp_path), "--rounds", "1"]
        monkeypatch.setattr("sys.argv", [*common, "--note", "a test", "--only", part, *arguments])
        module.main()
        return json.loads((tmp_path / "out" / f"{part}.json").read_text())

    return one


def checked(result: Any, part: str) -> dict[str, Any]:
    """The rows of a result by their names, once all are well-formed."""
    assert (result["schema"], result["part"], result["settings"]["note"]) == ("teal-dataset/1", part, "a test")
    assert {"cpu", "cores", "load", "versions", "at"} <= result["machine"].keys()
    for row in result["rows"]:
        assert row.keys() == FIELDS
        quantiles = [row[name] for name in ("p20", "p50", "p80")]
        assert quantiles == sorted(quantiles)
        assert all(isfinite(value) and value > 0 for value in quantiles), row
        assert row["rounds"] >= 1
        assert row["shape"]
        assert (row["met"] is None) == (row["goal"] is None)
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"])
    return rows


def test_synthetic_stores(run: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = "--shape", "tiny", "--levels", "0.5", "--tokens", "300"
    rows = checked(run("sizes", *shape), "sizes")
    ways = ["read rows", "read CSR", "read blocks", "stats", "verify", "write", "convert to npz", "convert to zarr"]
    assert {f"s0.50 {name}" for name in ways} < rows.keys()
    assert 0.3 < rows["s0.50 bytes to dense"]["p50"] < 0.5
    assert rows["s0.50 stats"]["shape"]["dense_bytes"] == 300 * 2 * 2 * (3 * 256 + 512)
    rows = checked(run("parts", *shape), "parts")
    assert {"read rows of parts", "read rows of merged", "read rows, parts to merged"} < rows.keys()
    assert "read CSR, parts to merged" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "stores are removed"


def test_a_large_store(run: Callable[..., Any]) -> None:
    pytest.importorskip("moto")
    rows = checked(run("large", "--shape", "tiny", "--levels", "0.5", "0.9", "--gigabytes", "0.01"), "large")
    assert rows["a projection whole, peak memory of its process"]["unit"] == "MB"
    assert rows["a random row, from disk"]["rounds"] == 200
    assert rows["a bucket, requests for a random row"]["at_most"]


def test_dumps(run: Callable[..., Any], ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = "--model", "tiny", "--prompts", "2", "--new-tokens", "8"
    rows = checked(run("follow", *counts), "follow")
    assert {"follow free", "follow text", "follow dense", "text to free", "dense to free"} == rows.keys()
    assert rows["follow text"]["shape"]["rows"] == 2 * 7

    def launched(command: list[str], **options: Any) -> Any:
        Path(command[-1]).mkdir()
        return SimpleNamespace(stdout=b'{"seconds": 2.0, "prompts": 2}')

    monkeypatch.setattr(subprocess, "run", launched)
    rows = checked(run("ranks", *counts), "ranks")
    assert rows["2 ranks to 1 process, rows alone"]["p50"] == 1.0
    assert rows["2 ranks, start to end"]["unit"] == "s"
