"""Quantiles, rounds and ratios, on times that are made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.bench.timing import Contender, Seconds, Spread, interleave, median_ratio


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=40))
def test_quantiles_are_those_of_numpy(values: list[float]) -> None:
    spread = Spread.of(values)
    expected = np.quantile(values, [0.2, 0.5, 0.8])
    assert [spread.p20, spread.p50, spread.p80] == pytest.approx(expected)


def test_every_contender_runs_once_per_round_in_changing_order() -> None:
    runs: list[str] = []

    def contender(name: str, taken: float) -> Contender:
        return Contender(name, lambda: runs.append(name) or taken)

    seconds: Seconds = {}
    done = list(interleave([contender("a", 1.0), contender("b", 2.0), contender("c", 3.0)], 20, 0, seconds))
    assert done == list(range(1, 21))
    rounds = [tuple(runs[i : i + 3]) for i in range(0, len(runs), 3)]
    assert len(rounds) == 21, "one round more than asked for, which warms up"
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert seconds == {"a": [1.0] * 20, "b": [2.0] * 20, "c": [3.0] * 20}


def test_a_ratio_is_formed_within_rounds() -> None:
    """A machine that is slow in one round is slow for both: the ratio of medians would be 1.5 here."""
    assert median_ratio([2.0, 6.0, 20.0], [1.0, 4.0, 10.0]) == 2.0
