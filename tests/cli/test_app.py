"""The command line as a whole: help, mistakes, exit codes, where output goes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer
from fixtures_cli import Teal, interruptible

from teal_cli import __version__
from teal_cli.app import COMMANDS
from teal_cli.errors import AuthError, HardwareError, NotFoundError, TealError, UsageError
from teal_cli.ui.lazy import Entry, load
from teal_cli.ui.options import JsonOption
from teal_cli.ui.output import output


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch):
    """Let `teal doctor` do something else: a command whose body is the test's."""

    def replace(body, name: str = "doctor") -> None:
        module = ModuleType(f"teal_cli.commands.{name}")
        setattr(module, name, body)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def test_help_lists_every_command(teal: Teal) -> None:
    result = teal("--help")
    assert result.code == 0
    shown = " ".join(result.out.split())
    for entry in COMMANDS:
        assert f"{entry.name} {entry.help}" in shown


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_command_is_documented(teal: Teal, entry: Entry) -> None:
    """The table's one line and the command's own first line are one sentence; every option says what it is
    for."""
    command = load(entry)
    assert command.help.splitlines()[0] == entry.help

    def check(command) -> None:
        assert command.help, command.name
        for parameter in command.params:
            assert parameter.help, f"{command.name} {parameter.name}"
        for child in getattr(command, "commands", {}).values():
            check(child)

    check(command)
    assert teal(entry.name, "--help").code == 0


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, command) of a command that runs, or of all that a group holds."""
    children = getattr(command, "commands", {})
    for child in children:
        yield from commands(children[child], f"{name} {child}")
    if not children:
        yield name, command


def options(command: Any) -> dict[str, str]:
    """Each name of an option, short or long -> its long name."""
    named = [sorted(parameter.opts, key=len) for parameter in command.params if parameter.param_type_name == "option"]
    return {name: names[-1] for names in named for name in names}


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_every_command_takes_json_and_quiet_after_it(entry: Entry) -> None:
    for name, command in commands(load(entry), entry.name):
        assert {"--json", "-q", "--quiet"} <= options(command).keys(), name


def test_an_option_has_one_name_in_every_command() -> None:
    """A letter stands for one word; what is written goes to -o/--output, and --force replaces what is there."""
    letters: dict[str, set[str]] = {}
    for entry in COMMANDS:
        for name, command in commands(load(entry), entry.name):
            found = options(command)
            for letter, word in found.items():
                letters.setdefault(letter, set()).add(word)
            assert not found.keys() & {"--out", "--outdir", "--out-file"}, name
            assert "--output" not in found or found["-o"] == "--output", name
            if found.keys() & {"--output", "--dump", "--name"}:
                assert found.get("-f") == "--force", name
    assert {letter: words for letter, words in letters.items() if len(words) > 1} == {}


def test_version(teal: Teal) -> None:
    assert teal("--version").out == f"teal {__version__}\n"


def test_no_command_shows_help_and_is_a_usage_error(teal: Teal) -> None:
    result = teal()
    assert result.code == 2
    assert "Usage: teal" in result.err
    assert result.out == ""


def test_mistyped_command_is_guessed(teal: Teal) -> None:
    result = teal("docter")
    assert result.code == 2
    assert "docter" in result.err
    assert "'doctor'" in result.err


def test_mistyped_option_is_guessed(teal: Teal) -> None:
    result = teal("doctor", "--ofline")
    assert result.code == 2
    assert result.err == "error: no such option: --ofline\n  hint: did you mean --offline?\n"


def test_usage_error_is_one_sentence_with_a_hint(teal: Teal, behave) -> None:
    behave(_counting)
    result = teal("doctor", "--count", "many")
    assert result.code == 2
    error, hint = result.err.splitlines()
    assert error.startswith("error: invalid value for '--count'")
    assert hint == "  hint: `teal doctor --help` shows what there is"


def _counting(count: Annotated[int, typer.Option(help="How many.")] = 1) -> None:
    """Count."""


@pytest.mark.parametrize(
    ("args", "says", "hint"),
    [
        (("generate", "The sea is"), "unexpected argument 'The sea is'", '-p: `teal generate -p "The sea is"`'),
        (("store", "info", "a", "b"), "unexpected argument 'b'", "`teal store info --help`"),
        (("generate", "-p", "x", "-s", 50), "50 is outside [0, 1)", "did you mean 0.5?"),
        (("dump", "-s", "0.5,65", "-o", "x.zarr"), "sparsity 65 is outside", "did you mean 0.65?"),
        (("generate", "-p", "x", "-m", "org/name"), "called 'org/name'", "`teal download org/name`"),
        (("generate", "-p", "x", "--max-new-tokens", "many"), "'many' is not a whole number", "--help"),
        (("generate", "-p", "x", "-s", "half"), "'half' is not a number", "--help"),
        (("eval", "--window", 1), "1 must be at least 2", "--help"),
        (("dump", "--follow", "me"), "'me' is not one of 'free', 'dense', 'text'", "--help"),
    ],
)
def test_mistakes_are_told_in_our_words(teal: Teal, args: tuple[object, ...], says: str, hint: str) -> None:
    result = teal(*args)
    error, hinted = result.err.splitlines()[-2:]
    assert (result.code in (2, 3), says in error, hint in hinted) == (True, True, True), result.err
    assert not any(phrase in error for phrase in ("Input should be", "Value error", "unable to parse"))


def test_in_python_an_error_carries_its_hint() -> None:
    error = NotFoundError("the sky is green", hint="look again")
    assert str(error) == "the sky is green\n  hint: look again"
    assert (error.message, str(TealError("no more"))) == ("the sky is green", "no more")


@pytest.mark.parametrize(
    ("kind", "code"),
    [(TealError, 1), (UsageError, 2), (NotFoundError, 3), (AuthError, 4), (HardwareError, 5)],
)
def test_teal_errors_become_sentence_hint_and_code(teal: Teal, behave, kind: type[TealError], code: int) -> None:
    def fail(json: JsonOption = False) -> None:
        raise kind("the sky is green", hint="look again")

    behave(fail)
    result = teal("doctor")
    assert result == (code, "", "error: the sky is green\n  hint: look again\n")
    result = teal("doctor", "--json")
    assert (result.code, result.out) == (code, "")
    assert result.error == {"message": "the sky is green", "hint": "look again", "exit_code": code}


def test_usage_error_as_json(teal: Teal) -> None:
    result = teal("--json", "docter")
    assert (result.code, result.out) == (2, "")
    assert result.error["exit_code"] == 2
    assert "'doctor'" in result.error["hint"]


@pytest.mark.parametrize("args", [["--json", "doctor"], ["doctor", "--json"]])
def test_json_counts_before_and_after_the_command(teal: Teal, behave, args: list[str]) -> None:
    def show(json: JsonOption = False) -> None:
        out = output(json)
        out.note("a note")
        out.result({"value": 1, "path": Path("a"), "nothing": float("nan")}, lambda console: console.print("text"))

    behave(show)
    result = teal(*args)
    assert result.json == {"value": 1, "path": "a", "nothing": None}
    assert result.err == ""


def test_json_does_not_outlive_a_call(teal: Teal, behave) -> None:
    behave(lambda: output().result({}, lambda console: console.print("text")))
    assert teal("--json", "doctor").out == "{}\n"
    assert teal("doctor").out == "text\n"


def test_data_on_stdout_remarks_on_stderr(teal: Teal, behave) -> None:
    def talk() -> None:
        out = output()
        out.note("a [note]")
        out.warn("a [warning]")
        out.result({}, lambda console: console.print("data"))

    behave(talk)
    assert teal("doctor") == (0, "data\n", "a [note]\nwarning: a [warning]\n")
    assert teal("--quiet", "doctor") == (0, "data\n", "warning: a [warning]\n")


def test_keyboard_interrupt_is_130(teal: Teal, behave) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    behave(interrupt)
    result = teal("doctor")
    assert (result.code, result.out, result.err) == (130, "", "error: interrupted\n")


def test_exit_code_of_a_command_is_kept(teal: Teal, behave) -> None:
    def leave() -> None:
        raise typer.Exit(5)

    behave(leave)
    assert teal("doctor") == (5, "", "")


def test_full_disk_is_a_sentence(teal: Teal, behave) -> None:
    def write() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out.zarr")

    behave(write)
    assert teal("doctor") == (1, "", "error: No space left on device: /data/out.zarr\n")


def test_a_defect_keeps_its_traceback(teal: Teal, behave) -> None:
    def crash() -> None:
        raise ZeroDivisionError("a bug")

    behave(crash)
    with pytest.raises(ZeroDivisionError):
        teal("doctor")


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import sys, time, types\n"
        "from teal_cli.app import main\n"
        "module = types.ModuleType('teal_cli.commands.doctor')\n"
        "def doctor():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "module.doctor = doctor\n"
        "sys.modules[module.__name__] = module\n"
        "sys.exit(main(['doctor']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted\n")


def test_reader_that_leaves_early_hears_nothing(tmp_path: Path) -> None:
    """`teal --help | true`: no traceback, whoever writes last."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "teal_cli", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
        text=True,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")
