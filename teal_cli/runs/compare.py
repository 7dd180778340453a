"""`teal compare`: prompts decoded densely and at sparsity levels, side by side.

Two things are measured. Decoded freely, each level goes on with its own tokens, as a user sees it: where does it part
from the dense model, and how much of what it says is the same. Fed the tokens of the dense model, every step has a
dense distribution to stand beside: how far is the sparse one from it. The first token comes from the dense prompt
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import median

import numpy as np
from numpy.typing import NDArray

from teal_cli.data.prompts import Prompt, Prompts, shortage
from teal_cli.data.tokenizer import TextStream
from teal_cli.decoding.decoder import Decoder, check_room
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import UsageError
from teal_cli.passes.forward import Sparse, States, forward
from teal_cli.passes.judge import realised_bytes
from teal_cli.passes.layers import ResidentLayers
from teal_cli.passes.score import differences
from teal_cli.runs.plans import Level, calibration_of
from teal_cli.runs.session import Session
from teal_cli.sparsity.plan import dense_plan
from teal_kernels.spec import PROJECTIONS


@dataclass(frozen=True)
class CompareRequest:
    """What to compare.

    Attributes:
        prompts: where the prompts come from.
        sparsities: targets of uniform plans, or else `plans`: names of plans of the model. The dense model is always
            compared with, and 0 need not be given.
        max_new_tokens: N tokens of each prompt, the first of them from the dense prompt.
        sampling: how tokens are drawn, the same for every level.
        chat: wrap prompts in the model's chat template.
        ignore_eos: go on past the end-of-sequence token.
    """

    prompts: Prompts
    sparsities: tuple[float, ...]
    plans: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling
    chat: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class Answer:
    """What was decoded from a prompt.

    Attributes:
        token_ids: in order. pieces: for each the text that is complete with it, often empty: a token may end inside a
            character. text: all of it.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class LevelAnswer:
    """One level beside the dense model, for one prompt.

    Attributes:
        answer: decoded with its own tokens.
        differs: of each token, whether it stands outside what the longest common parts of both answers are made of.
        parts_at: index of the first token that is not the dense model's; None where all are.
        agreement: share of the dense model's tokens that stand at the same place here.
        kl: KL(dense || sparse) in nats for each step that is fed a token of the dense model; the first predicts its
            second token. same: whether both find the same token most likely.
    """

    answer: Answer
    differs: tuple[bool, ...]
    parts_at: int | None
    agreement: float
    kl: tuple[float, ...]
    same: tuple[bool, ...]


@dataclass(frozen=True)
class PromptComparison:
    """One prompt: the dense model's answer, and each level's, in the order of `Comparison.levels`."""

    prompt: str
    prompt_ids: tuple[int, ...]
    dense: Answer
    levels: tuple[LevelAnswer, ...]


@dataclass(frozen=True)
class LevelSummary:
    """One level over all prompts.

    Attributes:
        plan: its name; None for a uniform level. sparsity: its target. label: how it is shown.
        realised: share of dropped entries over the steps fed the dense model's tokens, weighted by the size of each
            projection's matrix.
        agreement: mean of the prompts'. parted: of how many prompts the tokens part. parts_at: median index at which
            they do; None where none does.
        kl: mean over the steps of all prompts, in nats. top1: share of the steps with the same most likely token.
    """

    plan: str | None
    sparsity: float
    label: str
    realised: float
    agreement: float
    parted: int
    parts_at: float | None
    kl: float
    top1: float


@dataclass(frozen=True)
class Comparison:
    """The whole result; fields of JSON are as here."""

    model: str
    calibration: str | None
    backend: str
    device: str
    dtype: str
    max_new_tokens: int
    temperature: float
    seed: int
    levels: tuple[LevelSummary, ...]
    prompts: tuple[PromptComparison, ...]


@dataclass(frozen=True)
class Compared:
    """Progress: prompts done, of how many."""

    done: int
    total: int


def check_compare(session: Session, request: CompareRequest) -> tuple[tuple[Level, ...], list[Prompt]]:
    """What is compared with the dense model, and on which prompts, before weights are read.

    Raises:
        UsageError: no prompt, an empty or too long one, no level, or sparsities and plans together.
        NotFoundError: no calibration, plan or dataset.
        HardwareError: the backend cannot run a plan's criterion.
    """
    levels = session.levels(request.sparsities, request.plans)
    levels = tuple(level for level in levels if level.plan.target)
    if not levels:
        raise UsageError("there is nothing to compare the dense model with", hint="give --sparsity 0.5 or --plan NAME")
    prompts = request.prompts.read(lambda text: session.encode(text, chat=request.chat), session.decode)
    told = shortage(request.prompts, len(prompts))
    session.notes += [note for note in told if note not in session.notes]  # a command checks before it loads, too
    for prompt in prompts:
        check_room(prompt.token_ids, request.max_new_tokens, session.config.context, session.config.rope_switch)
    session.check_decodes(*(level.plan for level in levels))
    return levels, prompts


def compare(session: Session, request: CompareRequest) -> Iterator[Compared | Comparison]:
    """Decode every prompt densely and at every level, and yield the `Comparison` last.

    Raises:
        UsageError, NotFoundError, HardwareError: as `check_compare`.
        TealError: the model's logits are not finite.
    """
    levels, prompts = check_compare(session, request)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    cache = session.cache(longest + request.max_new_tokens)
    plans = [dense_plan(session.config.layers), *(level.plan for level in levels)]
    decoders = [session.decoder(plan, cache) for plan in plans]
    kept = [np.zeros((session.config.layers, len(PROJECTIONS)), np.int64) for _ in levels]
    found: list[PromptComparison] = []
    rows = 0
    for number, prompt in enumerate(prompts):
        yield Compared(number, len(prompts))
        dense, *answers = [_decode(session, request, decoder, prompt, number) for decoder in decoders]
        variants = [
            Sparse(level.plan, len(prompt.token_ids), counts) for level, counts in zip(levels, kept, strict=True)
        ]
        steps = _steps(session, (*prompt.token_ids, *dense.token_ids[:-1]), variants)
        rows += len(dense.token_ids) - 1
        beside = [_beside(dense, answer, *step) for answer, step in zip(answers, steps, strict=True)]
        found.append(PromptComparison(prompt.text, prompt.token_ids, dense, tuple(beside)))
    yield Compared(len(prompts), len(prompts))
    yield Comparison(
        model=session.entry.name,
        calibration=calibration_of(levels),
        backend=decoders[1].step.backend,
        device=str(session.device),
        dtype=session.dtype,
        max_new_tokens=request.max_new_tokens,
        temperature=request.sampling.temperature,
        seed=request.sampling.seed,
        levels=tuple(
            _summary(
                level,
                realised_bytes(session.config, counts, rows) if rows else 0.0,
                [prompt.levels[index] for prompt in found],
            )
            for index, (level, counts) in enumerate(zip(levels, kept, strict=True))
        ),
        prompts=tuple(found),
    )


def _decode(session: Session, request: CompareRequest, decoder: Decoder, prompt: Prompt, number: int) -> Answer:
    stream, ids, pieces = TextStream(session.tokenizer), [], []
    for token in decoder.generate(
        prompt.token_ids,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        sequence=number,
        stop=() if request.ignore_eos else session.config.eos_ids,
    ):
        ids.append(token)
        pieces.append(stream.push(token))
    return Answer(tuple(ids), tuple(pieces), "".join(pieces))


def _steps(
    session: Session, tokens: Sequence[int], variants: Sequence[Sparse]
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """(KL, whether the most likely token is the same) of every sparse row of each variant, fed these tokens."""
    layers, start = ResidentLayers(session.model), variants[0].position(len(tokens))
    head, found = layers.open_head(), []

    def sink(_: int, states: States) -> None:
        for sparse in states.sparse:
            kl, same = differences(head, session.config.vocab, states.dense[start:], sparse)
            found.append((kl.cpu().numpy(), same.cpu().numpy()))

    for _ in forward(layers, [np.array(tokens, np.int64)], variants, sink=sink):
        pass
    return found


def _beside(dense: Answer, answer: Answer, kl: NDArray[np.float64], same: NDArray[np.bool_]) -> LevelAnswer:
    theirs, ours = dense.token_ids, answer.token_ids
    differs = np.ones(len(ours), np.bool_)
    for match in SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks():
        differs[match.b : match.b + match.size] = False
    equal = [a == b for a, b in zip(theirs, ours, strict=False)]
    parts_at = equal.index(False) if False in equal else None
    if parts_at is None and len(theirs) != len(ours):  # one of them ended first
        parts_at = len(equal)
    return LevelAnswer(
        answer, tuple(differs.tolist()), parts_at, sum(equal) / len(theirs), tuple(kl.tolist()), tuple(same.tolist())
    )


def _summary(level: Level, realised: float, answers: Sequence[LevelAnswer]) -> LevelSummary:
    parted = [answer.parts_at for answer in answers if answer.parts_at is not None]
    kl = [value for answer in answers for value in answer.kl]
    same = [value for answer in answers for value in answer.same]
    return LevelSummary(
        plan=level.name,
        sparsity=level.plan.target,
        label=level.name or f"{level.plan.target:.0%}",
        realised=realised,
        agreement=sum(answer.agreement for answer in answers) / len(answers),
        parted=len(parted),
        parts_at=float(median(parted)) if parted else None,
        kl=sum(kl) / len(kl) if kl else 0.0,
        top1=sum(same) / len(same) if same else 1.0,
    )
