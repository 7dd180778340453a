"""GpuStep: one decode step of a whole model on a GPU.

Token, position and thresholds live in device tensors, nothing is read back, and every buffer is allocated once: the
step is captured as one CUDA graph at its second run and replayed from then on, whatever the position or the
number of kept entries. On a CPU under Triton's interpreter it runs the same launches without a graph.

It does not load models, prefill, or write stores: the caller shares weights and key-value cache with its own prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_kernels.configs import gemv_config
from teal_kernels.matrix import Matrix, floats
from teal_kernels.ops.kept.op import CHUNK, Capture, Sink, chunk_for
from teal_kernels.ops.packed.op import (
    launch_packed_dot,
    launch_unpack_row,
    packed_gemv_config,
)
from teal_kernels.packed import PackedMatrix
from teal_kernels.parts.attention.op import AttentionShares, launch_attention
from teal_kernels.parts.norm.op import launch_rms_norm
from teal_kernels.parts.rope.op import launch_qkv
from teal_kernels.parts.sample.op import Chooser
from teal_kernels.parts.sample.reference import SamplingRule
from teal_kernels.parts.swiglu.op import launch_swiglu
from teal_kernels.spec import SITES
from teal_kernels.steps.gpu.products import DenseProduct, Product, SparseProduct
from teal_kernels.steps.spec import (
    MATRICES,
    OPTIONAL,
    LayerTensors,
    StepSpec,
    check_thresholds,
    layer_shapes,
    traits_in,
)
from teal_kernels.thresholds import Thresholds

_HEADS_CHUNK: Final = 512
"""Entries per program that combines the shares of attention: each entry is read from up to 32 of them."""

_KEEP_ALL: Final = -1.0
"""A threshold that every number passes."""

_FIELD: Final = {site: field for field, site in MATRICES.items()}
"""Site -> the matrix of a layer that reads it."""

_PROGRAMS: Final = 264
"""Programs among which attention is divided: two per multiprocessor of an H100."""


class GpuStep:
    """A decode step of one model under one plan.

    Args:
        spec: the model's dimensions.
        layers: its layers; bfloat16, float16 or float32, contiguous, all on one device. Nothing is copied. The matrices
            of a site may be packed (int8, int4), all of them in one layout.
        embedding, final_norm, lm_head: [vocab, hidden], [hidden], [vocab, hidden]; a tied head is the embedding.
            Embedding and head may be packed, too.
        rope: cos and sin [tables, max_tokens, head_dim] in the model's dtype, the rotation's sign folded into sin.
        keys, values: the cache, [layers, kv_heads, max_tokens, head_dim]; the last two axes contiguous.
        thresholds: what entries are compared with; None for the dense step. A centre is not supported.
        ring_slots: length of the capture ring; 0 captures nothing.
        sparsity: about how much the thresholds drop; chooses among tuned configurations.

    Attributes:
        token, position: int64 [1], the input of the next step; after `sample`, each step writes those of its successor.
        logits: [vocab] of the last step, in the model's dtype.
        ring: site -> [layers, ring_slots, K], what the products consumed.
        slot: int64 [1], the ring slot that the next step fills; it advances by itself.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, layout or device; the message names it.
    """

    def __init__(
        self,
        spec: StepSpec,
        layers: Sequence[LayerTensors],
        embedding: Matrix,
        final_norm: Tensor,
        lm_head: Matrix,
        rope: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        *,
        thresholds: Thresholds | None = None,
        ring_slots: int = 0,
        sparsity: float = 0.5,
    ) -> None:
        self.spec, self._layers = spec, tuple(layers)
        self.dtype, self.device = embedding.dtype, embedding.device
        self._ends = embedding, final_norm, lm_head
        self._traits = traits_in(spec.traits, self.dtype)
        self._rope, self._keys, self._values = rope, keys, values
        self._check()
        self.token, self.position, self.slot = torch.zeros(3, 1, dtype=torch.int64, device=self.device)
        self.logits = self._buffer(spec.vocab)
        self.ring = {site: self._buffer(len(layers), ring_slots, spec.channels(site)) for site in SITES if ring_slots}
        self._chooser: Chooser | None = None
        self._sparse = thresholds is not None
        self._products = self._make_products(thresholds, sparsity)
        self._streams = self._buffer(2, spec.hidden)
        self._q = self._buffer(spec.heads, spec.head_dim)
        self._last = self._buffer(spec.hidden)
        self._unpacked, self._first = self._buffer(1, spec.hidden), torch.zeros_like(self.token)
        shares = max(1, min(32, _PROGRAMS // spec.kv_heads, -(-keys.shape[2] // 64)))
        self._attention = AttentionShares.empty(spec.heads, spec.head_dim, shares, self.device)
        self._ran = False
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def step(self, token: int, position: int) -> Tensor:
        """Feed one token and return the logits after it.

        Returns:
            [vocab] in the model's dtype: the buffer `logits`, overwritten by the next step.

        Raises:
            ValueError: the position is outside the cache, or the token outside the vocabulary.
        """
        if not 0 <= position < self._keys.shape[2]:
            raise ValueError(f"position {position} is outside the cache of {self._keys.shape[2]}")
        if not 0 <= token < self.spec.vocab:
            raise ValueError(f"token {token} is not in a vocabulary of {self.spec.vocab}")
        self.token.fill_(token)
        self.position.fill_(position)
        self.run()
        return self.logits

    @torch.inference_mode()
    def run(self) -> None:
        """Run the step for what `token` and `position` hold, without waiting for it.

        The first run launches kernel by kernel, which compiles them; the second records the graph.
        """
        if self.device.type == "cuda" and self._ran and self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # A store's writer may be copying rows on a stream and thread of its own meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch()
            self._graph = graph
        if self._graph is not None:
            self._graph.replay()
        else:
            self._launch()
        self._ran = True

    @torch.inference_mode()
    def sample(self, rule: SamplingRule, sequence: int = 0) -> None:
        """From the next step on, choose the token after it on the device, too."""
        if self._chooser is None or not self._chooser.adopt(rule, sequence):
            self._chooser = Chooser(rule, sequence, self.device)
            self._graph, self._ran = None, False

    @torch.inference_mode()
    def choose(self, logits: Tensor, position: int) -> None:
        """Choose from logits [vocab] that a prefill left after the token at `position`, as a step would."""
        assert self._chooser is not None, "call sample() first"
        self.position.fill_(position)
        self._chooser(logits, self.position)

    def chosen(self) -> int | None:
        """The token that the last step, or `choose`, chose; None if none can be chosen. Waits for the device."""
        assert self._chooser is not None, "call sample() first"
        token, broken = self._chooser.choice.tolist()
        return None if broken else token

    def kept(self) -> NDArray[np.int64] | None:
        """Kept entries summed over all steps so far, int64 [layers, 7]; None for a dense step. Waits for the device."""
        if not self._sparse:
            return None
        tallies = [p.tally.sum(-1) for p in self._products.values() if isinstance(p, SparseProduct)]
        return torch.cat(tallies, dim=1).cpu().numpy()

    def _launch(self) -> None:
        """The whole step: ten launches per layer, and the head."""
        embedding, final_norm, lm_head = self._ends
        first, second = self._streams
        eps, position, products, traits = self.spec.norm_eps, self.position, self._products, self._traits
        hidden, row = embedding.data, self.token
        if isinstance(embedding, PackedMatrix):
            launch_unpack_row(embedding, self.token, self._unpacked[0])
            hidden, row = self._unpacked, self._first
        down, post_norm = None, None
        for i, w in enumerate(self._layers):
            sinks = {site: product.sink(i, self._capture(site, i)) for site, product in products.items()}
            token = row if i == 0 else None
            launch_rms_norm(
                hidden, first, w.attn_norm, eps, sinks["attn_in"],
                partial=down, post_norm=post_norm, token=token, traits=traits,
            )  # fmt: skip
            qkv = products["attn_in"](i, w.qkv)
            norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm)
            keys, values = self._keys[i], self._values[i]
            rope = self._rope[0][self.spec.rope_of_layer[i]], self._rope[1][self.spec.rope_of_layer[i]]
            launch_qkv(qkv, rope, position, self._q, keys, values, eps, bias=w.qkv_bias, norms=norms, traits=traits)
            window = self.spec.windows[i]
            launch_attention(self._q, keys, values, position, window, self._attention, sinks["attn_out"], traits)
            out = products["attn_out"](i, w.attn_out)
            launch_rms_norm(
                first, second, w.mlp_norm, eps, sinks["mlp_in"],
                partial=out, bias=w.o_bias, post_norm=w.attn_post_norm, traits=traits,
            )  # fmt: skip
            launch_swiglu(products["mlp_in"](i, w.gate_up), first, sinks["mlp_mid"], traits.activation)
            down, post_norm = products["mlp_mid"](i, w.down), w.mlp_post_norm
            hidden = second
        end = Sink(chunk_for(self.spec.hidden), None, None, None, self._last, None)
        launch_rms_norm(hidden, first, final_norm, eps, end, partial=down, post_norm=post_norm, traits=traits)
        if isinstance(lm_head, PackedMatrix):
            launch_packed_dot(lm_head, self._last, self.logits)
        else:
            torch.mv(lm_head.data, self._last, out=self.logits)
        if traits.logit_scale != 1.0:
            self.logits.mul_(traits.logit_scale)
        if traits.logit_cap is not None:
            self.logits.div_(traits.logit_cap).tanh_().mul_(traits.logit_cap)
        self._advance()

    def _advance(self) -> None:
        if self.ring:
            self.slot.add_(1).remainder_(self.ring[SITES[0]].shape[1])
        if self._chooser is not None:
            self._chooser(self.logits, self.position)
            self.token.copy_(self._chooser.choice[:1])
            self.position.add_(1)

    def _capture(self, site: str, layer: int) -> Capture | None:
        return Capture(self.ring[site][layer], self.slot) if self.ring else None

    def _buffer(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _make_products(self, thresholds: Thresholds | None, sparsity: float) -> dict[str, Product]:
        spec = self.spec
        if thresholds is not None:
            check_thresholds(spec, thresholds)
        products: dict[str, Product] = {}
        for site in SITES:
            size, widths = spec.channels(site), spec.segments(site)
            chunk = _HEADS_CHUNK if site == "attn_out" else CHUNK
            matrix = getattr(self._layers[0], _FIELD[site])
            packed = isinstance(matrix, PackedMatrix)
            if thresholds is None and not packed:
                products[site] = DenseProduct(size, sum(widths), chunk, self.dtype, self.device)
                continue
            if thresholds is None:
                own = torch.full((len(self._layers), len(widths)), _KEEP_ALL, device=self.device)
            else:
                limits = np.stack([thresholds.site(layer, site) for layer in range(len(self._layers))])
                own = torch.from_numpy(limits).to(self.device)
            if packed:
                config = packed_gemv_config(size, matrix.layout)
            else:
                config = gemv_config(size, sum(widths), self.dtype.itemsize, sparsity, self.device)
            products[site] = SparseProduct(size, widths, own, config, chunk, self.dtype)
        return products

    def _check(self) -> None:
        """Kernels trust pointers, so nothing may reach them unchecked."""
        spec, count = self.spec, len(self._layers)
        if len(spec.windows) != count:
            raise ValueError(f"{count} layers were given, {len(spec.windows)} are described")
        for i, layer in enumerate(self._layers):
            for name, shape in layer_shapes(spec).items():
                tensor = getattr(layer, name)
                if name in MATRICES:
                    first = getattr(self._layers[0], name)
                    if isinstance(tensor, PackedMatrix) or isinstance(first, PackedMatrix):
                        self._check_packed(f"layer {i}, {name}", tensor, first, shape)
                        continue
                    tensor = floats(tensor, "the graph step")
                if tensor is not None or name not in OPTIONAL:
                    self._check_tensor(f"layer {i}, {name}", tensor, shape)
        embedding, final_norm, lm_head = self._ends
        self._check_tensor("final_norm", final_norm, (spec.hidden,))
        for name, table in (("embedding", embedding), ("lm_head", lm_head)):
            if isinstance(table, PackedMatrix):
                self._check_packed(name, table, table, (spec.vocab, spec.hidden))
            else:
                self._check_tensor(name, floats(table, "the graph step"), (spec.vocab, spec.hidden))
        room = self._keys.shape[2]
        for name, tensor in zip(("cos", "sin"), self._rope, strict=True):
            self._check_tensor(name, tensor, (1 + max(spec.rope_of_layer), room, spec.head_dim))
        for name, tensor in (("keys", self._keys), ("values", self._values)):
            self._check_tensor(name, tensor[0, 0], (room, spec.head_dim))
            if tensor.shape != (count, spec.kv_heads, room, spec.head_dim) or tensor.stride() != self._keys.stride():
                raise ValueError(f"{name} must be [layers, kv_heads, max_tokens, head_dim], not {list(tensor.shape)}")

    def _check_packed(self, name: str, matrix: Matrix, like: Matrix, shape: tuple[int, ...]) -> None:
        """`like`: a matrix whose layout it must share, since both are multiplied by one product."""
        layout, wanted = (m.layout if isinstance(m, PackedMatrix) else m.kind for m in (matrix, like))
        if (matrix.shape, matrix.dtype, matrix.device, layout) != (shape, self.dtype, self.device, wanted):
            raise ValueError(
                f"{name} must multiply {self.dtype} by {list(shape)} in {wanted} on {self.device}, "
                f"not {matrix.dtype} by {list(matrix.shape)} in {layout} on {matrix.device}"
            )

    def _check_tensor(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype or tensor.device != self.device:
            raise ValueError(
                f"{name} must be {self.dtype} {list(shape)} on {self.device}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
