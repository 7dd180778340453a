"""`teal generate`: sparse decoding of one prompt, with the text as it comes and the figures at the end."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal_cli.commands.opening import load, made_with
from teal_cli.errors import UsageError, counted
from teal_cli.ui import options
from teal_cli.ui.interrupts import deferred
from teal_cli.ui.output import Output, output
from teal_cli.ui.table import TIED, percent, show_text

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.generate import GenerateRequest, Generation
    from teal_cli.runs.session import Session


def generate(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    sparsity: options.SparsityOption,
    plan: options.PlanOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.", show_default="standard input")
    ] = None,
    max_new_tokens: Annotated[int, options.max_new_tokens("generate.max_new_tokens")],
    temperature: options.TemperatureOption,
    top_k: options.TopKOption,
    top_p: options.TopPOption,
    seed: options.SeedOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    calibration: options.CalibrationOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    backend: options.BackendOption,
    dump: Annotated[
        Path | None,
        typer.Option(
            "--dump",
            metavar="STORE",
            help="Write what flowed into each projection to this Zarr store.",
            show_default="no store",
        ),
    ] = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Generate text with sparse decoding.

    The prompt is processed densely; each further token is one sparse step: entries of every projection's input with
    |x| <= t are dropped, and the weight rows that go with them are never read. Sparsity 0 is the dense path.

    The text goes to stdout; speed, realised sparsity and backend go to stderr.

    Examples:
        teal generate -p "The capital of France is"
        teal generate --plan fisher-0.5 -t 0 < prompt.txt
        teal generate -s 0.4 -p "One, two," --dump run.zarr
    """
    out = output(json, quiet)
    options.check_plan(context, plan, "sparsity")
    text = _prompt(prompt)

    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.generate import GenerateRequest, Stopped, check_request
    from teal_cli.runs.session import open_session

    sampling = Sampling(temperature, top_k, top_p, secrets.randbits(32) if seed is None else seed)
    chosen = {"dtype": dtype, "device": device, "backend": backend, "calibration": calibration}
    session = open_session(model, **chosen, load=False)
    request = GenerateRequest(
        text,
        sparsity,
        max_new_tokens,
        sampling,
        chat,
        ignore_eos,
        dump,
        force,
        plan,
    )
    check_request(session, request)
    load(out, session)
    try:
        result = stream(out, session, request)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped):
            _finish(out, session.notes, stop.result)
        if dump is not None:
            out.warn(f"stopped; every step so far is in {dump}, and `teal dump --resume -o {dump}` goes on")
        raise
    _finish(out, session.notes, result)


def stream(out: Output, session: Session, request: GenerateRequest) -> Generation:
    """Write the text as it comes. Ctrl-C ends it after the token under way.

    Raises:
        Stopped: that, with the figures so far.
        KeyboardInterrupt: Ctrl-C before the first token, or twice.
    """
    from teal_cli.runs.generate import Generation, Piece, generate

    events = generate(session, request)
    event = next(events)
    with deferred() as stopping:
        while isinstance(event, Piece):
            out.write(event.text)
            event = events.throw(KeyboardInterrupt) if stopping() else next(events)
    assert isinstance(event, Generation), "a generation ends with its figures"
    return event


def _prompt(given: str | None) -> str:
    if given is not None:
        return given
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no prompt", hint='give one with --prompt "...", or on standard input')
    return sys.stdin.read()


def _finish(out: Output, notes: list[str], result: Generation) -> None:
    out.write("\n")
    for note in notes:
        out.note(note)
    if out.json:
        out.result(result.as_dict(), lambda console: None)
    elif not out.quiet:
        show_figures(out.err, result)


def show_figures(console: Console, result: Generation) -> None:
    steps = len(result.token_ids) - 1
    shares = "  ".join(f"{name}{TIED}{share:.1%}" for name, share in result.per_projection.items())
    console.print()
    show_text(
        console,
        f"{result.tokens_per_s:.1f} tok/s over {counted(steps, 'step')}, {result.effective_gbps:.1f} GB/s read, "
        f"prefill {result.prefill_s:.2f} s, load {result.load_s:.2f} s "
        f"({result.backend}, {result.device}, {result.dtype}, seed {result.seed})",
    )
    show_text(console, f"sparsity {percent(result.target)} wanted, {result.realised:.1%} realised: {shares}")
    console.print(made_with(result.model, result.calibration, result.plan), markup=False, soft_wrap=True)
    if result.store:
        console.print(
            f"dumped {counted(steps, 'row')} to {result.store}; look at it with "
            f"[cyan]teal store info {result.store}[/cyan]",
            soft_wrap=True,
        )
