"""`teal models`: list, inspect, verify, remove, and choose the default one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli import settings
from teal_cli.errors import UsageError, counted
from teal_cli.files import readable_size
from teal_cli.registry.entry import ModelEntry
from teal_cli.ui import completion, options
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import progress
from teal_cli.ui.table import percent, show_fields, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.registry.catalog import CatalogModel
    from teal_cli.registry.events import Problem

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)

DefaultedModel = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        help="A downloaded model; the default one if not given.",
        autocompletion=completion.models,
    ),
]


@app.callback()
def models() -> None:
    """The models this machine has: list, inspect, verify, remove."""


@app.command("ls")
def list_models(
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also the catalog's models that are not here.")
    ] = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """List the models that are here.

    Examples:
        teal models ls
        teal models ls --all --json
    """
    from teal_cli.registry.catalog import catalog
    from teal_cli.registry.registry import Registry

    out, registry = output(json, quiet), Registry()
    entries, default = registry.list(), registry.default
    here = {entry.name for entry in entries} | {entry.source.removeprefix("hub:") for entry in entries}
    others = [m for m in catalog().values() if not {m.name, m.hub} & here] if everything else []
    payload: dict[str, Any] = {"default": default, "models": [entry_payload(entry) for entry in entries]}
    if everything:
        payload["catalog"] = others
    damaged = registry.damaged()
    if damaged:
        payload["damaged"] = [error.message for error in damaged]
    out.result(payload, lambda console: _show_list(console, entries, default, others))
    for error in damaged:
        out.warn(f"{error.message}; {error.hint}")
    if not entries and not everything:
        out.note("no models yet: `teal download` fetches the default one, `teal models ls --all` shows others")


@app.command("info")
def info(
    name: DefaultedModel = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            "-c",
            metavar="ID|DIR",
            help="With --sparsity: whose thresholds to show.",
            show_default="the model's default",
            autocompletion=completion.calibrations,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            "-s",
            metavar="S",
            help="Also show the thresholds of a uniform plan for it, in [0, 1).",
            show_default="none",
            callback=options.checked(settings.sparsity),
            autocompletion=completion.sparsities,
        ),
    ] = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Everything known about one model; with --sparsity, also the thresholds of a uniform plan.

    Examples:
        teal models info
        teal models info smollm2-135m -s 0.5
    """
    from teal_cli.registry.registry import Registry

    out, registry = output(json, quiet), Registry()
    if calibration is not None and sparsity is None:
        raise UsageError(
            "--calibration shows thresholds, which need a sparsity", hint="add --sparsity, for example 0.5"
        )
    entry = registry.find(name)
    payload = {**entry_payload(entry), "default": entry.name == registry.default, "files": entry.files}
    if sparsity is not None:
        payload["sparsity"] = sparsity
        payload["thresholds"] = _thresholds(registry.find_calibration(entry.name, calibration), sparsity)
    out.result(payload, lambda console: _show_info(console, entry, payload))


@app.command("rm")
def remove(
    name: options.ModelArgument,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also delete the model's files from the Hugging Face cache.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Forget a model, with its calibrations and converted weights.

    Hub weights stay in the Hugging Face cache unless --weights is given; a checkpoint folder is never touched.

    Examples:
        teal models rm mine --yes
        teal models rm mine --yes --json
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.registry.sources.hub import remove_from_cache

    out, registry = output(json, quiet), Registry()
    entry = registry.find(name)
    if weights and entry.kind != "hub":
        raise UsageError(f"--weights is for models of the hub, and {entry.name} comes from {entry.source}")
    if not yes and not _confirmed(entry):
        out.result({"removed": None}, lambda console: console.print("nothing was removed"))
        return
    registry.remove(entry.name)
    freed = remove_from_cache(entry.source.removeprefix("hub:"), entry.revision) if weights else 0
    payload = {"removed": entry.name, "freed_cache_bytes": freed, "default": registry.default}
    out.result(payload, lambda console: console.print(f"removed {entry.name}", markup=False))
    if entry.kind == "hub" and not weights:
        size = readable_size(entry.size_bytes)
        out.note(f"its weights ({size}) are still in the Hugging Face cache: {entry.path}")


@app.command("default")
def default(name: DefaultedModel = None, json: options.JsonOption = False, quiet: options.QuietOption = False) -> None:
    """Show which model is used where none is named, or choose it.

    Examples:
        teal models default
        teal models default smollm2-135m
    """
    from teal_cli.registry.registry import Registry

    out, registry = output(json, quiet), Registry()
    entry = registry.set_default(name) if name is not None else registry.find(None)
    out.result({"default": entry.name}, lambda console: console.print(entry.name, markup=False))


@app.command("verify")
def verify(name: DefaultedModel = None, json: options.JsonOption = False, quiet: options.QuietOption = False) -> None:
    """Check every file of a model against the size and sha256 that were registered.

    Examples:
        teal models verify
        teal models verify smollm2-135m --json
    """
    from teal_cli.registry.registry import Registry

    out = output(json, quiet)
    entry = Registry().find(name)
    problems = _verified(out, entry)
    payload = {"name": entry.name, "ok": not problems, "files": len(entry.files), "problems": problems}
    out.result(payload, lambda console: _show_problems(console, entry, problems))
    if problems:
        out.note(f"hint: `teal download {entry.name} --force` fetches what is damaged again")
        raise typer.Exit(1)


def entry_payload(entry: ModelEntry) -> dict[str, Any]:
    """An entry as `--json` shows it; `path` is a folder that transformers' from_pretrained loads."""
    return {
        "name": entry.name,
        "source": entry.source,
        "revision": entry.revision,
        "path": entry.path,
        "architecture": entry.architecture,
        "family": entry.family,
        "dtype": entry.dtype,
        "parameters": entry.parameters,
        "size_bytes": entry.size_bytes,
        "context": entry.context,
        "created": entry.created,
        "calibrations": entry.calibrations,
        "parent": entry.parent,
        "bits_per_weight": entry.bits_per_weight,
        "stored": entry.stored,
    }


def _thresholds(folder: Any, sparsity: float) -> dict[str, list[float]]:
    """{"q": [one per layer], ...} of the uniform plan."""
    from teal_cli.sparsity.calibration import Calibration
    from teal_cli.sparsity.plan import uniform_plan
    from teal_kernels.spec import PROJECTIONS

    plan = uniform_plan(Calibration.load(folder), sparsity)
    return {name: plan.thresholds[:, i].tolist() for i, name in enumerate(PROJECTIONS)}


def _verified(out: Output, entry: ModelEntry) -> tuple[Problem, ...]:
    from teal_cli.registry.checkpoint import verify
    from teal_cli.registry.events import Progress

    total = sum(file.size for file in entry.files)
    with progress(out) as bars:
        task = bars.task(f"Verifying {entry.name}", total=total, unit="B")
        for event in verify(entry):
            if not isinstance(event, Progress):
                return event.problems
            task.update(done=event.done, total=event.total)
    raise AssertionError("a check ends with Verified")


def _confirmed(entry: ModelEntry) -> bool:
    lost = [counted(len(entry.calibrations), "calibration")] if entry.calibrations else []
    lost += ["its converted weights"] if entry.path.is_relative_to(entry.home) else []
    what = f"{entry.name} ({' and '.join(lost)} will be deleted)" if lost else entry.name
    if not sys.stdin.isatty():
        raise UsageError(f"removing {what} needs a yes, and nobody can be asked", hint="add --yes")
    return typer.confirm(f"remove {what}?", err=True)


def _show_list(
    console: Console, entries: tuple[ModelEntry, ...], default: str | None, others: list[CatalogModel]
) -> None:
    if entries:
        rows = [
            (
                entry.name,
                entry.family,
                _numbers(entry),
                readable_size(entry.size_bytes),
                f"{entry.context:,}",
                len(entry.calibrations),
                entry.source + (" (default)" if entry.name == default else ""),
            )
            for entry in entries
        ]
        headings = ("name", "family", "dtype", ">size", ">context", ">calibrations", "source")
        show_table(console, headings, rows)
    if others:
        console.print("\nnot here yet (`teal download NAME`):" if entries else "not here yet (`teal download NAME`):")
        catalogued = [
            (m.name, m.family, readable_size(m.size_bytes), f"{m.context:,}", "gated" if m.gated else "", m.hub)
            for m in others
        ]
        show_table(console, ("name", "family", ">size", ">context", "licence", "hub"), catalogued)


def _numbers(entry: ModelEntry) -> str:
    return entry.dtype if entry.bits_per_weight is None else f"{entry.bits_per_weight:.2f} bits"


def _show_info(console: Console, entry: ModelEntry, payload: dict[str, Any]) -> None:
    shown = {
        "name": f"{entry.name} (default)" if payload["default"] else entry.name,
        "source": entry.source,
        "revision": entry.revision,
        "path": entry.path,
        "model": f"{entry.architecture}, {entry.parameters:,} weights, {_numbers(entry)}",
        "size": f"{readable_size(entry.size_bytes)} in {counted(len(entry.files), 'file')}",
        "context": f"{entry.context:,} tokens",
        "created": entry.created,
        "calibrations": ", ".join(entry.calibrations) or f"none yet: `teal calibrate -m {entry.name}`",
    }
    if entry.stored is not None:
        shown["stored"] = f"{entry.stored} with scales, which become {entry.dtype} as they are read"
    if entry.parent is not None:
        shown["parent"] = f"{entry.parent}, whose calibrations and plans serve"
    show_fields(console, shown)
    if "thresholds" in payload:
        console.print(f"\nthresholds at sparsity {percent(payload['sparsity'])}:", markup=False)
        columns = payload["thresholds"]
        rows = [
            (layer, *(f"{value:.4g}" for value in row)) for layer, row in enumerate(zip(*columns.values(), strict=True))
        ]
        show_table(console, (">layer", *(f">{name}" for name in columns)), rows)


def _show_problems(console: Console, entry: ModelEntry, problems: tuple[Problem, ...]) -> None:
    if not problems:
        files, size = counted(len(entry.files), "file"), readable_size(entry.size_bytes)
        console.print(f"{entry.name} is intact: {files}, {size}", markup=False)
    for problem in problems:
        console.print(f"{problem.kind:<8} {problem.path}: {problem.detail}", markup=False, soft_wrap=True)
