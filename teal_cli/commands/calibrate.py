"""`teal calibrate`: histograms of a text on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli.errors import counted
from teal_cli.ui import options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import amount, progress
from teal_cli.ui.table import percent, show_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from teal_cli.runs.calibrate import Calibrated
    from teal_cli.sparsity.calibration import Calibration

SHOWN = (0.25, 0.50, 0.75, 0.90)


def calibrate(
    *,
    model: options.ModelOption = None,
    dataset: Annotated[str, options.dataset("calibrate.dataset")],
    split: options.SplitOption = None,
    text_column: options.TextColumnOption = None,
    num_sequences: Annotated[int, options.num_sequences("calibrate.num_sequences")],
    seq_len: options.SeqLenOption,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="ID", help="Name of the calibration.", show_default="made of the text"),
    ] = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure how large the activations of a model are, over a text.

    The text runs through the model with one layer in memory at a time, and every magnitude is counted, at
    each of the four inputs of each layer. From then on any sparsity has its thresholds: no calibration is
    made for one.

    `teal calibrations import` reads TEAL's histograms, and `teal calibrations check` shows what the thresholds drop of
    other text. The first calibration of a model becomes its default; `teal calibrations default` changes it.

    Examples:
        teal calibrate -d python-docs
        teal calibrate -d notes.txt -n 2 --seq-len 512 --name notes
    """
    from teal_cli.registry.calibrations import remarks
    from teal_cli.registry.registry import Registry
    from teal_cli.runs import calibrate as library
    from teal_cli.runs.session import choose_device
    from teal_cli.sparsity.calibration import FEW_TOKENS

    out, registry = output(json, quiet), Registry()
    text = library.Text(dataset, split, text_column, num_sequences, seq_len)
    events = library.calibrate(registry, model, text, dtype=dtype, device=choose_device(device), name=name, force=force)
    made: Calibrated = watch(out, f"Calibrating on {text.dataset}", events)
    out.result(about(made), lambda console: show_made(console, made))
    if (found := made.calibration.provenance.sequences) is not None and found < num_sequences:
        out.note(f"{text.dataset} has text for {found} of {counted(num_sequences, 'sequence')}")
    if scarce := made.calibration.scarce_experts():
        layer, expert, tokens = scarce[0]
        out.note(
            f"{counted(len(scarce), 'expert')} saw fewer than {FEW_TOKENS} tokens and take the thresholds of their "
            f"layer, such as {expert} of layer {layer}, which saw {tokens}; more text with --num-sequences"
        )
    for note in remarks(registry.find(model), None):
        out.note(note)


def watch(out: Output, text: str, events: Iterator[Any]) -> Any:
    """Show the layers as they are done; returns the last event."""
    event = None
    with progress(out) as bars:
        task = bars.task(text, unit="layers")
        for event in events:
            if hasattr(event, "layers"):
                task.update(done=event.done / event.total * event.layers, total=event.layers)
    return event


def about(made: Calibrated) -> dict[str, Any]:
    """A calibration that was just made, as `--json` shows it."""
    from teal_cli.runs.calibrate import mean_thresholds

    means = {f"{level:.2f}": mean_thresholds(made.calibration, level) for level in SHOWN}
    scarce = [{"layer": i, "expert": e, "tokens": n} for i, e, n in made.calibration.scarce_experts()]
    return {
        **made.calibration.manifest(),
        "folder": made.folder,
        "reused": made.reused,
        "mean_thresholds": means,
        **({"scarce_experts": scarce} if scarce else {}),
    }


def show_made(console: Console, made: Calibrated) -> None:
    """Mean thresholds, what the run took, and how to go on."""
    show_thresholds(console, made.calibration)
    origin = made.calibration.provenance
    if origin.seconds is not None and origin.tokens is not None:
        memory = f", peak memory {amount(origin.peak_memory_bytes, None, 'B')}" if origin.peak_memory_bytes else ""
        memory += f", on the GPU {amount(origin.peak_device_bytes, None, 'B')}" if origin.peak_device_bytes else ""
        console.print(f"{counted(origin.tokens, 'token')} of {origin.dataset} in {origin.seconds:.1f} s{memory}")
    state = "was there already" if made.reused else "is ready"
    console.print(
        f"calibration [bold]{made.calibration.id}[/bold] of {origin.model} {state}; next: "
        f"[cyan]teal generate -m {origin.model} -s 0.5[/cyan]",
        soft_wrap=True,
    )


def show_thresholds(console: Console, calibration: Calibration) -> None:
    """A row a sparsity, a column a site: the mean threshold over the layers."""
    from teal_cli.runs.calibrate import mean_thresholds
    from teal_kernels.spec import SITES

    console.print("thresholds, mean over the layers:")
    rows = []
    for level in SHOWN:
        means = mean_thresholds(calibration, level)
        rows.append((percent(level), *(f"{means[site]:.4g}" for site in SITES)))
    show_table(console, (">sparsity", *(f">{site}" for site in SITES)), rows)
