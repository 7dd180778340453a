"""Prompts of a dataset that has fewer documents than were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from teal_cli import settings
from teal_cli.data.prompts import PromptSource, shortage
from teal_cli.errors import UsageError


def test_a_dataset_that_is_a_little_short_gives_what_it_has(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text("one two three four five")
    encode = lambda text: [len(word) for word in text.split()]  # noqa: E731
    decode = lambda ids: " ".join(map(str, ids))  # noqa: E731
    found = PromptSource(str(tmp_path), count=6, prompt_tokens=3).read(encode, decode)
    assert len(found) == 4
    with pytest.raises(UsageError, match="has 4 documents of at least 3 tokens, fewer than the 9 asked for"):
        PromptSource(str(tmp_path), count=9, prompt_tokens=3).read(encode, decode)
    with pytest.raises(UsageError, match="has 0 documents"):
        PromptSource(str(tmp_path), count=2, prompt_tokens=30).read(encode, decode)


def test_the_built_in_text_serves_the_defaults_of_dump() -> None:
    """It has 8 of the 10 prompts of 64 tokens; words stand for tokens, of which a tokenizer makes more."""
    wanted = settings.load({}).pick("dump.num_sequences")
    encode = lambda text: list(range(len(text.split())))  # noqa: E731
    source = PromptSource("python-docs", count=wanted, prompt_tokens=64)
    found = len(source.read(encode, str))
    assert found >= 8
    assert shortage(source, found) == (
        [] if found == wanted else [f"python-docs has text for {found} of {wanted} prompts"]
    )
