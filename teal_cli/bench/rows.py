"""The rows of a result: what is printed, written to JSON and drawn.

Plain data. A row whose check failed has no times and no ratios, only what the check found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from teal_cli.ui.table import percent


@dataclass(frozen=True)
class Progress:
    """Work done so far, in steps of `total`; `text` says what is under way."""

    done: int
    total: int
    text: str


@dataclass(frozen=True)
class KernelRow:
    """One product, one way.

    Attributes:
        models, matrix, site, inputs, outputs: which weight matrix [inputs, outputs].
        sparsity: target; 0 for dense. realised: share of the entries that were dropped.
        product: which way, e.g. "numba". role: dense, sparse or published.
        check: "passed", or how it failed. error: relative to the exact product, in the norm.
        rounds, calls, copies: rounds; products per round; copies of the matrix that were used in turn.
        p20_us, p50_us, p80_us: microseconds per product, quantiles over the rounds.
        bytes: weight bytes that the kept entries need. gbps: bytes over the median time.
        read_gbps: the memory's read bandwidth in the same rounds, median. read_p20, read_p80: its quantiles; None in
            results that were written without.
        floor_us: bytes over that bandwidth. to_floor: median time over the floor.
        dense: the fastest dense product of this matrix. to_dense: how many times faster than it, median over rounds.
    """

    models: tuple[str, ...]
    matrix: str
    site: str | None
    inputs: int
    outputs: int
    dtype: str
    sparsity: float
    realised: float
    product: str
    role: str
    check: str
    error: float | None
    rounds: int
    calls: int
    copies: int
    p20_us: float | None
    p50_us: float | None
    p80_us: float | None
    bytes: int
    gbps: float | None
    read_gbps: float
    floor_us: float
    to_floor: float | None
    dense: str | None
    to_dense: float | None
    read_p20: float | None = None
    read_p80: float | None = None
    kind: Literal["kernel"] = "kernel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))  # JSON has lists

    @property
    def passed(self) -> bool:
        return self.check == "passed"


@dataclass(frozen=True)
class DecodeRow:
    """One way to decode.

    Attributes:
        model, layers, dtype: what was decoded.
        engine: teal, torch (a plain loop of PyTorch operators), transformers or llama.cpp.
        backend: what ran the step.
        sparsity: target. realised: dropped share, weighted by the size of the matrices.
        dump: into a temporary store at the same time.
        check: "passed", or how it failed. error: what the check measured.
        rounds, prompt_tokens, tokens: rounds; tokens of the prompt, and new ones per round.
        p20, p50, p80: decode steps per second, quantiles over the rounds; prefill is not in them.
        bytes: that a step has to read: kept weights, head, key-value cache. gbps: bytes over the median time.
        read_gbps, read_p20, read_p80: as of a kernel's row. floor: steps per second at that bandwidth.
        to_floor: median time over the floor's.
        faster_than: how many times faster than dense teal, and than each other engine; median over rounds.
        to_undumped: time with the dump over the time without it, median over rounds.
        plan: name of the plan, or of the uniform plan beside it. to_uniform: how many times faster a plan is than the
            uniform plan that reads as many bytes, median over rounds.
        weights: bfloat16, int8, int4, or the most frequent type of a GGUF's matrices, such as q4_0.
        perplexity: of this engine at this level, where it was asked for.
        best_peer: the fastest other engine whose weights have as many bits; to_best_peer: how many times faster.
        busy: other processes that each kept a core busy. to_idle: time with them over the time without, median over
            rounds. to_fair_share: the same over what is fair, where each of them takes half of a core.
    """

    model: str
    layers: int
    dtype: str
    engine: str
    backend: str
    sparsity: float
    realised: float
    dump: bool
    check: str
    error: float | None
    rounds: int
    prompt_tokens: int
    tokens: int
    p20: float | None
    p50: float | None
    p80: float | None
    bytes: int
    gbps: float | None
    read_gbps: float
    floor: float
    to_floor: float | None
    faster_than: dict[str, float] = field(default_factory=dict)
    to_undumped: float | None = None
    plan: str | None = None
    to_uniform: float | None = None
    read_p20: float | None = None
    read_p80: float | None = None
    weights: str = ""
    perplexity: float | None = None
    best_peer: str | None = None
    to_best_peer: float | None = None
    busy: int = 0
    to_idle: float | None = None
    to_fair_share: float | None = None
    kind: Literal["decode"] = "decode"

    @property
    def label(self) -> str:
        """What it is, in a few words: `teal 50% + dump`, `torch dense`, `transformers`."""
        if self.engine not in ("teal", "torch"):
            return self.engine
        if self.plan is not None:
            return f"{self.engine} {self.plan}"
        level = percent(self.sparsity) if self.sparsity else "dense"
        busy = f" beside {self.busy} busy" if self.busy else ""
        return f"{self.engine} {level}{' + dump' if self.dump else ''}{busy}"

    @property
    def passed(self) -> bool:
        return self.check == "passed"


@dataclass(frozen=True)
class PrefillRow:
    """One way to read a prompt.

    Attributes:
        model, layers, dtype, weights, engine: as in `DecodeRow`.
        tokens: of the prompt.
        check: "passed", or how it failed. error: what the check measured.
        rounds: rounds; p20, p50, p80: tokens per second, quantiles over the rounds.
        faster_than: how many times faster than each other engine; median over rounds.
    """

    model: str
    layers: int
    dtype: str
    weights: str
    engine: str
    tokens: int
    check: str
    error: float | None
    rounds: int
    p20: float | None
    p50: float | None
    p80: float | None
    read_gbps: float
    read_p20: float | None = None
    read_p80: float | None = None
    faster_than: dict[str, float] = field(default_factory=dict)
    kind: Literal["prefill"] = "prefill"

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        return self.engine

    @property
    def passed(self) -> bool:
        return self.check == "passed"


Row = KernelRow | DecodeRow | PrefillRow
