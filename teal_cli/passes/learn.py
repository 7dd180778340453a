"""Thresholds of every channel of every projection, learned: descent of the divergence from the dense model.

A plan has one threshold a projection. Here each channel of it gets one of its own, and all of them follow the gradient
of KL(dense || sparse) over the rows that decoding makes sparse, while the bytes that are dropped stay at the target. No
weight changes. An entry that is kept adds x_i g_i to the loss, g the gradient where the projection reads; whether it is
kept is a step at its threshold, so near the threshold stands a bell in the place of the step's derivative (a
straight-through estimate, Bengio et al., arXiv 1308.3432, section 4).

Each token is used once. SmolLM2-135M, 50%, 24 windows of other text: the share of the loss that uniform thresholds
have at equal bytes falls from 0.68 (prose) and 0.73 (docstrings) to 0.46 and 0.54 after 160,000 tokens of mixed text,
and after four times as many passes over them it is 0.48 and 0.54. NVIDIA H100, float32, 2026-11-27.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.passes.forward import Advance, States, forward
from teal_cli.passes.gradients import Errors, gradients
from teal_cli.passes.layers import Head, Layers, logit_rows
from teal_cli.sparsity.plan import Plan
from teal_kernels.ops.threshold.reference import keep_mask
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, SITE_PROJECTIONS, SITES, columns

BATCH: Final = 8
"""Sequences a step, 4,096 tokens by default: what was tried."""
_WAY: Final = 1.2
"""How far a log threshold comes at most, were all steps as long as the first. The more text, the shorter the steps:
thresholds come as far, and of the noise of the text less is left. Steps fall to 0 along a cosine."""
_LONGEST: Final = 0.12
"""The longest step, with however little text."""
_MEMORY: Final = (0.9, 0.99)
"""Of the first and second moment (Adam, arXiv 1412.6980)."""
_LOGIT_BYTES: Final = 256 << 20
"""Of logits at a time, were they float32: 256 rows of 262,144 tokens of vocabulary (see `layers._FEWEST`). In the
model's dtype two such products are held, and the gradient at one of them."""
_MOST: Final = 0.1
"""By how much all log thresholds may move at once to keep the budget."""

ChannelThresholds = dict[str, NDArray[np.float32]]
"""Site -> float32 [layers, P, K], positive: a threshold per projection of the site and channel."""


class Keep(Protocol):
    """Takes the state of a descent after a step, as `torch.save` does; `last`: no step follows."""

    def __call__(self, state: Mapping[str, Any], *, last: bool) -> None: ...


def learn(
    layers: Layers,
    tokens: Sequence[NDArray[np.int64]],
    plan: Plan,
    start: int,
    known: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
) -> Iterator[Advance | ChannelThresholds]:
    """Learn thresholds of channels that together drop as many bytes as a plan says.

    Args:
        tokens: token ids of each sequence, all longer than `start`; each is used once.
        plan: by magnitude; its thresholds, all positive, are where the descent begins, its target is what is dropped.
        start: rows from this position on are sparse.
        known: a state that `keep` was given with the same arguments, to go on from; the plan's thresholds do not count
            then.

    Yields:
        Advance, and the thresholds last.

    Raises:
        UsageError, TealError: as `passes.forward.forward`.
    """
    begun, descent = time.perf_counter(), _Descent(layers, plan, start, math.ceil(len(tokens) / BATCH))
    if known is not None:
        descent.restore(known)
    each = 3 * layers.config.layers
    for first in range(descent.steps * BATCH, len(tokens), BATCH):
        for done, event in enumerate(descent.step(tokens[first : first + BATCH]), each * first + 1):
            yield Advance(done, each * len(tokens), event.layers, time.perf_counter() - begun)
        if keep is not None:
            keep(descent.state(), last=first + BATCH >= len(tokens))
    yield descent.thresholds()


class _Descent:
    """The thresholds and what the descent remembers.

    Attributes:
        steps: done so far.
    """

    def __init__(self, layers: Layers, plan: Plan, start: int, steps: int) -> None:
        self._layers, self._start, self._target, self.steps = layers, start, plan.target, 0
        config = layers.config
        shapes = {site: (config.layers, len(group), config.channels(site)) for site, group in SITE_PROJECTIONS.items()}
        size = sum(map(math.prod, shapes.values()))
        self._logs, self._loss, self._bytes = (torch.zeros(size, device=layers.device) for _ in range(3))
        rate = min(_WAY / steps, _LONGEST)
        self._adam = torch.optim.Adam([self._logs], lr=rate, betas=_MEMORY, eps=1e-12)
        self._cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, steps)
        self._views = [_views(flat, shapes) for flat in (self._logs, self._loss, self._bytes)]
        for site in SITES:
            start_at = torch.from_numpy(np.log(plan.thresholds[:, columns(site)]))
            self._views[0][site].copy_(start_at[..., None].expand(shapes[site]))
        sizes = np.array(list(config.projection_sizes().values()), np.float64)
        self._weights = sizes / (sizes.sum() * config.layers)  # of a projection of one layer among all bytes
        self._dropped = torch.zeros((), dtype=torch.float64, device=layers.device)

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        own = {"steps": self.steps, "logs": self._logs}
        return own | {"adam": self._adam.state_dict(), "cosine": self._cosine.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be where another descent was."""
        self.steps = int(state["steps"])
        self._logs.copy_(state["logs"])
        self._adam.load_state_dict(state["adam"])
        self._cosine.load_state_dict(state["cosine"])

    def thresholds(self) -> ChannelThresholds:
        return {site: view.exp().cpu().numpy() for site, view in self._views[0].items()}

    def step(self, batch: Sequence[NDArray[np.int64]]) -> Iterator[Advance]:
        """One move, from the gradient over a batch; 3 * layers * sequences Advances."""
        ends: dict[int, Tensor] = {}

        def sink(sequence: int, states: States) -> None:
            ends[sequence] = states.dense

        yield from forward(self._layers, batch, sink=sink)
        rows = sum(len(row) - self._start for row in batch)
        self._limits = {site: view.exp() for site, view in self._views[0].items()}
        for buffer in (self._loss, self._bytes, self._dropped):
            buffer.zero_()
        errors = _divergence(self._layers.config, ends, self._start, rows)
        yield from gradients(self._layers, batch, self._visit, errors, self._cut)
        self._move(rows)

    def _cut(self, layer: int, site: str, number: int, x: Tensor) -> Tensor:
        """What a projection reads: dropped entries zero, in sparse rows."""
        begin, limits = self._start, self._limits[site][layer, number]
        return torch.cat((x[:begin], x[begin:] * keep_mask(x[begin:].detach(), limits)))

    def _visit(self, layer: int, projection: str, sequence: int, x: Tensor, g: Tensor) -> None:
        """Add to the gradients at the log thresholds, of the loss and of the bytes dropped."""
        site, column = PROJECTION_SITE[projection], PROJECTION_INDEX[projection]
        number = column - columns(site).start
        limits, x = self._limits[site][layer, number], x[self._start :].float()
        weight = float(self._weights[column]) / x.shape[1]
        self._dropped += weight * (x.abs() <= limits).sum()
        # With r = |x| / t: the derivative by log r of r^4 / (1 + r^4), which rises from 0 to 1 about r = 1. Wider, it
        # counts entries far from their thresholds, which mislead; narrower, it leaves more noise.
        fourth = (x / limits).square_().square_()
        bell = (4 * fourth).div_((1 + fourth).square_())
        self._views[1][site][layer, number] -= (bell * x).mul_(g[self._start :]).sum(0)
        self._views[2][site][layer, number] += weight * bell.sum(0)

    def _move(self, rows: int) -> None:
        """Adam along the gradient of the loss less its part along that of the bytes, then all at once to the target."""
        each_byte = self._bytes / rows
        self._logs.grad = self._loss - (self._loss @ each_byte) / (each_byte @ each_byte) * each_byte
        self._adam.step()
        self._cosine.step()
        short = self._target - float(self._dropped) / rows
        self._logs += min(max(short / float(each_byte.sum()), -_MOST), _MOST) / 2
        self.steps += 1


def _views(flat: Tensor, shapes: dict[str, tuple[int, int, int]]) -> dict[str, Tensor]:
    """One vector as an array a site."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {site: part.view(shape) for part, (site, shape) in zip(parts, shapes.items(), strict=True)}


def _divergence(config: ModelConfig, ends: dict[int, Tensor], start: int, rows: int) -> Errors:
    """The mean over rows of KL(dense || sparse) after `start`.

    Args:
        ends: of each sequence the dense model's hidden states [S, hidden] after the last layer.
    """

    def errors(head: Head, sequence: int, states: Tensor) -> Tensor:
        found = torch.zeros_like(states)
        for part in logit_rows(config.vocab, len(states) - start, _LOGIT_BYTES):
            at = slice(part.start + start, part.stop + start)
            hidden = states[at].detach().clone().requires_grad_()
            wanted, sparse = head.predictions(ends[sequence][at]), head.predictions(hidden)
            slopes = torch.empty_like(sparse.products)
            for few in sparse.spans():
                excess = sparse[few].exp_() - wanted[few].exp_()
                slopes[few] = sparse.slopes(few, excess.div_(rows))
            sparse.products.backward(slopes)
            assert hidden.grad is not None
            found[at] = hidden.grad
        return found

    return errors
