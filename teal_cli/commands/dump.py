"""`teal dump`: a dataset of sparsified activations, many prompts at many levels."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli import settings
from teal_cli.commands.opening import opened
from teal_cli.errors import UsageError
from teal_cli.runs.recipe import load_recipe
from teal_cli.ui import completion, options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import amount, progress

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.dump import Dump


def dump(
    model: options.ModelOption = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity", "-s", metavar="LEVELS", help="One level, a list 0.5,0.9, or a range 0.50:0.95:0.05."
        ),
    ] = None,
    recipe_name: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="Take what is not given here from a recipe.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    dataset: options.DatasetOption = None,
    split: options.SplitOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts from a file: one a line, or JSON lines with `prompt`."),
    ] = None,
    num_sequences: options.NumSequencesOption = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens", min=1, metavar="TOKENS", help="Tokens of each document of a dataset that make a prompt."
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    seed: options.SeedOption = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos", help="Go on past the end-of-sequence token, so that every sequence has all its rows."
        ),
    ] = False,
    out_path: Annotated[Path | None, typer.Option("--out", "-o", metavar="STORE", help="The store to write.")] = None,
    resume: options.ResumeOption = False,
    force: options.ForceOption = False,
    dry_run: options.DryRunOption = False,
    calibration: options.CalibrationOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption = None,
    backend: options.BackendOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Dump activations of many prompts at many sparsity levels into one store.

    For every level and prompt, tokens are decoded sparsely and what flowed into each projection of each layer is
    stored, token by token. Stop it whenever you like: what is committed stays, and --resume goes on.
    """
    out = output(json, quiet)
    if out_path is None:
        raise UsageError("where should the store go?", hint="name it with -o, e.g. -o activations.zarr")
    if resume and force:
        raise UsageError("--resume and --force exclude each other", hint="--resume goes on, --force begins anew")
    if dataset and prompts:
        raise UsageError("--dataset and --prompts exclude each other", hint="give one of them")
    given = settings.load()
    chosen = load_recipe(recipe_name) if recipe_name else {}

    def pick(key: str, option: Any, default: Any = None) -> Any:
        """Command line, then recipe, then settings."""
        value = option if option is not None else chosen.get(key)
        setting = f"dump.{key}"
        if value is None and setting in settings.KEYS:
            value = given.pick(setting)
        return default if value is None else value

    from teal_cli.data.prompts import PromptSource
    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.dump import Dump, DumpRequest
    from teal_cli.store.placing import check_target
    from teal_cli.store.schema import parse_levels

    source = (
        PromptSource(file=prompts, count=num_sequences)
        if prompts
        else PromptSource(
            pick("dataset", dataset),
            pick("split", split),
            None,
            pick("num_sequences", num_sequences),
            pick("prompt_tokens", prompt_tokens, 64),
        )
    )
    request = DumpRequest(
        parse_levels(pick("levels", sparsity)),
        source,
        pick("max_new_tokens", max_new_tokens),
        Sampling(
            pick("temperature", temperature, given.pick("generate.temperature")),
            pick("top_k", top_k, given.pick("generate.top_k")),
            pick("top_p", top_p, given.pick("generate.top_p")),
            given.pick("seed", seed) or 0,
        ),
        ignore_eos,
    )
    if not (resume or dry_run):
        check_target(out_path, force=force)
    session = opened(out, given, model=model, dtype=dtype, device=device, backend=backend, calibration=calibration)
    job = Dump(session, request)
    for note in session.notes:
        out.note(note)
    if dry_run:
        estimate = job.estimate(out_path)
        payload = {
            "model": session.entry.name,
            "levels": request.levels,
            "prompts": len(job.prompts),
            **asdict(estimate),
            "store": str(out_path),
        }
        out.result(payload, lambda console: _show_estimate(console, payload))
        return
    payload = {
        "model": session.entry.name,
        "levels": request.levels,
        "prompts": len(job.prompts),
        **_run(out, job, out_path, force=force, resume=resume),
        "store": str(out_path),
    }
    out.result(payload, lambda console: _show_result(console, payload))


def _run(out: Output, job: Dump, path: Path, *, force: bool, resume: bool) -> dict[str, Any]:
    new_rows, seconds = 0, 0.0
    with progress(out) as bars:
        task = bars.task("Decoding", total=job.rows, unit="rows")
        try:
            for state in job.run(path, force=force, resume=resume):
                task.update(done=state.rows, text=f"Decoding {state.level}")
                new_rows, seconds = state.new_rows, state.seconds
        except KeyboardInterrupt:
            out.warn(f"stopped; what is complete is in {path}, and the same command with --resume goes on")
            raise
    return {"new_rows": new_rows, "seconds": seconds, "rows_per_s": new_rows / seconds if seconds else 0.0}


def _show_estimate(console: Console, estimate: dict[str, Any]) -> None:
    short = estimate["store_bytes"] > estimate["free_bytes"]
    free = f"{amount(estimate['free_bytes'], None, 'B')} free{' [red](not enough)[/red]' if short else ''}"
    console.print(f"levels   {', '.join(f'{level:.2f}' for level in estimate['levels'])}")
    console.print(f"prompts  {estimate['prompts']}")
    console.print(f"rows     {estimate['rows']:,} at most")
    console.print(f"size     about {amount(estimate['store_bytes'], None, 'B')}, {free}")
    console.print(f"time     about {estimate['seconds'] / 60:.1f} minutes on this machine")


def _show_result(console: Console, result: dict[str, Any]) -> None:
    console.print(f"wrote {result['new_rows']:,} rows in {result['seconds']:.1f} s to [bold]{result['store']}[/bold]")
    console.print(
        f"next: [cyan]teal store info {result['store']}[/cyan], or in Python "
        f'[cyan]teal_cli.open_store("{result["store"]}")[/cyan]',
        soft_wrap=True,
    )
