"""Command groups that import a command only when it runs, and how help looks.

A `LazyGroup` knows name, one-line help and panel of each command from a table, so that `teal --help`,
did-you-mean and completion of a command name import no command. Help is plain text with bold headings, since
drawing boxes costs more than all the rest of the start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from teal_cli import settings
from teal_cli.errors import UsageError

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

_PlainFormatter: Any = typer.Context.formatter_class


class Entry(NamedTuple):
    """One command, as known without importing it: `teal_cli.commands.<name>` holds a function of its name, or
    a Typer app for a group; a hyphen of the name is an underscore there."""

    name: str
    panel: str
    help: str
    attribute: str | None = None

    @property
    def module(self) -> str:
        return f"teal_cli.commands.{self.name.replace('-', '_')}"


class HelpFormatter(_PlainFormatter):  # its class is typer's or click's, by version
    """Bold headings; whether colour reaches the terminal is decided where it is written."""

    def write_heading(self, heading: str) -> None:
        self.write(f"{'':>{self.current_indent}}{typer.style(heading + ':', bold=True)}\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(typer.style(term, fg="cyan"), text) for term, text in rows], col_max, col_spacing)


class Defaults(Mapping[str, Any]):
    """The default map of a command: what the settings give its options; they are read when one is asked for.

    Args:
        keys: names of parameters -> settings.

    Raises:
        UsageError: on the first look, as `settings.load`.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self.keys_of = keys

    @cached_property
    def _values(self) -> dict[str, Any]:
        found = settings.load()
        picked = {name: found.pick(key) for name, key in self.keys_of.items()}
        return {name: value for name, value in picked.items() if value is not None}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class TealContext(typer.Context):
    formatter_class = HelpFormatter

    def lookup_default(self, name: str, call: bool = True) -> Any:
        """As the parser's own, but help and completion work beside a broken file of settings."""
        try:
            return super().lookup_default(name, call)  # type: ignore[call-overload]
        except UsageError:
            if self.resilient_parsing:
                return None
            raise


class LazyGroup(TyperGroup):
    """A group whose commands come from `entries`; each is imported when it is resolved to run or to show its help."""

    context_class = TealContext
    entries: Iterable[Entry] = ()

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.lazy = {entry.name: entry for entry in self.entries}
        for entry in self.entries:
            self.commands[entry.name] = TyperCommand(
                name=entry.name,
                help=entry.help,
                short_help=entry.help,
                rich_help_panel=entry.panel,
                rich_markup_mode=None,
            )

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Swap the entry of the table for the command itself."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and command.name in self.lazy:
            command = load(self.lazy[command.name])
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One section for each panel, in the order of the table."""
        width = max(map(len, self.commands), default=0)
        for panel in dict.fromkeys(entry.panel for entry in self.entries):
            rows = [(entry.name.ljust(width), entry.help) for entry in self.entries if entry.panel == panel]
            with formatter.section(panel):
                formatter.write_dl(rows)


def load(entry: Entry) -> Any:
    """Import the command, a function or a Typer app, and make it look like the others.

    What its docstring has under `Examples:` stands at the end of its help; a test runs all of these.
    """
    found = getattr(import_module(entry.module), entry.attribute or entry.name.replace("-", "_"))
    if isinstance(found, typer.Typer):
        app = found
        app._add_completion = False  # only the root offers to install completion
    else:
        app = typer.Typer(add_completion=False)
        app.command(entry.name)(found)
    command = typer.main.get_command(app)
    command.name = entry.name
    _adopt(command)
    return command


def _adopt(command: Any) -> None:
    """Give a command, and those under it, our help and `-h`, and list it with its whole first line."""
    command.rich_markup_mode = None
    command.context_class = TealContext
    keys = _take_settings(command)
    defaults = {"default_map": Defaults(keys)}
    command.context_settings = {**command.context_settings, **CONTEXT_SETTINGS, **defaults}
    about, _, examples = (command.help or "").partition("\n\nExamples:\n")
    if examples:
        command.help, command.epilog = about, f"\b\nExamples:\n{examples.rstrip()}"  # \b: lines stay as they are
    command.short_help = command.short_help or (command.help or "").partition("\n")[0]
    alone = {name for option in command.params if str(option.metavar).startswith("[") for name in option.opts}
    command.parse_args = partial(_parse, command.parse_args, alone)
    for parameter in command.params:
        parameter.get_help_record = partial(_help_record, keys.get(parameter.name), parameter.get_help_record)
    for child in getattr(command, "commands", {}).values():
        _adopt(child)


def _parse(parse: Callable[[Any, list[str]], list[str]], alone: set[str], context: Any, args: list[str]) -> list[str]:
    """Parse with an empty value for an option that may stand alone, by the brackets of its metavar, where it does."""
    given = []
    for arg, following in zip(args, [*args[1:], "-"], strict=False):
        given += [arg, ""] if arg in alone and following.startswith("-") else [arg]
    return parse(context, given)


def _take_settings(command: Any) -> dict[str, str]:
    """Parameter -> setting of the options that name one, by its variable.

    The variable is taken from the option: the parser would read it itself, without our check and its message.
    """
    variables = {settings.variable(key): key for key in settings.KEYS}
    found = {}
    for option in command.params:
        if option.envvar in variables:
            found[option.name] = variables[option.envvar]
            option.envvar, option.required = None, False
    return found


def _help_record(
    key: str | None, record: Callable[[Any], tuple[str, str] | None], context: Any
) -> tuple[str, str] | None:
    """A parameter's line of help, with the variable of its setting before the default."""
    found = record(context)
    if found is None:
        return None
    names, text = found
    text = text.replace(r"\[", "[")  # escaped by old versions of Typer, for a renderer that is not used here
    text = re.sub(r"default: \((.*)\)(; [^;\]]*)?\]$", r"default: \1\2]", text)  # words need no parentheses
    if key is None:
        return names, text
    about, bracket, default = text.rpartition("  [")
    variable = settings.variable(key)
    return names, f"{about}  [{variable}; {default}" if bracket else f"{text}  [{variable}]"
