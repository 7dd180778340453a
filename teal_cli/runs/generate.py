"""`teal generate` as a library call: text in, tokens out as they come, and at the end one object with every figure.

Puts a session, a decoder and, for a dump, a store together. Printing is the command's business.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.data.prompts import KnownPrompts, Prompt
from teal_cli.data.tokenizer import StopTexts, TextStream
from teal_cli.decoding.decoder import Decoder, check_room
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import UsageError
from teal_cli.files import require_space
from teal_cli.runs.dump import NO_ROOM, open_writer, row_bytes, store_headers
from teal_cli.runs.plans import Level
from teal_cli.runs.session import Session
from teal_cli.store.placing import check_target
from teal_kernels.spec import PROJECTIONS


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate.

    Attributes:
        prompt: the text.
        sparsity: uniform target in [0, 1); 0 is the dense path. Not looked at where there is a plan.
        max_new_tokens: N; one prefill and N-1 steps.
        sampling: how tokens are drawn.
        chat: wrap the prompt in the model's chat template.
        ignore_eos: go on past the end-of-sequence token.
        dump: where to write a store of what flowed into each projection; None writes none.
        force: replace a store that is there.
        plan: name of a plan of the model, in place of a uniform one.
        stop: texts that end it, wherever tokens are cut; none is part of the result. Not together with `dump`.
        sequence: its index among several prompts; equal prompts are drawn apart by it, as in a dump.
    """

    prompt: str
    sparsity: float
    max_new_tokens: int
    sampling: Sampling
    chat: bool = False
    ignore_eos: bool = False
    dump: Path | None = None
    force: bool = False
    plan: str | None = None
    stop: tuple[str, ...] = ()
    sequence: int = 0


@dataclass(frozen=True)
class Piece:
    """One new token, and the text that is certain with it (often empty: a token may end inside a character, and a stop
    text may have begun). At the end, without a token, what was held back for nothing."""

    token_id: int | None
    text: str


@dataclass(frozen=True)
class Generation:
    """The whole result; `as_dict` is what `--json` prints.

    Attributes:
        calibration: whose thresholds were applied; None on the dense path.
        plan: name of the plan; None for a uniform one.
        realised: share of dropped input entries, weighted by the size of each projection's matrix.
        per_projection: the same for each projection, mean over the layers.
        effective_gbps: bytes that the steps had to read (kept weight rows, lm_head, key/value cache) per second, in
            GB/s.
    """

    model: str
    calibration: str | None
    plan: str | None
    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    target: float
    realised: float
    per_projection: dict[str, float]
    backend: str
    device: str
    dtype: str
    seed: int
    load_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    effective_gbps: float
    store: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "calibration": self.calibration,
            "plan": self.plan,
            "prompt": self.prompt,
            "text": self.text,
            "prompt_ids": list(self.prompt_ids),
            "token_ids": list(self.token_ids),
            "sparsity": {"target": self.target, "realised": self.realised, "per_projection": self.per_projection},
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "timings": {
                "load_s": self.load_s,
                "prefill_s": self.prefill_s,
                "decode_s": self.decode_s,
                "tokens_per_s": self.tokens_per_s,
                "effective_gbps": self.effective_gbps,
            },
            "store": self.store,
        }


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with the figures of what was decoded until then."""

    def __init__(self, result: Generation) -> None:
        super().__init__()
        self.result = result


def check_request(session: Session, request: GenerateRequest) -> tuple[Prompt, Level]:
    """Everything about a request that can be known before weights are read: its prompt, and the level it asks for.

    Raises:
        UsageError: an empty or too long prompt, an empty stop text, a dump with stop texts, or a store that is there
            already without `force`.
        NotFoundError: a sparsity above 0 and no calibration.
        HardwareError: the backend cannot run the plan's criterion.
        TealError: the disk has no room for the store.
    """
    StopTexts(request.stop)
    if request.dump is not None and request.stop:
        raise UsageError("a store ends at a token, not within one", hint="give either a dump or stop texts")
    if request.dump is not None:
        check_target(request.dump, force=request.force)
    (level,) = session.levels(*((), (request.plan,)) if request.plan else ((request.sparsity,),))
    session.check_decodes(level.plan)
    prompt = Prompt(request.prompt, tuple(session.encode(request.prompt, chat=request.chat)))
    check_room(prompt.token_ids, request.max_new_tokens, session.config.context, session.config.rope_switch)
    if request.dump is not None:
        require_space(request.dump, round((request.max_new_tokens - 1) * row_bytes(session, level.plan)), hint=NO_ROOM)
    return prompt, level


def generate(session: Session, request: GenerateRequest) -> Generator[Piece | Generation, None, None]:
    """Yield a `Piece` for every token as it comes, and last the `Generation`.

    A dump never changes a token. Left by an exception, Ctrl-C included, the store holds every step that was complete.

    Raises:
        UsageError, NotFoundError: as `check_request`.
        TealError: the disk is full, or the checkpoint is damaged.
        Stopped: KeyboardInterrupt came, here or thrown in, once there was a token.
    """
    prompt, level = check_request(session, request)
    plan = level.plan
    decoder = session.decoder(plan, session.cache(len(prompt.token_ids) + request.max_new_tokens))
    stop = () if request.ignore_eos else session.config.eos_ids
    writer = None
    if request.dump is not None:
        source = KnownPrompts("--prompt", (prompt,))
        header, levels = store_headers(
            session, [prompt], [level], request.max_new_tokens, request.sampling, source=source, stop=stop
        )
        writer = open_writer(request.dump, header, levels, str(session.device), force=request.force)
    token_ids, pieces, stops, text = [], TextStream(session.tokenizer), StopTexts(request.stop), []
    try:
        with writer or nullcontext():
            capture = None if writer is None else writer.level(plan.target)
            for token in decoder.generate(
                prompt.token_ids,
                max_new_tokens=request.max_new_tokens,
                sampling=request.sampling,
                sequence=request.sequence,
                stop=stop,
                capture=capture,
            ):
                token_ids.append(token)
                text.append(stops.push(pieces.push(token)))
                yield Piece(token, text[-1])
                if stops.found:
                    break
            if writer is not None and capture is not None:
                capture.finish()
                writer.complete()
    except KeyboardInterrupt:
        if not token_ids:
            raise
        said = "".join(text) + stops.rest()
        raise Stopped(_result(session, request, level, decoder, prompt, token_ids, said)) from None
    if rest := stops.rest():
        text.append(rest)
        yield Piece(None, rest)
    yield _result(session, request, level, decoder, prompt, token_ids, "".join(text))


def _result(
    session: Session,
    request: GenerateRequest,
    level: Level,
    decoder: Decoder,
    prompt: Prompt,
    token_ids: list[int],
    text: str,
) -> Generation:
    dropped, tally = decoder.realised(), decoder.tally
    return Generation(
        model=session.entry.name,
        calibration=level.plan.calibration,
        plan=level.name,
        prompt=request.prompt,
        text=text,
        prompt_ids=prompt.token_ids,
        token_ids=tuple(token_ids),
        target=level.plan.target,
        realised=decoder.realised_share(),
        per_projection={p: float(share) for p, share in zip(PROJECTIONS, dropped.mean(0), strict=True)},
        backend=decoder.step.backend,
        device=str(session.device),
        dtype=session.dtype,
        seed=request.sampling.seed,
        load_s=session.load_s,
        prefill_s=tally.prefill_s,
        decode_s=tally.decode_s,
        tokens_per_s=tally.tokens_per_s,
        effective_gbps=decoder.effective_gbps(),
        store=None if request.dump is None else str(request.dump),
    )
