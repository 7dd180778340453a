"""Ids to text as they come, and stop texts wherever the pieces are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.data.tokenizer import StopTexts, TextStream, load_tokenizer
from teal_cli.errors import UsageError


def through(stops: StopTexts, pieces: list[str]) -> str:
    passed = []
    for piece in pieces:
        passed.append(stops.push(piece))
        if stops.found:
            break
    return "".join(passed) + stops.rest()


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["one ", "END two"], ["END"], "one "),
        (["one E", "N", "D two"], ["END"], "one "),
        (["one EN", "EN", "D"], ["END"], "one EN"),
        (["aab"], ["ab"], "a"),
        (["a", "a", "b"], ["aab"], ""),
        (["one EN"], ["END"], "one EN"),
        (["xy", "z"], ["yz!", "z"], "xy"),
        (["one", " two"], [], "one two"),
    ],
)
def test_text_before_the_first_stop_passes(pieces: list[str], stops: list[str], text: str) -> None:
    assert through(StopTexts(stops), pieces) == text


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    """Held against the whole text: cut at the stop that is complete first, the longest of those."""
    whole = "".join(pieces)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    one_by_one = through(StopTexts(stops), list(whole))
    assert one_by_one == (whole[: min(ends)[1]] if ends else whole)
    # In larger pieces a stop that ends later may begin earlier and be seen with the other: never more text passes.
    assert one_by_one.startswith(through(StopTexts(stops), pieces))


def test_nothing_is_held_back_that_no_stop_begins_with() -> None:
    stops = StopTexts(["END"])
    assert stops.push("one E") == "one "
    assert stops.push("x") == "Ex"
    assert not stops.found


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopTexts(["END", ""])


def test_a_token_that_ends_inside_a_character_gives_nothing_yet(tiny: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(tiny("llama3"))
    text = "naïve 🦊, <|end|>ok"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, special=True)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert "" in pieces
    plain = TextStream(tokenizer)
    assert "".join(map(plain.push, ids)) == "naïve 🦊, ok"
