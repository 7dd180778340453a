"""`teal calibrations`: the calibrations of a model: list, inspect, compare, remove, choose, import, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from teal_cli.commands.calibrate import SHOWN, about, show_made, show_thresholds, watch
from teal_cli.errors import TealError
from teal_cli.ui import completion, options
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.output import output
from teal_cli.ui.table import TIED, percent, show_fields, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.calibrate import Checked
    from teal_cli.sparsity.differences import Difference

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)

IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="A calibration of the model.", autocompletion=completion.calibration_ids)
]
DefaultedId = Annotated[
    str | None,
    typer.Argument(
        metavar="ID", help="A calibration; the default one if not given.", autocompletion=completion.calibration_ids
    ),
]
FURTHEST = 3


@app.callback()
def calibrations() -> None:
    """The calibrations of a model: list, inspect, compare, remove, choose the default, import, check."""


@app.command("ls")
def list_calibrations(
    model: options.ModelOption = None, json: options.JsonOption = False, quiet: options.QuietOption = False
) -> None:
    """The calibrations of a model, and which of them is the default.

    Examples:
        teal calibrations ls
        teal calibrations ls -m smollm2-135m --json
    """
    from teal_cli.registry.calibrations import default as default_of
    from teal_cli.registry.calibrations import place
    from teal_cli.registry.registry import Registry
    from teal_cli.sparsity.calibration import read_manifest

    out = output(json, quiet)
    entry = Registry().find(model)
    default = default_of(entry)
    found: list[dict[str, Any]] = []
    for name in entry.calibrations:
        try:
            found.append({**read_manifest(place(entry, name)), "id": name})
        except TealError as error:
            out.warn(f"{error.message}; `teal calibrations rm {name} -m {entry.name}` removes it")
    fields = ("id", "dataset", "split", "tokens", "dtype", "rule", "created")
    listed = [{**{field: made.get(field) for field in fields}, "default": made["id"] == default} for made in found]
    rows = [
        (
            made["id"] + (" (default)" if made["default"] else ""),
            made["dataset"],
            "" if made["tokens"] is None else f"{made['tokens']:,}",
            made["dtype"],
            made["rule"],
            str(made["created"])[:10],
        )
        for made in listed
    ]
    headings = ("id", "dataset", ">tokens", "dtype", "rule", "made")
    payload = {"model": entry.name, "default": default, "calibrations": listed}
    out.result(payload, lambda console: show_table(console, headings, rows))
    if not entry.calibrations:
        out.note(f"{entry.name} has no calibration yet: `teal calibrate -m {entry.name}` makes one")


@app.command()
def info(
    calibration: DefaultedId = None,
    *,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Where a calibration comes from, and its thresholds.

    Examples:
        teal calibrations info
        teal calibrations info notes
    """
    from teal_cli.registry.calibrations import default as default_of
    from teal_cli.registry.calibrations import place, remarks
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.calibrate import mean_thresholds
    from teal_cli.sparsity.calibration import Calibration

    out, registry = output(json, quiet), Registry()
    entry = registry.find(model)
    folder = registry.find_calibration(entry.name, calibration)
    found = Calibration.load(folder)
    means = {f"{level:.2f}": mean_thresholds(found, level) for level in SHOWN}
    default = default_of(entry)
    is_default = default is not None and folder == place(entry, default)
    payload = {**found.manifest(), "folder": folder, "default": is_default, "mean_thresholds": means}
    for remark in remarks(entry, calibration):
        out.note(remark)

    def show(console: Console) -> None:
        names = ("id", "model", "dataset", "split", "tokens", "dtype", "device", "rule", "criterion", "created")
        shown = {name: payload[name] for name in (*names, "folder") if payload[name] is not None}
        shown["id"] += " (default)" if payload["default"] else ""
        if "tokens" in shown:
            shown["tokens"] = f"{shown['tokens']:,}"
        show_fields(console, shown)
        console.print()
        show_thresholds(console, found)

    out.result(payload, show)


@app.command()
def compare(
    first: IdArgument,
    second: IdArgument,
    *,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """How far the thresholds of two calibrations are apart, site by site.

    Examples:
        teal calibrations compare notes python
        teal calibrations compare notes python -m smollm2-135m --json
    """
    from teal_cli.registry.calibrations import remarks
    from teal_cli.registry.registry import Registry
    from teal_cli.sparsity.calibration import Calibration
    from teal_cli.sparsity.differences import differences

    out, registry = output(json, quiet), Registry()
    entry = registry.find(model)
    a, b = (Calibration.load(registry.find_calibration(entry.name, name)) for name in (first, second))
    for remark in remarks(entry, first) + remarks(entry, second):
        out.note(remark)
    found = list(differences(a, b, SHOWN))
    payload = {"model": entry.name, "first": a.id, "second": b.id, "thresholds": found}
    out.result(payload, lambda console: _show_differences(console, a.id, b.id, found))


@app.command("rm")
def remove(
    calibration: IdArgument,
    *,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Remove a calibration of a model.

    Examples:
        teal calibrations rm notes
        teal calibrations rm notes -m smollm2-135m
    """
    from teal_cli.registry.calibrations import default as default_of
    from teal_cli.registry.registry import Registry

    out, registry = output(json, quiet), Registry()
    entry = registry.find(model)
    was = default_of(entry)
    removed = registry.remove_calibration(entry.name, calibration)
    default = default_of(entry)
    payload = {"model": entry.name, "removed": removed, "default": default}
    out.result(payload, lambda console: console.print(f"removed {removed}", markup=False))
    if default is not None and default != was:
        out.note(f"the default of {entry.name} is now {default}")


@app.command("default")
def default(
    calibration: DefaultedId = None,
    *,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Show which calibration is used where none is named, or choose it.

    Examples:
        teal calibrations default
        teal calibrations default notes
    """
    from teal_cli.registry.registry import Registry

    out, registry = output(json, quiet), Registry()
    entry = registry.find(model)
    if calibration is not None:
        registry.set_default_calibration(entry.name, calibration)
    chosen = registry.find_calibration(entry.name).name
    out.result({"model": entry.name, "default": chosen}, lambda console: console.print(chosen, markup=False))


@app.command("import")
def import_teal(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="TEAL's `histograms` folder of a model.")],
    *,
    model: options.ModelOption = None,
    rule: Annotated[
        Literal["teal", "abs"], typer.Option("--rule", help="TEAL's own thresholds, or quantiles of |x| over its bins.")
    ] = "teal",
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="ID", help="Name of the calibration.", show_default="made of what it is"),
    ] = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Make a calibration of the histograms that TEAL's own code wrote.

    Examples:
        teal calibrations import TEAL/histograms
        teal calibrations import TEAL/histograms --rule abs --name teal-abs
    """
    from teal_cli.registry.calibrations import remarks
    from teal_cli.registry.registry import Registry
    from teal_cli.runs import calibrate as library

    out, registry = output(json, quiet), Registry()
    made = library.import_teal(registry, model, folder, rule=rule, name=name, force=force)
    out.result(about(made), lambda console: show_made(console, made))
    for remark in remarks(registry.find(model), None):
        out.note(remark)


@app.command()
def check(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help=options.DATASETS, autocompletion=completion.datasets)
    ],
    *,
    model: options.ModelOption = None,
    calibration: options.CalibrationOption = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="SPLIT", help="Split of the dataset.", show_default="the held-out one"),
    ] = None,
    text_column: options.TextColumnOption = None,
    num_sequences: Annotated[int, options.num_sequences("calibrate.num_sequences")],
    seq_len: options.SeqLenOption,
    device: options.DeviceOption,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """What the thresholds of a calibration really drop of a text that it was not made from.

    Examples:
        teal calibrations check python-docs -n 4
        teal calibrations check notes.txt -n 2 --seq-len 512
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs import calibrate as library
    from teal_cli.runs.session import choose_device

    out, registry = output(json, quiet), Registry()
    text = library.Text(dataset, split, text_column, num_sequences, seq_len)
    events = library.check(registry, model, calibration, text, device=choose_device(device))
    checked: Checked = watch(out, f"Checking on {dataset}", events)
    out.result(_check_payload(checked), lambda console: _show_check(console, checked))
    for remark in checked.notes:
        out.note(remark)


def _check_payload(checked: Checked) -> dict[str, Any]:
    blocks = checked.blocks
    levels = [
        {"target": level.target, "mean": level.mean, "p95_deviation": level.p95, "pairs": level.pairs}
        for level in checked.levels
    ]
    origin = checked.calibration.provenance
    made_with = {"model": origin.model, "calibration": checked.calibration.id}
    text = {"dataset": blocks.dataset, "split": blocks.split, "fingerprint": blocks.fingerprint}
    return {**made_with, **text, "tokens": blocks.tokens.size, "levels": levels}


def _show_check(console: Console, checked: Checked) -> None:
    blocks = checked.blocks
    split = f" ({blocks.split})" if blocks.split else ""
    text = f"{blocks.dataset}{split}, {blocks.tokens.size:,} tokens"
    show_text(console, f"realised sparsity of {checked.calibration.id} on {text}:")
    rows = []
    for level in checked.levels:
        far = ", ".join(TIED.join((str(p.layer), p.site, f"{p.sparsity:.1%}")) for p in level.furthest(FURTHEST))
        rows.append((percent(level.target), f"{level.mean:.1%}", f"{level.p95 * 100:.1f} points", far))
    show_table(console, (">target", ">mean", ">95% of pairs within", "furthest pairs of layer and site"), rows)


def _show_differences(console: Console, first: str, second: str, found: list[Difference]) -> None:
    console.print(f"first   {first}\nsecond  {second}\n", markup=False, soft_wrap=True)
    rows = [
        (
            row.site,
            percent(row.sparsity),
            f"{row.first:.4g}",
            f"{row.second:.4g}",
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.furthest is None else f"{row.furthest:.1%}",
            row.layer,
        )
        for row in found
    ]
    headings = ("site", ">sparsity", ">first", ">second", ">second/first", ">furthest", ">layer")
    show_table(console, headings, rows, keys=2)
