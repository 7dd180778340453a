from __future__ import annotations

import pytest

from teal_cli.errors import UsageError
from teal_cli.store.schema import parse_levels


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("0.5", (0.5,)),
        ("0", (0.0,)),
        ("0.9, 0.25,0.5", (0.25, 0.5, 0.9)),
        ("0.50:0.95:0.05", (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)),
        ("0:0.3:0.2", (0.0, 0.2)),
        ("0.5:0.5:0.1", (0.5,)),
        ("0.5,0.4:0.6:0.1", (0.4, 0.5, 0.6)),
    ],
)
def test_levels_are_read(text, levels):
    assert parse_levels(text) == levels


@pytest.mark.parametrize(
    "text",
    [
        "",
        "half",
        "1",
        "1.0",
        "-0.1",
        "0.5:0.9",
        "0.9:0.5:0.1",
        "0.5:0.9:0",
        "nan",
        "0.1:inf:0.1",
        "0.5,,0.6",
        "0.5:1.0:0.1",
        "0.5:0.6:0.1:0.1",
    ],
)
def test_what_is_no_level_is_refused_with_a_hint(text):
    with pytest.raises(UsageError) as caught:
        parse_levels(text)
    assert caught.value.hint
