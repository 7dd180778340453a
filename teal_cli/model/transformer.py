"""Our own lean decoder-only transformer: one layer as a function, and the whole model around it.

Every linear layer goes through `project`, called once per site: the one hook serves dense prefill, calibration,
sparse decoding and capture. This module knows nothing of these, nor of text, sampling or thresholds.

Batch size is one everywhere: hidden states are [S, hidden], S tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.memory import WeightMemory
from teal_cli.model.rope import RopeTable, Rotation, rotate_
from teal_cli.model.weights import Checkpoint, Device, LayerWeights
from teal_kernels.experts import Experts, route
from teal_kernels.matrix import Matrix
from teal_kernels.traits import GELU_TANH, LLAMA, Traits

Project: TypeAlias = Callable[[int, str, Tensor, Matrix], Tensor]
"""(layer, site, x [S, K], matrix [K, N]) -> [S, N]. It leaves x as it is; the model may overwrite the result."""

Attend: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, q [S, heads, head_dim], kv [S, 2, kv_heads, head_dim]) -> [S, heads * head_dim]; q, k already rotated."""


def dense(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
    """The plain linear layer, the default `Project`."""
    return matrix.dense(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, traits: Traits = LLAMA) -> Tensor:
    """RMSNorm over the last axis, in float32: cast to x's dtype before or after it is multiplied by the weight."""
    normed = F.rms_norm(x.float(), weight.shape, None, eps)
    if traits.norm_rounds_once:
        return (normed * (weight.float() + traits.norm_offset)).to(x.dtype)
    return normed.to(x.dtype) * weight


def embed(config: ModelConfig, embedding: Matrix, tokens: Tensor) -> Tensor:
    """Token ids int64 [S], embedding [vocab, hidden] -> the hidden states [S, hidden] before the first layer."""
    hidden = embedding.rows(tokens)
    scale = config.traits.embedding_scale
    return hidden if scale == 1.0 else hidden * torch.tensor(scale, dtype=hidden.dtype)


def logits_of(config: ModelConfig, states: Tensor, norm: Tensor, head: Matrix) -> Tensor:
    """Final norm and head: hidden states [S, hidden] after the last layer -> float32 [S, vocab]."""
    return finished(config, products_of_head(config, states, norm, head))


def products_of_head(config: ModelConfig, states: Tensor, norm: Tensor, head: Matrix) -> Tensor:
    """The same in the dtype of the states, before it is scaled and capped."""
    return head.dense_transposed(rms_norm(states, norm, config.norm_eps, config.traits))


def finished(config: ModelConfig, products: Tensor) -> Tensor:
    """Products of the head [S, vocab] -> logits float32 [S, vocab]."""
    traits, logits = config.traits, products.float()
    if traits.logit_scale != 1.0:
        logits = logits * traits.logit_scale
    return logits if traits.logit_cap is None else capped(logits, traits.logit_cap)


def capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, traits: Traits = LLAMA) -> Tensor:
    """Causal attention of the last S of T positions.

    Args:
        q: [S, heads, head_dim], the queries of the last S positions.
        k, v: [kv_heads, T, head_dim], T >= S.
        window: how many positions a query sees, its own included; None for all.
        traits: scale and cap of the scores.

    Returns:
        [S, heads * head_dim], heads in the order of q.
    """
    count, heads, head_dim = q.shape
    kv_heads, total, _ = k.shape
    if count == 1:
        if window is not None and total > window:
            k, v = k[:, total - window :], v[:, total - window :]
        # Heads that share a key stand in the sequence axis: grouped attention with neither mask nor copy of k.
        grouped = q.view(1, kv_heads, heads // kv_heads, head_dim)
        return _attend(grouped, k[None], v[None], traits).reshape(1, heads * head_dim)
    mask, before = None, total - count
    plain = (window is None or window >= total) and traits.score_cap is None
    if plain and 0 < before <= count // 2:
        # Half of a square, without a mask, is less than S times T with one: queries that nobody asked for fill it up.
        q = torch.cat((q.new_zeros(before, heads, head_dim), q))
    if len(q) != total or not plain:
        rows = torch.arange(total - count, total, device=q.device)[:, None]
        columns = torch.arange(total, device=q.device)
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
    out = _attend(q.transpose(0, 1)[None], k[None], v[None], traits, mask=mask, causal=mask is None)
    return out[0].transpose(0, 1)[-count:].reshape(count, heads * head_dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, traits: Traits, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """q [1, heads, S, head_dim], k and v [1, kv_heads, T, head_dim], mask bool [S, T] or None -> as q."""
    grouped = q.shape[1] != k.shape[1]
    if traits.score_cap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=traits.attention_scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if traits.attention_scale is None else traits.attention_scale
    scores = capped(q.float() @ k.float().transpose(-1, -2) * scale, traits.score_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v.float()).to(q.dtype)


def attend_alone(config: ModelConfig, prefix: Tensor | None = None) -> Attend:
    """Attention within one whole sequence, without a cache: what a pass uses.

    Args:
        prefix: keys and values of the positions before the first query, [P, 2, kv_heads, head_dim]; None where the
            queries begin at position 0.
    """

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        k, v = (kv if prefix is None else torch.cat((prefix, kv))).permute(1, 2, 0, 3)
        return attention(q, k, v, config.sliding_windows[layer], config.traits)

    return attend


def attend_cached(config: ModelConfig, cache: KVCache, position: int) -> Attend:
    """Attention over a cache: writes the new keys and values at `position`, then attends up to them."""

    def attend(layer: int, q: Tensor, kv: Tensor) -> Tensor:
        end = position + len(q)
        cached = cache.kv[layer]
        cached[:, :, position:end].copy_(kv.permute(1, 2, 0, 3))
        k, v = cached[:, :, :end]
        return attention(q, k, v, config.sliding_windows[layer], config.traits)

    return attend


def block(
    config: ModelConfig,
    index: int,
    weights: LayerWeights,
    hidden: Tensor,
    rope: Rotation,
    attend: Attend,
    project: Project = dense,
) -> Tensor:
    """One decoder layer; the model, the decoder and calibration all go through here.

    Args:
        hidden: [S, hidden], left as it is.
        rope: cos and sin of these S positions for this layer, from `RopeTable.at`.
        attend: `attend_cached` or `attend_alone`.
        project: called at attn_in, attn_out, mlp_in and mlp_mid, in this order.

    Returns:
        [S, hidden], new memory.
    """
    count, heads, kv_heads, head_dim = len(hidden), config.heads, config.kv_heads, config.head_dim
    traits = config.traits

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm(x, weight, config.norm_eps, traits)

    def residual(hidden: Tensor, out: Tensor, post_norm: Tensor | None) -> Tensor:
        out = norm(out, post_norm)
        return hidden + (out if traits.residual_scale == 1.0 else out * traits.residual_scale)

    x = norm(hidden, weights.attn_norm)
    qkv = project(index, "attn_in", x, weights.qkv)
    if weights.qkv_bias is not None:
        qkv += weights.qkv_bias
    qkv = qkv.view(count, heads + 2 * kv_heads, head_dim)
    if weights.q_norm is not None and weights.k_norm is not None:
        for part, weight in ((qkv[:, :heads], weights.q_norm), (qkv[:, heads : heads + kv_heads], weights.k_norm)):
            vectors = part.flatten(1) if traits.wide_head_norms else part
            vectors = vectors.clone() if part.requires_grad else vectors  # a gradient needs what copy_ overwrites
            part.copy_(norm(vectors, weight).view(part.shape))
    rotate_(qkv[:, : heads + kv_heads], rope)
    mixed = attend(index, qkv[:, :heads], qkv[:, heads:].view(count, 2, kv_heads, head_dim))
    out = project(index, "attn_out", mixed, weights.attn_out)
    if weights.o_bias is not None:
        out += weights.o_bias
    hidden = residual(hidden, out, weights.attn_post_norm)
    x = norm(hidden, weights.mlp_norm)
    gate_up, down = _mlp(config, weights, x)
    gate, up = project(index, "mlp_in", x, gate_up).chunk(2, dim=-1)
    active = F.gelu(gate, approximate="tanh") if traits.activation == GELU_TANH else F.silu(gate)
    out = project(index, "mlp_mid", active.mul_(up), down)
    return residual(hidden, out, weights.mlp_post_norm)


def _mlp(config: ModelConfig, weights: LayerWeights, x: Tensor) -> tuple[Matrix, Matrix]:
    """gate_up and down for tokens whose MLP reads x [S, hidden]."""
    gate_up, down, mixture = weights.gate_up, weights.down, config.mixture
    if mixture is None or weights.router is None:
        return gate_up, down
    assert isinstance(gate_up, Experts)
    assert isinstance(down, Experts)
    routing = route(x, weights.router, mixture.routed, normalised=mixture.normalised)
    return gate_up.routed(routing), down.routed(routing)


class KVCache:
    """The keys and values of the tokens of one sequence seen so far, in memory that is allocated once.

    Attributes:
        kv: [layers, 2, kv_heads, max_tokens, head_dim]; index 0 of the second axis holds the keys, 1 the values,
            so that a layer writes both in one copy.
        max_tokens: how many positions there is room for.
        length: how many positions are filled. Set it lower to take tokens back, 0 to begin anew.
    """

    def __init__(
        self, config: ModelConfig, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, 2, config.kv_heads, max_tokens, config.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.max_tokens = max_tokens
        self.length = 0

    @property
    def k(self) -> Tensor:
        """Rotated keys, a view [layers, kv_heads, max_tokens, head_dim]."""
        return self.kv[:, 0]

    @property
    def v(self) -> Tensor:
        """Values, a view [layers, kv_heads, max_tokens, head_dim]."""
        return self.kv[:, 1]

    def check_room(self, position: int, count: int) -> None:
        """Raises unless `count` tokens can be written at `position`.

        Raises:
            UsageError: the cache is full.
            ValueError: the write would leave positions unfilled before it (a defect of the caller).
        """
        if position > self.length:
            raise ValueError(f"position {position} leaves a gap after the {self.length} filled positions")
        if position + count > self.max_tokens:
            raise UsageError(
                f"{position + count} tokens do not fit the key-value cache of {self.max_tokens}",
                hint="shorten the prompt, or ask for fewer new tokens",
            )


class Transformer:
    """A whole model in memory.

    Attributes:
        config, dtype, device: what it is and where it runs.
        layers: the weights of every layer.
        embedding, final_norm, lm_head: [vocab, hidden], [hidden], [vocab, hidden]; a tied head is the embedding.
        rope: the rotary table.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[LayerWeights],
        embedding: Matrix,
        final_norm: Tensor,
        lm_head: Matrix,
    ) -> None:
        self.config = config
        self.layers = tuple(layers)
        self.embedding, self.final_norm, self.lm_head = embedding, final_norm, lm_head
        self.dtype, self.device = embedding.dtype, embedding.device
        self.rope = RopeTable(config, self.dtype, self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: Device = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Transformer:
        """Loads a checkpoint folder.

        Args:
            dtype: bfloat16, float16 or float32; None takes the one the checkpoint asks for.
            progress: called with (layers loaded, layers), at the beginning and after each layer.

        Raises:
            TealError: as `Checkpoint`.
        """
        checkpoint = Checkpoint(path)
        config = checkpoint.config
        if dtype is None:
            dtype = getattr(torch, config.torch_dtype)
        if progress is not None:
            progress(0, config.layers)
        embedding = checkpoint.embedding(dtype, device)
        empty = WeightMemory().empty if torch.device(device).type == "cpu" else torch.empty
        layers = []
        for index in range(config.layers):
            layers.append(checkpoint.layer(index, dtype, device, empty))
            if progress is not None:
                progress(index + 1, config.layers)
        head = embedding if checkpoint.tied() else checkpoint.lm_head(dtype, device)
        return cls(config, layers, embedding, checkpoint.final_norm(dtype, device), head)

    def cache(self, max_tokens: int | None = None) -> KVCache:
        """An empty key-value cache for this model; None makes room for the whole context."""
        return KVCache(self.config, max_tokens or self.config.context, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, position: int, cache: KVCache, project: Project = dense) -> Tensor:
        """Runs tokens through the model and returns the logits after the last of them.

        Args:
            tokens: int64 [S] on the model's device; S = 1 is a decode step.
            position: where in the sequence the first of them stands; at most `cache.length`.
            cache: holds the positions before; the new ones are added.

        Returns:
            float32 [vocab].

        Raises:
            UsageError: the cache has no room for them.
        """
        return self.logits(self.states(tokens, position, cache, project)[-1:])[0]

    @torch.inference_mode()
    def states(self, tokens: Tensor, position: int, cache: KVCache, project: Project = dense) -> Tensor:
        """Like `forward`, but returns the last layer's hidden states [S, hidden], before the final norm."""
        cache.check_room(position, len(tokens))
        rope = self.rope.at(position, len(tokens))
        attend = attend_cached(self.config, cache, position)
        hidden = embed(self.config, self.embedding, tokens)
        for index, weights in enumerate(self.layers):
            hidden = block(self.config, index, weights, hidden, rope[index], attend, project)
        cache.length = position + len(tokens)
        return hidden

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Final norm and head: [S, hidden] -> float32 [S, vocab]."""
        return logits_of(self.config, states, self.final_norm, self.lm_head)
