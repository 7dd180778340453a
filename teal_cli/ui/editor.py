"""Lines of a conversation: edited, remembered and completed on a terminal, read as they come from a pipe.

prompt_toolkit does the editing and is imported where a line is edited. Nothing here knows what lines mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

PROMPT = "> "


def on_terminal() -> bool:
    """Whether somebody types."""
    return sys.stdin is not None and sys.stdin.isatty()


class Editor:
    """Asks for lines on a terminal. Enter ends a line, Alt-Enter begins another line of the same message.

    Args:
        words: first word -> the words that may follow it, for TAB; None for files.
        history: file of earlier lines, which new ones are added to; None keeps them in memory.
    """

    def __init__(self, words: Mapping[str, Iterable[str] | None], history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            completer=_completer(words),
            complete_while_typing=False,
            history=InMemoryHistory() if history is None else FileHistory(str(history)),
            key_bindings=_keys(),
            output=create_output(always_prefer_tty=True),  # stdout may be a file, which takes answers alone
        )

    def ask(self) -> str:
        """The next message.

        Raises:
            EOFError: Ctrl-D on an empty line. KeyboardInterrupt: Ctrl-C.
        """
        return self._session.prompt()


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def _completer(words: Mapping[str, Iterable[str] | None]) -> Any:
    """Offers the first words at the beginning of a line, then what may follow the one that is there."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Lines(Completer):
        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            first, space, rest = document.text_before_cursor.partition(" ")
            if space and words.get(first, ()) is None:
                yield from PathCompleter(expanduser=True).get_completions(Document(rest), complete_event)
                return
            typed, offered = (rest, words.get(first) or ()) if space else (first, words)
            for word in offered:
                if word.startswith(typed):
                    yield Completion(word, start_position=-len(typed))

    return Lines()
