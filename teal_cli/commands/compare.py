"""`teal compare`: prompts decoded densely and at sparsity levels, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teal_cli.commands.opening import load
from teal_cli.errors import UsageError
from teal_cli.ui import options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import progress
from teal_cli.ui.table import show_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from teal_cli.runs.compare import Answer, CompareRequest, Comparison
    from teal_cli.runs.session import Session

_NARROWEST = 28
"""Columns of text that are narrower than this are shown one below the other."""


def compare(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    levels: Annotated[
        str,
        typer.Option(
            "--sparsity", "-s", metavar="LEVELS", help="One level, a list 0.25,0.5, or a range LOW:HIGH:STEP."
        ),
    ] = "0.5",
    plan: options.PlansOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="A prompt; may be given several times.",
            show_default="those of the dataset",
        ),
    ] = None,
    prompts: options.PromptsOption = None,
    dataset: Annotated[str, options.dataset("dump.dataset")],
    split: options.SplitOption = None,
    num_sequences: Annotated[
        int, typer.Option("--num-sequences", "-n", min=1, metavar="N", help="How many prompts to take of the dataset.")
    ] = 4,
    prompt_tokens: options.PromptTokensOption = 64,
    max_new_tokens: Annotated[int, options.max_new_tokens("generate.max_new_tokens")],
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", metavar="T", help="0 takes the most likely token.")
    ] = 0.0,
    top_k: options.TopKOption,
    top_p: options.TopPOption,
    seed: options.FixedSeedOption = None,
    chat: options.ChatOption = False,
    ignore_eos: options.IgnoreEosOption = False,
    calibration: options.CalibrationOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    backend: options.BackendOption,
    page: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write one self-contained HTML page as well.", show_default="none"
        ),
    ] = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Decode prompts densely and at sparsity levels, side by side.

    Each level goes on with its own tokens: where it parts from the dense model is shown, and what differs is marked.
    KL and top-1 stand for every step beside the dense one, fed the tokens of the dense model.

    Examples:
        teal compare -p "The capital of France is" -s 0.5
        teal compare --prompts prompts.txt -s 0.4,0.65 -o side-by-side.html
    """
    out = output(json, quiet)
    options.check_plan(context, plan, "levels")
    if sum((bool(prompt), bool(prompts), options.on_command_line(context, "dataset"))) > 1:
        raise UsageError("--prompt, --prompts and --dataset exclude each other", hint="give one of them")

    from teal_cli.data.prompts import Prompts, PromptSource, TypedPrompts
    from teal_cli.decoding.sampling import Sampling
    from teal_cli.plots.compare import compare_page
    from teal_cli.plots.page import check_page, write_page
    from teal_cli.runs.compare import CompareRequest, check_compare
    from teal_cli.runs.session import open_session
    from teal_cli.store.schema import parse_levels

    if page is not None:
        check_page(page, force=force)
    source: Prompts = PromptSource(dataset, split, prompts, None if prompts else num_sequences, prompt_tokens)
    if prompt:
        source = TypedPrompts(tuple(prompt))
    request = CompareRequest(
        source,
        () if plan else parse_levels(levels),
        tuple(plan or ()),
        max_new_tokens,
        Sampling(temperature, top_k, top_p, seed or 0),
        chat,
        ignore_eos,
    )
    session = open_session(model, dtype=dtype, device=device, backend=backend, calibration=calibration, load=False)
    check_compare(session, request)
    load(out, session)
    found = _run(out, session, request)
    for note in session.notes:
        out.note(note)
    if page is not None:
        write_page(page, compare_page(found))
    out.result({**asdict(found), "page": page}, lambda console: _show(console, found, page))


def _run(out: Output, session: Session, request: CompareRequest) -> Comparison:
    from teal_cli.runs.compare import Comparison
    from teal_cli.runs.compare import compare as run

    with progress(out) as bars:
        task = bars.task("Comparing", unit="prompts")
        for event in run(session, request):
            if isinstance(event, Comparison):
                return event
            task.update(done=event.done, total=event.total)
    raise AssertionError("a comparison ends with its result")


def _show(console: Console, found: Comparison, page: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from teal_cli.plots.compare import HEADINGS, cells

    labels = ["dense", *(level.label for level in found.levels)]
    for prompt in found.prompts:
        console.print(Text(f"\n{prompt.prompt}", style="bold"))
        texts = [_marked(prompt.dense, ()), *(_marked(level.answer, level.differs) for level in prompt.levels)]
        if console.is_terminal and console.width // len(texts) >= _NARROWEST:
            table = Table(*labels, expand=True, padding=(0, 1))
            for column in table.columns:
                column.ratio, column.overflow = 1, "fold"
            table.add_row(*texts)
            console.print(table)
            continue
        for label, text in zip(labels, texts, strict=True):
            console.print(Text.assemble((f"{label}: ", "cyan"), text))
    console.print()
    right = [HEADINGS[0], *(f">{heading}" for heading in HEADINGS[1:])]
    show_table(console, right, [cells(level, len(found.prompts)) for level in found.levels])
    if page is not None:
        console.print(f"page: {page}", markup=False, soft_wrap=True)


def _marked(answer: Answer, differs: tuple[bool, ...]) -> Text:
    from rich.text import Text

    from teal_cli.plots.compare import runs

    pieces = runs(answer, differs) if differs else [(False, answer.text)]
    return Text.assemble(*((text, "reverse" if marked else "") for marked, text in pieces))
