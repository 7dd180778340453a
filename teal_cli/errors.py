"""The errors a user can meet: one clear sentence, a hint, and the exit code of the command line.

Everything that a user can cause raises one of these; anything else that escapes is a defect of teal and shows a
traceback. This file knows nothing of the terminal: `teal_cli.app.main` turns an error into text.
"""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 prompt`, `1,234 rows`: how messages and results say how many there are of something."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class TealError(Exception):
    """A failure that the user can understand and act on.

    Args:
        message: one sentence that says what is wrong, with the value that is wrong in it.
        hint: what to do about it, ideally a command to type; None where nothing helps.

    Attributes:
        exit_code: what the process exits with (1 failure, 2 usage, 3 not found,
            4 authentication or gated, 5 hardware).
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The sentence and, on a line of its own, the hint: what Python shows of an error that nobody caught."""
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class UsageError(TealError):
    """The request itself is wrong: a value out of range, options that exclude each other, an unsupported input."""

    exit_code = 2


class NotFoundError(TealError):
    """A model, calibration, dataset, file or level that was named is not there."""

    exit_code = 3


class AuthError(TealError):
    """The hub wants a token, or the token lacks the rights for this repository."""

    exit_code = 4


class HardwareError(TealError):
    """This machine cannot do what was asked: no GPU, no such device, too little memory."""

    exit_code = 5
