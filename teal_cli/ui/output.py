"""The one sink of a command: data to stdout, everything else to stderr; JSON or text, decided once.

`app` calls `configure` with the options given before the command; the command calls `output(json)` with its own and
gets an `Output`. Rich is imported when something is drawn, not before. This file knows nothing of what it shows.
"""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass
class _Globals:
    json: bool = False
    quiet: bool = False


_globals = _Globals()


def configure(*, json: bool, quiet: bool) -> None:
    """Remember what was given before the command; called once for each invocation."""
    _globals.json, _globals.quiet = json, quiet


def output(json: bool = False, quiet: bool = False) -> Output:
    """The sink for one command; `--json` and `--quiet` count wherever they were given."""
    return Output(json=json or _globals.json, quiet=quiet or _globals.quiet)


class Output:
    """Where a command puts its result and its remarks.

    Attributes:
        json: the result is one JSON object on stdout; nothing else goes there.
        quiet: no notes and no progress; warnings and errors still show.
        console: rich console on stdout.
        err: rich console on stderr.
    """

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json = json
        self.quiet = quiet

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        return Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())

    @cached_property
    def err(self) -> Console:
        from rich.console import Console

        return Console(file=sys.stderr, highlight=False, soft_wrap=not sys.stderr.isatty())

    def result(self, payload: Mapping[str, Any], render: Callable[[Console], None]) -> None:
        """Show a command's result, once: `payload` as JSON, or what `render` draws on the console."""
        if self.json:
            sys.stdout.write(to_json(payload, indent=2) + "\n")
            sys.stdout.flush()
        else:
            render(self.console)

    def write(self, text: str) -> None:
        """Stream text to stdout as it is, at once (generated tokens); nothing with `--json`."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """A remark on stderr that may be missed: off with `--quiet` and `--json`."""
        if not (self.quiet or self.json):
            self.err.print(text, style="dim", markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something the user should know, on stderr, always."""
        from rich.text import Text

        self.err.print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)

    def problem(self, message: str, hint: str | None) -> None:
        """A mistake that ends nothing, on stderr, in the form in which `app` tells those that do."""
        from rich.text import Text

        self.err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
        if hint:
            self.err.print(Text.assemble(("  hint: ", "cyan"), hint), soft_wrap=True)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Encode as strict JSON: dataclasses as objects, paths as text, numpy scalars as numbers, NaN and
    infinity as null."""
    ascii_only = not (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8")
    return jsonlib.dumps(_plain(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays, without importing either
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")
