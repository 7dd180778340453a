"""`teal chat` as a library call: a conversation whose history stays in the key/value cache.

Every turn is the whole conversation in the model's chat template; what of it the cache holds already, token for token,
is not prefilled again. An answer that is left, by Ctrl-C for example, stays in the history as far as it was said.
Reading, printing and commands that begin with a slash are the command's business.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from teal_cli.data.tokenizer import TextStream
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import UsageError
from teal_cli.files import disk_errors, occupied, write_json
from teal_cli.runs.costs import Cost, known_cost
from teal_cli.runs.session import Session

SCHEMA: Final = "teal-chat/1"

ENDED, STOPPED, LENGTH, CONTEXT = "ended", "stopped", "length", "context"
"""How an answer ends: by the model itself, left by the user, at the most new tokens, at the end of the context."""


@dataclass(frozen=True)
class ChatRequest:
    """How to converse.

    Attributes:
        sparsity: uniform target in [0, 1); 0 is the dense path. Not looked at where there is a plan.
        plan: name of a plan of the model.
        sampling: how tokens are drawn.
        max_new_tokens: of one answer.
        context: tokens of the whole conversation, at most the model's.
        system: what the model is told before the conversation; None leaves it to the template.
    """

    sparsity: float
    plan: str | None
    sampling: Sampling
    max_new_tokens: int = 512
    context: int = 4096
    system: str | None = None


@dataclass(frozen=True)
class Answer:
    """One answer and its figures.

    Attributes:
        level: label of the plan: its target, or its name. target: its sparsity.
        realised: share of dropped input entries, weighted by the size of each projection's matrix.
        tokens: new tokens. prefilled, kept: tokens of the prompt that were run, and that the cache held.
        tokens_per_s: decode steps per second. prefill_s, decode_s: wall-clock.
        end: one of ended, stopped, length, context.
    """

    text: str
    level: str
    target: float
    realised: float
    tokens: int
    prefilled: int
    kept: int
    tokens_per_s: float
    prefill_s: float
    decode_s: float
    end: str


def check_chat(session: Session, request: ChatRequest) -> None:
    """Refuse, before weights are read, a conversation that could not begin.

    Raises:
        UsageError: the model has no chat template, or what it is told first leaves no room in the context.
        UsageError, NotFoundError, HardwareError: as `Session.levels` and `check_decodes`.
        TealError: the template fails.
    """
    (level,) = session.levels(*((), (request.plan,)) if request.plan else ((request.sparsity,),))
    session.check_decodes(level.plan)
    context = min(request.context, session.config.context)
    begun = session.encode_chat([*_told_first(request), {"role": "user", "content": "?"}])
    if len(begun) > context:
        raise UsageError(
            f"the context of {context} tokens has no room for a message: what stands before it has {len(begun)}",
            hint="shorten --system, or raise --context where the model has more",
        )


def _told_first(request: ChatRequest) -> list[dict[str, str]]:
    return [] if request.system is None else [{"role": "system", "content": request.system}]


class Chat:
    """A conversation of one session.

    Args:
        session: the opened model; it has a chat template.
        request: how to converse.

    Attributes:
        messages: `role` and `content` of each, the system's first if there is one.
        answers: all of this conversation.

    Raises:
        UsageError, NotFoundError: as `Session.levels`.
    """

    def __init__(self, session: Session, request: ChatRequest) -> None:
        self.session, self.request = session, request
        self._cache = session.cache(request.context)
        self._conversations = -1
        self.use(request.sparsity, request.plan)
        self.reset()

    @property
    def context(self) -> int:
        """Tokens that the conversation may have."""
        return self._cache.max_tokens

    @property
    def used(self) -> int:
        """Tokens that the cache holds."""
        return self._cache.length

    def use(self, sparsity: float, plan: str | None = None) -> None:
        """Decode under another plan from here on; what was said stays. Raises as `Session.levels`."""
        (level,) = self.session.levels((), (plan,)) if plan else self.session.levels((sparsity,))
        self._decoder = self.session.decoder(level.plan, self._cache)
        self.level = level

    def known_cost(self) -> Cost | None:
        """What the level in use is known to cost, from `teal eval`."""
        return known_cost(self.session.entry, self.level) if self.level.plan.target else None

    def reset(self) -> None:
        """Begin a new conversation, under the same plan."""
        self.messages = _told_first(self.request)
        self.answers: list[Answer] = []
        self._ids: list[int] = []
        self._cache.length = 0
        self._conversations += 1

    def say(self, text: str) -> Generator[str, None, None]:
        """Say something and yield the answer in pieces of text; it is in `answers` when the iterator ends or is closed.

        Left before the first token, what was said is taken back.

        Raises:
            UsageError: the context has no room for it.
            TealError: the template fails, or no token can be chosen.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.session.encode_chat(messages)
        room = self.context - len(ids) + 1  # the last token of an answer is never fed
        if room < 1:
            raise UsageError(
                f"the context of {self.context} tokens is full: with this message the conversation has {len(ids)}",
                hint="/reset begins a new conversation; --context makes room where the model has more",
            )
        kept = min(_common(self._ids[: self._cache.length], ids), len(ids) - 1)
        self._cache.length = kept  # from here on `_ids` says what the cache holds, whenever this is left
        self._ids = ids
        self._decoder.count_anew()
        pieces, end = [], STOPPED
        stream, begin = TextStream(self.session.tokenizer), len(ids)
        stop = self.session.config.eos_ids
        try:
            for token in self._decoder.generate(
                tuple(ids),
                max_new_tokens=min(self.request.max_new_tokens, room),
                sampling=self.request.sampling,
                sequence=self._conversations,
                stop=stop,
                cached=kept,
            ):
                ids.append(token)
                pieces.append(stream.push(token))
                yield pieces[-1]
            end = ENDED if ids[-1] in stop else LENGTH if self.request.max_new_tokens < room else CONTEXT
        finally:
            if pieces:
                answer = "".join(pieces)
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                self.answers.append(self._figures(answer, len(ids) - begin, kept, end))

    def _figures(self, text: str, tokens: int, kept: int, end: str) -> Answer:
        tally = self._decoder.tally
        return Answer(
            text=text,
            level=self.level.label,
            target=self.level.plan.target,
            realised=self._decoder.realised_share(),
            tokens=tokens,
            prefilled=tally.prompt_tokens,
            kept=kept,
            tokens_per_s=tally.tokens_per_s,
            prefill_s=tally.prefill_s,
            decode_s=tally.decode_s,
            end=end,
        )

    def as_dict(self) -> dict[str, Any]:
        """What `/save` and `--json` write."""
        session = self.session
        return {
            "schema": SCHEMA,
            "model": session.entry.name,
            "calibration": self.level.plan.calibration,
            "plan": self.level.name,
            "backend": session.backend,
            "device": str(session.device),
            "dtype": session.dtype,
            "sampling": asdict(self.request.sampling),
            "context": {"tokens": self.context, "used": self.used},
            "messages": self.messages,
            "answers": [asdict(answer) for answer in self.answers],
        }

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, to a file that is not there yet.

        Raises:
            UsageError: something is there. TealError: the disk refuses.
        """
        if occupied(path):
            raise UsageError(f"{path} exists", hint="give another name: a conversation replaces nothing")
        with disk_errors(path):
            write_json(path, self.as_dict())


def _common(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many token ids two sequences have in common from the beginning."""
    both = min(len(held), len(wanted))
    return next((place for place in range(both) if held[place] != wanted[place]), both)
