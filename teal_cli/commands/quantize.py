"""`teal quantize`: a derived model whose matrices are int8 or int4."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from teal_cli.commands.models import entry_payload
from teal_cli.files import readable_size
from teal_cli.ui import completion, options
from teal_cli.ui.interrupts import when_stopped
from teal_cli.ui.output import output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.registry.entry import ModelEntry


def quantize(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model that is here; the default one if not given.",
            autocompletion=completion.models,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option("--to", metavar="int8|int4", help="Width of the weights.", autocompletion=completion.widths),
    ],
    group: Annotated[
        int, typer.Option("--group", metavar="N", help="Outputs that share a scale: a power of two from 32 up.")
    ] = 64,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            metavar="int8|int4|none",
            help="Width of embedding and output head, which need more bits than the rest; none leaves them.",
            autocompletion=completion.head_widths,
        ),
    ] = "int8",
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What to call it.", show_default="MODEL-int4 and so on")
    ] = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Make an int8 or int4 model of one that is here.

    The matrices of every layer are rounded to the nearest codes, with a scale for each group of outputs; embedding
    and head to int8 codes, unless --head says otherwise. Calibrations and plans of the model serve the new one.
    Interrupted, the same command goes on where it stopped.

    Examples:
        teal quantize --to int4
        teal quantize smollm2-135m --to int8 --name small-int8
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.quantize import Made, quantize_model

    out = output(json, quiet)
    made: Made | None = None
    with (
        closing(quantize_model(Registry(), model, to, group=group, head=head, name=name, force=force)) as events,
        progress(out) as bars,
        when_stopped(out.warn, "the layers that are done are kept, and the same command goes on"),
    ):
        task = bars.task("Quantising", unit="layers")
        for event in events:
            if isinstance(event, Made):
                made = event
                continue
            task.update(done=event.layers, total=event.total)
    assert made is not None, "ends with Made"
    if made.reused:
        out.note(f"{made.entry.name} is here already; --force makes it again")
    entry = made.entry
    out.result({**entry_payload(entry), "reused": made.reused}, lambda console: _show(console, entry))


def _show(console: Console, entry: ModelEntry) -> None:
    size = readable_size(entry.size_bytes)
    console.print(f"{entry.name}: {entry.bits_per_weight:.2f} bits a weight, {size}, of {entry.parent}", markup=False)
