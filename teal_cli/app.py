"""`teal`: the table of commands, the options before a command, and what an exception becomes.

`main` turns every TealError into a sentence, a hint and an exit code; usage errors into the same with 2;
Ctrl-C into 130. No command is imported here: see `ui.lazy`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from teal_cli.errors import HardwareError, TealError, UsageError
from teal_cli.files import DISK_ERRORS
from teal_cli.ui.lazy import CONTEXT_SETTINGS, Entry, LazyGroup
from teal_cli.ui.output import configure, to_json
from teal_cli.version import __version__

START, MODELS, RUN, STORES, SPEED = "Start here", "Models", "Sparse decoding", "Stores", "Speed"


COMMANDS = (
    Entry(
        "quickstart", START, "From nothing to a store: download, calibrate, generate sparsely, check what was written."
    ),
    Entry("doctor", START, "What this machine can do, and what is missing."),
    Entry("download", MODELS, "Get a model: from the hub, a folder, a GGUF file or a Python wheel."),
    Entry("models", MODELS, "The models this machine has: list, inspect, verify, remove.", attribute="app"),
    Entry("quantize", MODELS, "Make an int8 or int4 model of one that is here."),
    Entry("calibrate", MODELS, "Measure how large the activations of a model are, over a text."),
    Entry(
        "calibrations",
        MODELS,
        "The calibrations of a model: list, inspect, compare, remove, choose the default, import, check.",
        attribute="app",
    ),
    Entry(
        "plan", MODELS, "Make plans that spend sparsity where it hurts least, and keep them by name.", attribute="app"
    ),
    Entry("generate", RUN, "Generate text with sparse decoding."),
    Entry(
        "chat",
        RUN,
        "Converse with a model, decoding sparsely, with speed and realised sparsity after each answer.",
    ),
    Entry("dump", RUN, "Dump activations of many prompts at many sparsity levels into one store."),
    Entry(
        "eval",
        RUN,
        "Measure what sparsity levels cost: perplexity, divergence from the dense model, agreement with it.",
        attribute="evaluate",
    ),
    Entry("compare", RUN, "Decode prompts densely and at sparsity levels, side by side."),
    Entry("lm-eval", RUN, "Run lm-evaluation-harness, with models under their plans.", attribute="app"),
    Entry("store", STORES, "Look into a store, check it, measure it, convert it.", attribute="app"),
    Entry("bench", SPEED, "Measure speed against dense, against others and against the memory limit.", attribute="app"),
    Entry("plot", SPEED, "Draw pictures of results.", attribute="app"),
)
"""A line here is all that registers a command; a test holds its help against the command's docstring."""


class Commands(LazyGroup):
    entries = COMMANDS


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"teal {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def teal(
    json: Annotated[bool, typer.Option("--json", help="Print results as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Training-free activation sparsity: decode faster, and keep the sparse activations as data."""
    configure(json=json, quiet=quiet)


# Typer carries its own click or uses the installed one, by version; the class is the same position in both.
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 ok, 1 failure, 2 usage, 3 not found, 4 auth, 5 hardware, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in args
    configure(json=False, quiet=False)
    if "_TEAL_COMPLETE" in os.environ:
        from teal_cli.ui.completion import hurry

        hurry()
    try:
        code = app(args, prog_name="teal", standalone_mode=False, color=_colour())
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer makes this of KeyboardInterrupt, in some versions
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TealError as error:
        return _fail(error.message, error.hint, error.exit_code, as_json)
    except _ClickError as error:
        return _usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", None, INTERRUPTED, as_json)
    except BrokenPipeError:
        # The reader has gone (`teal models ls | head`); keep the interpreter from complaining at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror}{where}", None, TealError.exit_code, as_json)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own; importing torch costs a second
            raise
        hint = "a smaller model, --dtype bfloat16, or --device cpu"
        return _fail("the device has too little memory", hint, HardwareError.exit_code, as_json)


def _usage(error: Any, as_json: bool) -> int:
    """A mistake in the command line: one sentence, and as a hint what was probably meant."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return UsageError.exit_code
    if type(error.__cause__).__name__ == "ValidationError":  # pydantic's, by which some versions of typer read values
        error.message = _in_words(error.__cause__.errors()[0])
    possible = sorted(getattr(error, "possibilities", None) or ())
    text = error.message if possible else error.format_message()
    sentence, _, guess = " ".join(text.split()).partition(" Did you mean ")
    sentence = sentence[:1].lower() + sentence[1:].rstrip(".")
    path = error.ctx.command_path if error.ctx else "teal"
    hint = getattr(error, "hint", None) or f"`{path} --help` shows what there is"
    if possible or guess:
        hint = f"did you mean {guess or ' or '.join(possible) + '?'}"
    elif extra := re.fullmatch(r"got unexpected extra argument\S* \((.*)\)", sentence):
        sentence = f"unexpected argument {extra[1]!r}"
        if any("-p" in parameter.opts for parameter in error.ctx.command.params):
            quoted = shlex.quote(extra[1]) if set(extra[1]) & set('"$`\\!') else f'"{extra[1]}"'
            hint = f"a prompt is given with -p: `{path} -p {quoted}`"
    return _fail(sentence, hint, error.exit_code, as_json)


def _in_words(problem: Mapping[str, Any]) -> str:
    """What is wrong with a value, as our own checks say it.

    Args:
        problem: one of `ValidationError.errors()`.
    """
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    match kind.partition("_")[0]:
        case "int":
            return f"{value!r} is not a whole number"
        case "float":
            return f"{value!r} is not a number"
        case "greater":
            return f"{value} must be at least {context['ge']}"
        case "value":
            return str(context["error"])
    return str(problem["msg"])


def _fail(message: str, hint: str | None, code: int, as_json: bool) -> int:
    """Say it on stderr: two lines, or with --json one line that is a JSON object."""
    message, hint = message.rstrip("."), hint.rstrip(".") if hint else None
    if as_json:
        error = {"message": message, "hint": hint, "exit_code": code}
        sys.stderr.write(to_json({"error": error}) + "\n")
        return code
    typer.echo(typer.style("error: ", fg="red", bold=True) + message, err=True, color=_colour())
    if hint:
        typer.echo(typer.style("  hint: ", fg="cyan") + hint, err=True, color=_colour())
    return code


def _colour() -> bool | None:
    """None lets typer decide: colour on a terminal only."""
    return False if os.environ.get("NO_COLOR") else None
