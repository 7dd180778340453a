"""A few hundred hostile inputs in every test run; `python -m tests.fuzz --minutes N` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.areas import AREAS
from fuzz.harness import Area, run_case

CASES = 12
"""For each unit of an area's weight."""


@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.name)
def test_nothing_hostile_breaks_it(area: Area, tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    area.make(sound)
    failures = [run_case(area, sound, seed) for seed in range(CASES * area.weight)]
    found = [str(failure) for failure in failures if failure]
    assert not found, "\n\n".join(found)
