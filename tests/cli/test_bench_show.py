"""`teal bench show`: saved results as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_cli import Teal

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"
DECODE, KERNELS = RESULTS / "decode-smollm2-135m.json", RESULTS / "kernels.json"


@pytest.fixture
def faster(tmp_path: Path) -> Path:
    """The committed result with every speed doubled, a row gone, and readings that moved."""
    found: dict[str, Any] = json.loads(DECODE.read_text())
    found["rows"] = [row | {"p50": 2 * row["p50"], "read_p20": 20.0, "read_p80": 31.0} for row in found["rows"][1:]]
    (tmp_path / "faster.json").write_text(json.dumps(found))
    return tmp_path / "faster.json"


def test_one_result_is_its_table(teal: Teal) -> None:
    run = teal("bench", "show", DECODE)
    assert run.code == 0
    (line,) = (line for line in run.out.splitlines() if "teal 50% " in line and "dump" not in line)
    assert "141.3" in line
    assert "1.47" in line
    assert "~" not in run.out


def test_a_reading_that_moved_makes_floors_uncertain(teal: Teal, faster: Path) -> None:
    run = teal("bench", "show", KERNELS)
    assert "the reading moved by 17% within the run: floors (~) are no firm limits" in run.out
    assert " ~3124.8 " in run.out
    assert "moved by 59%" in teal("bench", "show", faster).out
    found = teal("bench", "show", DECODE, "--json").json["results"][0]
    assert found["firm"]
    assert found["reading_moved"] == pytest.approx(0.011, abs=0.001)


def test_two_side_by_side_with_ratios(teal: Teal, faster: Path) -> None:
    run = teal("bench", "show", DECODE, faster)
    (line,) = (line for line in run.out.splitlines() if "teal 50% " in line and "dump" not in line)
    assert line.split()[-3:] == ["141.3", "282.5", "2.00"]
    assert any("torch dense" in line and line.endswith("not in 2") for line in run.out.splitlines())
    compared = teal("bench", "show", DECODE, faster, "--json").json["comparison"]
    assert len(compared) == 10
    assert [row["ratios"] for row in compared].count([2.0]) == 9
    assert {"engine": "torch dense", "tokens": 64}.items() <= compared[0]["identity"].items()


def test_less_time_is_faster(teal: Teal, tmp_path: Path) -> None:
    found = json.loads(KERNELS.read_text())
    found["rows"] = [row | {"p50_us": row["p50_us"] / 4} for row in found["rows"]]
    (tmp_path / "k.json").write_text(json.dumps(found))
    compared = teal("bench", "show", KERNELS, tmp_path / "k.json", "--json").json["comparison"]
    assert len(compared) == len(found["rows"])
    assert all(row["ratios"] == [pytest.approx(4)] for row in compared)


def test_what_is_no_result_is_refused(teal: Teal, tmp_path: Path) -> None:
    assert teal("bench", "show", tmp_path / "none.json").code == 3
    assert teal("bench", "show", ROOT / "pyproject.toml").code == 2
    assert teal("bench", "show").code == 2
