"""Tables and lists: whole lines in a pipe, parts that fit on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from teal_cli.errors import counted
from teal_cli.ui.table import percent, show_fields, show_table

HEADINGS = ("level", "site", ">kept", ">bytes an element", "where")
ROWS = (
    ("s0.50", "attn_in", "50.1%", "1.125", "a/very/long/name/of/a/place/that/fits/nowhere"),
    ("s0.90", "mlp_mid", "9.9%", "0.375", "here, there and everywhere else that there is"),
)


@pytest.mark.parametrize("width", [26, 36])
def test_keys_that_leave_no_room_are_folded(width: int) -> None:
    file = io.StringIO()
    rows = [("a model with a name", "an engine of another", "120.5"), ("b", "c", "7.25")]
    show_table(Console(file=file, width=width), ("model", "engine", ">steps/s"), rows, keys=2)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["model", "engine", "steps/s"]
    assert set("\n".join(lines).split()) >= set(" ".join(cell for row in rows for cell in row).split())
    assert [line.split()[-1] for line in lines if line.endswith(("120.5", "7.25"))] == ["120.5", "7.25"]


@pytest.mark.parametrize("kind", ["", "sha256:"])
def test_a_hash_is_whole_where_it_fits(kind: str) -> None:
    digest = kind + 8 * "0123cdef"
    for width, shown in ((60, f"{kind}0123cdef0123…"), (90, digest), (None, digest)):
        file = io.StringIO()
        show_fields(Console(file=file, width=width, soft_wrap=width is None), {"digest": digest})
        assert file.getvalue() == f"digest  {shown}\n"


def drawn(width: int | None, **options: int) -> list[str]:
    """Lines as a terminal of this width, or a pipe, gets them."""
    file = io.StringIO()
    show_table(Console(file=file, width=width, soft_wrap=width is None), HEADINGS, ROWS, **options)
    return file.getvalue().splitlines()


def test_a_pipe_gets_whole_rows() -> None:
    heading, *rows = drawn(None)
    assert heading.split() == ["level", "site", "kept", "bytes", "an", "element", "where"]
    assert [row.split()[:4] for row in rows] == [list(row[:4]) for row in ROWS]
    assert rows[0].endswith(ROWS[0][4])


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_terminal_gets_parts_that_fit_and_break_nothing(width: int) -> None:
    lines = drawn(width, keys=2)
    assert max(map(len, lines)) <= width
    parts = [part.splitlines() for part in "\n".join(lines).split("\n\n")]
    assert len(parts) > 1
    for part in parts:
        assert part[0].split()[:2] == ["level", "site"]
        assert [line.split()[:2] for line in part if line.startswith("s0.")] == [list(row[:2]) for row in ROWS]
    shown = "\n".join(lines).split()
    for row in ROWS:
        for number in row[2:4]:
            assert number in shown
    for word in ROWS[1][4].split():
        assert word in shown
    assert "…" in "".join(lines) or ROWS[0][4] in shown


def test_a_wide_terminal_gets_one_part() -> None:
    assert len(drawn(120)) == 3


@pytest.mark.parametrize("width", [30, 60])
def test_fields_go_on_below_themselves(width: int) -> None:
    file = io.StringIO()
    value = "one two three four five six seven eight nine ten eleven twelve"
    show_fields(Console(file=file, width=width), {"model": value, "path": "/a" * 40})
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("model  one")
    assert all(line.startswith("       ") for line in lines[1:-1])
    assert [word for line in lines[:-1] for word in line.split()] == ["model", *value.split()]
    assert lines[-1] == "path   " + "/a" * 40, "a path stays whole: it is there to be copied"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 prompts"), (1, "1 prompt"), (2, "2 prompts"), (4096, "4,096 prompts")]
)
def test_numbers_of_things(number: int, text: str) -> None:
    assert counted(number, "prompt") == text


@pytest.mark.parametrize(("target", "text"), [(0.0, "0%"), (0.5, "50%"), (0.625, "62.5%"), (0.57, "57%")])
def test_targets(target: float, text: str) -> None:
    assert percent(target) == text
