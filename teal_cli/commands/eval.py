"""`teal eval`: what sparsity levels cost in quality, on a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from teal_cli.commands.opening import loading
from teal_cli.errors import UsageError, counted
from teal_cli.ui import options
from teal_cli.ui.output import Output, output
from teal_cli.ui.progress import progress
from teal_cli.ui.table import percent, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from teal_cli.runs.evaluate import Evaluate, Evaluation


_LEVELS = "0,0.25,0.5,0.65"


def evaluate(
    *,
    model: options.ModelOption = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            "--sparsity",
            "-s",
            metavar="LEVELS",
            help="One level, a list 0,0.5, or a range 0:0.75:0.25; 0 is dense.",
            show_default=_LEVELS,
        ),
    ] = None,
    plan: options.PlansOption = None,
    dataset: Annotated[str, options.dataset("calibrate.dataset")],
    split: options.SplitOption = None,
    text_column: options.TextColumnOption = None,
    convention: Annotated[
        Literal["window", "document"],
        typer.Option("--convention", help="Token perplexity of windows, or word and byte perplexity of documents."),
    ] = "window",
    window: Annotated[int, typer.Option("--window", min=2, metavar="TOKENS", help="Tokens of each window.")] = 2048,
    count: Annotated[
        int,
        typer.Option("--num-sequences", "-n", min=1, metavar="N", help="Windows or documents, at most."),
    ] = 20,
    sparse_from: Annotated[
        str,
        typer.Option(
            "--sparse-from",
            metavar="N|half|SHARE",
            help="Where a window becomes sparse: after N tokens, half of it, or a share such as 0.01. The default is a "
            "dense prompt as `teal dump` takes it, then sparse decoding.",
        ),
    ] = "64",
    layer_by_layer: Annotated[
        bool | None,
        typer.Option(
            "--layer-by-layer/--resident",
            help="Hold one layer in memory at a time, or the whole model.",
            show_default="as the memory there is has room",
        ),
    ] = None,
    calibration: options.CalibrationOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    result: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Keep the result, window by window, in this JSON file.",
            show_default="none",
        ),
    ] = None,
    resume: options.ResumeOption = False,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Measure what sparsity levels cost: perplexity, divergence from the dense model, agreement with it.

    All levels run side by side over the same text. A position is dense or sparse exactly as decoding has it: its
    keys and values are what a decode step would have left.

    Examples:
        teal eval -s 0,0.5 -d python-docs -n 4
        teal eval --plan fisher-0.5 -d python-docs -n 2 -o eval.json
    """
    out = output(json, quiet)
    if resume and result is None:
        raise UsageError("there is nothing to resume without a file", hint="name it with --output FILE")

    from teal_cli.registry.registry import Registry
    from teal_cli.runs.calibrate import Text
    from teal_cli.runs.evaluate import EvalRequest, Evaluate
    from teal_cli.store.schema import parse_levels

    request = EvalRequest(
        Text(dataset, split, text_column, count, window),
        parse_levels(sparsity or _LEVELS) if sparsity or not plan else (),
        tuple(plan or ()),
        model=model,
        calibration=calibration,
        convention=convention,
        sparse_from=sparse_from,
        dtype=dtype,
        device=device,
        layer_by_layer=layer_by_layer,
        output=result,
        resume=resume,
        force=force,
    )
    job = Evaluate(Registry(), request)
    for note in job.notes:
        out.warn(note)
    found = _run(out, job)
    out.result(asdict(found), lambda console: _show(console, found))


def _run(out: Output, job: Evaluate) -> Evaluation:
    from teal_cli.runs.evaluate import Evaluation

    with progress(out) as bars:
        layers = job.open_layers(loading(bars, job.entry.size_bytes))
        task = bars.task("Scoring", unit=f"{job.request.convention}s")
        try:
            for event in job.run(layers):
                if isinstance(event, Evaluation):
                    return event
                task.update(done=event.done, total=event.total)
        except KeyboardInterrupt:
            if job.request.output is not None and layers.resident:
                out.warn(
                    f"stopped; {job.request.output} holds what is done, and the same command with --resume goes on"
                )
            raise
    raise AssertionError("an evaluation ends with its result")


def _show(console: Console, found: Evaluation) -> None:
    split = f" ({found.split})" if found.split else ""
    text = f"{counted(found.tokens, 'token')} in {counted(found.windows, 'window')} of at most {found.window}"
    console.print(
        f"{found.model}, {found.dtype}, on {found.dataset}{split}: {text}, sparse from {found.sparse_from}; "
        f"convention: {found.convention}",
        markup=False,
    )
    by_document = found.convention == "document"
    headings = [">target", ">dropped", ">perplexity", ">nll", ">KL to dense", ">same top-1"]
    headings += [">word ppl", ">byte ppl", ">bits/byte"] if by_document else []
    rows = []
    for level in found.levels:
        error = "" if level.stderr is None else f" \u00b1 {level.stderr:.3f}"
        row = [
            level.plan or percent(level.sparsity),
            f"{level.realised:.1%}",
            f"{level.perplexity:.2f}",
            f"{level.nll:.4f}{error}",
            f"{level.kl:.4f}",
            f"{level.top1:.1%}",
        ]
        if by_document:
            row += [f"{level.word_perplexity:.2f}", f"{level.byte_perplexity:.3f}", f"{level.bits_per_byte:.4f}"]
        rows.append(row)
    show_table(console, headings, rows)
