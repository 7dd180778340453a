"""`teal dump`: a dataset of sparsified activations, many prompts at many levels."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from teal_cli.commands.opening import load, made_with
from teal_cli.errors import TealError, UsageError, counted
from teal_cli.files import readable_size
from teal_cli.runs.recipe import load_recipe, shipped_recipes
from teal_cli.ui import completion, options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import Task, clock, progress
from teal_cli.ui.table import percent, show_fields, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.board import Board
    from teal_cli.runs.dump import Dump


_SOURCE: Final = ("dataset", "split", "num_sequences", "prompt_tokens")
_CHECKED: Final = ("seed", "dtype", "max_new_tokens", "temperature", "top_k", "top_p", "follow", "prefill")
"""What must be that of a store that is resumed, told before the model is loaded; the rest is told when it is opened."""


def _take_recipe(context: typer.Context, name: str | None) -> str | None:
    """Put what a recipe says before the settings, in the parser's default map."""
    if name and not context.resilient_parsing:
        said = {key: value for key, value in load_recipe(name).items() if key != "about"}
        context.default_map = {**(context.default_map or {}), **said}
    return name


def _take_store(context: typer.Context, parameter: typer.CallbackParam, value: Any) -> Any:
    """The same with the settings of the store that is resumed or repeated; a recipe that is given goes first."""
    given = {**context.params, str(parameter.name): value}
    origin = given.get("out_path") if given.get("resume") else given.get("like")
    if origin is not None and not context.resilient_parsing:
        from teal_cli.runs.stored import stored_run

        with suppress(TealError):  # the command says what is wrong, once it knows what else is given
            kept = {name: option for name, option in stored_run(Path(origin)).options.items() if option is not None}
            kept["levels"] = ",".join(map(repr, kept["levels"]))
            context.default_map = {**(context.default_map or {}), **kept}
            _take_recipe(context, given.get("recipe"))
    return value


def dump(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    levels: Annotated[
        str,
        options.setting(
            "dump.levels",
            "--sparsity",
            "-s",
            metavar="LEVELS",
            help="One level, a list 0.5,0.9, or a range: LOW:HIGH:STEP.",
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="[NAME|FILE]",
            help="Take what is not given here from a recipe: "
            + ", ".join(shipped_recipes())
            + ", or a .toml file; alone, list them.",
            show_default="none",
            callback=_take_recipe,
            is_eager=True,
            autocompletion=completion.recipes,
        ),
    ] = None,
    dataset: Annotated[str, options.dataset("dump.dataset")],
    split: options.SplitOption = None,
    prompts: options.PromptsOption = None,
    num_sequences: Annotated[int, options.num_sequences("dump.num_sequences")],
    prompt_tokens: options.PromptTokensOption = 64,
    max_new_tokens: Annotated[int, options.max_new_tokens("dump.max_new_tokens")],
    temperature: options.TemperatureOption,
    top_k: options.TopKOption,
    top_p: options.TopPOption,
    seed: options.FixedSeedOption = None,
    follow: Annotated[
        Literal["free", "dense", "text"],
        typer.Option(
            "--follow",
            help="Which tokens a level is fed: its own, those that the dense model decodes, or the dataset's text. The "
            "last two give every level the same rows, at the speed of a prefill.",
        ),
    ] = "free",
    prefill: Annotated[
        Literal["none", "dense", "sparse"],
        typer.Option("--prefill", help="Rows of the prompts, too: as the dense prompt has them, or run sparsely."),
    ] = "none",
    layer_by_layer: Annotated[
        bool | None,
        typer.Option(
            "--layer-by-layer/--resident",
            help="With --follow text: hold one layer in memory at a time, or the whole model.",
            show_default="whether the model fits in memory",
        ),
    ] = None,
    ignore_eos: options.IgnoreEosOption = False,
    out_path: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="STORE",
            help="The store to write.  [required]",
            callback=_take_store,
            is_eager=True,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="STORE",
            help="Repeat the run that wrote this store; options given here win.",
            show_default="none",
            callback=_take_store,
            is_eager=True,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the store, with the settings that it keeps.",
            callback=_take_store,
            is_eager=True,
        ),
    ] = False,
    durable: Annotated[
        bool,
        typer.Option(
            "--durable", help="Wait for the disk at every commit, so that a loss of power costs none of them."
        ),
    ] = False,
    force: options.ForceOption = False,
    dry_run: options.DryRunOption = False,
    plan: options.PlansOption = None,
    calibration: options.CalibrationOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    backend: options.BackendOption,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Dump activations of many prompts at many sparsity levels into one store.

    For every level and prompt, tokens are decoded sparsely and what flowed into each projection of each layer is
    stored, token by token. Stop it whenever you like: what is committed stays, and `teal dump --resume -o STORE`
    goes on.

    Examples:
        teal dump -d python-docs -s 0.5,0.9 -o activations.zarr
        teal dump --prompts prompts.txt --follow dense -o fed.zarr --dry-run
        teal dump --resume -o activations.zarr
    """
    from teal_cli.runs.board import open_board, rank_of_job

    first = rank_of_job() == 0  # of several ranks one talks
    out = output(json, quiet or not first)
    if recipe == "":
        rows = [(name, load_recipe(name)["about"]) for name in shipped_recipes()]
        out.result({"recipes": dict(rows)}, lambda console: show_table(console, ("recipe", "about"), rows))
        return
    if out_path is None:
        raise UsageError("where should the store go?", hint="name it with -o, e.g. -o activations.zarr")
    if resume and force:
        raise UsageError("--resume and --force exclude each other", hint="--resume goes on, --force begins anew")
    if resume and like:
        raise UsageError("--resume and --like exclude each other", hint="--resume goes on, --like repeats a run anew")
    options.check_plan(context, plan, "levels")
    if layer_by_layer and follow != "text":
        raise UsageError("--layer-by-layer cannot decode", hint="take --follow text: the text says what comes next")
    if prompts and options.on_command_line(context, "dataset"):
        raise UsageError("--dataset and --prompts exclude each other", hint="give one of them")
    from teal_cli.data.prompts import Prompts, PromptSource
    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.dump import Dump, DumpRequest
    from teal_cli.runs.estimate import estimate
    from teal_cli.runs.session import open_session
    from teal_cli.runs.stored import stored_run
    from teal_cli.store.placing import check_target, destination
    from teal_cli.store.schema import parse_levels

    destination(out_path)  # refuses a URL before anything is read from there
    origin = out_path if resume else like
    run = stored_run(origin) if origin else None
    if run and resume:
        given = {name: context.params[name] for name in _CHECKED if options.on_command_line(context, name)}
        run.check(given | ({"levels": parse_levels(levels)} if options.on_command_line(context, "levels") else {}))
    source: Prompts
    if prompts:  # all of them, unless a number was typed
        count = num_sequences if options.on_command_line(context, "num_sequences") else None
        source = PromptSource(file=prompts, count=count)
    elif run and not recipe and not any(options.on_command_line(context, name) for name in _SOURCE):
        source = run.prompts
    else:
        source = PromptSource(dataset, split, None, num_sequences, prompt_tokens)
    sampling = Sampling(temperature, top_k, top_p, seed or 0)
    request = DumpRequest(
        parse_levels(levels), source, max_new_tokens, sampling, ignore_eos, tuple(plan or ()), follow, prefill
    )
    board = open_board()
    if first and not (resume or dry_run or board.attempt):
        check_target(out_path, force=force)
    chosen = {"dtype": dtype, "device": device, "backend": backend, "calibration": calibration}
    session = open_session(model, **chosen, load=False)
    job = Dump(session, request)
    if first and not (dry_run or board.attempt):
        job.check(out_path, force=force, resume=resume)
    if follow == "text":
        session.layer_by_layer = layer_by_layer
    if not (session.streams or (resume and job.is_complete(out_path))):
        load(out, session, decodes=follow != "text")
    made = {
        "model": session.entry.name,
        "calibration": job.calibration,
        "plans": list(request.plans),
        "levels": job.targets,
    }
    for note in session.notes:
        out.note(note)
    if dry_run:
        payload = {
            **made,
            "prompts": len(job.prompts),
            **asdict(estimate(job, out_path)),
            "store": str(out_path),
        }
        out.result(payload, lambda console: _show_estimate(console, payload))
        return
    payload = {
        **made,
        "prompts": len(job.prompts),
        **_run(out, job, out_path, board, force=force, resume=resume, durable=durable),
        "store": str(out_path),
        "ranks": board.size,
    }
    if first:
        out.result(payload, lambda console: _show_result(console, payload))


def _run(
    out: Output, job: Dump, path: Path, board: Board, *, force: bool, resume: bool, durable: bool
) -> dict[str, Any]:
    from teal_cli.runs.dump import Following

    begun = time.perf_counter()  # what all levels are fed is decoded before the first row, and counts
    new_rows, seconds = 0, 0.0
    task: Task | None = None
    passes = job.request.follow != "free"
    verb = "Running" if passes else "Decoding"
    with progress(out) as bars:
        followed = bars.task("Decoding densely", unit="tokens")
        try:
            with closing(job.run(path, force=force, resume=resume, durable=durable, board=board)) as states:
                for state in states:
                    if isinstance(state, Following):
                        followed.update(done=state.done, total=state.total)
                        continue
                    text, before = f"{verb} {state.level}", state.rows - state.new_rows
                    if task is None:
                        task = bars.task(text, total=state.total_rows, unit="rows", done=before)
                        writing = bars.task("Writing", total=state.total_rows, unit="rows", done=before)
                    task.update(done=state.passed, text=text)
                    if passes and state.new_rows:  # a decoded row is written at once
                        writing.update(done=state.rows)
                    new_rows, seconds = state.new_rows, time.perf_counter() - begun
        except KeyboardInterrupt:
            if task is None and not (resume or path.exists()):
                out.warn(f"stopped before there were rows; nothing was written to {path}")
            else:
                out.warn(f"stopped; what is complete is in {path}, and `teal dump --resume -o {path}` goes on")
            raise
    return {"new_rows": new_rows, "seconds": seconds, "rows_per_s": new_rows / seconds if seconds else 0.0}


def _show_estimate(console: Console, estimate: dict[str, Any]) -> None:
    short = " (not enough)" if estimate["store_bytes"] > estimate["free_bytes"] else ""
    low, high = clock(estimate["seconds_low"]), clock(estimate["seconds_high"])
    tried = f"{low} to {high} by {counted(estimate['sampled_rows'], 'row')} that were tried"
    fields = {
        "levels": ", ".join(percent(level) for level in estimate["levels"]),
        "prompts": f"{estimate['prompts']:,}",
        "rows": f"{estimate['rows']:,} at most",
        "size": f"about {readable_size(estimate['store_bytes'])}, {readable_size(estimate['free_bytes'])} free{short}",
        "time": f"about {clock(estimate['seconds'])} on this machine as it is now ({tried})",
    }
    show_fields(console, fields)


def _show_result(console: Console, result: dict[str, Any]) -> None:
    rows = counted(result["new_rows"], "row")
    who = f"rank 0 of {result['ranks']} wrote" if result["ranks"] > 1 else "wrote"
    done = f"{who} {rows} in {result['seconds']:.1f} s to" if result["new_rows"] else "nothing was left to write to"
    console.print(f"{done} [bold]{result['store']}[/bold]")
    console.print(made_with(result["model"], result["calibration"], *result["plans"]), markup=False, soft_wrap=True)
    console.print(
        f"next: [cyan]teal store info {result['store']}[/cyan], or in Python "
        f'[cyan]teal_cli.open_store("{result["store"]}")[/cyan]',
        soft_wrap=True,
    )
