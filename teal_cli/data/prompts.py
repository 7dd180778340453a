"""Prompts for a dump: the first tokens of a dataset's documents, or a file with one prompt a line.

This module does not know what is done with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from teal_cli.data.sources import open_source
from teal_cli.errors import NotFoundError, UsageError, counted

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[list[int]], str]
_KEYS = ("prompt", "text")


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text, token_ids: as text, and as the token ids that are fed.
        following: token ids that come after it, where these are known before anything is decoded.
    """

    text: str
    token_ids: tuple[int, ...]
    following: tuple[int, ...] = ()


class Prompts(Protocol):
    """Where prompts come from."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def options(self) -> dict[str, Any]:
        """As JSON values, what it takes to read them again; empty where nothing does."""

    def read(self, encode: Encode, decode: Decode) -> list[Prompt]:
        """The prompts, in order."""


@dataclass(frozen=True)
class KnownPrompts:
    """Prompts that are there already, with the name of the source that gave them and its options."""

    name: str
    prompts: tuple[Prompt, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def read(self, encode: Encode, decode: Decode) -> list[Prompt]:
        """The prompts, as they are."""
        return list(self.prompts)


@dataclass(frozen=True)
class TypedPrompts:
    """Prompts as texts, which have no token ids until a model reads them."""

    texts: tuple[str, ...]
    name: str = "--prompt"

    @property
    def options(self) -> dict[str, Any]:
        """None: they cannot be read again."""
        return {}

    def read(self, encode: Encode, decode: Decode) -> list[Prompt]:
        """The prompts, in order. Raises UsageError for one without tokens."""
        return [Prompt(text, _encoded(text, encode)) for text in self.texts]


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: give a dataset or a file.

    Attributes:
        dataset: as `open_source` takes it; documents shorter than `prompt_tokens` are passed over. One with at least
            half of the documents that were asked for gives as many as it has.
        split: split of the dataset; None takes the one that is not calibrated on.
        file: text with one prompt a line, or JSON lines with a `prompt` or `text` key.
        count: how many prompts; None takes the whole file.
        prompt_tokens: how many tokens of each document of a dataset make the prompt.
        following: how many of the tokens after it are taken as well.
    """

    dataset: str | None = None
    split: str | None = None
    file: Path | None = None
    count: int | None = None
    prompt_tokens: int = 64
    following: int = 0

    @property
    def name(self) -> str:
        """For people: the file, or the dataset with its split."""
        if self.file is not None:
            return str(self.file)
        return f"{self.dataset}:{self.split}" if self.split else str(self.dataset)

    @property
    def options(self) -> dict[str, Any]:
        """What a store keeps of it; a file may have changed meanwhile, so that its prompts are taken from the store."""
        if self.file is not None:
            return {}
        return {
            "dataset": self.dataset,
            "split": self.split,
            "num_sequences": self.count,
            "prompt_tokens": self.prompt_tokens,
        }

    def read(self, encode: Encode, decode: Decode) -> list[Prompt]:
        """The prompts, in order.

        Args:
            encode: text to token ids.  decode: the way back, for documents that are cut.

        Raises:
            NotFoundError: no such file, dataset or split.
            UsageError: no prompts, fewer than `count`, an empty prompt, or a line that is not JSON.
        """
        if self.file is not None:
            return [Prompt(text, _encoded(text, encode)) for text in self.texts()]
        return [
            Prompt(
                decode(ids[: self.prompt_tokens]), tuple(ids[: self.prompt_tokens]), tuple(ids[self.prompt_tokens :])
            )
            for ids in self._from_dataset(str(self.dataset), encode)
        ]

    def texts(self) -> list[str]:
        """The prompts of the file, which it takes no tokenizer to read. Raises as `read`."""
        assert self.file is not None, "a dataset has tokens"
        file, hint = self.file, "--prompts takes a text or .jsonl file"
        try:
            text = file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {file}", hint=hint) from None
        except UnicodeDecodeError:
            raise UsageError(f"{file} is not UTF-8 text", hint=hint) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            what = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{file} cannot be read: {what}", hint=hint) from None
        # Not splitlines: JSON may hold other line separators within a string.
        lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
        if file.suffix == ".jsonl":
            lines = [_prompt_of(line, number, file) for number, line in enumerate(lines, 1)]
        if not lines:
            raise UsageError(f"{file} holds no prompts")
        if self.count is not None and len(lines) < self.count:
            raise UsageError(
                f"{file} holds {counted(len(lines), 'prompt')}, fewer than the {self.count} asked for",
                hint="lower --num-sequences, or leave it out to take them all",
            )
        return lines[: self.count]

    def _from_dataset(self, dataset: str, encode: Encode) -> list[list[int]]:
        count = 1 if self.count is None else self.count
        prompts: list[list[int]] = []
        source = open_source(dataset, split=self.split, held_out=self.split is None)
        wanted = self.prompt_tokens + self.following
        for ids in _long_enough(source.documents(), encode, wanted):
            prompts.append(ids)
            if len(prompts) == count:
                return prompts
        if 2 * len(prompts) >= count:
            return prompts
        raise UsageError(
            f"{self.name} has {counted(len(prompts), 'document')} of at least {counted(wanted, 'token')}, fewer than "
            f"the {count} asked for",
            hint="lower --num-sequences or --prompt-tokens, or take another split",
        )


def shortage(source: Prompts, found: int) -> list[str]:
    """What a user should know of a dataset that gave fewer prompts than were asked for."""
    if not isinstance(source, PromptSource) or source.file is not None or source.count is None or found >= source.count:
        return []
    return [f"{source.name} has text for {found} of {source.count} prompts"]


def _long_enough(documents: Iterator[str], encode: Encode, tokens: int) -> Iterator[list[int]]:
    for document in documents:
        ids = list(encode(document))
        if len(ids) >= tokens:
            yield ids[:tokens]


def _encoded(text: str, encode: Encode) -> tuple[int, ...]:
    ids = tuple(encode(text))
    if not ids:
        raise UsageError(f"the prompt {text!r} has no tokens")
    return ids


def is_text(value: str) -> bool:
    """Whether a string can be encoded: JSON and terminals can give half of a surrogate pair, which is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _prompt_of(line: str, number: int, file: Path) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"line {number} of {file} is not JSON") from None
    for key in _KEYS:
        if isinstance(record, dict) and isinstance(record.get(key), str):
            if not is_text(record[key]):
                raise UsageError(f"line {number} of {file} holds half of a surrogate pair, which is no character")
            return str(record[key])
    raise UsageError(f"line {number} of {file} has no text under 'prompt' or 'text'")
