"""What `teal dump --dry-run` makes of the paces that it measured. How fast a machine is, is no business of a test."""

from __future__ import annotations

import pytest

from teal_cli.runs.estimate import Pace, Work, levels_work, storing

PACE = Pace(token=0.001, step=0.1, row=0.01)
"""A token of a prefill in 1 ms, a step in 100 ms, a row stored in 10 ms."""


@pytest.mark.parametrize(
    ("follow", "prefill", "work", "seconds"),
    [
        ("free", "none", Work(30, 200, 200), 0.03 + 20 + 2),
        ("free", "dense", Work(30, 200, 230), 0.03 + 20 + 2.3),
        ("free", "sparse", Work(0, 230, 230), 23 + 2.3),  # its prompts are fed token by token
        ("text", "none", Work(230, 0, 200), 0.23 + 2),
        ("dense", "none", Work(230, 0, 200), 0.23 + 2),  # what the dense model decodes comes on top
        ("text", "sparse", Work(230, 0, 230), 0.23 + 2.3),
    ],
)
def test_the_time_of_a_level(follow: str, prefill: str, work: Work, seconds: float) -> None:
    assert levels_work(30, 200, follow, prefill) == work
    assert PACE.seconds(work) == pytest.approx(seconds)


def test_levels_of_a_pass_share_its_tokens() -> None:
    """What a token takes was measured with all levels side by side; rows are stored for each."""
    assert levels_work(30, 200, "text", "none", levels=3) == Work(230, 0, 600)


def test_ending_a_level_is_counted_once() -> None:
    """A second for each row and three at the end, from runs of 8 and of 32 rows."""
    row, end = storing((8, 11.0), (32, 35.0))
    assert (row, end) == pytest.approx((1.0, 3.0))
    assert Pace(0.0, 0.0, row, end).seconds(Work(0, 0, 1000)) == pytest.approx(1003)


@pytest.mark.parametrize(
    ("short", "long", "found"),
    [((8, 5.0), (32, 4.0), (0.0, 4.0)), ((8, 0.0), (32, 32.0), (1.0, 0.0)), ((1, 2.0), (1, 3.0), (3.0, 0.0))],
)
def test_what_cannot_be_is_not_told(
    short: tuple[int, float], long: tuple[int, float], found: tuple[float, float]
) -> None:
    """The short run was slower, or so fast that the end would take less than nothing, or there is but one length."""
    assert storing(short, long) == pytest.approx(found)
