"""`teal bench`: speed against dense, against others, and against the limit that memory sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli.commands.bench_runs import (
    asked_dtypes,
    asked_levels,
    asked_matrices,
    finish,
    open_model,
    open_stack,
)
from teal_cli.commands.opening import load
from teal_cli.errors import UsageError
from teal_cli.files import check_new_file
from teal_cli.ui import completion, options
from teal_cli.ui.lazy import CONTEXT_SETTINGS
from teal_cli.ui.output import output

if TYPE_CHECKING:
    from teal_cli.bench.rows import Progress, Row
    from teal_cli.bench.subjects import Subject
    from teal_cli.runs.plans import Level

app = typer.Typer(rich_markup_mode=None, context_settings=CONTEXT_SETTINGS, no_args_is_help=True)

LEVELS = "0.4,0.5,0.65,0.9"
QUICK_LEVELS = "0.5,0.9"

LevelsOption = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="LEVELS",
        help="One level, a list 0.5,0.9, or a range 0.4:0.9:0.1.",
        show_default=LEVELS,
    ),
]
RoundsOption = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        min=2,
        metavar="N",
        help="How often each contender is measured.",
        show_default="15 to 25, or 5 to 7 with --quick",
    ),
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Fewer rounds and combinations: a few minutes.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the rows as JSON, for `teal plot bench`.", show_default="no file"
    ),
]
StacksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stack",
        metavar="SHAPE:LAYERS",
        help="Random layers of a real shape, such as llama-2-7b:4, which need no checkpoint; may be repeated.",
        show_default="the model",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="LIST",
        help="int8, int4, with commas: in the same rounds, too, what `teal quantize` made of the model, or the stack "
        "rounded.",
        show_default="only its own",
    ),
]
TransformersOption = Annotated[bool, typer.Option("--transformers/--no-transformers", help="Also run transformers.")]
GgufOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--gguf",
        metavar="FILE",
        help="A GGUF of the same model to run with llama.cpp; may be repeated.",
        show_default="none",
    ),
]


@app.callback()
def bench() -> None:
    """Measure speed against dense, against others and against the memory limit."""


@app.command()
def kernels(
    *,
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            metavar="LIST",
            help="llama-2-7b, llama-3-8b, mistral-7b, qwen3-8b, smollm2-135m, all, "
            "or inputs x outputs such as 4096x11008; with commas.",
            show_default="all",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="The matrices of a downloaded model.", show_default="none"),
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="LIST", help="bfloat16, float16, float32; with commas.", show_default="bfloat16,float16"
        ),
    ] = None,
    sparsity: LevelsOption = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="STORE",
            help="Vectors from a store, at its levels, in place of random ones.",
            show_default="random",
        ),
    ] = None,
    rounds: RoundsOption = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First search launch configurations on this GPU; all commands use what it finds."),
    ] = False,
    quick: QuickOption = False,
    seed: options.FixedSeedOption = None,
    device: options.DeviceOption,
    path: OutputOption = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Products of one vector and one matrix: dense, sparse, and the floor that memory sets.

    Every matrix, dtype and sparsity is multiplied in all ways that this device has, in the same rounds. The floor is
    the time that reading the kept rows takes at the bandwidth measured in those rounds. A wrong product has no time.

    Examples:
        teal bench kernels --shapes 128x64 --quick -o kernels.json
        teal bench kernels --shapes 128x64 --dtype bfloat16 -s 0.5
    """
    from teal_cli.bench.inputs import Replay
    from teal_cli.bench.kernels import KernelRequest, bench_kernels
    from teal_cli.runs.session import DTYPES, choose_device

    out = output(json, quiet)
    _check_path(path, force)
    store = Replay(replay) if replay else None
    matrices = asked_matrices(shapes, model, store.store.header.model if store else None)
    if store:
        matrices = store.matching(matrices)
    if dtypes is None:
        dtypes = store.store.header.dtype if store else "bfloat16" if quick else "bfloat16,float16"
    levels = asked_levels(sparsity or (None if store else LEVELS), tuple(store.levels) if store else None)
    request = KernelRequest(
        matrices, tuple(DTYPES[name] for name in asked_dtypes(dtypes)), levels, choose_device(device),
        rounds or (7 if quick else 25), seed or 0, store, tune,
    )  # fmt: skip
    asked = {"shapes": shapes, "model": model, "dtypes": dtypes, "sparsities": levels, "rounds": request.rounds,
             "seed": request.seed, "replay": str(replay) if replay else None, "tune": tune, "quick": quick}  # fmt: skip
    finish(out, "kernels", request.device, asked, [bench_kernels(request)], path, "matrices")


@app.command()
def decode(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    stacks: StacksOption = None,
    weights: WeightsOption = None,
    sparsity: LevelsOption = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            metavar="NAME",
            help="A plan of the model too, in turn with a uniform one that reads as many bytes; may be repeated.",
            show_default="no plan",
            autocompletion=completion.plans,
        ),
    ] = None,
    dump: Annotated[bool, typer.Option("--dump/--no-dump", help="Also decode into a temporary store.")] = True,
    transformers: TransformersOption = True,
    gguf: GgufOption = None,
    quality: Annotated[
        bool, typer.Option("--with-quality", help="Also the perplexity of each, over the text of --dataset.")
    ] = False,
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", metavar="SOURCE", help="With --with-quality: what is scored.")
    ] = "python-docs",
    busy: Annotated[
        int, typer.Option("--busy", min=0, metavar="N", help="Again beside N processes that each keep a core busy.")
    ] = 0,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=3, metavar="N", help="New tokens per run.", show_default="64, or 32 with --quick"),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Tokens of the prompt.")
    ] = 32,
    rounds: RoundsOption = None,
    quick: QuickOption = False,
    calibration: options.CalibrationOption = None,
    seed: options.FixedSeedOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    backend: options.BackendOption,
    path: OutputOption = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Tokens per second: dense, sparse, with a dump, transformers, llama.cpp, and the floor.

    All continue the same prompt greedily, in turn, round after round; prefill is not counted. The floor is the speed at
    which what a step has to read (kept weights, output head, key-value cache) could be read.

    Examples:
        teal bench decode --quick -o decode.json
        teal bench decode --quick --no-transformers --no-dump -s 0.5
    """
    from teal_cli.bench.decode import DecodeRequest, bench_decode, bench_plan
    from teal_cli.bench.engines import check_gguf
    from teal_cli.bench.quality import Quality
    from teal_cli.bench.shapes import parse_stack
    from teal_cli.bench.subjects import child_names, children, packed, parse_widths, registered
    from teal_cli.runs.calibrate import Text
    from teal_cli.runs.session import choose_device

    out = output(json, quiet)
    _check_path(path, force)
    check_gguf(gguf or [])
    named = options.on_command_line(context, "model")
    if stacks and not named and gguf:
        raise UsageError("a stack of random layers has no GGUF", hint="name a model with --model, or leave out --gguf")
    if stacks and not named and plan:
        raise UsageError("a stack of random layers has no plans", hint="name a model with --model, or leave out --plan")
    shapes = [parse_stack(text) for text in stacks or ()]
    levels = asked_levels(sparsity or (QUICK_LEVELS if quick else LEVELS), None)
    dumped = (0.5 if 0.5 in levels else levels[0],) if dump else ()
    widths = parse_widths(weights)
    text = Text(dataset, num_sequences=8, seq_len=512)
    request = DecodeRequest(
        levels, dumped, tokens or (32 if quick else 64), rounds or (5 if quick else 15), seed or 0,
        dumped_blocks=1 if quick else 2, transformers=transformers, gguf=gguf or [], busy=busy,
        quality=Quality(text, calibration) if quality else None,
    )  # fmt: skip
    where = choose_device(device)
    chosen = {"dtype": dtype, "backend": backend}

    asked = {"model": model, "calibration": calibration, "stacks": stacks or [], "sparsities": levels,
             "plans": plan or [], "dump": dump, "tokens": request.new_tokens,
             "prompt_tokens": prompt_tokens, "rounds": request.rounds, "seed": request.seed, **chosen,
             "gguf": [file.name for file in gguf or ()], "transformers": transformers, "quick": quick,
             "weights": widths, "busy": busy, "quality": text.dataset if quality else None}  # fmt: skip
    subjects: list[Subject] = []
    planned: tuple[Level, ...] = ()
    if named or not shapes:
        session = open_model(out, model, str(where), calibration, chosen, asked)
        planned, names = session.levels((), plan) if plan else (), child_names(session.entry.name, widths)
        subjects = [registered(session, levels, prompt_tokens, partial(load, out))]
        subjects += children(
            subjects[0], names, levels, partial(load, out), device=str(where), calibration=calibration, **chosen
        )

    def measured() -> Iterator[Iterable[Progress | Row]]:
        if subjects:
            yield bench_decode(subjects[0], request, subjects[1:])
        for level in planned:
            yield bench_plan(subjects[0], level, session.calibration, request)
        for shape in shapes:
            subject = open_stack(shape, where, levels, prompt_tokens, request.seed, chosen)
            others = [packed(subject, width) for width in widths]
            yield bench_decode(subject, replace(request, gguf=[], quality=None), others)  # these are of the model

    finish(out, "decode", where, asked, measured(), path, "rounds")


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results that `teal bench -o FILE` wrote.")],
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """A saved result as a table; several side by side, with how many times as fast each is as the first.

    Floors are computed from readings of the memory's bandwidth: where these moved by more than 15% within a run, the
    table says so and marks the floors.

    Examples:
        teal bench show decode.json
        teal bench show kernels.json decode.json
    """
    from teal_cli.bench.compare import as_dict
    from teal_cli.bench.results import load
    from teal_cli.bench.tables import show as show_result
    from teal_cli.bench.tables import show_side_by_side

    out = output(json, quiet)
    results = {str(file): load(file) for file in files}
    if len(results) == 1:
        out.result(as_dict(results), lambda console: show_result(console, *results.values()))
    else:
        out.result(as_dict(results), lambda console: show_side_by_side(console, results))


@app.command()
def prefill(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    stacks: StacksOption = None,
    weights: WeightsOption = None,
    transformers: TransformersOption = True,
    gguf: GgufOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Tokens of the prompt.")] = 512,
    rounds: RoundsOption = None,
    quick: QuickOption = False,
    seed: options.FixedSeedOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    path: OutputOption = None,
    force: options.ForceOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Prompt tokens per second, which is also the speed of calibrating, evaluating and forced dumps.

    Every engine reads the same prompt, dense, in the same rounds.

    Examples:
        teal bench prefill --quick --no-transformers --tokens 64
        teal bench prefill --rounds 2 --no-transformers --tokens 32 --dtype float32 -o prefill.json
    """
    from teal_cli.bench.engines import check_gguf
    from teal_cli.bench.prefill import PrefillRequest, bench_prefill
    from teal_cli.bench.shapes import parse_stack
    from teal_cli.bench.subjects import child_names, children, packed, parse_widths, registered
    from teal_cli.runs.session import choose_device

    out = output(json, quiet)
    _check_path(path, force)
    check_gguf(gguf or [])
    widths, where = parse_widths(weights), choose_device(device)
    request = PrefillRequest(rounds or (3 if quick else 9), seed or 0, transformers, gguf or [])
    chosen = {"dtype": dtype, "backend": None}
    asked: dict[str, Any] = {
        "model": model, "stacks": stacks or [], "weights": widths, "tokens": tokens, "rounds": request.rounds,
        "seed": request.seed, "dtype": dtype, "gguf": [file.name for file in gguf or ()], "transformers": transformers,
    }  # fmt: skip

    shapes = [parse_stack(text) for text in stacks or ()]
    subjects: list[Subject] = []
    if options.on_command_line(context, "model") or not shapes:
        session = open_model(out, model, str(where), None, chosen, asked, calibrated=False)
        names, reading = child_names(session.entry.name, widths), partial(load, out, decodes=False)
        subjects = [registered(session, (), tokens, reading)]
        subjects += children(subjects[0], names, (), reading, device=str(where), **chosen)

    def measured() -> Iterator[Iterable[Progress | Row]]:
        if subjects:
            yield bench_prefill(subjects, request)
        for shape in shapes:
            subject = open_stack(shape, where, (), tokens, request.seed, chosen)
            others = [packed(subject, width) for width in widths]
            yield bench_prefill([subject, *others], replace(request, gguf=[]))  # a GGUF is of the model

    finish(out, "prefill", where, asked, measured(), path, "rounds")


def _check_path(path: Path | None, force: bool) -> None:
    if path is not None:
        check_new_file(path, force=force)
