"""`teal calibrate`: histograms of a text on a model, an import of TEAL's, and a check on other text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from teal_cli.errors import UsageError
from teal_cli.ui import completion, options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import amount, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from teal_cli.runs.calibrate import Calibrated, Checked

_SHOWN = (0.25, 0.50, 0.75, 0.90)
_FURTHEST = 3


def calibrate(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    dataset: Annotated[str, options.dataset("calibrate.dataset")],
    split: options.SplitOption = None,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", metavar="NAME", help="Column of the dataset that holds the text."),
    ] = None,
    num_sequences: Annotated[int, options.num_sequences("calibrate.num_sequences")],
    seq_len: options.SeqLenOption,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="ID", help="Name of the calibration; made of the text if not given."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Import TEAL's `histograms` folder instead of running a text."),
    ] = None,
    rule: Annotated[
        Literal["teal", "abs"],
        typer.Option("--rule", help="With --from: TEAL's own thresholds, or quantiles of |x| over its bins."),
    ] = "teal",
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="DATASET",
            help="Then show what the thresholds drop of this other text.",
            autocompletion=completion.datasets,
        ),
    ] = None,
    check_split: Annotated[
        str | None,
        typer.Option("--check-split", metavar="SPLIT", help="With --check: the split; else the held-out one."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="ID|DIR",
            help="With --check: check this one, and calibrate nothing.",
            show_default="the one that is made",
            autocompletion=completion.calibrations,
        ),
    ] = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure how large the activations of a model are, over a text.

    The text runs through the model with one layer in memory at a time, and every magnitude is counted, at
    each of the four inputs of each layer. From then on any sparsity has its thresholds: no calibration is
    made for one.

    --check shows what the thresholds really drop of a text that was not calibrated on; with --calibration
    nothing is calibrated, and that one is checked.
    """
    out = output(json, quiet)
    _refuse_mixtures(
        context,
        ("source", "calibration", "check", "check_split"),
        to_calibrate=("dataset", "split", "dtype"),
        to_run=("text_column", "seq_len", "num_sequences"),
    )

    from teal_cli.registry.registry import Registry
    from teal_cli.runs import calibrate as library
    from teal_cli.runs.session import choose_device

    registry, where = Registry(), choose_device(device)
    amounts = {"num_sequences": num_sequences, "seq_len": seq_len}
    made: Calibrated | None = None
    if source is not None:
        made = library.import_teal(registry, model, source, rule=rule, name=name, force=force)
    elif calibration is None:
        text = library.Text(dataset, split, text_column, **amounts)
        events = library.calibrate(registry, model, text, dtype=dtype, device=where, name=name, force=force)
        made = watch(out, f"Calibrating on {text.dataset}", events)
    checked: Checked | None = None
    if check is not None:
        wanted = str(made.folder) if made else calibration
        text = library.Text(check, check_split, text_column, **amounts)
        checked = watch(
            out,
            f"Checking on {check}",
            library.check(registry, model, wanted, text, device=where),
        )
    payload = {**(_about(made) if made else {}), **({"check": _check_payload(checked)} if checked else {})}
    out.result(payload, lambda console: _show(console, made, checked))
    for note in checked.notes if checked else ():
        out.note(note)


def _refuse_mixtures(
    context: typer.Context, kind: tuple[str, ...], *, to_calibrate: tuple[str, ...], to_run: tuple[str, ...]
) -> None:
    """Refuse options that would have no effect: an import and a check of what is there run no text of their own."""
    flags = {name: "--from" if name == "source" else "--" + name.replace("_", "-") for name in context.params}
    given = {flags[name] for name in (*kind, *to_calibrate, *to_run) if options.on_command_line(context, name)}
    if "--check" not in given:
        for option in ("--calibration", "--check-split"):
            if option in given:
                raise UsageError(f"{option} is about a check, but there is no --check", hint="add --check DATASET")
    without_effect = [flags[name] for name in to_calibrate + (() if "--check" in given else to_run)]
    for maker in ("--from", "--calibration"):
        for option in ("--calibration", *without_effect):
            if maker in given and option in given and maker != option:
                raise UsageError(f"{option} does not go with {maker}", hint="leave one of them away")


def watch(out: Output, text: str, events: Iterator[Any]) -> Any:
    """Show the layers as they are done; returns the last event."""
    event = None
    with progress(out) as bars:
        task = bars.task(text, unit="layers")
        for event in events:
            if hasattr(event, "layers"):
                task.update(done=event.done, total=event.layers)
    return event


def _about(made: Calibrated) -> dict[str, Any]:
    from teal_cli.runs.calibrate import mean_thresholds

    means = {f"{level:.2f}": mean_thresholds(made.calibration, level) for level in _SHOWN}
    return {
        **made.calibration.manifest(),
        "folder": made.folder,
        "reused": made.reused,
        "mean_thresholds": means,
    }


def _check_payload(checked: Checked) -> dict[str, Any]:
    blocks = checked.blocks
    levels = [
        {"target": level.target, "mean": level.mean, "p95_deviation": level.p95, "pairs": level.pairs}
        for level in checked.levels
    ]
    about = {"dataset": blocks.dataset, "split": blocks.split, "fingerprint": blocks.fingerprint}
    return {"calibration": checked.calibration.id, **about, "tokens": blocks.tokens.size, "levels": levels}


def _show(console: Console, made: Calibrated | None, checked: Checked | None) -> None:
    if made is not None:
        _show_calibration(console, made)
    if checked is not None:
        _show_check(console, checked)


def _show_calibration(console: Console, made: Calibrated) -> None:
    from rich.table import Table

    from teal_cli.runs.calibrate import mean_thresholds
    from teal_kernels.spec import SITES

    table = Table(title="Thresholds, mean over the layers", title_justify="left")
    table.add_column("sparsity", justify="right")
    for site in SITES:
        table.add_column(site, justify="right")
    for level in _SHOWN:
        means = mean_thresholds(made.calibration, level)
        table.add_row(f"{level:.0%}", *(f"{means[site]:.4g}" for site in SITES))
    console.print(table)
    origin = made.calibration.provenance
    if origin.seconds is not None:
        memory = f", peak memory {amount(origin.peak_memory_bytes, None, 'B')}" if origin.peak_memory_bytes else ""
        memory += f", on the GPU {amount(origin.peak_device_bytes, None, 'B')}" if origin.peak_device_bytes else ""
        console.print(f"{origin.tokens:,} tokens of {origin.dataset} in {origin.seconds:.1f} s{memory}")
    state = "was there already" if made.reused else "is ready"
    console.print(
        f"calibration [bold]{made.calibration.id}[/bold] of {origin.model} {state}; next: "
        f"[cyan]teal generate -m {origin.model} -s 0.5[/cyan]",
        soft_wrap=True,
    )


def _show_check(console: Console, checked: Checked) -> None:
    from rich.table import Table

    blocks = checked.blocks
    split = f" ({blocks.split})" if blocks.split else ""
    text = f"{blocks.dataset}{split}, {blocks.tokens.size:,} tokens"
    table = Table(title=f"Realised sparsity of {checked.calibration.id} on {text}", title_justify="left")
    for column in ("target", "mean", "95% of pairs within", "furthest pairs of layer and site"):
        table.add_column(column, justify="left" if column.startswith("furthest") else "right")
    for level in checked.levels:
        # Joined by spaces that do not break, so that a narrow table breaks between the pairs.
        far = ", ".join(f"{pair.layer}\u00a0{pair.site}\u00a0{pair.sparsity:.1%}" for pair in level.furthest(_FURTHEST))
        table.add_row(f"{level.target:.0%}", f"{level.mean:.1%}", f"{level.p95 * 100:.1f} points", far)
    console.print(table)
