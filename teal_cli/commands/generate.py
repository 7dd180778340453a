"""`teal generate`: sparse decoding of one prompt, with the text as it comes and the figures at the end."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal_cli.commands.opening import load, made_with
from teal_cli.errors import UsageError, counted
from teal_cli.ui import options
from teal_cli.ui.interrupts import deferred
from teal_cli.ui.output import Output, output
from teal_cli.ui.table import TIED, percent, show_table, show_text

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
    prompts: options.PromptsOption = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--num-sequences", "-n", min=1, metavar="N", help="Of --prompts, the first N.", show_default="all"
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", metavar="TEXT", help="End before this text; may be given several times.", show_default="none"
        ),
    ] = None,
    max_new_tokens: Annotated[int, options.max_new_tokens("generate.max_new_tokens")],
    temperature: options.TemperatureOption,
    top_k: options.TopKOption,
    top_p: options.TopPOption,
    seed: options.SeedOption = None,
    chat: options.ChatOption = False,
    ignore_eos: options.IgnoreEosOption = False,
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
    _check(prompt, prompts, count, stop, dump)

    from teal_cli.data.prompts import PromptSource
    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.generate import GenerateRequest, Stopped, check_request
    from teal_cli.runs.session import open_session

    texts = [_prompt(prompt)] if prompts is None else PromptSource(file=prompts, count=count).texts()
    sampling = Sampling(temperature, top_k, top_p, secrets.randbits(32) if seed is None else seed)
    chosen = {"dtype": dtype, "device": device, "backend": backend, "calibration": calibration}
    session = open_session(model, **chosen, load=False)
    request = GenerateRequest(
        texts[0],
        sparsity,
        max_new_tokens,
        sampling,
        chat,
        ignore_eos,
        dump,
        force,
        plan,
        tuple(stop or ()),
    )
    if prompts is not None:
        _each(out, session, [replace(request, prompt=text, sequence=i) for i, text in enumerate(texts)])
        return
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


def _check(
    prompt: str | None, prompts: Path | None, count: int | None, stop: list[str] | None, dump: Path | None
) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: some do.
    """
    if prompt is not None and prompts is not None:
        raise UsageError("--prompt and --prompts exclude each other", hint="give one of them")
    if count is not None and prompts is None:
        raise UsageError("--num-sequences counts the prompts of a file", hint="name it with --prompts FILE")
    if dump is not None and prompts is not None:
        raise UsageError("one prompt goes into a store", hint="`teal dump --prompts FILE -o STORE` takes many")
    if dump is not None and stop:
        raise UsageError("a store ends at a token, not within one", hint="give either --dump or --stop")


def _each(out: Output, session: Session, requests: Sequence[GenerateRequest]) -> None:
    """Every prompt of a file in turn, and the figures of all at the end."""
    from teal_cli.runs.generate import Stopped, check_request

    for request in requests:
        check_request(session, request)
    load(out, session)
    results: list[Generation] = []
    try:
        for number, request in enumerate(requests, 1):
            out.note(f"{number}/{len(requests)}  {' '.join(request.prompt.split())}")
            results.append(stream(out, session, request))
            out.write("\n")
    except Stopped as stopped:
        out.write("\n")
        _show_all(out, session.notes, [*results, stopped.result])
        raise
    _show_all(out, session.notes, results)


def _show_all(out: Output, notes: list[str], results: Sequence[Generation]) -> None:
    for note in notes:
        out.note(note)
    if out.json:
        out.result({"generations": [result.as_dict() for result in results]}, lambda console: None)
    elif not out.quiet:
        headings = (">prompt", ">tokens", ">tok/s", ">dropped", ">prefill s")
        rows = [
            (i, len(r.token_ids), f"{r.tokens_per_s:.1f}", f"{r.realised:.1%}", f"{r.prefill_s:.2f}")
            for i, r in enumerate(results, 1)
        ]
        show_table(out.err, headings, rows)
        out.note(made_with(results[-1].model, results[-1].calibration, results[-1].plan))


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
