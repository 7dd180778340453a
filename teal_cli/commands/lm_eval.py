"""`teal lm-eval`: the command line of lm-evaluation-harness, with teal among its models.

Versions of the harness after 0.4.13 find teal by its entry point, so that their own `lm_eval` does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any

import typer

from teal_cli.errors import TealError, UsageError
from teal_cli.files import read_json
from teal_cli.ui import options
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.output import output

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS)


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context, json: options.JsonOption = False, quiet: options.QuietOption = False) -> None:
    """Run lm-evaluation-harness, with models under their plans.

    Everything else on the command line goes to lm_eval as it is: `teal lm-eval --model teal --model_args
    model=smollm2-135m,plan=NAME --tasks hellaswag`; `teal lm-eval run -h` shows its options. The model `teal` takes
    model, plan or sparsity, sparse_from, calibration, dtype, backend, max_length and seed.

    A request's context is dense and what follows it sparse, as decoding has it; sparse_from=64, 0.01 or half makes
    every sequence sparse from there on, as `teal eval --sparse-from` does.

    Examples:
        teal lm-eval run -h
        teal lm-eval ls -h
    """
    out = output(json, quiet)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise TealError("lm-evaluation-harness is not installed", hint="pip install 'teal-cli[eval]'") from None
    from teal_cli.runs import harness as harness  # registers the model

    arguments = list(context.args)
    if not out.json:
        _run(cli_evaluate, arguments)
        return
    with TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        folder = _output_path(arguments)
        _run(cli_evaluate, arguments if folder else [*arguments, "--output_path", scratch])
        found = sorted(Path(folder or scratch).rglob("results_*.json"), key=lambda file: file.stat().st_mtime_ns)
        if not found:
            raise UsageError("lm_eval left no result", hint="--json goes with a run of tasks")
        result: dict[str, Any] = read_json(found[-1])
    out.result(result, lambda console: None)


def _run(cli_evaluate: Any, arguments: Sequence[str]) -> None:
    """lm_eval's own entry point, which reads `sys.argv`."""
    with _argv(["lm_eval", *arguments]):
        try:
            cli_evaluate()
        except SystemExit as end:
            if end.code:
                raise typer.Exit(end.code if isinstance(end.code, int) else TealError.exit_code) from None
        except ValueError as error:
            if not _raised_in(error, "lm_eval"):
                raise
            raise UsageError(f"lm_eval: {error}", hint="`teal lm-eval ls tasks` lists tasks") from error


def _raised_in(error: BaseException, package: str) -> bool:
    """Whether the line that raised an error is of a package."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == package


@contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


def _output_path(arguments: Sequence[str]) -> str | None:
    """What was given as lm_eval's `--output_path`."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--output_path", "-o"):
            return value if equals else arguments[number + 1] if number + 1 < len(arguments) else None
    return None
