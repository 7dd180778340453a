"""The options that several commands share, written once: name, help, check, completion.

    def generate(*, model: ModelOption = None, sparsity: SparsityOption, json: JsonOption = False) -> None:

An option that is a setting names its key: where it is not on the command line, `ui.lazy` gives it the setting's value
through the parser's default map. One whose setting has a shipped default needs none in the signature. The checks here
are those that need no model: a mistake is told before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from teal_cli import settings
from teal_cli.errors import UsageError
from teal_cli.ui import completion


def checked(check: Callable[[object], Any]) -> Callable[[Any], Any]:
    """The check of a setting, as a callback of an option."""

    def callback(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except ValueError as error:
            shown = f"{value:g}" if isinstance(value, float) else value
            refused: Any = typer.BadParameter(f"{shown} {error}")
            refused.hint = getattr(error, "hint", None)  # for `app`, which shows it
            raise refused from None

    return callback


def setting(key: str, *names: str, **attributes: Any) -> Any:
    """An option whose value, where the command line does not give it, is the setting `key`."""
    check = checked(settings.KEYS[key].check)
    return typer.Option(*names, envvar=settings.variable(key), callback=check, **attributes)


def check_plan(context: typer.Context, plan: object, sparsity: str) -> None:
    """Refuse a plan together with a sparsity that was typed; `sparsity` is that parameter's name.

    Raises:
        UsageError: both were given.
    """
    if plan and on_command_line(context, sparsity):
        raise UsageError("a plan says its own sparsity", hint="give either --plan or --sparsity")


def on_command_line(context: typer.Context, parameter: str) -> bool:
    """Whether an option was typed, rather than filled in from a variable, a file, a recipe or a default."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


# ---------------------------------------------------------------- how it is shown
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")]

# ---------------------------------------------------------------- what is worked on
ModelOption = Annotated[
    str | None,
    setting(
        "model",
        "--model",
        "-m",
        metavar="MODEL",
        help="A downloaded model.",
        show_default="the registry's default",
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
        show_default="all",
        autocompletion=completion.levels,
    ),
]
CalibrationOption = Annotated[
    str | None,
    setting(
        "calibration",
        "--calibration",
        "-c",
        metavar="ID|DIR",
        help="A calibration of the model, or a folder.",
        show_default="the model's default",
        autocompletion=completion.calibrations,
    ),
]

# ---------------------------------------------------------------- text
DATASETS = (
    "wikitext, alpaca, c4, python-docs; org/name[:config] of the hub; a .txt, .jsonl or .parquet file, folder or glob."
)


def dataset(key: str) -> Any:
    """`--dataset`, with the setting of the command."""
    return setting(key, "--dataset", "-d", metavar="DATASET", help=DATASETS, autocompletion=completion.datasets)


def num_sequences(key: str) -> Any:
    """`--num-sequences`, with the setting of the command."""
    return setting(key, "--num-sequences", "-n", metavar="N", help="How many sequences or prompts to take.")


def max_new_tokens(key: str) -> Any:
    """`--max-new-tokens`, with the setting of the command."""
    return setting(key, "--max-new-tokens", metavar="N", help="Tokens to generate for each prompt.")


SplitOption = Annotated[
    str | None, typer.Option("--split", metavar="SPLIT", help="Split of the dataset.", show_default="the one for it")
]
TextColumnOption = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Column of the dataset that holds the text.",
        show_default="text, or Alpaca's columns",
    ),
]
SeqLenOption = Annotated[
    int, setting("calibrate.seq_len", "--seq-len", metavar="TOKENS", help="Tokens of each sequence.")
]

PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts from a file: one a line, or JSON lines with `prompt`.",
        show_default="none",
    ),
]
PromptTokensOption = Annotated[
    int,
    typer.Option(
        "--prompt-tokens", min=1, metavar="TOKENS", help="Tokens of each document of a dataset that make a prompt."
    ),
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")]
IgnoreEosOption = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")]

# ---------------------------------------------------------------- how it is run
SparsityOption = Annotated[
    float,
    setting(
        "sparsity",
        "--sparsity",
        "-s",
        metavar="S",
        autocompletion=completion.sparsities,
        help="Part of every input to drop, in [0, 1); 0 is the dense path.",
    ),
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="NAME",
        help="A plan that `teal plan make` made, in place of a uniform --sparsity.",
        show_default="uniform",
        autocompletion=completion.plans,
    ),
]
PlansOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plan",
        metavar="NAME",
        help="A plan of the model, in place of --sparsity; may be given several times.",
        show_default="uniform",
        autocompletion=completion.plans,
    ),
]
DtypeOption = Annotated[
    str | None,
    setting(
        "dtype",
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float16 or float32.",
        show_default="the checkpoint's",
        autocompletion=completion.dtypes,
    ),
]
DeviceOption = Annotated[
    str,
    setting(
        "device", "--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", autocompletion=completion.devices
    ),
]
BackendOption = Annotated[
    str,
    setting(
        "backend",
        "--backend",
        metavar="BACKEND",
        autocompletion=completion.backends,
        help="What runs a decode step: auto, triton-graph, triton, numba, cpu, reference.",
    ),
]
TemperatureOption = Annotated[
    float,
    setting("generate.temperature", "--temperature", "-t", metavar="T", help="0 takes the most likely token."),
]
TopKOption = Annotated[
    int,
    setting("generate.top_k", "--top-k", metavar="K", help="Draw among the K most likely tokens; 0 among all."),
]
TopPOption = Annotated[
    float,
    setting(
        "generate.top_p",
        "--top-p",
        metavar="P",
        help="And of these among the fewest whose probability reaches P; 1 among all.",
    ),
]
SeedOption = Annotated[
    int | None, setting("seed", "--seed", metavar="SEED", help="Seed of the draws.", show_default="a new one each time")
]
FixedSeedOption = Annotated[
    int | None, setting("seed", "--seed", metavar="SEED", help="Seed of the draws.", show_default="0")
]

# ---------------------------------------------------------------- network and safety
OfflineOption = Annotated[bool, setting("offline", "--offline", help="Use only what is on this machine already.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", "-N", help="Say what would be done and how much, and stop.")]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
