"""`teal plot`: pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teal_cli.commands.gathering import gathered
from teal_cli.files import check_new_file
from teal_cli.ui.completion import sites
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.options import ForceOption, JsonOption, QuietOption, StoreArgument
from teal_cli.ui.output import output

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)


@app.callback()
def plot() -> None:
    """Draw pictures of results."""


@app.command()
def bench(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A file that `teal bench ... --output` wrote.")],
    picture: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf to write.")],
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time and bandwidth against sparsity, or tokens per second, with floor and dense.

    A result of `teal bench kernels` gives one panel per matrix and dtype, one of `teal bench decode` bars per model.

    Examples:
        teal plot bench kernels.json -o kernels.png
        teal plot bench decode.json -o decode.svg
    """
    from teal_cli.bench.results import load
    from teal_cli.plots.bench import check_picture, draw

    out = output(json, quiet)
    loaded = load(result)
    check_picture(picture)
    check_new_file(picture, force=force)
    draw(loaded, picture)
    out.result({"result": result, "picture": picture}, lambda console: console.print(f"drawn: {picture}", markup=False))


@app.command()
def store(
    path: StoreArgument,
    picture: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf to write.")],
    layer: Annotated[int, typer.Option("--layer", metavar="N", help="The layer to show; -1 is the last.")] = 0,
    site: Annotated[
        str,
        typer.Option("--site", metavar="SITE", help="attn_in, attn_out, mlp_in or mlp_mid.", autocompletion=sites),
    ] = "mlp_in",
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="How many tokens to show.")] = 64,
    channels: Annotated[int, typer.Option("--channels", min=1, metavar="N", help="How many channels to show.")] = 288,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="activations, or of all levels: density, thresholds, raster, overlap, union, nm, blocks.",
        ),
    ] = "activations",
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The activations of a site token by token, or what its masks are like.

    --layer, --site, --tokens and --channels are for the activations; the other kinds are the pictures of
    `teal store report`.

    Examples:
        teal plot store activations.zarr -o store.png
        teal plot store activations.zarr --site mlp_mid --layer -1 -o last.png
    """
    from teal_cli.plots.bench import check_picture
    from teal_cli.plots.panels import draw_kind, find_kind
    from teal_cli.plots.store import draw
    from teal_cli.store.reader import open_store

    out = output(json, quiet)
    opened = open_store(path)
    check_picture(picture)
    check_new_file(picture, force=force)
    if kind == "activations":
        draw(opened, picture, layer=layer, site=site, tokens=tokens, channels=channels)
    else:
        wanted = find_kind(kind)
        draw_kind(gathered(out, opened), wanted, picture)
    out.result({"store": path, "picture": picture}, lambda console: console.print(f"drawn: {picture}", markup=False))
