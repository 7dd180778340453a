"""The options that several commands share, written once: name, help, check, completion.

    def generate(model: ModelOption = None, sparsity: SparsityOption = None, json: JsonOption = False) ->
    None:

A default of None means "not given": the command asks `settings` for the value. The checks here are those that
need no model: a mistake is told before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from teal_cli import settings
from teal_cli.ui import completion


def _checked(check: Callable[[object], Any]) -> Callable[[Any], Any]:
    """The check of a setting, as a callback of an option."""

    def callback(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except ValueError as error:
            raise typer.BadParameter(f"{value} {error}") from None

    return callback


# ---------------------------------------------------------------- how it is shown
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")]

# ---------------------------------------------------------------- what is worked on
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A downloaded model; the default one if not given.",
        autocompletion=completion.models,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A downloaded model.", autocompletion=completion.models)
]
StoreArgument = Annotated[
    Path, typer.Argument(metavar="STORE", help="A store that `teal dump` or `generate --dump` wrote.")
]
LevelOption = Annotated[
    str | None,
    typer.Option(
        "--level",
        "-l",
        metavar="LEVEL",
        help="One level of the store: s0.50 or 0.5.",
        autocompletion=completion.levels,
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="ID|DIR",
        help="A calibration of the model, or a folder; the newest if not given.",
        autocompletion=completion.calibrations,
    ),
]

# ---------------------------------------------------------------- text
DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        "-d",
        metavar="DATASET",
        autocompletion=completion.datasets,
        help="wikitext, alpaca, c4, python-docs; org/name[:config] of the hub; "
        "a .txt, .jsonl or .parquet file, folder or glob.",
    ),
]
SplitOption = Annotated[str | None, typer.Option("--split", metavar="SPLIT", help="Split of the dataset.")]
NumSequencesOption = Annotated[
    int | None,
    typer.Option("--num-sequences", "-n", min=1, metavar="N", help="How many sequences or prompts to take."),
]
SeqLenOption = Annotated[
    int | None, typer.Option("--seq-len", min=1, metavar="TOKENS", help="Tokens of each sequence.")
]

# ---------------------------------------------------------------- how it is run
SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="S",
        help="Part of every input to drop, in [0, 1); 0 is the dense path.",
        callback=_checked(settings.sparsity),
        autocompletion=completion.sparsities,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float16 or float32.",
        callback=_checked(settings.dtype),
        autocompletion=completion.dtypes,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N.",
        callback=_checked(settings.device),
        autocompletion=completion.devices,
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="BACKEND",
        help="What runs a decode step: auto, triton-graph, triton, numba, cpu, reference.",
        callback=_checked(settings.backend),
        autocompletion=completion.backends,
    ),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to generate for each prompt."),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", "-t", min=0.0, metavar="T", help="0 takes the most likely token."),
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", min=0, metavar="K", help="Sample among the K most likely tokens; 0 among all."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        help="And of these among the fewest whose probability reaches P; 1 among all.",
        callback=_checked(settings.top_p),
    ),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, metavar="SEED", help="Seed of the sampling.")]

# ---------------------------------------------------------------- network and safety
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use only what is on this machine already.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-N", help="Say what would be done and how much, and stop.")]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
