"""Packing text into blocks of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from teal_cli.data.blocks import pack
from teal_cli.data.sources import Source
from teal_cli.errors import UsageError

BOS = 999


class Characters:
    """A tokenizer whose tokens are characters; with a begin-of-sequence token it puts that before a prompt, or not."""

    def __init__(self, bos: int | None = None, *, prepends: bool = True) -> None:
        self.bos_token_id = bos
        self._prepends = prepends

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id and self._prepends else []
        return [*first, *map(ord, text)]


def source(*rows: str, separator: str = "") -> Source:
    return Source("some-text", "train", separator, lambda: iter(rows))


def text_of(tokens: np.ndarray) -> str:
    return "".join(map(chr, tokens.ravel()))


def test_rows_are_joined_and_cut() -> None:
    blocks = pack(source("abcd", "efg", "hij", separator="--"), Characters(), num_sequences=3, seq_len=4)
    assert blocks.tokens.dtype == np.int64
    assert [text_of(row) for row in blocks.tokens] == ["abcd", "--ef", "g--h"]
    assert (blocks.dataset, blocks.split) == ("some-text", "train")


def test_each_block_begins_as_a_decoded_sequence_does() -> None:
    blocks = pack(source("abcdef"), Characters(BOS), num_sequences=2, seq_len=4)
    assert blocks.tokens.tolist() == [[BOS, *map(ord, "abc")], [BOS, *map(ord, "def")]]


def test_a_bos_that_the_tokenizer_does_not_use_is_left_out() -> None:
    blocks = pack(source("abcdef"), Characters(BOS, prepends=False), num_sequences=2, seq_len=3)
    assert [text_of(row) for row in blocks.tokens] == ["abc", "def"]


def test_the_fingerprint_is_the_sha256_of_the_ids() -> None:
    blocks = pack(source("abcdef"), Characters(), num_sequences=2, seq_len=3)
    ids = b"".join(ord(c).to_bytes(8, "little") for c in "abcdef")
    assert blocks.fingerprint == hashlib.sha256(ids).hexdigest()
    other = pack(source("abcdeg"), Characters(), num_sequences=2, seq_len=3)
    assert other.fingerprint != blocks.fingerprint


def test_a_stream_is_read_no_further_than_needed() -> None:
    def endless() -> Iterator[str]:
        for i in range(1000):
            assert i < 100, "read on after the blocks were full"
            yield "x" * 1000

    blocks = pack(Source("c4", "train", "", endless), Characters(), num_sequences=10, seq_len=100)
    assert blocks.tokens.shape == (10, 100)


@given(st.lists(st.text("ab", max_size=40_000), max_size=8), st.sampled_from(["", "\n\n"]))
@settings(max_examples=20, deadline=None)
def test_nothing_is_lost_between_pieces(rows: list[str], separator: str) -> None:
    whole = "".join(row + separator for row in rows)
    if whole:
        blocks = pack(source(*rows, separator=separator), Characters(), num_sequences=1, seq_len=len(whole))
        assert text_of(blocks.tokens) == whole


def test_too_short_says_what_there_is_and_what_fits() -> None:
    with pytest.raises(UsageError, match=r"some-text \(train\) has only 10 tokens; 5 sequences of 4 need 20") as error:
        pack(source("0123456789"), Characters(), num_sequences=5, seq_len=4)
    assert error.value.hint == "the most that fits is --num-sequences 2"
    assert pack(source("0123456789"), Characters(), num_sequences=2, seq_len=4).tokens.shape == (2, 4)


def test_not_even_one_fits() -> None:
    with pytest.raises(UsageError) as error:
        pack(source("0123456789"), Characters(BOS), num_sequences=1, seq_len=20)
    assert "--seq-len to at most 11," in str(error.value.hint)
    assert pack(source("0123456789"), Characters(BOS), num_sequences=1, seq_len=11).tokens.shape == (1, 11)


def test_what_there_is_is_taken_where_that_is_enough() -> None:
    assert pack(source("0123456789"), Characters(), num_sequences=5, seq_len=4, least=1).tokens.shape == (2, 4)
    with pytest.raises(UsageError, match="has only 10 tokens"):
        pack(source("0123456789"), Characters(), num_sequences=5, seq_len=4, least=3)
    with pytest.raises(UsageError, match="has only 3 tokens"):
        pack(source("012"), Characters(), num_sequences=5, seq_len=4, least=1)


@pytest.mark.parametrize(("num_sequences", "seq_len"), [(0, 4), (-1, 4), (1, 1), (1, 0)])
def test_numbers_that_make_no_blocks(num_sequences: int, seq_len: int) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        pack(source("0123456789"), Characters(BOS), num_sequences=num_sequences, seq_len=seq_len)
