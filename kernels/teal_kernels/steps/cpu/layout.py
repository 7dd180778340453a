"""The records that the compiled step takes: addresses, dimensions and buffers, as named tuples that numba can
type.

Addresses are ints; the caller that fills these records keeps the tensors behind them alive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

ATTN_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, ATTN_OUT, O_BIAS, MLP_NORM, GATE_UP, DOWN = range(10)
ATTN_POST_NORM, MLP_POST_NORM, TENSORS = range(10, 13)
"""Columns of `Weights.tensors`, in the order of `spec.layer_shapes`, and how many there are."""

NONE: Any = np.int64(0)
"""The address of a tensor that the model does not have. numba compiles a function again for every Python integer that a
caller names; for numpy's integers it does not."""

ALL = np.float32(-1.0)
"""The threshold of a dense step: nothing is compared, everything is kept."""

SINGLE = -1
"""The place in `Shared.limits` of a projection that has one threshold for all channels."""

RELEASED, ABANDON, CHOICE, STREAM, MEMBERS = 0, 8, 16, 24, 32
"""Places in `Shared.control`: how many steps were released; whether they are abandoned, so that no thread waits for the
others; the state of the choice of the last token (sync.py has states); that of `Shared.stream`; then PLACES places of
each thread. Each in a cache line of its own."""

PART, APPENDED, TAKEN, DONE, PARKED, ABSENT, PLACES = 0, 8, 9, 16, 17, 18, 24
"""Of one thread's PLACES places: the states of its part of a phase, and of the keys and values of that part; what
another thread has taken over last, see `sync.take_over`; how many steps it has done; whether it sleeps and
must be woken; whether others need not wait for it before they take over."""

FORM, STRIDE, SCALES_AT, GROUP, FIELDS = range(5)
"""Columns of `Weights.packed`: bits of a code, or PLAIN; bytes from row to row; byte of a row at which its scales
begin; log2 of the columns that share a scale. And how many they are."""

EMBEDDING, HEAD, TABLE_UNITS = 0, 1, FIELDS
"""Rows of `Weights.tables`, and the column after those of `Weights.packed`: units of a row."""

WANTED, CHOSEN, STOPS, GREEDY, TOP_K, NUCLEUS, ROPE_BYTES, NUMBERS = range(8)
"""Places in `Draw.numbers`: how many tokens the step chooses by itself, 0 if none; how many it has chosen; how many
tokens of `Draw.stops` end that; whether the rule is greedy; its top_k; whether its top_p is below 1; bytes from one
position of the rotary tables to the next. And how many they are."""

MOST_TOKENS, MOST_STOPS = 32, 64
"""The most tokens of one call, and of those that end it."""

WHOLE: Any = np.int64(1 << 40)
"""More than any number of rows, and any state of a part."""

PLAIN = 0
"""The form of a matrix of the model's dtype."""

UNIT = 32
"""Outputs are split over threads in multiples of this: 64 bytes of 16-bit weights, so no cache line is read twice."""


class Shape(NamedTuple):
    """Dimensions, as in `StepSpec`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


class Norm(NamedTuple):
    """How every norm is computed: epsilon and what is added to the weight, float32; whether it rounds only once."""

    eps: Any
    offset: Any
    once: bool


class Rules(NamedTuple):
    """The rest of `Traits`; scales and caps float32, 0 where there is no cap."""

    wide_head_norms: bool
    gelu: bool
    attention_scale: Any
    score_cap: Any
    embedding_scale: Any
    residual_scale: Any
    logit_scale: Any
    logit_cap: Any


class Codes(NamedTuple):
    """Which packed matrices there are: empty arrays of int8 for 8 bits and of uint8 for 4, see lanes.py; None where
    there is no such matrix, and then no code for one is compiled."""

    int8: Any = None
    int4: Any = None


INT8, INT4 = np.empty(0, np.int8), np.empty(0, np.uint8)


class Weights(NamedTuple):
    """tensors int64 [layers, 12], addresses or NONE; windows int64 [layers]; ropes int64 [layers], bytes from the first
    rotary table to the layer's; edges int64 [4, 4], see step.site_edges; packed int64 [layers, 4, 4], per site how its
    matrix is packed, see FORM; units int64 [layers, 4, 4], the first unit of each of its projections and the number of
    all (`RowLayout.units`), where it is packed; tables int64 [2, 5], how embedding and head are packed, see EMBEDDING
    and TABLE_UNITS; codes: see `Codes`; norm, rules: how to compute; the rest addresses."""

    tensors: Any
    windows: Any
    ropes: Any
    edges: Any
    packed: Any
    units: Any
    tables: Any
    codes: Codes
    norm: Norm
    rules: Rules
    embedding: int
    final_norm: int
    lm_head: int


class Rows(NamedTuple):
    """One matrix: its address; edges int64 [P + 1], where the columns of each projection begin and where the last end;
    packed, units and codes as in `Weights`."""

    address: int
    edges: Any
    packed: Any
    units: Any
    codes: Codes


class Limits(NamedTuple):
    """What the P projections of a matrix compare with: thresholds float32 [P], limit_of int64 [P] and limits as in
    `Shared`."""

    thresholds: Any
    limit_of: Any
    limits: Any


class Draw(NamedTuple):
    """How tokens are chosen: numbers int64, see WANTED; temperature float32 [1]; bits uint64 [MOST_TOKENS + 1], the
    random bits of each and last `top_p_bits`; stops int64. What was chosen: tokens int64 [MOST_TOKENS]."""

    numbers: Any
    temperature: Any
    bits: Any
    stops: Any
    tokens: Any


class Candidates(NamedTuple):
    """One thread's room for the tokens that may be chosen: places int64, values float32 and weights uint64, each
    [vocab]."""

    places: Any
    values: Any
    weights: Any


class Shared(NamedTuple):
    """What all threads see. Written by the caller before a step is released:

        order: int64 [8], a `Token` and a `Cache`, which members read without Python.
        thresholds: float32 [layers, 7], ALL where dense.
        limits: float32 [any], the thresholds of projections that have one for each channel.
        limit_of, lowest_of: int64 [layers, 7] and [layers, 4], where those of a projection begin in `limits`, and the
            lowest of a site's projections; SINGLE where one threshold serves all channels.
        rows: int64 [4, 3], per site the address of layer 0's row of the step and the bytes from layer to layer and from
            step to step; address NONE when nothing is captured.
        draw: see `Draw`.

    Written by the threads, float32: stream [hidden], the residual stream at the beginning of some layer; qkv, attn_out,
    gate_up, down [row groups, columns], the sums of each product; tops, totals [heads, parts] and mixed [heads, parts,
    head_dim], those of attention; logits [vocab], the result.
    kept int64 [MOST_TOKENS, layers, 7] counts the kept entries of each step, at its number modulo MOST_TOKENS; control
    is int64, see RELEASED.
    """

    order: Any
    thresholds: Any
    limits: Any
    limit_of: Any
    lowest_of: Any
    rows: Any
    draw: Draw
    stream: Any
    qkv: Any
    tops: Any
    totals: Any
    mixed: Any
    attn_out: Any
    gate_up: Any
    down: Any
    logits: Any
    kept: Any
    control: Any


class Token(NamedTuple):
    """Which token, where, and the addresses of cos and sin for that position."""

    token: int
    position: int
    cos: int
    sin: int


class Cache(NamedTuple):
    """Addresses of the first key and value; strides in bytes. Positions of one head lie together."""

    keys: int
    values: int
    layer_stride: int
    head_stride: int


class Part(NamedTuple):
    """Which of a product's parts is computed: its number among as many as there are threads, and into how many groups
    those are divided (`matrices.row_groups`). A thread that has taken over a part looks at `control[place]` after every
    `rows` rows, and gives up once that is larger than `state`."""

    number: int
    parts: int
    groups: int
    control: Any
    place: int
    state: int
    rows: int


class Worker(NamedTuple):
    """One thread's part of a product alone (product.py): the fields of `Own` that `add_kept_rows` uses."""

    thread: int
    threads: int
    index: Any
    all: Any
    room: Any
    spans: Any


class Own(NamedTuple):
    """The buffers of one thread: its copy of the residual stream, `hidden`; the list of the kept entries' places,
    `index`, and that of all places, `all`, both int64; `room` for the columns of a packed matrix with padding; the part
    of a phase that it has computed (a product or logits in `sums`, of a product the columns `spans`, see
    `add_kept_rows`, and `counts` of kept entries, int64; attention's `tops`, `totals` and `parts`, as in `Shared`);
    `candidates` of a choice; the rest is for what its functions pass to each other."""

    thread: int
    threads: int
    hidden: Any
    x: Any
    index: Any
    all: Any
    room: Any
    spans: Any
    counts: Any
    sums: Any
    tops: Any
    totals: Any
    parts: Any
    candidates: Candidates
    mid: Any
    out: Any
    head: Any
    normed: Any
    rotated: Any
    queries: Any
    scores: Any
    mixed: Any
