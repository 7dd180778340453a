"""`teal dump` as a library call: prompts and levels in, one store out, with progress during.

Puts a session, decoders, a job and a store together; printing is the command's business.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2
from pathlib import Path

import numpy as np

from teal_cli.data.prompts import Prompt, Prompts, PromptSource, shortage
from teal_cli.decoding.decoder import Decoder, check_room
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import UsageError
from teal_cli.files import require_space, sizes_below
from teal_cli.model.weights import config_sha256
from teal_cli.runs.board import Board, LocalBoard
from teal_cli.runs.forced import Forcing
from teal_cli.runs.job import Decoding, Producer, Progress, run_job
from teal_cli.runs.plans import Level, calibration_of
from teal_cli.runs.ranks import Target, is_whole, run_ranks
from teal_cli.runs.session import Session
from teal_cli.sparsity.criterion import MAGNITUDE
from teal_cli.sparsity.plan import Plan, dense_plan
from teal_cli.store.manifest import is_collection
from teal_cli.store.metadata import read_state
from teal_cli.store.placing import check_resume, check_target, destination
from teal_cli.store.schema import VALUE_DTYPES, StoredMixture, level_name
from teal_cli.store.writer import LevelHeader, StoreHeader, StoreWriter
from teal_kernels.spec import PROJECTION_INDEX, SITES

# Bytes on disk per byte of kept values, after byte shuffle and zstd-1: SmolLM2-135M at 50%, 2026-11-23.
_VALUE_RATIO = {"bfloat16": 0.65, "float16": 0.78, "float32": 0.84}
NO_ROOM = "free some space, write to another disk, or ask for fewer rows"

PASS = "pass"
"""What a store names as the backend where rows come from a pass."""


@dataclass(frozen=True)
class DumpRequest:
    """What to dump.

    Attributes:
        levels: sparsity targets, each in [0, 1); or else
        plans: names of plans of the model, each with a target of its own.
        follow: `free`, each level goes on with its own tokens; `dense`, all are fed those that the dense model decodes;
            `text`, those of the dataset's documents.
        prefill: `none`; or `dense` or `sparse`: the prompts have rows too, and are run so.
        prompts: where the prompts come from.
        max_new_tokens: N tokens a prompt, N-1 rows.
        sampling: how tokens are drawn; each sequence has its own random stream.
        ignore_eos: go on past the end-of-sequence token, so that every sequence has all its rows.
    """

    levels: tuple[float, ...]
    prompts: Prompts
    max_new_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    plans: tuple[str, ...] = ()
    follow: str = "free"
    prefill: str = "none"


@dataclass(frozen=True)
class Following:
    """Progress of the dense model, which decodes what all levels are fed.

    Attributes:
        done, total: tokens over all prompts; of several ranks, each counts what it has been handed as done by all.
    """

    done: int
    total: int


class Dump:
    """A dump that is ready to run.

    Args:
        session: the opened model; its weights are not read before they are needed.
        request: what to dump.

    Attributes:
        prompts: sequence i starts from prompt i. levels: plans, one level each.

    Raises:
        UsageError: too few tokens asked for, or a prompt that does not fit the context.
        NotFoundError: no calibration, dataset or file of prompts.
        HardwareError: rows are decoded, and the backend cannot run a plan's criterion.
    """

    def __init__(self, session: Session, request: DumpRequest) -> None:
        if request.max_new_tokens < 2:
            raise UsageError(
                "a dump needs at least 2 new tokens a prompt: the first one comes from the prefill",
                hint="raise --max-new-tokens",
            )
        self.session, self.request = session, request
        self.prompts = self._read_prompts()
        session.notes += shortage(request.prompts, len(self.prompts))
        self.levels = session.levels(() if request.plans else request.levels, request.plans)
        self._plans = {level_name(level.plan.target): level.plan for level in self.levels}
        _check_levels(self.levels)
        if request.follow == "free":
            session.check_decodes(*self._plans.values())
        self._stop = () if request.ignore_eos else session.config.eos_ids
        for prompt in self.prompts:
            check_room(prompt.token_ids, request.max_new_tokens, session.config.context, session.config.rope_switch)

    def _read_prompts(self) -> list[Prompt]:
        """The prompts, with the tokens that follow them where the text gives these."""
        source = self.request.prompts
        if self.request.follow == "text" and isinstance(source, PromptSource):
            if source.file is not None:
                raise UsageError(
                    "a file of prompts has no text that follows them", hint="give a --dataset, or --follow dense"
                )
            source = replace(source, following=self.request.max_new_tokens)
        return source.read(self.session.encode, self.session.decode)

    def _follow_dense(self, board: Board) -> Iterator[Following]:
        """Let the dense model decode what all levels are fed, where a store that is resumed does not say it; each rank
        takes some of the prompts.
        """
        decoder = self.decoder_for(dense_plan(self.session.config.layers))
        missing = [index for index, prompt in enumerate(self.prompts) if not prompt.following]
        most = self.request.max_new_tokens
        while (turn := board.add("dense", 1) - 1) < len(missing):
            tokens = []
            for token in decoder.generate(
                self.prompts[missing[turn]].token_ids,
                max_new_tokens=most,
                sampling=self.request.sampling,
                sequence=missing[turn],
                stop=self._stop,
            ):
                tokens.append(token)
                yield Following(turn * most + len(tokens), len(missing) * most)
            board.put(f"dense/{missing[turn]}", json.dumps(tokens))
        if missing:
            yield Following(len(missing) * most, len(missing) * most)
        for index in missing:
            following = tuple(json.loads(board.get(f"dense/{index}")))
            self.prompts[index] = replace(self.prompts[index], following=following)

    def decoder_for(self, plan: Plan) -> Decoder:
        """A decoder under any plan of the model; all share one cache."""
        return self.session.decoder(plan, next(iter(self.decoders.values())).cache)

    @cached_property
    def decoders(self) -> dict[str, Decoder]:
        """Level name -> decoder."""
        longest = max(len(prompt.token_ids) for prompt in self.prompts)
        cache = self.session.cache(longest + self.request.max_new_tokens)
        return {name: self.session.decoder(plan, cache) for name, plan in self._plans.items()}

    @property
    def calibration(self) -> str | None:
        """Whose thresholds are applied; None where every level is dense."""
        return calibration_of(self.levels)

    @property
    def targets(self) -> tuple[float, ...]:
        """Sparsity target of each level."""
        return tuple(plan.target for plan in self._plans.values())

    @property
    def rows(self) -> int:
        """Rows over all levels, at most."""
        return len(self._plans) * _most_rows(self.prompts, self.request.max_new_tokens, self.request.prefill)

    @property
    def store_bytes(self) -> int:
        """Expected size of the store."""
        per_level = self.rows // len(self._plans)
        return round(sum(per_level * row_bytes(self.session, plan) for plan in self._plans.values()))

    def check(self, path: Path, *, force: bool = False, resume: bool = False) -> None:
        """Refuse, before weights are read, what could not be written.

        Raises:
            UsageError: something is at `path` and neither `force` nor `resume` is given, or the settings differ.
            NotFoundError: nothing to resume.
            TealError: the disk has no room for what is expected.
        """
        request, size = self.request, self.store_bytes
        if not resume:
            check_target(path, force=force)
        elif is_collection(path):
            pass  # its parts say it, when they are opened
        elif request.follow != "dense" or all(prompt.following for prompt in self.prompts):
            check_resume(destination(path), *self._headers())
        require_space(path, size - (sum(sizes_below(path).values()) if resume else 0), hint=NO_ROOM)

    def is_complete(self, path: Path) -> bool:
        """Whether the store at `path` holds all rows of this run, so that resuming it computes nothing.

        Raises:
            NotFoundError, UsageError, TealError: no store there, or other settings, as `check_resume`.
        """
        if self.request.follow == "dense" and not all(prompt.following for prompt in self.prompts):
            return False  # what it was made with is known only later
        target, (header, levels) = destination(path), self._headers()
        if not is_collection(path):
            check_resume(target, header, levels)
            return read_state(target).complete
        return is_whole(target, header, levels)

    def run(
        self,
        path: Path,
        *,
        force: bool = False,
        resume: bool = False,
        durable: bool = False,
        board: Board | None = None,
    ) -> Generator[Following | Progress, None, None]:
        """Write the store, yielding where it stands as often as that changes; left by an exception, it can be resumed.

        Where it is complete already, nothing is computed and nothing yielded.

        Args:
            force, resume, durable: as `open_writer` takes them.
            board: of the ranks that write it together, as a collection; None where this process is alone.

        Raises:
            UsageError: something is at `path` and neither `force` nor `resume` is given, or the settings differ.
            TealError: the disk is full, or another rank has failed.
        """
        request, board = self.request, board or LocalBoard()
        collection = is_collection(path)
        resume = resume or (collection and board.attempt > 0)
        if resume and self.is_complete(path):
            return
        if request.follow == "dense":
            yield from self._follow_dense(board)
        header, levels = self._headers()
        device = str(self.session.device)
        if board.size > 1 or (resume and collection):
            if durable:
                raise UsageError("--durable is for one process", hint="leave it out, or dump without torchrun")
            target = Target(path, header, levels, device, force=force and not resume, resume=resume)
            yield from run_ranks(board, target, self._producer())
        else:
            writer = open_writer(path, header, levels, device, force=force, resume=resume, durable=durable)
            yield from run_job(writer, self._producer())

    def _headers(self) -> tuple[StoreHeader, list[LevelHeader]]:
        """What the store says of itself."""
        request = self.request
        return store_headers(
            self.session, self.prompts, self.levels, request.max_new_tokens, request.sampling,
            source=request.prompts, stop=self._stop, follow=request.follow, prefill=request.prefill,
        )  # fmt: skip

    def _producer(self) -> Producer:
        if self.request.follow != "free":
            return Forcing(self.session.layers, self._plans, self.prompts, self.request.prefill)
        return Decoding(
            self.decoders,
            self.prompts,
            max_new_tokens=self.request.max_new_tokens,
            sampling=self.request.sampling,
            stop=self._stop,
            prefill=self.request.prefill,
        )


def _check_levels(levels: Sequence[Level]) -> None:
    """Refuse plans that one store cannot hold side by side."""
    targets = [level_name(level.plan.target) for level in levels]
    if len(set(targets)) < len(targets):
        raise UsageError(
            f"two plans have one target: {', '.join(targets)}", hint="a level is named by its target: dump them apart"
        )
    criteria = {level.plan.scoring.criterion for level in levels if level.plan.target > 0}
    if len(criteria) > 1:
        raise UsageError(
            f"the plans have different criteria: {', '.join(sorted(criteria))}",
            hint="a store has one criterion: dump them apart",
        )


def store_headers(
    session: Session,
    prompts: Sequence[Prompt],
    levels: Sequence[Level],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    source: Prompts,
    stop: Sequence[int],
    follow: str = "free",
    prefill: str = "none",
) -> tuple[StoreHeader, list[LevelHeader]]:
    """What a store of these prompts at these levels says of itself; equal headers mean equal contents.

    Args:
        prompts: sequence i starts from prompt i.
        levels: plans, one level each.
        max_new_tokens, sampling, stop: as `Decoder.generate` takes them.
        source: where the prompts come from.
    """
    mixture = session.config.mixture
    plans, names = [level.plan for level in levels], [level.name for level in levels if level.name]
    header = StoreHeader(
        model=session.entry.name,
        model_revision=session.entry.revision,
        config_sha256=config_sha256(session.entry.path),
        calibration=calibration_of(levels),
        plan=", ".join(names) or None,
        dtype=session.dtype,
        prompts={
            "source": source.name,
            "count": len(prompts),
            "texts": [prompt.text for prompt in prompts],
            "token_ids": [list(prompt.token_ids) for prompt in prompts],
            **({} if follow == "free" else {"following": [list(prompt.following) for prompt in prompts]}),
        },
        seed=sampling.seed,
        sampling={
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_new_tokens": max_new_tokens,
            "stop_ids": list(stop),
        },
        backend=session.backend if follow == "free" else PASS,
        layers=session.config.layers,
        channels={site: session.config.channels(site) for site in SITES},
        criterion={"name": next((p.scoring.criterion for p in plans if p.target > 0), MAGNITUDE)},
        run={
            "device": session.device.type,
            "ignore_eos": not stop,
            "follow": follow,
            "prefill": prefill,
            "source": source.options,
            **({"plans": names} if names else {}),
        },
        columns=() if follow == "free" else ("logprob",),
        mixture=None if mixture is None else StoredMixture(mixture.experts, mixture.routed, mixture.layers),
    )
    rows = _most_rows(prompts, max_new_tokens, prefill)
    return header, [_level_header(plan, rows, None if mixture is None else mixture.experts) for plan in plans]


def _level_header(plan: Plan, rows: int, experts: int | None) -> LevelHeader:
    """What a level says of its plan; `experts`: how many a layer has."""
    table, of_experts = np.maximum(plan.thresholds, 0), None
    if experts is not None:
        down = table[:, PROJECTION_INDEX["down"]]
        own = np.repeat(down[:, None], experts, axis=1) if plan.experts is None else plan.experts
        of_experts = np.asarray(own, np.float32)
        down[:] = of_experts.min(1)  # what is above it may be kept: whose threshold decides, `experts` of a row say
    scoring = plan.scoring
    return LevelHeader(
        plan.target, plan.allocation, table, rows, scale=scoring.scale, centre=scoring.centre, experts=of_experts
    )


def _most_rows(prompts: Sequence[Prompt], max_new_tokens: int, prefill: str) -> int:
    """Rows of a level, if no sequence ends early."""
    rows = len(prompts) * (max_new_tokens - 1)
    return rows + (0 if prefill == "none" else sum(len(prompt.token_ids) for prompt in prompts))


def open_writer(
    path: Path,
    header: StoreHeader,
    levels: Sequence[LevelHeader],
    device: str,
    *,
    force: bool,
    resume: bool = False,
    durable: bool = False,
) -> StoreWriter:
    """Open a store, a new one or one that an earlier run left; raises as `StoreWriter.create` and `resume`."""
    if resume:
        return StoreWriter.resume(path, header, levels, device, durable=durable)
    return StoreWriter.create(path, header, levels, device=device, force=force, durable=durable)


def row_bytes(session: Session, plan: Plan) -> float:
    """Expected bytes on disk of one token's rows: the mask at its entropy, the kept values as they compress."""
    density = 1.0 - plan.target
    mask_bits = -sum(p * log2(p) for p in (density, plan.target) if p > 0)
    value_bytes = density * VALUE_DTYPES[session.dtype].itemsize * _VALUE_RATIO[session.dtype]
    entries = session.config.layers * sum(session.config.channels(site) for site in SITES)
    return entries * (mask_bits / 8 + value_bytes)
