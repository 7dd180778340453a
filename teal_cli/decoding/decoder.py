"""Prefill, then one sparse step per token (TEAL, section 5.4: decoding is sparsified, the prompt is not).

The decoder yields token ids as they come and keeps the clock. It knows neither text nor files: a tokenizer turns ids
into text, and a capture, if one is given, takes the vectors of each step.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teal_cli.decoding.projector import PromptRecorder, Rows, first_rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.decoding.steps import Choose, Step
from teal_cli.errors import UsageError, counted
from teal_cli.model.transformer import KVCache, Transformer
from teal_cli.model.transformer import dense as dense_projection
from teal_kernels.spec import PROJECTIONS
from teal_kernels.steps.spec import MATRICES

_AT_ONCE_S, _AT_ONCE = 0.05, 16
"""Tokens that are decoded at once are those of so many seconds, and at most so many: text still flows, Ctrl-C is
noticed soon, and a caller that ends early has waited for few that it does not take, which are not counted."""


class Capture(Protocol):
    """Takes the vectors of each step, e.g. a level of a store."""

    def room(self, count: int) -> tuple[int, Rows | None]:
        """How many of the next `count` tokens, at least one, may be run before they are added, and where their rows go,
        site -> [layers, tokens, K]. None: nowhere, these are not recorded.
        """
        ...

    def add(self, token_id: int, position: int, sequence: int, phase: str = "decode") -> None:
        """The first row of `room` that is not added yet is filled: by the step that this token was fed to, or for one
        of the prompt (phase `prefill`) perhaps by the prefill.
        """
        ...


@dataclass
class Tally:
    """What decoding took, summed over the sequences of one decoder. Seconds are wall-clock."""

    prompt_tokens: int = 0
    """Tokens that were prefilled; what the cache held already is not in it."""
    prefill_s: float = 0.0
    steps: int = 0
    decode_s: float = 0.0
    context: int = 0
    """Sum over the steps of the tokens attended to."""

    @property
    def tokens_per_s(self) -> float:
        """Decode steps per second; the prefill and the token it gives are not in it."""
        return self.steps / self.decode_s if self.decode_s else 0.0


def check_room(prompt: Sequence[int], max_new_tokens: int, room: int, switch: int | None) -> None:
    """Refuse what cannot be decoded, before anything is opened for it.

    Args:
        room: positions of the context or the cache.
        switch: `ModelConfig.rope_switch`.

    Raises:
        UsageError: an empty prompt, no new token, or more than there is room for; also as `check_rotation`.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max-new-tokens must be at least 1, not {max_new_tokens}")
    if not prompt:
        raise UsageError("the prompt is empty", hint="give some text with --prompt, or on standard input")
    if len(prompt) + max_new_tokens - 1 > room:
        raise UsageError(
            f"the prompt has {counted(len(prompt), 'token')}, and {max_new_tokens} new ones do not fit the context "
            f"of {room}",
            hint="shorten the prompt or lower --max-new-tokens",
        )
    check_rotation(switch, len(prompt), len(prompt) + max_new_tokens - 1)


def check_rotation(switch: int | None, prefilled: int, end: int) -> None:
    """Refuse steps from `prefilled` to `end` tokens that pass the switch of a model (`ModelConfig.rope_switch`).

    Raises:
        UsageError: they do: keys in the cache would have another rotation than the queries.
    """
    if _is_passed(switch, prefilled, end):
        raise UsageError(
            f"steps from {prefilled} to {end} tokens pass {switch}, where this model's rotary embedding changes for "
            "all tokens (longrope)",
            hint=f"lower --max-new-tokens, or prefill more than {switch} tokens",
        )


def _is_passed(switch: int | None, begin: int, end: int) -> bool:
    return switch is not None and begin <= switch < end


class Decoder:
    """Decodes sequences of one model under one plan.

    Args:
        model: the weights.
        cache: its key/value cache; its size is the longest sequence that fits.
        step: how a single token is run; shares the cache.
    """

    def __init__(self, model: Transformer, cache: KVCache, step: Step) -> None:
        self.model, self.cache, self.step = model, cache, step
        self.count_anew()

    def count_anew(self) -> None:
        """Begin all figures at zero: tally, kept entries, bandwidth."""
        self.tally = Tally()
        self._kept_before = self.step.kept()

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        sequence: int = 0,
        stop: Collection[int] = (),
        capture: Capture | None = None,
        dense: int | None = None,
        cached: int = 0,
        prompt_rows: bool = False,
    ) -> Iterator[int]:
        """Yield up to `max_new_tokens` ids; a token of `stop` is yielded and ends the sequence.

        N ids take one prefill and N-1 steps, and without `prompt_rows` only these steps are captured: row i of a
        capture is what the model computed when it was fed the i-th generated id.

        Args:
            dense: tokens of the prompt that the prefill takes; the others are steps of their own, as sparse as those
                that follow. None: all of them.
            cached: how many of the prompt's first tokens the cache holds from what was decoded before; the prefill
                begins after them. At least one token is left to it.
            prompt_rows: capture the tokens of the prompt that are not cached, too.

        Raises:
            UsageError: an empty prompt, or one that does not fit the context together with the new tokens.
        """
        switch = self.model.config.rope_switch
        check_room(prompt, max_new_tokens, self.cache.max_tokens, switch)
        if not 0 <= cached < len(prompt) or cached > self.cache.length:
            raise ValueError(
                f"{cached} tokens of a prompt of {len(prompt)} cannot be in a cache of {self.cache.length}"
            )
        choose = self.step.sampler(sampling, sequence)
        dense = len(prompt) if dense is None else dense
        check_rotation(switch, dense, len(prompt))
        if _is_passed(switch, cached, len(prompt)):
            cached = 0  # its keys were rotated for a shorter sequence
        self.cache.length = cached
        prompted = capture if prompt_rows else None
        if cached < dense:
            token = self._prefill(prompt[cached:dense], cached, sequence, choose, prompted)
        else:
            token = prompt[cached]
        for position in range(max(cached, dense), len(prompt)):
            token = self._feed(prompt[position], position, sequence, choose, prompted)
        yield token
        position, end = len(prompt), len(prompt) + max_new_tokens - 1
        while position < end and token not in stop:
            tokens = yield from self._follow(token, position, sequence, choose, end - position, stop, capture)
            position, token = position + len(tokens), tokens[-1]

    @torch.inference_mode()
    def _prefill(
        self, prompt: Sequence[int], position: int, sequence: int, choose: Choose, capture: Capture | None
    ) -> int:
        start = time.perf_counter()
        tokens = torch.tensor(list(prompt), device=self.model.device)
        recorder = None if capture is None else PromptRecorder()
        logits = self.model.forward(tokens, position, self.cache, recorder or dense_projection)
        token = choose(logits, position + len(prompt) - 1)
        if capture is not None and recorder is not None:
            for index, fed in enumerate(prompt):
                _, rows = capture.room(1)
                recorder.copy(index, rows and first_rows(rows))
                capture.add(fed, position + index, sequence, "prefill")
        self.tally.prefill_s += time.perf_counter() - start
        self.tally.prompt_tokens += len(prompt)
        return token

    @torch.inference_mode()
    def _feed(self, token: int, position: int, sequence: int, choose: Choose, capture: Capture | None) -> int:
        """A step with a token of the prompt."""
        start = time.perf_counter()
        _, rows = (1, None) if capture is None else capture.room(1)
        logits = self.step(token, position, rows and first_rows(rows))
        if capture is not None:
            capture.add(token, position, sequence, "prefill")
        chosen = choose(logits, position)
        self.tally.decode_s += time.perf_counter() - start
        self.tally.steps += 1
        self.tally.context += position + 1
        return chosen

    def _follow(
        self,
        token: int,
        position: int,
        sequence: int,
        choose: Choose,
        left: int,
        stop: Collection[int],
        capture: Capture | None,
    ) -> Generator[int, None, list[int]]:
        """As many tokens as nobody would wait for, decoded at once, and at most `left`; returns them, too. If the
        caller ends early, steps whose tokens it has not taken are neither counted nor recorded."""
        tally, rows = self.tally, None
        count = max(1, min(int(_AT_ONCE_S * tally.tokens_per_s), left, _AT_ONCE))
        start = time.perf_counter()
        with torch.inference_mode():
            if capture is not None:
                count, rows = capture.room(count)
            tokens = self.step.follow(token, position, choose, count, stop, rows)
        seconds = time.perf_counter() - start
        tally.decode_s += seconds
        tally.steps += len(tokens)
        tally.context += sum(range(position + 1, position + 1 + len(tokens)))
        taken = 0
        try:
            for fed, chosen in zip((token, *tokens), tokens, strict=False):
                taken += 1  # the step was done, even if its row cannot be recorded
                if capture is not None:
                    start = time.perf_counter()
                    capture.add(fed, position + taken - 1, sequence)
                    tally.decode_s += time.perf_counter() - start
                yield chosen
            return tokens
        finally:
            unused = len(tokens) - taken
            if unused:
                self.step.take_back(unused)
                tally.decode_s -= seconds * unused / len(tokens)
                tally.steps -= unused
                tally.context -= sum(range(position + 1 + taken, position + 1 + len(tokens)))

    def mean_kept(self) -> NDArray[np.float64] | None:
        """Kept entries of a mean step, float64 [layers, 7]; None for a dense step, or before the first one."""
        kept = self.step.kept()
        if kept is None or self._kept_before is None or not self.tally.steps:
            return None
        return np.asarray((kept - self._kept_before) / self.tally.steps, np.float64)

    def realised(self) -> NDArray[np.float64]:
        """Share of dropped entries over all steps counted, float64 [layers, 7]; zeros for a dense step."""
        config, kept = self.model.config, self.mean_kept()
        if kept is None:
            return np.zeros((config.layers, len(PROJECTIONS)))
        return np.asarray(1.0 - kept / np.array(config.inputs()), np.float64)

    def realised_share(self) -> float:
        """`realised`, weighted by the size of each projection's matrix."""
        sizes = self.model.config.projection_sizes()
        return float(np.average(self.realised().mean(0), weights=[sizes[p] for p in PROJECTIONS]))

    def effective_gbps(self) -> float:
        """Bytes that the steps had to read (kept weight rows, lm_head, cache) over their time, in GB/s."""
        tally = self.tally
        if not tally.steps:
            return 0.0
        read = step_bytes(self.model, tally.context / tally.steps, self.mean_kept())
        return read * tally.steps / tally.decode_s / 1e9


def step_bytes(
    model: Transformer, context: float, kept: NDArray[np.floating] | NDArray[np.integer] | None = None
) -> float:
    """Bytes of weights and KV cache that one step reads: the memory floor that every speed is judged by.

    Single-batch decoding is bound by reads, so bytes over time is the bandwidth achieved, and bytes over the machine's
    bandwidth is the floor. Norm weights and biases (under 0.1%) are left out.

    Args:
        model: its matrices say what a row costs.
        context: tokens in the cache that the step attends to (a mean will do).
        kept: kept input entries [layers, 7] of the step; None for a dense one.
    """
    config = model.config
    rows = np.array([[size for name in MATRICES for size in getattr(w, name).row_bytes] for w in model.layers])
    weights = float(np.sum(rows * (config.inputs() if kept is None else kept)))
    attended = sum(min(context, window or context) for window in config.sliding_windows)
    head = len(model.lm_head.data) * sum(model.lm_head.row_bytes)
    return weights + head + 2 * config.kv_width * model.dtype.itemsize * attended
