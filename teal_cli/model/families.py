"""The families of models that teal runs: a row each, of what makes one differ from Llama.

A row says two kinds of things: what its checkpoints call their tensors, and how the model computes what lies between
the matrices. What a model's own config decides is a function of transformers' config object. Nothing is imported here,
so that the registry reads the same table without loading torch; `config` turns a row and a config into numbers.
What a mixture of experts adds to a row is in `mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Hf: TypeAlias = Any
"""A config object of transformers."""

Name: TypeAlias = tuple[str, str]
"""What a tensor is called in safetensors, and in a GGUF."""

Windows: TypeAlias = tuple[int | None, ...]
"""Per layer, how many positions a token attends to, itself included; None means all."""


def _one(hf: Hf) -> float:
    return 1.0


def _nothing(hf: Hf) -> None:
    return None


def _never(hf: Hf) -> bool:
    return False


def _always(hf: Hf) -> bool:
    return True


def _all_layers(hf: Hf) -> tuple[bool, ...]:
    return (True,) * int(hf.num_hidden_layers)


def _attention_bias(hf: Hf) -> bool:
    return bool(hf.attention_bias)


def _no_windows(hf: Hf) -> Windows:
    return (None,) * int(hf.num_hidden_layers)


def _same_windows(hf: Hf) -> Windows:
    return (hf.sliding_window,) * int(hf.num_hidden_layers)


def _windows_by_layer_type(hf: Hf) -> Windows:
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


TOP: Final[Mapping[str, Name]] = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}
"""Part of a model -> its tensor, the same in every family."""

_LLAMA: Final[dict[str, Name]] = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
}
_BIASES: Final[dict[str, Name]] = {
    "q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "o_bias": ("self_attn.o_proj.bias", "attn_output.bias"),
}
"""Where a config asks for biases; Llama's GGUF have none."""
_HEAD_NORMS: Final[dict[str, Name]] = {
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
}

_FUSED: Final[dict[str, Name]] = _LLAMA | {
    **dict.fromkeys("qkv", ("self_attn.qkv_proj.weight", "attn_qkv.weight")),
    **dict.fromkeys(("gate", "up"), ("mlp.gate_up_proj.weight", "ffn_up.weight")),
}
_NORMS_ON_BOTH_SIDES: Final[dict[str, Name]] = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "attn_post_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "mlp_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    "mlp_post_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
}

_NORMS_AFTER: Final[dict[str, Name]] = {
    part: name for part, name in (_LLAMA | _NORMS_ON_BOTH_SIDES).items() if part not in ("attn_norm", "mlp_norm")
}


def _gemma_refused(hf: Hf) -> str | None:
    return "attention in both directions (use_bidirectional_attention)" if hf.use_bidirectional_attention else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row. The defaults are Llama's.

    Attributes:
        title: the models' names, for people.
        architecture: the class that config.json names.
        gguf: the architecture that a GGUF's metadata names; None where llama.cpp has no name of its own for it.
        gguf_norm_offset: what llama.cpp's converter added to every norm's weight.
        gguf_interleaved: its converter reordered the rows of q and k for its rotation.
        layer: part of a layer -> its tensor. Parts `attn_norm`, `mlp_norm` are norms before the half layer,
            `attn_post_norm`, `mlp_post_norm` after it; what the row lacks, the family lacks. Biases are read where
            `qkv_bias` and `o_bias` say so. Parts of one name are rows of one tensor, in the order of the row.
        qkv_bias, o_bias: q, k and v have a bias; o has one.
        windows: the window of every layer.
        norm_offset: added to the weight of every norm, those of q and k too.
        norm_rounds_once: a norm is multiplied by its weight in float32 and then rounded, not rounded before it, too.
        activation: of the gate, as transformers calls it.
        wide_head_norms: the norms of q and k, if there are any, take all heads as one vector.
        rotates: of every layer, whether it rotates q and k.
        rotary_share: how much of each head is rotated, from its first channel on.
        attention_scale: factor on the scores; None is 1 / sqrt(head size).
        score_cap, logit_cap: scores and logits become cap * tanh(x / cap).
        embedding_scale, residual_scale, logit_scale: factors on the embedding of a token (rounded to the model's
            dtype), on what a half layer adds to the residual stream, and on the logits.
        refused: a part that a config may ask for and teal lacks, as a noun; None if it asks for none.
    """

    title: str
    architecture: str
    gguf: str | None = None
    gguf_norm_offset: float = 0.0
    gguf_interleaved: bool = False
    layer: dict[str, Name]
    qkv_bias: Callable[[Hf], bool] = _never
    o_bias: Callable[[Hf], bool] = _never
    windows: Callable[[Hf], Windows] = _no_windows
    norm_offset: float = 0.0
    norm_rounds_once: bool = False
    wide_head_norms: bool = False
    rotates: Callable[[Hf], tuple[bool, ...]] = _all_layers
    rotary_share: Callable[[Hf], float] = _one
    activation: Callable[[Hf], str] = lambda hf: str(hf.hidden_act)
    attention_scale: Callable[[Hf], float | None] = _nothing
    score_cap: Callable[[Hf], float | None] = _nothing
    embedding_scale: Callable[[Hf], float] = _one
    residual_scale: Callable[[Hf], float] = _one
    logit_scale: Callable[[Hf], float] = _one
    logit_cap: Callable[[Hf], float | None] = _nothing
    refused: Callable[[Hf], str | None] = _nothing

    def parts(self, hf: Hf) -> dict[str, Name]:
        """The parts of a layer that a checkpoint with this config has, and their tensors."""
        absent = set() if self.qkv_bias(hf) else {"q_bias", "k_bias", "v_bias"}
        absent |= set() if self.o_bias(hf) else {"o_bias"}
        return {part: name for part, name in self.layer.items() if part not in absent}


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(
        title="Llama 2/3",
        architecture="LlamaForCausalLM",
        gguf="llama",
        gguf_interleaved=True,
        layer=_LLAMA | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
    ),
    "mistral": Family(
        title="Mistral",
        architecture="MistralForCausalLM",
        layer=_LLAMA,
        windows=_same_windows,
    ),
    "qwen2": Family(
        title="Qwen2/2.5",
        architecture="Qwen2ForCausalLM",
        gguf="qwen2",
        layer=_LLAMA | _BIASES,
        qkv_bias=_always,
        windows=_windows_by_layer_type,
    ),
    "qwen3": Family(
        title="Qwen3",
        architecture="Qwen3ForCausalLM",
        gguf="qwen3",
        layer=_LLAMA | _BIASES | _HEAD_NORMS,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_windows_by_layer_type,
    ),
    "gemma": Family(
        title="Gemma",
        architecture="GemmaForCausalLM",
        gguf="gemma",
        gguf_norm_offset=1.0,
        layer=_LLAMA | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        norm_offset=1.0,
        norm_rounds_once=True,
        embedding_scale=lambda hf: float(hf.hidden_size**0.5),
        refused=_gemma_refused,
    ),
    "gemma3_text": Family(
        title="Gemma 3 (text)",
        architecture="Gemma3ForCausalLM",
        gguf="gemma3",
        gguf_norm_offset=1.0,
        layer=_LLAMA | _NORMS_ON_BOTH_SIDES | _HEAD_NORMS | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_windows_by_layer_type,
        norm_offset=1.0,
        norm_rounds_once=True,
        activation=lambda hf: str(hf.hidden_activation),
        attention_scale=lambda hf: float(hf.query_pre_attn_scalar**-0.5),
        embedding_scale=lambda hf: float(hf.hidden_size**0.5),
        logit_cap=lambda hf: hf.final_logit_softcapping,
        refused=_gemma_refused,
    ),
    "gemma2": Family(
        title="Gemma 2",
        architecture="Gemma2ForCausalLM",
        gguf="gemma2",
        gguf_norm_offset=1.0,
        layer=_LLAMA | _NORMS_ON_BOTH_SIDES | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_windows_by_layer_type,
        norm_offset=1.0,
        norm_rounds_once=True,
        activation=lambda hf: str(hf.hidden_activation),
        attention_scale=lambda hf: float(hf.query_pre_attn_scalar**-0.5),
        score_cap=lambda hf: hf.attn_logit_softcapping,
        embedding_scale=lambda hf: float(hf.hidden_size**0.5),
        logit_cap=lambda hf: hf.final_logit_softcapping,
        refused=_gemma_refused,
    ),
    "granite": Family(
        title="Granite 3",
        architecture="GraniteForCausalLM",
        gguf="granite",
        gguf_interleaved=True,
        layer=_LLAMA | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        attention_scale=lambda hf: float(hf.attention_multiplier),
        embedding_scale=lambda hf: float(hf.embedding_multiplier),
        residual_scale=lambda hf: float(hf.residual_multiplier),
        logit_scale=lambda hf: float(1.0 / hf.logits_scaling),
    ),
    "smollm3": Family(
        title="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        gguf="smollm3",
        gguf_interleaved=True,
        layer=_LLAMA | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=lambda hf: _windows_by_layer_type(hf) if hf.use_sliding_window else _no_windows(hf),
        rotates=lambda hf: tuple(map(bool, hf.no_rope_layers)),
    ),
    "olmo2": Family(
        title="OLMo 2",
        architecture="Olmo2ForCausalLM",
        gguf="olmo2",
        layer=_NORMS_AFTER | _BIASES | _HEAD_NORMS,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        norm_rounds_once=True,
        wide_head_norms=True,
    ),
    "olmo3": Family(
        title="OLMo 3",
        architecture="Olmo3ForCausalLM",
        layer=_NORMS_AFTER | _BIASES | _HEAD_NORMS,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_windows_by_layer_type,
        norm_rounds_once=True,
        wide_head_norms=True,
    ),
    "phi3": Family(
        title="Phi-3/3.5/4",
        architecture="Phi3ForCausalLM",
        gguf="phi3",
        layer=_FUSED,
        windows=_same_windows,
        rotary_share=lambda hf: float(hf.rope_parameters["partial_rotary_factor"]),
    ),
    "mixtral": Family(
        title="Mixtral",
        architecture="MixtralForCausalLM",
        layer=_LLAMA,
        windows=_same_windows,
    ),
    "qwen3_moe": Family(
        title="Qwen3-MoE",
        architecture="Qwen3MoeForCausalLM",
        layer=_LLAMA | _BIASES | _HEAD_NORMS,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        windows=_same_windows,
    ),
    "olmoe": Family(
        title="OLMoE",
        architecture="OlmoeForCausalLM",
        layer=_LLAMA | _BIASES | _HEAD_NORMS,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        wide_head_norms=True,
        refused=lambda hf: None if hf.clip_qkv is None else "clipped queries, keys and values (clip_qkv)",
    ),
    "granitemoe": Family(
        title="Granite 3 MoE",
        architecture="GraniteMoeForCausalLM",
        layer=_LLAMA | _BIASES,
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        attention_scale=lambda hf: float(hf.attention_multiplier),
        embedding_scale=lambda hf: float(hf.embedding_multiplier),
        residual_scale=lambda hf: float(hf.residual_multiplier),
        logit_scale=lambda hf: float(1.0 / hf.logits_scaling),
    ),
}
"""`model_type` of config.json -> its row."""
