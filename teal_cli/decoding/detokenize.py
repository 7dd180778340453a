"""Token ids to text as they come.

A token may end inside a UTF-8 character, so text comes out only once it is whole; `tokenizers` does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextStream:
    """Turns the ids of one sequence into pieces of text.

    Args:
        tokenizer: the model's fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Take one id and return the text that is complete with it, often the empty string."""
        return self._stream.step(self._tokenizer, token) or ""
