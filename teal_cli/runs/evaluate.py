"""`teal eval`: what sparsity levels cost, as perplexity, divergence from the dense model and agreement with it.

All levels run side by side in one pass and share its dense rows, and a position is sparse or dense exactly as decoding
would have it (see `passes.forward`), so what is evaluated is what is deployed. Sums are kept per window: an evaluation
that was cut off goes on at the window where it stopped, and levels can be added to one that is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from teal_cli.data.blocks import Tokenizer, pack
from teal_cli.data.sources import Source, open_source
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.data.windows import cut
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import check_new_file, disk_errors, read_json, unread, write_json
from teal_cli.model.config import load_config
from teal_cli.model.weights import Checkpoint, config_sha256
from teal_cli.passes.forward import Sparse, States, check_tokens, forward
from teal_cli.passes.judge import realised_bytes
from teal_cli.passes.layers import Layers, choose_layers
from teal_cli.passes.score import Score, score, standard_error
from teal_cli.registry.calibrations import remarks
from teal_cli.registry.registry import ModelEntry, Registry
from teal_cli.runs.calibrate import Text
from teal_cli.runs.costs import record_costs
from teal_cli.runs.plans import Level, levels_of
from teal_cli.runs.session import choose_device
from teal_cli.sparsity.calibration import Calibration, check_fits, read_manifest
from teal_kernels.spec import PROJECTIONS

SCHEMA: Final = "teal-eval/1"
DEFAULT_SPARSE_FROM: Final = "64"
"""A dense prompt as long as `teal dump` takes it, then sparse decoding."""


def parse_sparse_from(value: str) -> int | float:
    """Where a window becomes sparse: `64` tokens, `half`, or a share such as `0.01`.

    Raises:
        UsageError: none of these.
    """
    try:
        number = 0.5 if value == "half" else float(value) if "." in value else int(value)
    except ValueError:
        number = -1
    if number < 0 or (isinstance(number, float) and number >= 1):
        raise UsageError(
            f"--sparse-from {value!r} is no position", hint="give a number of tokens, a share such as 0.01, or half"
        )
    return number


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        text: the text; `num_sequences` windows or documents of at most `seq_len` tokens.
        sparsities: targets of uniform plans, 0 for the dense model; or else
        plans: names of plans of the model.
        model, calibration: as `Registry` finds them; None takes the default ones.
        convention: `window` or `document`, see `data.windows`.
        sparse_from: as `parse_sparse_from` takes it.
        dtype: bfloat16, float16 or float32; None takes the checkpoint's own. device: as `choose_device` takes it.
        layer_by_layer: hold one layer in memory, or the whole model; None decides by the memory there is.
        output: file to keep the result in, window by window; None keeps none.
        resume: go on with what `output` holds. force: replace it.
    """

    text: Text
    sparsities: tuple[float, ...] = ()
    plans: tuple[str, ...] = ()
    model: str | None = None
    calibration: str | None = None
    convention: str = "window"
    sparse_from: str = DEFAULT_SPARSE_FROM
    dtype: str | None = None
    device: str | None = None
    layer_by_layer: bool | None = None
    output: Path | None = None
    resume: bool = False
    force: bool = False


@dataclass(slots=True)
class LevelSums:
    """What is known of one level so far.

    Attributes:
        scores: of each window that is done, by its index.
        kept: int64 [layers, 7], entries kept over all sparse rows. rows: how many of these there were.
    """

    kept: NDArray[np.int64]
    rows: int = 0
    scores: dict[int, Score] = field(default_factory=dict)

    @classmethod
    def empty(cls, layers: int) -> LevelSums:
        return cls(np.zeros((layers, len(PROJECTIONS)), np.int64))

    def to_json(self) -> dict[str, Any]:
        scores = {str(index): [s.tokens, s.nll, s.kl, s.top1] for index, s in self.scores.items()}
        return {"kept": self.kept.tolist(), "rows": self.rows, "scores": scores}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LevelSums:
        scores = {int(index): Score(*entries) for index, entries in value["scores"].items()}
        return cls(np.array(value["kept"], np.int64), value["rows"], scores)


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level of a finished evaluation.

    Attributes:
        plan: its name in the registry; None for a uniform level that was asked for by its target.
        sparsity: its target. realised: share of dropped entries over the sparse positions, weighted by the size of each
            projection's matrix.
        nll: mean negative log-likelihood of the scored tokens, in nats. perplexity: its exponential.
        stderr: standard error of `nll`, with windows (or documents) as clusters; None where there is only one.
        kl: mean KL(dense || sparse) over the scored tokens, in nats. top1: share of them at which both models find the
            same token most likely. Dense positions count as equal in both.
        word_perplexity, byte_perplexity, bits_per_byte: of documents; None with the convention `window`.
    """

    plan: str | None
    sparsity: float
    realised: float
    perplexity: float
    stderr: float | None
    nll: float
    kl: float
    top1: float
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The whole result; fields of JSON are as here.

    Attributes:
        window: tokens of a window. sparse_from: where each becomes sparse, as it was asked for.
        windows: how many. tokens: scored tokens. fingerprint: sha256 over them.
        notes: remarks for the user, e.g. that this is the calibration's own text.
    """

    model: str
    calibration: str | None
    dataset: str
    split: str | None
    convention: str
    window: int
    sparse_from: str
    windows: int
    tokens: int
    fingerprint: str
    dtype: str
    device: str
    seconds: float
    levels: tuple[LevelResult, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """Progress: windows done in this run, with parts for the layers of the one under way, of how many; seconds."""

    done: float
    total: int
    seconds: float


class Evaluate:
    """An evaluation that is ready to run: the text is cut, settings are checked, earlier results are read.

    Args:
        registry: where the model is.
        request: what to evaluate.

    Attributes:
        notes: remarks for the user, e.g. that this is the calibration's own text.

    Raises:
        UsageError: the text is too short, no level or both kinds were asked for, a plan or calibration is another
            model's, something is at `output`, or it was made with other settings.
        NotFoundError: no such model, plan, calibration or dataset, or nothing to resume.
    """

    def __init__(self, registry: Registry, request: EvalRequest) -> None:
        self.request = request
        self.start = parse_sparse_from(request.sparse_from)
        self.device = choose_device(request.device)
        self.entry = registry.get(request.model)
        self.config = load_config(self.entry.path)
        self.dtype = request.dtype or self.config.torch_dtype
        self.notes: list[str] = []
        self.calibration: Calibration | None = None
        if any(request.sparsities):
            self.calibration = Calibration.load(registry.find_calibration(self.entry.name, request.calibration))
            self.notes += remarks(self.entry, request.calibration)
            self.notes += check_fits(self.calibration, self.config, self.entry.path, self.dtype)
        self.levels = levels_of(self.entry, self.config.layers, request.sparsities, request.plans, self.calibration)
        self._cut_text(registry)
        self._sums = {level.key: LevelSums.empty(self.config.layers) for level in self.levels}
        self._seconds = 0.0
        if request.output is not None:
            self._open(request.output)

    def _cut_text(self, registry: Registry) -> None:
        text, tokenizer = self.request.text, load_tokenizer(self.entry.path)
        source = open_source(text.dataset, split=text.split, text_column=text.text_column, held_out=True)
        self.windows = cut(
            source, tokenizer, convention=self.request.convention, count=text.num_sequences, length=text.seq_len
        )
        check_tokens(self.config, [window.inputs for window in self.windows.windows])
        for name in sorted({level.plan.calibration for level in self.levels if level.plan.calibration}):
            self.notes += _own_text(registry, self.entry, name, source, tokenizer)
        if (found := len(set(self.windows.units))) < text.num_sequences:
            self.notes.append(f"{source.name} has text for {found} of {text.num_sequences} {self.request.convention}s")

    def open_layers(self, progress: Callable[[int, int], None] | None = None) -> Layers:
        """The model as the pass reads it; in memory as a whole where that takes less than half of what is free.

        Args:
            progress: called with (layers loaded, layers) where the whole model is loaded.
        """
        dtype = getattr(torch, self.dtype)
        return choose_layers(Checkpoint(self.entry.path), dtype, self.device, self.request.layer_by_layer, progress)

    @property
    def _settings(self) -> dict[str, Any]:
        """What must be equal for results to stand side by side."""
        return {
            "schema": SCHEMA,
            "model": self.entry.name,
            "config_sha256": config_sha256(self.entry.path),  # of a quantised model that of its parent
            "quantised": self.entry.revision if self.entry.parent else None,
            "fingerprint": self.windows.fingerprint,
            "convention": self.request.convention,
            "window": self.request.text.seq_len,
            "sparse_from": self.request.sparse_from,
            "dtype": self.dtype,
        }

    def _open(self, output: Path) -> None:
        if not self.request.resume:
            check_new_file(output, force=True)  # what is there has a hint of its own
            if output.exists() and not self.request.force:
                raise UsageError(f"{output} exists", hint="go on with --resume, or replace it with --force")
            return
        try:
            state = read_json(output)
            found, sums = state["settings"], {key: LevelSums.from_json(v) for key, v in state["sums"].items()}
        except FileNotFoundError:
            raise NotFoundError(f"there is no evaluation at {output} to resume", hint="leave --resume away") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TealError(
                f"{output} is no evaluation of teal: {unread(error)}", hint="replace it with --force"
            ) from error
        differing = [name for name, value in self._settings.items() if found.get(name) != value]
        if differing:
            raise UsageError(
                f"{output} was made with other settings; what differs: {', '.join(differing)}",
                hint="resume with the settings it was made with, or write to another file",
            )
        self._sums |= sums
        self._seconds = float(state.get("seconds", 0.0))

    def run(self, layers: Layers) -> Iterator[Scored | Evaluation]:
        """Score every window that is missing, and yield the result last.

        Raises:
            TealError: logits are not finite, the checkpoint is damaged, or the disk refuses the result.
        """
        begun, every, levels = time.perf_counter(), self.windows.windows, self._unfinished()
        wanted = [level for level in levels if level.plan.target > 0]
        pending = [i for i in range(len(every)) if levels and i not in self._sums[levels[0].key].scores]
        variants = [Sparse(level.plan, self.start, self._sums[level.key].kept) for level in wanted]
        head = layers.open_head()

        def sink(number: int, states: States) -> None:
            index = pending[number]
            starts = [variant.position(states.length) for variant in variants]
            dense, *sparse = score(head, self.config.vocab, states, every[index].targets, starts)
            for level in levels:
                self._sums[level.key].scores[index] = dense
            for level, start, found in zip(wanted, starts, sparse, strict=True):
                self._sums[level.key].scores[index] = found
                self._sums[level.key].rows += states.length - start
            if layers.resident:
                self._save(self._seconds + time.perf_counter() - begun)

        if pending:
            for event in forward(layers, [every[index].inputs for index in pending], variants, sink=sink):
                yield Scored(event.done / event.layers, len(pending), event.seconds)
        self._seconds += time.perf_counter() - begun
        result = self._result(str(layers.device))
        self._save(self._seconds, result)
        found = {asked.key: level.perplexity for asked, level in zip(self.levels, result.levels, strict=True)}
        record_costs(self.entry, self._settings, result.dataset, result.tokens, found)
        yield result

    def _unfinished(self) -> list[Level]:
        """Levels to run. Kept entries are sums over windows, so levels that stopped at different windows begin anew."""
        every = len(self.windows.windows)
        levels = [level for level in self.levels if len(self._sums[level.key].scores) < every]
        if len({tuple(sorted(self._sums[level.key].scores)) for level in levels}) > 1:
            self._sums |= {level.key: LevelSums.empty(self.config.layers) for level in levels}
        return levels

    def _save(self, seconds: float, result: Evaluation | None = None) -> None:
        if self.request.output is None:
            return
        sums = {key: sums.to_json() for key, sums in self._sums.items()}
        state = {"settings": self._settings, "seconds": seconds, "complete": result is not None, "sums": sums}
        with disk_errors(self.request.output.parent):
            write_json(self.request.output, {**(asdict(result) if result else {}), **state})

    def _result(self, device: str) -> Evaluation:
        text, windows = self.request.text, self.windows
        return Evaluation(
            model=self.entry.name,
            calibration=self.calibration.id if self.calibration else None,
            dataset=windows.dataset,
            split=windows.split,
            convention=self.request.convention,
            window=text.seq_len,
            sparse_from=self.request.sparse_from,
            windows=len(windows.windows),
            tokens=windows.tokens,
            fingerprint=windows.fingerprint,
            dtype=self.dtype,
            device=device,
            seconds=self._seconds,
            levels=tuple(self._level(level) for level in self.levels),
            notes=tuple(self.notes),
        )

    def _level(self, level: Level) -> LevelResult:
        sums, windows = self._sums[level.key], self.windows
        scores = [sums.scores[index] for index in range(len(windows.windows))]
        nll = sum(score.nll for score in scores)
        result = LevelResult(
            plan=level.name,
            sparsity=level.plan.target,
            realised=realised_bytes(self.config, sums.kept, sums.rows) if sums.rows else 0.0,
            perplexity=math.exp(nll / windows.tokens),
            stderr=standard_error(scores, windows.units),
            nll=nll / windows.tokens,
            kl=sum(score.kl for score in scores) / windows.tokens,
            top1=sum(score.top1 for score in scores) / windows.tokens,
        )
        if not windows.bytes:
            return result
        return replace(
            result,
            word_perplexity=math.exp(nll / windows.words),
            byte_perplexity=math.exp(nll / windows.bytes),
            bits_per_byte=nll / windows.bytes / math.log(2),
        )


def _own_text(registry: Registry, entry: ModelEntry, name: str, source: Source, tokenizer: Tokenizer) -> list[str]:
    """A remark where a calibration was made from the beginning of this very text, whatever the text is called."""
    try:
        made = read_manifest(registry.find_calibration(entry.name, name))
        if not made.get("sequences") or not made.get("seq_len"):
            return []
        blocks = pack(source, tokenizer, num_sequences=made["sequences"], seq_len=made["seq_len"])
    except (NotFoundError, UsageError):  # the calibration is gone, or this text is too short to be its own
        return []
    if blocks.fingerprint != made.get("fingerprint"):
        return []
    remark = f"this is the text that the calibration {name} was made from, so the result flatters its plans"
    return [f"{remark}; evaluate on other text, or on another --split"]
