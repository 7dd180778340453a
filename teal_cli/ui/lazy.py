"""Command groups that import a command only when it runs, and how help looks.

A `LazyGroup` knows name, one-line help and panel of each command from a table, so that `teal --help`, did-you-mean and
completion of a command name import no command. Help is plain text with bold headings, since drawing boxes costs more
than all the rest of the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Entry(NamedTuple):
    """One command: where it is, and what help says of it without importing it."""

    name: str
    target: str
    help: str
    panel: str


class HelpFormatter(typer.Context.formatter_class):
    """Bold headings; whether colour reaches the terminal is decided where it is written."""

    def write_heading(self, heading: str) -> None:
        self.write(f"{'':>{self.current_indent}}{typer.style(heading + ':', bold=True)}\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(typer.style(term, fg="cyan"), text) for term, text in rows], col_max, col_spacing)


class TealContext(typer.Context):
    formatter_class = HelpFormatter


class LazyGroup(TyperGroup):
    """A group whose commands come from `entries`; each is imported when it is resolved to run or to show its help."""

    context_class = TealContext
    entries: Iterable[Entry] = ()

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.targets = {entry.name: entry.target for entry in self.entries}
        for entry in self.entries:
            self.commands[entry.name] = TyperCommand(
                name=entry.name, help=entry.help, rich_help_panel=entry.panel, rich_markup_mode=None
            )

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Swap the entry of the table for the command itself."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and command.name in self.targets:
            command = load(command.name, self.targets[command.name])
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One section for each panel, in the order of the table."""
        width = max(map(len, self.commands), default=0)
        for panel in dict.fromkeys(entry.panel for entry in self.entries):
            rows = [(entry.name.ljust(width), entry.help) for entry in self.entries if entry.panel == panel]
            with formatter.section(panel):
                formatter.write_dl(rows)


def load(name: str, target: str) -> Any:
    """Import `module:attribute`, a function or a Typer app, and make a command of it that looks like the others."""
    module, _, attribute = target.partition(":")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(found)
        found = app
    else:
        found._add_completion = False  # only the root offers to install completion
    command = typer.main.get_command(found)
    command.name = name
    _adopt(command)
    return command


def _adopt(command: Any) -> None:
    """Give a command, and those under it, our help and `-h`."""
    command.rich_markup_mode = None
    command.context_class = TealContext
    command.context_settings = {**command.context_settings, "help_option_names": ["-h", "--help"]}
    for child in getattr(command, "commands", {}).values():
        _adopt(child)
