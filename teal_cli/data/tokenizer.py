"""The tokenizer of a checkpoint, token ids to text as they come, and where a text that ends it begins.

The only place that asks transformers for a tokenizer. A token may end inside a UTF-8 character, so text comes out only
once it is whole; `tokenizers` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from teal_cli.errors import TealError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a checkpoint folder; nothing is fetched and no code of the checkpoint is run.

    Raises:
        TealError: there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # teal packs texts longer than any context; transformers would warn of each.
    logging.get_logger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TealError(
            f"{checkpoint} has no tokenizer that can be read",
            hint="check the model with `teal models verify`",
        ) from error


class TextStream:
    """Turns the ids of one sequence into pieces of text.

    Args:
        tokenizer: the model's fast tokenizer.
        special: give the text of special tokens, too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, special: bool = False) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=not special)

    def push(self, token: int) -> str:
        """Take one id and return the text that is complete with it, often the empty string."""
        return self._stream.step(self._tokenizer, token) or ""


class StopTexts:
    """Lets text through up to the first of the texts that end it, wherever its pieces are cut.

    Args:
        texts: without any, all text passes.

    Attributes:
        found: whether one has come; what follows it is dropped.

    Raises:
        UsageError: one of them is empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if "" in texts:
            raise UsageError("a stop text is empty", hint="leave it out: without one, the text ends by itself")
        self._texts, self._held = tuple(texts), ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take a piece and return what is certain to stand before any stop text."""
        self._held += piece
        places = [place for place in (self._held.find(text) for text in self._texts) if place >= 0]
        if places:
            self.found = True
            passed, self._held = self._held[: min(places)], ""
            return passed
        kept = max((_overlap(self._held, text) for text in self._texts), default=0)
        passed = self._held[: len(self._held) - kept]
        self._held = self._held[len(passed) :]
        return passed

    def rest(self) -> str:
        """What was held back because it might have become a stop text, once nothing more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
