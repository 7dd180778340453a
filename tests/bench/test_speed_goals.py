"""What benchmarks/speed_goals.py says of results: the committed ones, and steps that fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "goals"


@pytest.fixture
def speed_goals(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("speed_goals", ROOT / "benchmarks" / "speed_goals.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "speed_goals", module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_goals_are_those_of_the_committed_results(speed_goals: Any) -> None:
    results = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json") if file.stem != "goals"}
    found = [{**asdict(goal), "met": goal.met} for goal in speed_goals.goals(results)]
    assert found == json.loads((RESULTS / "goals.json").read_text())
    assert all(goal["value"] is not None for goal in found)
    assert {goal["met"] for goal in found} == {True, False, None}


def test_a_step_that_fails_is_told_and_an_older_result_is_not_its_own(
    speed_goals: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory.json").write_text((RESULTS / "memory.json").read_text())
    failing = {"memory": [sys.executable, "-c", "raise SystemExit(3)"]}
    monkeypatch.setattr(speed_goals, "steps", lambda *arguments: failing)
    monkeypatch.setattr("sys.argv", ["speed_goals.py", str(tmp_path), "--model", "tiny"])
    assert speed_goals.main() == 1
    assert "memory: exit 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "goals.json").read_text()) == []
