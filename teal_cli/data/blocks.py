"""Rows of text to packed blocks of tokens: what a calibration, a check and a perplexity run on.

The rows are joined with the dataset's separator into one stream of text, which is tokenised piece by piece
and cut into blocks of equal length. Each block begins with the model's begin-of-sequence token if its
tokenizer would put one before a prompt, because a decoded sequence begins that way too. No end-of-sequence
token is added: decoding stops there, so the model never computes anything after one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teal_cli.data.sources import Source
from teal_cli.errors import UsageError, counted

_PIECE_CHARS = 1 << 16


class Tokenizer(Protocol):
    """What packing needs of a tokenizer of `transformers`."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True, eq=False)
class TokenBlocks:
    """Tokens of a dataset in blocks of equal length.

    Attributes:
        tokens: int64 [sequences, seq_len], begin-of-sequence tokens included.
        dataset, split: where they come from.
        fingerprint: sha256 in hex over the token ids as little-endian int64, block after block.
    """

    tokens: NDArray[np.int64]
    dataset: str
    split: str | None
    fingerprint: str


def pack(
    source: Source,
    tokenizer: Tokenizer,
    *,
    num_sequences: int,
    seq_len: int,
    least: int | None = None,
    option: str = "--seq-len",
) -> TokenBlocks:
    """Fill `num_sequences` blocks of `seq_len` tokens from the beginning of a dataset.

    A dataset that is too short for them gives as many as it can, but at least `least`; None wants all. `option` is what
    the user calls `seq_len`.

    Raises:
        UsageError: the dataset is too short (says what would fit), or a number below 1.
        NotFoundError, AuthError, TealError: as `open_source`.
    """
    if num_sequences < 1:
        raise UsageError(f"--num-sequences must be at least 1, not {num_sequences}")
    prefix = _prefix(tokenizer)
    room = seq_len - len(prefix)
    if room < 1:
        raise UsageError(f"{option} must be at least {len(prefix) + 1}, not {seq_len}")
    ids: list[int] = []
    for piece in _pieces(source):
        ids += tokenizer.encode(piece, add_special_tokens=False)
        if len(ids) >= num_sequences * room:
            break
    fitting = len(ids) // room
    if fitting < (num_sequences if least is None else least):
        raise _too_short(source, len(ids), num_sequences, seq_len, room, option)
    num_sequences = min(num_sequences, fitting)
    tokens = np.empty((num_sequences, seq_len), np.dtype("<i8"))
    tokens[:, : len(prefix)] = prefix
    tokens[:, len(prefix) :] = np.asarray(ids[: num_sequences * room]).reshape(num_sequences, room)
    return TokenBlocks(tokens, source.name, source.split, hashlib.sha256(tokens.tobytes()).hexdigest())


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-sequence token, if the tokenizer puts it before a text of its own accord."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("a", add_special_tokens=True)[0] == bos else []


def _pieces(source: Source) -> Iterator[str]:
    """The joined text in pieces of some 65,536 characters, cut between rows, so that a stream is never held whole."""
    rows: list[str] = []
    size = 0
    for row in source.documents():
        rows += (row, source.separator)
        size += len(row) + len(source.separator)
        if size >= _PIECE_CHARS:
            yield "".join(rows)
            rows, size = [], 0
    if size:
        yield "".join(rows)


def _too_short(source: Source, there: int, num_sequences: int, seq_len: int, room: int, option: str) -> UsageError:
    split = f" ({source.split})" if source.split else ""
    fits = there // room
    if fits:
        hint = f"the most that fits is --num-sequences {fits}"
    else:
        most = there + seq_len - room
        shorter = f"lower {option} to at most {most}, or name more text" if there > 1 else "name a text that has some"
        hint = f"not even one sequence fits; {shorter}"
    return UsageError(
        f"{source.name}{split} has only {counted(there, 'token')}; {counted(num_sequences, 'sequence')} of {seq_len} "
        f"need {num_sequences * room:,}",
        hint=hint,
    )
