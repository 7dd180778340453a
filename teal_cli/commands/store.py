"""`teal store`: look into a store, check it, measure it, turn it into other forms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal_cli.commands.copying import copied
from teal_cli.commands.gathering import gathered
from teal_cli.commands.opening import load
from teal_cli.commands.store_tables import show_info, show_stats, show_verified
from teal_cli.errors import UsageError, counted
from teal_cli.ui.interrupts import when_stopped
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.options import ForceOption, JsonOption, LevelOption, QuietOption, StoreArgument
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import progress
from teal_cli.ui.table import show_table

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.replay import Replayed
    from teal_cli.runs.session import Session
    from teal_cli.store.verify import Problem

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)

# One for each row of `formats.FORMATS`, which is heavy to import; a test compares them.
FORMATS_HELP = (
    "npz (dense NumPy), csr (SciPy), mtx (Matrix Market), pt (a vector per token), zarr (dense), safetensors (dense), "
    "parquet, anndata (CSR in Zarr), smtx (DLMC), tns (FROSTT), scalesim, timeloop (densities)."
)
LayersOption = Annotated[
    str | None, typer.Option("--layers", metavar="N,A:B", help="Layers, such as 0,5 or 0:4.", show_default="all")
]


@app.callback()
def store() -> None:
    """Look into a store, check it, measure it, convert it."""


@app.command()
def info(
    store: StoreArgument,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="Find the tokens of prompts that contain this text.", show_default="none"
        ),
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(
            "--sequence",
            min=0,
            metavar="N",
            help="List the tokens of this prompt's rows, with their text.",
            show_default="none",
        ),
    ] = None,
    level: LevelOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Where a store comes from, its levels and its size.

    With --sequence, each token that a step was fed, as the model's tokenizer writes it; --level says whose, of the
    lowest sparsity if not given.

    Examples:
        teal store info activations.zarr
        teal store info activations.zarr --sequence 0 --level 0.5
    """
    from teal_cli.store.reader import describe, open_store, token_texts

    if level is not None and sequence is None:
        raise UsageError("--level says whose tokens are listed", hint="say of which prompt with --sequence N")
    out = output(json, quiet)
    opened = open_store(store)
    found = describe(opened, prompt)
    tokens = None if sequence is None else token_texts(opened, sequence, level or opened.levels[0])
    payload = {"store": found, **({} if tokens is None else {"tokens": tokens})}

    def render(console: Console) -> None:
        show_info(console, found, prompt)
        if tokens is not None:
            console.print()
            rows = [(token.row, token.position, token.token_id, repr(token.text)) for token in tokens]
            show_table(console, (">row", ">position", ">token", "text"), rows)

    out.result(payload, render)


@app.command()
def verify(
    store: StoreArgument,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a store whose run was cut off or still goes on.")
    ] = False,
    rows: Annotated[
        int | None,
        typer.Option(
            "--replay", min=1, metavar="N", help="Compute N random rows again from the model, too.", show_default="none"
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read every byte and hold it against what is known; exit 1 if anything is wrong.

    Examples:
        teal store verify activations.zarr
        teal store verify activations.zarr --partial --json
    """
    from teal_cli.store.digest import Digested
    from teal_cli.store.verify import Checked
    from teal_cli.store.verify import verify as check

    out = output(json, quiet)
    session = _session(out, store) if rows else None
    problems: list[Problem] = []
    blocks = 0
    with progress(out) as bars:
        tasks = bars.task("Verifying", unit="blocks"), bars.task("Comparing the digest", unit="arrays")
        for event in check(store, allow_incomplete=partial):
            if isinstance(event, Checked | Digested):
                tasks[isinstance(event, Digested)].update(done=event.done, total=event.total)
                blocks = event.done if isinstance(event, Checked) else blocks
            else:
                problems.append(event)
    again = _replay(out, session, store, rows) if session and rows and not problems else []
    problems += [row.problem() for row in again if not row.close]
    payload = {"store": store, "ok": not problems, "blocks": blocks, "problems": problems}
    out.result(payload | ({"replay": again} if rows else {}), lambda console: show_verified(console, payload, again))
    if problems:
        raise typer.Exit(1)


def _session(out: Output, path: Path) -> Session:
    """What computes rows of a store again, its weights not read yet; with remarks on stderr."""
    from teal_cli.runs.replay import open_for_replay
    from teal_cli.runs.session import open_session
    from teal_cli.store.reader import open_store

    store = open_store(path)
    model, calibration, dtype = store.header.model, store.header.calibration, store.header.dtype
    session, notes = open_for_replay(
        store,
        lambda device, backend: open_session(
            model, dtype=dtype, device=device, backend=backend, calibration=calibration, load=False
        ),
    )
    for note in notes:
        out.note(note)
    return session


def _replay(out: Output, session: Session, path: Path, count: int) -> list[Replayed]:
    """Rows of a store computed again."""
    from teal_cli.runs.replay import replay
    from teal_cli.store.reader import open_store

    load(out, session)
    found = []
    with progress(out) as bars:
        task = bars.task("Computing again", total=count, unit="rows")
        task.update(done=0)
        for row in replay(session, open_store(path), count):
            found.append(row)
            task.update(done=len(found))
    return found


@app.command()
def stats(
    store: StoreArgument,
    level: LevelOption = None,
    layers: LayersOption = None,
    projections: Annotated[
        str | None, typer.Option("--projections", metavar="NAMES", help="Such as q,down.", show_default="all")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write the rows as a .parquet table, too.", show_default="no table"
        ),
    ] = None,
    gbps: Annotated[
        float | None,
        typer.Option(
            "--gbps", min=0.001, metavar="GB/S", help="Bandwidth for the time floor.", show_default="no floor"
        ),
    ] = None,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="With --json: in how many rows each channel is kept.")
    ] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Size and entropy bound per site; statistics of the masks per level, layer and projection.

    Examples:
        teal store stats activations.zarr
        teal store stats activations.zarr -l 0.5 --layers 0 -o masks.parquet
    """
    from teal_cli.store.reader import open_store
    from teal_cli.store.selection import parse_layers, parse_names, select
    from teal_cli.store.stats import Measured, measure
    from teal_cli.store.table import check_table, write_table

    out = output(json, quiet)
    opened = open_store(store)
    if table is not None:
        check_table(table, force=force)
    part = select(
        opened,
        levels=[level] if level else [],
        layers=parse_layers(layers, opened.header.layers),
        names=parse_names(projections),
    )
    found: list[Measured] = []
    with progress(out) as bars:
        task = bars.task("Reading", unit="layers")
        found.extend(
            measure(
                opened, part.levels, layers=part.layers, projections=part.names, gbps=gbps,
                progress=lambda done, total: task.update(done=done, total=total),
            )
        )  # fmt: skip
    rows = [row for event in found for row in event.rows]
    if table is not None:
        write_table(table, rows)
    payload = {
        "store": store,
        "sites": [event.site.values() for event in found],
        "rows": [row.values(per_channel=per_channel) for row in rows],
        **({} if table is None else {"output": table}),
    }
    out.result(payload, lambda console: show_stats(console, found))
    if opened.header.mixture is not None:
        out.note("a channel of down is of another expert in each token: what follows channels over rows is of places")


@app.command()
def convert(
    store: StoreArgument,
    target: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A folder that does not exist yet.")],
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help=FORMATS_HELP)] = "npz",
    level: Annotated[
        str | None, typer.Option("--level", "-l", metavar="LEVELS", help="Such as 0.5 or 0.5,0.9.", show_default="all")
    ] = None,
    layers: LayersOption = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="NAMES", help="Sites or projections, with commas.", show_default="all projections"
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="A:B", help="Range of tokens of each level.", show_default="all")
    ] = None,
    sequences: Annotated[
        str | None,
        typer.Option(
            "--sequences",
            metavar="N,A:B",
            help="Instead of a range, the rows of these prompts: 0,5 or 0:4.",
            show_default="all",
        ),
    ] = None,
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Write the weight rows of kept channels, too (safetensors).")
    ] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write levels, layers, sites or projections in another form, for NumPy, SciPy, PyTorch, tables, simulators.

    Examples:
        teal store convert activations.zarr -o arrays -l 0.5 --layers 0
        teal store convert activations.zarr -o csr --format csr --names mlp_in
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.store.export import convert as write
    from teal_cli.store.reader import open_store
    from teal_cli.store.selection import parse_layers, parse_names, parse_range, parse_sequences, select

    if tokens is not None and sequences is not None:
        raise UsageError("--tokens and --sequences exclude each other", hint="give one of them")
    out = output(json, quiet)
    opened = open_store(store)
    selection = select(
        opened,
        levels=parse_names(level),
        layers=parse_layers(layers, opened.header.layers),
        names=parse_names(names),
        tokens=parse_range(tokens) if tokens else (0, None),
        sequences=parse_sequences(sequences, opened.sequences),
    )
    registry = Registry()
    model = registry.get(opened.header.model).path if with_weights else None
    arrays = 0
    with progress(out) as bars:
        task = bars.task("Converting", unit="arrays")
        for event in write(opened, target, form, selection, force=force, model=model, registry=registry):
            arrays = event.done
            task.update(done=event.done, total=event.total)
    payload = {"store": store, "output": target, "format": form, "arrays": arrays, "selection": selection}
    out.result(payload, lambda console: console.print(f"{counted(arrays, 'array')} in {target}", markup=False))


@app.command()
def copy(
    store: StoreArgument,
    target: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR|URL", help="A folder, a URL, or a dataset: hf://datasets/ORG/NAME."
        ),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new dataset of the hub private.")] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Bring a store here, send it to a URL, or push it to the hub with a card; verified by its checksums.

    Run it again to go on where it stopped. Pushing takes the token of `hf auth login` or HF_TOKEN.

    Examples:
        teal store copy activations.zarr -o copied.zarr
        teal store copy collection.zarr -o copied.zarr --force
    """
    copied(output(json, quiet), store, target, private=private, force=force)


@app.command()
def merge(
    store: StoreArgument,
    target: Annotated[Path, typer.Option("--output", "-o", metavar="STORE", help="The store to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a merge that was cut off.")] = False,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make one store of a collection that several ranks wrote, with the rows in the order of one rank.

    Examples:
        teal store merge collection.zarr -o one.zarr
        teal store merge collection.zarr -o one.zarr --force --json
    """
    from teal_cli.store.merge import merge as write
    from teal_cli.store.reader import open_store

    if resume and force:
        raise UsageError("--resume and --force exclude each other", hint="--resume goes on, --force begins anew")
    out = output(json, quiet)
    rows, kept = 0, f"what is merged is in {target}, and the same command with --resume goes on"
    with progress(out) as bars, when_stopped(out.warn, kept):
        task = bars.task("Merging", unit="rows")
        for event in write(open_store(store), target, force=force, resume=resume):
            rows = event.total
            task.update(done=event.done, total=event.total)
    payload = {"store": store, "output": target, "rows": rows, "digest": open_store(target).state.digest}
    out.result(payload, lambda console: console.print(f"{counted(rows, 'row')} in {target}", markup=False))


@app.command()
def report(
    store: StoreArgument,
    page: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")],
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """One HTML page of a store: where it comes from, pictures of its masks, tables; it needs no network.

    Examples:
        teal store report activations.zarr -o report.html
        teal store report activations.zarr -o report.html --force
    """
    from teal_cli.plots.page import check_page, write_page
    from teal_cli.plots.report import report_page
    from teal_cli.plots.style import check_picture
    from teal_cli.store.reader import open_store

    out = output(json, quiet)
    opened = open_store(store)
    check_page(page, force=force)
    check_picture(page.with_suffix(".svg"))
    write_page(page, report_page(gathered(out, opened)))
    out.result({"store": store, "page": page}, lambda console: console.print(f"written: {page}", markup=False))
