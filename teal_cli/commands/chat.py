"""`teal chat`: a conversation with sparse decoding, and commands that change how it is decoded."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from teal_cli import settings
from teal_cli.checks import did_you_mean
from teal_cli.commands.opening import load, made_with
from teal_cli.errors import TealError, UsageError
from teal_cli.ui import completion, options
from teal_cli.ui.output import Output, output
from teal_cli.ui.table import show_table

if TYPE_CHECKING:
    from teal_cli.runs.chat import Answer, Chat


def chat(
    context: typer.Context,
    *,
    model: options.ModelOption = None,
    sparsity: options.SparsityOption,
    plan: options.PlanOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", metavar="TEXT", help="What the model is told first.", show_default="what its template says"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens of an answer, at most.")
    ] = 512,
    room: Annotated[
        int,
        typer.Option(
            "--context", min=1, metavar="TOKENS", help="Tokens of the conversation, at most; the model may have fewer."
        ),
    ] = 4096,
    temperature: options.TemperatureOption,
    top_k: options.TopKOption,
    top_p: options.TopPOption,
    seed: options.SeedOption = None,
    calibration: options.CalibrationOption = None,
    dtype: options.DtypeOption = None,
    device: options.DeviceOption,
    backend: options.BackendOption,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Converse with a model, decoding sparsely, with speed and realised sparsity after each answer.

    What was said stays in the key/value cache: only new text is processed. Ctrl-C stops an answer, Ctrl-D leaves; /help
    lists the commands, /sparsity and /plan change how the next answers are decoded.

    Answers go to stdout, all else to stderr. From a pipe every line is a message or a command, and the first mistake
    ends it. With --json the whole conversation is one object at the end.

    Examples:
        teal chat
        teal chat -s 0.4 --seed 0
    """
    out = output(json, quiet)
    options.check_plan(context, plan, "sparsity")

    from teal_cli.decoding.sampling import Sampling
    from teal_cli.runs.chat import Chat, ChatRequest, check_chat
    from teal_cli.runs.session import open_session

    sampling = Sampling(temperature, top_k, top_p, secrets.randbits(32) if seed is None else seed)
    session = open_session(model, dtype=dtype, device=device, backend=backend, calibration=calibration, load=False)
    request = ChatRequest(sparsity, plan, sampling, max_new_tokens, room, system)
    check_chat(session, request)
    load(out, session)
    talk = Chat(session, request)
    _greet(out, talk)
    _converse(out, talk)
    if out.json:
        out.result(talk.as_dict(), lambda console: None)


def _greet(out: Output, talk: Chat) -> None:
    session = talk.session
    made = made_with(session.entry.name, talk.level.plan.calibration, talk.level.name)
    out.note(f"{made}; {talk.level.plan.target:.0%} sparsity, {session.backend}, a context of {talk.context:,} tokens")
    for note in session.notes:
        out.note(note)
    _tell_cost(out, talk)
    out.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")


def _converse(out: Output, talk: Chat) -> None:
    """Take messages and commands until there are no more; on a terminal a mistake is told and nothing ends."""
    from teal_cli.ui.editor import on_terminal

    if out.json or not on_terminal():
        for line in sys.stdin or ():
            if not _take(out, talk, line.rstrip("\n")):
                break
        return
    for line in _typed(out, talk):
        try:
            if not _take(out, talk, line):
                break
        except TealError as error:
            out.problem(error.message, error.hint)
        except KeyboardInterrupt:
            pass  # what was said stays, and `_answer` has told so


def _typed(out: Output, talk: Chat) -> Iterator[str]:
    from teal_cli.runs.plans import plan_names
    from teal_cli.ui.editor import Editor

    following = {"/sparsity": completion.SPARSITIES, "/plan": plan_names(talk.session.entry), "/save": None}
    editor = Editor({name: following.get(name, ()) for name in COMMANDS}, settings.teal_home() / "chat_history")
    while True:
        try:
            yield editor.ask()
        except EOFError:
            return
        except KeyboardInterrupt:
            out.note("Ctrl-D or /exit leaves")


def _take(out: Output, talk: Chat, line: str) -> bool:
    """Answer a message or obey a command; False where it is to be the last."""
    if not line.startswith("/"):
        if line.strip():
            _answer(out, talk, line)
        return True
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name}", hint=did_you_mean(name, COMMANDS) + "/help lists them")
    COMMANDS[name].run(out, talk, argument.strip())
    return name != "/exit"


def _answer(out: Output, talk: Chat, message: str) -> None:
    before = len(talk.answers)
    try:
        with closing(talk.say(message)) as pieces:
            for piece in pieces:
                out.write(piece)
    finally:
        if len(talk.answers) > before:
            out.write("\n")
            _figures(out, talk, talk.answers[-1])
        elif sys.exc_info()[0] is KeyboardInterrupt:
            out.note("stopped before the first token: the message is taken back")


def _figures(out: Output, talk: Chat, answer: Answer) -> None:
    out.note(
        f"[{answer.tokens_per_s:.1f} tok/s, {answer.tokens} tokens; {answer.realised:.1%} dropped of "
        f"{answer.target:.0%}; prefill {answer.prefilled} tokens in {answer.prefill_s:.2f} s, {answer.kept} were there"
        f"; context {talk.used:,} of {talk.context:,}]"
    )
    ends = {
        "stopped": "stopped; what was said stays in the conversation",
        "length": f"cut off after {answer.tokens} tokens, as --max-new-tokens says",
        "context": f"the context of {talk.context:,} tokens is full; /reset begins a new conversation",
    }
    if answer.end in ends:
        out.note(ends[answer.end])


def _tell_cost(out: Output, talk: Chat) -> None:
    from teal_cli.runs.costs import NOTABLE

    cost = talk.known_cost()
    if cost is not None and cost.increase > NOTABLE:
        out.note(
            f"{talk.level.label} costs {cost.increase:.0%} in perplexity on {cost.dataset}, by `teal eval` over "
            f"{cost.tokens:,} tokens"
        )


# ---------------------------------------------------------------- commands
def _use_sparsity(out: Output, talk: Chat, argument: str) -> None:
    try:
        target = settings.sparsity(argument)
    except ValueError as error:
        raise UsageError(f"/sparsity {argument} {error}", hint="/sparsity 0.4") from None
    talk.use(target)
    _told(out, talk)


def _use_plan(out: Output, talk: Chat, argument: str) -> None:
    from teal_cli.runs.plans import plan_names

    if not argument:
        names = plan_names(talk.session.entry)
        there = f"/plan {names[0]}; there are {', '.join(names)}" if names else "`teal plan make` makes one"
        raise UsageError("which plan?", hint=there)
    talk.use(0.0, argument)
    _told(out, talk)


def _told(out: Output, talk: Chat) -> None:
    plan = talk.level.plan
    out.note(f"from here on {made_with(talk.session.entry.name, plan.calibration, talk.level.name)}, {plan.target:.0%}")
    _tell_cost(out, talk)


def _stats(out: Output, talk: Chat, argument: str) -> None:
    headings = (">answer", "level", ">dropped", ">tokens", ">tok/s", ">prefilled", ">kept", ">prefill s", "end")
    rows = [
        (
            number,
            answer.level,
            f"{answer.realised:.1%}",
            answer.tokens,
            f"{answer.tokens_per_s:.1f}",
            answer.prefilled,
            answer.kept,
            f"{answer.prefill_s:.2f}",
            answer.end,
        )
        for number, answer in enumerate(talk.answers, 1)
    ]
    if out.json:
        return  # the object at the end has them
    show_table(out.err, headings, rows)
    out.err.print(f"context: {talk.used:,} of {talk.context:,} tokens", markup=False)


def _reset(out: Output, talk: Chat, argument: str) -> None:
    talk.reset()
    out.note("a new conversation")


def _save(out: Output, talk: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("where should the conversation go?", hint="/save FILE.json")
    path = Path(argument).expanduser()
    talk.save(path)
    out.note(f"{len(talk.messages)} messages written to {path}")


def _help(out: Output, talk: Chat, argument: str) -> None:
    if not out.json:
        show_table(out.err, ("command", "does"), [(c.usage, c.help) for c in COMMANDS.values()])


def _leave(out: Output, talk: Chat, argument: str) -> None:
    pass


class Command(NamedTuple):
    """A line that begins with a slash: how it is written, what it does."""

    usage: str
    help: str
    run: Callable[[Output, Chat, str], None]


COMMANDS = {
    command.usage.partition(" ")[0]: command
    for command in (
        Command("/sparsity S", "Drop this part of every input from here on; 0 is the dense path.", _use_sparsity),
        Command("/plan NAME", "Decode under a plan of the model from here on.", _use_plan),
        Command("/stats", "Speed, realised sparsity and prefill of every answer.", _stats),
        Command("/reset", "Begin a new conversation.", _reset),
        Command("/save FILE", "Write the conversation and its figures as JSON.", _save),
        Command("/help", "This list.", _help),
        Command("/exit", "Leave; so does Ctrl-D.", _leave),
    )
}
