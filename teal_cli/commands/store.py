"""`teal store`: look into a store, check it, measure it, turn it into other forms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli.errors import UsageError
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.options import JsonOption, LevelOption, QuietOption, StoreArgument
from teal_cli.ui.output import output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.store.reader import StoreInfo
    from teal_cli.store.stats import SiteStats
    from teal_cli.store.verify import Problem

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)

SHOWN_PROBLEMS = 10


@app.callback()
def store() -> None:
    """Look into a store, check it, measure it, convert it."""


@app.command()
def info(
    store: StoreArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Find the tokens of prompts that contain this text."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Where a store comes from, its levels and its size."""
    from teal_cli.store.reader import describe, open_store

    out = output(json, quiet)
    found = describe(open_store(store), prompt)
    out.result({"store": found}, lambda console: _show_info(console, found, prompt))


@app.command()
def verify(
    store: StoreArgument,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a store whose run was cut off or still goes on.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read every byte and hold it against what is known; exit 1 if anything is wrong."""
    from teal_cli.store.verify import Checked
    from teal_cli.store.verify import verify as check

    out = output(json, quiet)
    problems: list[Problem] = []
    blocks = 0
    with progress(out) as bars:
        task = bars.task("Verifying", unit="blocks")
        for event in check(store, allow_incomplete=partial):
            if isinstance(event, Checked):
                blocks = event.done
                task.update(done=event.done, total=event.total)
            else:
                problems.append(event)
    payload = {"store": store, "ok": not problems, "blocks": blocks, "problems": problems}
    out.result(payload, lambda console: _show_problems(console, store, blocks, problems))
    if problems:
        raise typer.Exit(1)


@app.command()
def stats(
    store: StoreArgument, level: LevelOption = None, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Size against other forms and the entropy bound, realised sparsity, structure of the masks."""
    from teal_cli.store.reader import open_store
    from teal_cli.store.stats import statistics
    from teal_kernels.spec import SITES

    out = output(json, quiet)
    opened = open_store(store)
    levels = [opened.level(level).name] if level else list(opened.levels)
    found: list[SiteStats] = []
    with progress(out) as bars:
        task = bars.task("Reading", total=len(levels) * len(SITES), unit="sites")
        for site in statistics(opened, levels):
            found.append(site)
            task.update(done=len(found))
    sites = [_derived(site) for site in found]
    out.result({"store": store, "sites": sites}, lambda console: _show_stats(console, found))


@app.command()
def convert(
    store: StoreArgument,
    target: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A folder that does not exist yet.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="npz (dense), csr (scipy's npz), mtx (Matrix Market), pt.")
    ] = "npz",
    level: LevelOption = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="N,A:B", help="Layers, such as 0,5 or 0:4; all if not given.")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="NAMES", help="Sites or projections, with commas; all projections if not given."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="A:B", help="Range of tokens of each level; all if not given.")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option("--sequence", min=0, metavar="N", help="Instead of a range, the rows of one prompt.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write levels, layers, sites or projections as npz, CSR, Matrix Market or one .pt per token."""
    from teal_cli.store.export import convert as write
    from teal_cli.store.export import select
    from teal_cli.store.reader import open_store

    if tokens is not None and sequence is not None:
        raise UsageError("--tokens and --sequence exclude each other", hint="give one of them")
    out = output(json, quiet)
    opened = open_store(store)
    selection = select(
        opened,
        levels=[level] if level else [],
        layers=_layers(layers, opened.header.layers),
        names=[name.strip() for name in names.split(",")] if names else [],
        tokens=_range(tokens) if tokens else (0, None),
        sequence=sequence,
    )
    arrays = 0
    with progress(out) as bars:
        task = bars.task("Converting", unit="arrays")
        for event in write(opened, target, form, selection):
            arrays = event.done
            task.update(done=event.done, total=event.total)
    payload = {"store": store, "output": target, "format": form, "arrays": arrays, "selection": selection}
    out.result(payload, lambda console: console.print(f"{arrays} arrays in {target}", markup=False))


def _range(text: str) -> tuple[int, int | None]:
    try:
        start, stop = text.split(":")
        return int(start or 0), int(stop) if stop else None
    except ValueError:
        raise UsageError(f"{text!r} is no range", hint="write START:STOP, such as 0:100") from None


def _layers(text: str | None, count: int) -> list[int]:
    layers: list[int] = []
    for part in text.split(",") if text else []:
        if ":" in part:
            start, stop = _range(part)
            layers += range(start, count if stop is None else stop)
        elif part.strip().isdigit():
            layers.append(int(part))
        else:
            raise UsageError(f"{text!r} names no layers", hint="write them as 0,5 or 0:4")
    return layers


def _derived(site: SiteStats) -> dict[str, Any]:
    """A site's statistics with the ratios that the table shows."""
    from dataclasses import asdict

    from teal_cli.store.stats import QUANTILES

    return {
        **asdict(site),
        "channel_keep": dict(zip(map(str, QUANTILES), site.channel_keep, strict=True)),
        "bytes_per_element": site.bytes_per_element,
        "to_bound": site.to_bound,
    }


def _show_info(console: Console, found: StoreInfo, prompt: str | None) -> None:
    from rich.table import Table

    about = found.attributes
    console.print(found.path, style="bold", markup=False)
    prompts = "" if found.prompts is None else f", {found.prompts} prompts"
    schema = (
        f"{about['schema']}, {about['layers']} layers, values {about['value_dtype']}, "
        f"blocks of {about['block_tokens']} tokens, teal {about['teal_version']}"
    )
    for label, text in (
        ("model", f"{about['model']} ({about['model_revision'] or 'no revision'})"),
        ("calibration", about["calibration"]),
        ("computed", f"{about['dtype']} on the {about['backend']} backend, seed {about['seed']}{prompts}"),
        ("schema", schema),
        ("size", f"{found.bytes / 1e6:,.1f} MB in {found.files:,} files"),
        ("complete", "yes" if about["complete"] else "no; `teal dump --resume` goes on"),
    ):
        console.print(f"  {label:<12} {text}", markup=False)
    table = Table("level", "allocation", "tokens", "sequences", "complete", box=None)
    for level in found.levels:
        state = "yes" if level.complete else f"no, of at most {level.max_tokens:,}"
        table.add_row(level.name, level.allocation, f"{level.tokens:,}", f"{level.sequences:,}", state)
    console.print(table)
    if prompt is not None:
        for match in found.matches:
            rows = ", ".join(f"{level} {start}:{stop}" for level, (start, stop) in match.rows.items()) or "no rows yet"
            console.print(f"  sequence {match.sequence}: tokens {rows}", markup=False)
        if not found.matches:
            console.print("  no prompt contains that text", markup=False)


def _show_problems(console: Console, store: Path, blocks: int, problems: list[Problem]) -> None:
    if not problems:
        console.print(f"{store}: whole. {blocks:,} blocks of sites read, nothing wrong.", markup=False)
        return
    console.print(f"{store}: {len(problems):,} problem{'s' * (len(problems) > 1)}", markup=False)
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"  {problem}", markup=False)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"  and {len(problems) - SHOWN_PROBLEMS:,} more (--json lists them all)", markup=False)


def _show_stats(console: Console, found: list[SiteStats]) -> None:
    from rich.table import Table

    table = Table("level", "site", "dropped", "B/elem", box=None, padding=(0, 1, 0, 0))
    for name in ("/dense", "/CSR", "/bound", "channels", "overlap", "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for site in found:
        shares = list(dict.fromkeys(f"{share:.1%}" for share in site.realised.values()))
        table.add_row(
            site.level,
            site.site,
            " ".join(shares),
            f"{site.bytes_per_element:.3f}",
            f"{site.stored_bytes / site.dense_bytes:.1%}",
            f"{site.stored_bytes / site.csr_bytes:.1%}",
            f"{site.to_bound:.3f}",
            f"{site.channel_keep[0]:.0%}-{site.channel_keep[-1]:.0%}",
            "" if site.overlap is None else f"{site.overlap:.1%}",
            f"{site.overlap_by_chance:.1%}",
        )
    console.print(table)
    console.print(
        "\ndropped: realised, one figure per projection where they differ. bound: order-0 entropy of mask and values."
        "\nchannels: how often a channel is kept, 5th to 95th percentile. overlap: kept entries that the token before"
        "\nkept too; chance: the same for independent tokens.",
        style="dim",
    )
