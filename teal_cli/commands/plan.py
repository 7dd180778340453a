"""`teal plan`: plans with a name: make, list, show, remove, import."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from teal_cli import settings
from teal_cli.commands.opening import loading
from teal_cli.ui import completion, options
from teal_cli.ui.interrupts import when_stopped
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import progress
from teal_cli.ui.table import percent, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.make_plan import MadePlan, PlanMaker
    from teal_cli.sparsity.named import NamedPlan

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A plan of the model.", autocompletion=completion.plans)
]
SparsityOption = Annotated[
    float,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="S",
        help="Part of all weight bytes to leave unread, in (0, 1).",
        callback=options.checked(settings.sparsity),
        autocompletion=completion.sparsities,
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the plan.", show_default="made of what it is"),
]


@app.callback()
def plan() -> None:
    """Make plans that spend sparsity where it hurts least, and keep them by name."""


@app.command()
def make(
    *,
    model: options.ModelOption = None,
    sparsity: Annotated[
        str,
        typer.Option(
            "--sparsity",
            "-s",
            metavar="LEVELS",
            help="Part of all weight bytes to leave unread; for a list 0.4,0.5 or a range 0.25:0.75:0.25 a plan each.",
            autocompletion=completion.sparsities,
        ),
    ] = "0.5",
    allocation: Annotated[
        Literal["uniform", "greedy", "fisher", "learned"],
        typer.Option("--allocation", help="How the budget is spread over layers and projections."),
    ] = "fisher",
    criterion: Annotated[
        Literal["magnitude", "wina", "centred", "topk"],
        typer.Option("--criterion", help="How entries are scored; what scores least is dropped."),
    ] = "magnitude",
    closed_loop: Annotated[
        bool,
        typer.Option("--closed-loop", help="Take thresholds from what the sparse model computes, not the dense one."),
    ] = False,
    calibration: options.CalibrationOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "-d",
            metavar="DATASET",
            help="Text for gradients and scores.",
            show_default="the calibration's own",
            autocompletion=completion.datasets,
        ),
    ] = None,
    split: options.SplitOption = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=2,
            metavar="N",
            help="Tokens of it; up to a fourth more is held out for the check.",
            show_default="4096; learned: 327680",
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", min=2, metavar="TOKENS", help="Tokens of each sequence.")] = 512,
    sparse_from: Annotated[
        int, typer.Option("--sparse-from", min=0, metavar="N", help="Rows before this position stay dense.")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the labels that are drawn from the model.")] = 0,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    name: NameOption = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Make plans: thresholds for every layer and projection that together leave a part of the bytes unread.

    uniform gives every projection the same sparsity. greedy is TEAL's Algorithm 1, block by block. fisher spreads the
    budget over the whole model by what the loss of each projection's dropped entries costs, from one backward pass.
    learned begins there and gives every channel a threshold of its own, by descent of the divergence from the dense
    model; it takes the longest, and gains by much and varied text. Plans are checked on held-out text, and never
    handed out where a uniform one is better. Interrupted, greedy and learned go on where they were when the same
    command runs again. Several levels share one search.

    Examples:
        teal plan make -s 0.5
        teal plan make -s 0.25,0.4,0.5,0.65
        teal plan make -s 0.5 --allocation learned -d notes.txt
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.make_plan import PlanMaker
    from teal_cli.runs.plan_request import PlanRequest
    from teal_cli.store.schema import parse_levels

    out = output(json, quiet)
    request = PlanRequest(
        parse_levels(sparsity),
        name,
        model=model,
        calibration=calibration,
        allocation=allocation,
        criterion=criterion,
        closed_loop=closed_loop,
        dataset=dataset,
        split=split,
        tokens=tokens or 0,
        seq_len=seq_len,
        start=sparse_from,
        seed=seed,
        dtype=dtype,
        device=device,
        force=force,
    )
    plans = _watch(out, PlanMaker(Registry(), request))
    for made in plans:
        for note in made.notes:
            out.note(note)
    payloads = [_payload(made.named) for made in plans]
    out.result(payloads[0] if len(plans) == 1 else {"plans": payloads}, lambda console: _show_made(console, plans))


def _watch(out: Output, maker: PlanMaker) -> list[MadePlan]:
    from teal_cli.runs.make_plan import MadePlan

    plans: list[MadePlan] = []
    kept = {
        "greedy": "the layers that were searched are kept, and the same command goes on",
        "learned": "what was learned until half a minute ago is kept, and the same command goes on",
    }.get(maker.request.allocation)
    with progress(out) as bars, when_stopped(out.warn, kept) if kept else nullcontext():
        stages: dict[str, Any] = {}
        for event in maker.run(loading(bars, maker.entry.size_bytes)):
            if isinstance(event, MadePlan):
                plans.append(event)
                stages.pop("checking", None)  # the next target has a check of its own
                continue
            if event.stage not in stages:
                stages[event.stage] = bars.task(event.stage.capitalize(), unit="steps")
            stages[event.stage].update(done=event.done, total=event.total)
    return plans


@app.command("ls")
def list_plans(
    model: options.ModelOption = None, json: options.JsonOption = False, quiet: options.QuietOption = False
) -> None:
    """The plans of a model.

    Examples:
        teal plan ls
        teal plan ls -m smollm2-135m --json
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.plans import readable_plans

    out = output(json, quiet)
    entry = Registry().find(model)
    plans, damaged = readable_plans(entry)
    for message in damaged:
        out.warn(message)
    summaries = [_summary(named) for named in plans]
    payload = {"model": entry.name, "plans": summaries}
    rows = [
        (p["name"], percent(p["sparsity"]), p["allocation"], p["criterion"], p["calibration"], p["created"][:10])
        for p in summaries
    ]
    headings = ("name", ">target", "allocation", "criterion", "calibration", "made")
    out.result(payload, lambda console: show_table(console, headings, rows))
    if not rows:
        out.note(f"{entry.name} has no plan yet: `teal plan make -m {entry.name} -s 0.5` makes one")


@app.command()
def show(
    name: NameArgument,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """How a plan spends its budget: the sparsity of every layer and projection.

    Examples:
        teal plan show fisher-0.5
        teal plan show fisher-0.5 -m smollm2-135m --json
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.plans import find_plan

    out = output(json, quiet)
    named = find_plan(Registry().find(model), name)
    out.result(_payload(named), lambda console: _show_plan(console, named))


@app.command("rm")
def remove(
    name: NameArgument,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Remove a plan of a model.

    Examples:
        teal plan rm even
        teal plan rm even -m smollm2-135m
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.plans import remove_plan

    out, registry = output(json, quiet), Registry()
    entry = registry.find(model)
    remove_plan(registry, entry, name)
    out.result({"model": entry.name, "removed": name}, lambda console: console.print(f"removed {name}", markup=False))


@app.command("import")
def import_lookup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="TEAL's `lookup` folder of a model.")],
    *,
    model: options.ModelOption = None,
    sparsity: SparsityOption = 0.5,
    calibration: options.CalibrationOption = None,
    name: NameOption = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Make a plan of TEAL's greedy levels, with the thresholds of a calibration.

    The row of each layer is chosen by the model's own matrices; where TEAL's table of weight shares is wrong for this
    model, that is said.

    Examples:
        teal plan import TEAL/lookup -s 0.5
        teal plan import TEAL/lookup -s 0.4 --name teal-greedy
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.plans import import_plan

    out = output(json, quiet)
    named, notes = import_plan(Registry(), model, folder, sparsity, calibration=calibration, name=name, force=force)
    for note in notes:
        out.warn(note)
    out.result(_payload(named), lambda console: _show_plan(console, named))


def _summary(named: NamedPlan) -> dict[str, Any]:
    return {
        "name": named.name,
        "model": named.model,
        "sparsity": named.plan.target,
        "allocation": named.plan.allocation,
        "criterion": named.plan.scoring.criterion,
        "calibration": named.plan.calibration,
        "created": named.created,
        "made": dict(named.made),
    }


def _payload(named: NamedPlan) -> dict[str, Any]:
    from teal_kernels.spec import PROJECTIONS

    levels = {name: named.plan.sparsity[:, column].tolist() for column, name in enumerate(PROJECTIONS)}
    return {**_summary(named), "levels": levels, "thresholds": named.plan.by_projection()}


def _show_made(console: Console, plans: list[MadePlan]) -> None:
    for made in plans:
        named = made.named
        gain = named.made.get("kl_to_uniform")
        said = f"plan [bold]{named.name}[/bold] of {named.model} is ready"
        if gain is not None:
            said += f": on held-out text {gain:.2f} times as far from dense (KL) as a uniform plan of equal bytes"
        console.print(said, soft_wrap=True)
    name = plans[-1].named.name
    console.print(f"next: [cyan]teal plan show {name}[/cyan], [cyan]teal generate --plan {name}[/cyan]", soft_wrap=True)


_SHADES = " ░▒▓█"


def _show_plan(console: Console, named: NamedPlan) -> None:
    """A row a layer, a column a projection, the level as a number and a shade."""
    from teal_kernels.spec import PROJECTIONS

    plan = named.plan
    console.print(
        f"{named.name}: {percent(plan.target)}, {plan.allocation}, {plan.scoring.criterion}, of {named.model}",
        markup=False,
    )
    rows = []
    for layer, levels in enumerate(plan.sparsity):
        cells = [f"{level:.0%} {_SHADES[min(4, int(5 * level))]}" for level in levels]
        rows.append((layer, *cells))
    show_table(console, (">layer", *(f">{name}" for name in PROJECTIONS)), rows)
