"""`teal plot`: pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from teal_cli.commands.gathering import gathered
from teal_cli.files import check_new_file
from teal_cli.ui.completion import levels, sites
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.options import ForceOption, JsonOption, QuietOption, StoreArgument
from teal_cli.ui.output import Output, output

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)


@app.callback()
def plot() -> None:
    """Draw pictures of results."""


PictureOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf to write.")]


@app.command()
def bench(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A file that `teal bench ... --output` wrote.")],
    picture: PictureOption,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """How many times as fast as dense against sparsity, or decode steps per second, with what memory allows.

    A result of `teal bench kernels` gives a page for each dtype with a panel for each matrix, one of `teal bench
    decode` bars per model. Several pages are named after their dtypes: kernels-bfloat16.png.

    Examples:
        teal plot bench decode.json -o decode.png
        teal plot bench decode.json -o decode.svg
    """
    from teal_cli.bench.results import load
    from teal_cli.plots.bench import draw, pictures

    out = output(json, quiet)
    loaded = load(result)
    for file in pictures(loaded, picture):
        check_new_file(file, force=force)
    drawn = draw(loaded, picture)
    _drawn(out, {"result": result, "picture": drawn[0], "pictures": drawn}, drawn)


@app.command()
def store(
    path: StoreArgument,
    picture: PictureOption,
    level: Annotated[
        list[str] | None,
        typer.Option(
            "--level",
            "-l",
            metavar="LEVEL",
            help="A level to show, s0.50 or 0.5; may be given several times.",
            show_default="all",
            autocompletion=levels,
        ),
    ] = None,
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
            help="activations, density, thresholds, raster, overlap, union, nm or blocks.",
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
        teal plot store activations.zarr --kind overlap --level 0.5 -o overlap.png
    """
    from teal_cli.plots.panels import draw_kind, find_kind
    from teal_cli.plots.store import draw
    from teal_cli.plots.style import check_picture
    from teal_cli.store.reader import open_store

    out = output(json, quiet)
    opened = open_store(path)
    check_picture(picture)
    check_new_file(picture, force=force)
    if kind == "activations":
        draw(opened, picture, layer=layer, site=site, levels=level or (), tokens=tokens, channels=channels)
    else:
        wanted = find_kind(kind)
        draw_kind(gathered(out, opened, level or ()), wanted, picture)
    _drawn(out, {"store": path, "picture": picture}, [picture])


@app.command("eval")
def evaluation(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Files that `teal eval -o FILE` wrote.")],
    picture: PictureOption,
    bench: Annotated[
        Path | None,
        typer.Option(
            "--bench",
            metavar="FILE",
            help="A result of `teal bench decode` of the model: also draw speed.",
            show_default="none",
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Perplexity and KL against the share that was dropped, and with --bench against decode speed.

    Examples:
        teal plot eval eval.json -o eval.png
        teal plot eval eval.json --bench decode.json -o eval.svg
    """
    from teal_cli.bench.results import load
    from teal_cli.plots.eval import draw, load_evaluation
    from teal_cli.plots.style import check_picture

    out = output(json, quiet)
    curves = [load_evaluation(file) for file in results]
    measured = None if bench is None else load(bench)
    check_picture(picture)
    check_new_file(picture, force=force)
    draw(curves, measured, picture)
    _drawn(out, {"results": results, "bench": bench, "picture": picture}, [picture])


def _drawn(out: Output, payload: dict[str, Any], files: list[Path]) -> None:
    out.result(payload, lambda console: console.print(f"drawn: {', '.join(map(str, files))}", markup=False))
