"""Programmatic dependent launch: a kernel is launched while the one before it in its stream still runs.

From compute capability 9.0 on, a launch that asks for it need not wait for the end of the launch before it: its
programs are placed on multiprocessors as they fall free, and wait there until what they read has been written. That
hides what it costs to begin a kernel, which a decode step pays ten times a layer. `configs.launch_options` asks for it.
Device code only.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Wait until the launch before this one has written its results, and let the next one begin.

    The first statement of a kernel: nothing that an earlier launch writes is read before it, and every program executes
    it, so the end of one launch implies the end of all before it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
