"""`teal plot`: pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.options import ForceOption, JsonOption, QuietOption
from teal_cli.ui.output import output

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)


@app.callback()
def plot() -> None:
    """Draw pictures of results."""


@app.command()
def bench(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A file that `teal bench ... --out` wrote.")],
    picture: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf to write.")],
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time and bandwidth against sparsity, or tokens per second, with floor and dense.

    A result of `teal bench kernels` gives one panel per matrix and dtype, one of `teal bench decode` bars per model.
    """
    from teal_cli.bench.plots import check_picture, draw
    from teal_cli.bench.results import check_target, load

    out = output(json, quiet)
    loaded = load(result)
    check_picture(picture)
    check_target(picture, force=force)
    draw(loaded, picture)
    out.result({"result": result, "picture": picture}, lambda console: console.print(f"drawn: {picture}", markup=False))
