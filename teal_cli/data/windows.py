"""Text as windows of tokens to score, by one of two conventions that are never mixed.

`window`: the documents joined by a blank line and cut into windows of equal length without overlap; every token of a
window but its first is scored (the convention of the papers: GPTQ, SparseGPT, TEAL). `document`: each document by
itself, every token of it scored, the first one after the begin-of-sequence token, long documents in windows that do not
overlap (lm-evaluation-harness, `loglikelihood_rolling`), so that the likelihood can be told per word and per byte.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.data.blocks import Tokenizer, pack
from teal_cli.data.sources import Source
from teal_cli.errors import UsageError

CONVENTIONS: Final = ("window", "document")


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One sequence to run and the tokens to score.

    Attributes:
        inputs: int64 [S], what the model reads.
        targets: int64 [T], T <= S: the tokens that follow the last T inputs.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """A text ready to be scored.

    Attributes:
        windows: in order.
        units: for each window the index of the text it is of: itself, or its document.
        words, bytes: of the documents; 0 with the convention `window`.
        dataset, split: where the text comes from.
        fingerprint: sha256 in hex over inputs and targets.
    """

    windows: Sequence[Window]
    units: Sequence[int]
    words: int
    bytes: int
    dataset: str
    split: str | None
    fingerprint: str

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return sum(len(window.targets) for window in self.windows)


def cut(source: Source, tokenizer: Tokenizer, *, convention: str, count: int, length: int) -> Windows:
    """Windows of a dataset.

    Args:
        convention: one of `CONVENTIONS`.
        count: windows, or documents; a text that is shorter gives fewer.
        length: tokens of a window.

    Raises:
        UsageError: the text does not fill one window, or has no document; a number below 1, a window below 2 tokens.
        NotFoundError, AuthError, TealError: as `open_source`.
    """
    if length < 2:
        raise UsageError(f"a window needs at least 2 tokens, not {length}", hint="2048 is the usual length")
    if convention == "window":
        blocks = pack(source, tokenizer, num_sequences=count, seq_len=length, least=1, option="--window")
        found = [Window(row[:-1], row[1:]) for row in blocks.tokens]
        return _windows(found, range(len(found)), 0, 0, source)
    windows, units, words, size = [], [], 0, 0
    documents = (text for text in source.documents() if text.strip())
    for unit, text in zip(range(count), documents, strict=False):
        for window in _rolling(tokenizer.encode(text, add_special_tokens=False), token_before(tokenizer), length):
            windows.append(window)
            units.append(unit)
        words += len(re.split(r"\s+", text))
        size += len(text.encode())
    if not windows:
        raise UsageError(f"{source.name} holds no document", hint="name another text")
    return _windows(windows, units, words, size, source)


def _windows(windows: Sequence[Window], units: Sequence[int], words: int, size: int, source: Source) -> Windows:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.inputs.astype("<i8").tobytes() + window.targets.astype("<i8").tobytes())
    return Windows(windows, units, words, size, source.name, source.split, digest.hexdigest())


def token_before(tokenizer: Tokenizer) -> int:
    """What stands before the first token of a document: begin-of-sequence, or where there is none end-of-sequence."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UsageError(
        "the model's tokenizer has neither a begin- nor an end-of-sequence token",
        hint="use --convention window",
    )


def _rolling(ids: list[int], before: int, length: int) -> Iterator[Window]:
    """Every token of a document scored once; a last, shorter window is filled up with what stands before it."""
    stream = np.array([before, *ids], np.int64)
    for begin in range(0, len(ids), length):
        end = min(begin + length, len(ids))
        yield Window(stream[max(0, end - length) : end], stream[begin + 1 : end + 1])
