"""The phases of a step as their parts: what a thread computes of one, and how it becomes seen by all.

A part is computed from what all threads see and from what every thread has computed for itself (`Own.x`), into memory
of this thread, by whichever thread it is; `sync.begin_write` then lets one of them write it into `Shared`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teal_kernels.steps.cpu.attention import append_all, attend, hand_over_sums, prefetch_keys
from teal_kernels.steps.cpu.intrinsics import atomic_load, get, item_bytes, put
from teal_kernels.steps.cpu.layout import (
    ABANDON,
    APPENDED,
    FORM,
    GROUP,
    HEAD,
    MEMBERS,
    MOST_TOKENS,
    PART,
    PLACES,
    PLAIN,
    SCALES_AT,
    STRIDE,
    TABLE_UNITS,
    WHOLE,
    Part,
    Token,
)
from teal_kernels.steps.cpu.packed_rows import dot_packed_rows
from teal_kernels.steps.cpu.rows import STREAM, dot_rows
from teal_kernels.steps.cpu.sites import (
    EVERY,
    SITE_ATTN_IN,
    SITE_ATTN_OUT,
    SITE_MLP_IN,
    SITE_MLP_MID,
    ZERO,
    activate,
    hand_over,
    multiply,
    own_channels,
    share,
)
from teal_kernels.steps.cpu.sync import (
    await_state,
    begin_late,
    begin_write,
    end_write,
    is_late,
    note_presence,
    take_over,
    wait_a_little,
)
from teal_kernels.steps.cpu.vectors import ONE, cap_all, compiled, merged

_NUMBERS: list[Any] = [np.int64(number) for number in range(6)]
PHASES = 5
"""Phases of a layer; the head is one more."""

IN_QKV, IN_ATTENTION, IN_OUT, IN_GATE_UP, IN_DOWN, IN_HEAD = _NUMBERS
"""The kinds of phases; numpy's integers, so that `compute` is compiled once for all of them (see layout.NONE)."""

ONE_GROUP: Any = np.int64(1)
SOME_ROWS: Any = np.int64(64)
SOME_LOGITS: Any = np.int64(256)
"""How many rows, or rows of the head, a thread that has taken over a part adds before it looks whether it is done."""


@merged
def run_phase(
    kind: Any, what: int, phase: int, layer: int, token: Any, cache: Any, shape: Any, weights: Any, shared: Any,
    own: Any,
) -> bool:  # fmt: skip
    """This thread's part of a phase, then those that their threads do not get to; returns when all are done. False:
    this thread is late, or the step was abandoned.

    Args:
        what: the kind of phase; layer: which, except for the head. phase: its number, counted over all steps.
    """
    control, me = shared.control, own.thread
    if is_late(control, MEMBERS + PLACES * me + PART, phase):
        return False
    for turn in range(own.threads):
        owner = (me + turn) % own.threads
        place, polls = MEMBERS + PLACES * owner + PART, 0
        state = atomic_load(control, place)
        while state < 2 * phase + 2:
            mine = turn == 0 and polls == 0
            if state == 2 * phase and (mine or take_over(control, owner, 2 * phase + 1, polls)):
                compute(kind, what, phase, layer, token, cache, shape, weights, shared, owner, own)
            elif atomic_load(control, ABANDON) != 0:
                return False
            polls = wait_a_little(polls)
            state = atomic_load(control, place)
        if turn == 0 and what == IN_QKV:
            prefetch_keys(kind, shape, weights, cache, layer, token, shared.totals.shape[1], own)
    return True


@merged
def compute(
    kind: Any, what: int, phase: int, layer: int, token: Any, cache: Any, shape: Any, weights: Any, shared: Any,
    number: int, own: Any,
) -> None:  # fmt: skip
    """Part `number` of a phase, unless another thread has it sooner."""
    control, place = shared.control, MEMBERS + PLACES * number + PART
    if what == IN_ATTENTION:
        rope = weights.ropes[layer]
        turned = Token(token.token, token.position, token.cos + rope, token.sin + rope)
        if append_once(kind, phase, layer, turned, cache, shape, weights, shared, number, own):
            attend(kind, shape, weights, cache, layer, turned, number, shared, own)
            if begin_part(control, place, phase, number, own):
                hand_over_sums(shape, number, shared, own)
                end_write(control, place, phase)
    elif what == IN_HEAD:
        first, last = share(shape.vocab, number, own.threads)
        if head(kind, shape, weights, part_of(control, phase, number, ONE_GROUP, SOME_LOGITS, own), own) and begin_part(
            control, place, phase, number, own
        ):
            for i in range(last - first):
                put(shared.logits, first + i, get(own.sums, i))
            end_write(control, place, phase)
    else:
        site, x, count, sums = SITE_ATTN_IN, own.x, shape.hidden, shared.qkv
        if what == IN_OUT:
            site, count, sums = SITE_ATTN_OUT, shape.heads * shape.head_dim, shared.attn_out
        elif what == IN_GATE_UP:
            site, sums = SITE_MLP_IN, shared.gate_up
        elif what == IN_DOWN:
            site, x, count, sums = SITE_MLP_MID, own.mid, shape.intermediate, shared.down
        part, channels = part_of(control, phase, number, len(sums), SOME_ROWS, own), EVERY
        if what == IN_DOWN:
            channels = own_channels(count, part)
            activate(kind, channels, count, shared.gate_up, weights.rules, own)
        if multiply(kind, site, layer, x, count, channels, weights, shared, part, own) and begin_part(
            control, place, phase, number, own
        ):
            step = phase // (PHASES * shape.layers + 1)
            hand_over(kind, site, layer, x, count, channels, shared, sums, shared.kept[step % MOST_TOKENS], part, own)
            end_write(control, place, phase)


@compiled
def part_of(control: Any, phase: int, number: int, groups: int, rows: int, own: Any) -> Any:
    """The `Part`, which this thread gives up when it is another's and that has come to write it."""
    place = MEMBERS + PLACES * number + PART
    if number == own.thread:
        return Part(number, own.threads, groups, control, place, WHOLE, WHOLE)
    return Part(number, own.threads, groups, control, place, 2 * phase, rows)


@compiled
def begin_part(control: Any, place: int, phase: int, number: int, own: Any) -> bool:
    """`begin_write`; a thread that writes its own part is present."""
    if not begin_write(control, place, phase):
        return False
    if number == own.thread:
        note_presence(control, number)
    return True


@compiled
def append_once(
    kind: Any, phase: int, layer: int, token: Any, cache: Any, shape: Any, weights: Any, shared: Any, number: int,
    own: Any,
) -> bool:  # fmt: skip
    """`append_all` by one thread, before any attends. False: this thread is late."""
    control, place = shared.control, MEMBERS + PLACES * number + APPENDED
    if begin_late(control, place, phase):
        append_all(kind, shape, weights, cache, layer, token, number, shared, own)
        end_write(control, place, phase)
    await_state(control, place, phase)
    return atomic_load(control, place) == 2 * phase + 2


@compiled
def head(kind: Any, shape: Any, weights: Any, part: Any, own: Any) -> bool:
    """own.sums = a part's rows of lm_head @ own.x, not rounded. False: it was given up, see `Part`."""
    first, last = share(shape.vocab, part.number, part.parts)
    table, rules = weights.tables[HEAD], weights.rules
    if table[FORM] != PLAIN:
        own.room[:] = ZERO
        for i in range(shape.hidden):
            own.room[i] = own.x[i]
    for done in range(0, last - first, part.rows):
        if atomic_load(part.control, part.place) > part.state:
            return False
        count = min(part.rows, last - first - done)
        some = own.sums[done : done + count]
        if table[FORM] == PLAIN:
            row = shape.hidden * item_bytes(kind)
            base = weights.lm_head + (first + done) * row
            dot_rows(kind, base, row, count, own.x, shape.hidden, some, STREAM)
        else:
            base = weights.lm_head + (first + done) * table[STRIDE]
            dot_packed(weights.codes.int8, weights.codes.int4, table, base, own.room, some)
    if rules.logit_scale != ONE:
        for i in range(last - first):
            own.sums[i] *= rules.logit_scale
    if rules.logit_cap != ZERO:
        cap_all(own.sums, last - first, ONE, rules.logit_cap)
    return True


@compiled
def dot_packed(int8: Any, int4: Any, table: Any, base: int, x: Any, out: Any) -> None:
    """out = x . each row of a packed table, from the row at `base` on; x is zero beyond the width of the rows.
    int8, int4 as in `add_packed`."""
    scales, stride, group, units = base + table[SCALES_AT], table[STRIDE], table[GROUP], table[TABLE_UNITS]
    if int8 is not None and table[FORM] == 8:
        dot_packed_rows(int8, base, scales, stride, group, len(out), x, units, out, STREAM)
    if int4 is not None and table[FORM] == 4:
        dot_packed_rows(int4, base, scales, stride, group, len(out), x, units, out, STREAM)
