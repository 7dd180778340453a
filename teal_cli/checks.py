"""Checks of what a user typed that many rooms need: the range of a sparsity, and what an unknown word was meant to be.

Pure standard library; knows neither files nor models.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final, SupportsFloat

from teal_cli.errors import UsageError

OUTSIDE: Final = "is outside [0, 1): it must be at least 0 and below 1, where 0 drops nothing and 0.5 drops half"
"""What is wrong with a number for which `is_sparsity` is False."""


def is_sparsity(value: SupportsFloat) -> bool:
    """Whether a number can be a sparsity: in [0, 1), since 1 would leave nothing of an input."""
    return 0.0 <= float(value) < 1.0


def meant_sparsity(value: SupportsFloat) -> str:
    """`did you mean 0.5? ` where a percentage was given for a sparsity, to begin a hint with; else empty."""
    return f"did you mean {float(value) / 100:g}? " if 1.0 < float(value) < 100.0 else ""


def check_sparsity(value: SupportsFloat, *, hint: str = "give a fraction such as 0.5") -> None:
    """Refuse a sparsity outside [0, 1).

    Raises:
        UsageError: it is.
    """
    if not is_sparsity(value):
        raise UsageError(f"sparsity {float(value):g} {OUTSIDE}", hint=meant_sparsity(value) + hint)


def closest(word: str, words: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The words that were probably meant, most similar first; empty where none is similar.

    Args:
        count: at most so many.
        cutoff: least similarity, from 0 to 1 (difflib's ratio).
    """
    return get_close_matches(word, sorted(words), n=count, cutoff=cutoff)


def did_you_mean(word: str, words: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean X or Y? `, to begin a hint with; empty where nothing is similar. Arguments as for `closest`."""
    found = closest(word, words, count=count, cutoff=cutoff)
    return f"did you mean {' or '.join(found)}? " if found else ""
