"""The weight matrices that a benchmark multiplies by: those of well-known models, of any model, or of any size.

Shapes only. Matrices are those that a decode step reads: q, k and v are one, gate and up are one. Equal matrices of
several models are one matrix with several names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from teal_cli.checks import did_you_mean
from teal_cli.errors import UsageError
from teal_kernels.spec import SITES, Geometry

MATRIX_NAMES: Final = {"attn_in": "qkv", "attn_out": "o", "mlp_in": "gate_up", "mlp_mid": "down"}


@dataclass(frozen=True)
class ModelShape(Geometry):
    """A model's dimensions, enough to build one with random weights.

    Attributes:
        family: `model_type` of transformers.
        layers, vocab, context: the usual counts.
        rope_theta: base of the rotary embedding.
        tied: the output head is the embedding.
    """

    family: str
    layers: int
    vocab: int
    context: int
    rope_theta: float
    tied: bool = False

    def config_fields(self, layers: int) -> dict[str, Any]:
        """config.json of such a model with that many layers."""
        return {
            "model_type": self.family,
            "num_hidden_layers": layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "sliding_window": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }


MODEL_SHAPES: Final = {
    "llama-2-7b": ModelShape(4096, 11008, 32, 32, 128, "llama", 32, 32000, 4096, 1e4),
    "llama-3-8b": ModelShape(4096, 14336, 32, 8, 128, "llama", 32, 128256, 8192, 5e5),
    "mistral-7b": ModelShape(4096, 14336, 32, 8, 128, "mistral", 32, 32768, 32768, 1e6),
    "qwen3-8b": ModelShape(4096, 12288, 32, 8, 128, "qwen3", 36, 151936, 40960, 1e6),
    "smollm2-135m": ModelShape(576, 1536, 9, 3, 64, "llama", 30, 49152, 8192, 1e5, tied=True),
}
"""Mistral is v0.3, whose attention has no window."""


@dataclass(frozen=True)
class MatrixShape:
    """One input-major weight matrix [inputs, outputs].

    Attributes:
        name: qkv, o, gate_up, down, or KxN for one that belongs to no model.
        models: whose it is; empty for a KxN.
        site: which vector it is multiplied by; None for a KxN.
        segments: output widths of the projections that are fused in it.
    """

    name: str
    models: tuple[str, ...]
    site: str | None
    inputs: int
    segments: tuple[int, ...]

    @property
    def outputs(self) -> int:
        return sum(self.segments)


def matrices_of(name: str, shape: Geometry) -> list[MatrixShape]:
    """The four matrices of a layer of a model."""
    return [
        MatrixShape(MATRIX_NAMES[site], (name,), site, shape.channels(site), shape.segments(site)) for site in SITES
    ]


def merge(matrices: Iterable[MatrixShape]) -> list[MatrixShape]:
    """Equal matrices become one that names all their models; the order stays."""
    merged: dict[tuple[str | None, int, tuple[int, ...]], MatrixShape] = {}
    for matrix in matrices:
        key = (matrix.site, matrix.inputs, matrix.segments)
        models = merged[key].models if key in merged else ()
        names = tuple(dict.fromkeys((*models, *matrix.models)))
        merged[key] = MatrixShape(matrix.name, names, matrix.site, matrix.inputs, matrix.segments)
    return list(merged.values())


def parse_shapes(text: str) -> list[MatrixShape]:
    """Matrices of a list such as `llama-2-7b,4096x11008`; `all` is every model known here.

    Raises:
        UsageError: an unknown name, or a size that is none.
    """
    matrices: list[MatrixShape] = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        size = re.fullmatch(r"(\d+)x(\d+)", part)
        if size:
            inputs, outputs = map(int, size.groups())
            if not inputs or not outputs:
                raise UsageError(
                    f"a matrix of {part} has no entries", hint="write inputs x outputs, such as 4096x11008"
                )
            matrices.append(MatrixShape(part, (), None, inputs, (outputs,)))
        else:
            names = list(MODEL_SHAPES) if part == "all" else [part]
            for name in names:
                matrices += matrices_of(name, model_shape(name))
    if not matrices:
        raise UsageError("no shapes were named", hint=f"shapes: {', '.join(MODEL_SHAPES)}, all, or KxN")
    return merge(matrices)


def model_shape(name: str) -> ModelShape:
    """The dimensions of a known model.

    Raises:
        UsageError: an unknown name; the hint has a did-you-mean.
    """
    if name not in MODEL_SHAPES:
        meant = did_you_mean(name.lower(), MODEL_SHAPES, count=2, cutoff=0.4)
        raise UsageError(
            f"there is no shape called {name!r}",
            hint=f"{meant}there are {', '.join(MODEL_SHAPES)}, and for --shapes sizes such as 4096x11008",
        )
    return MODEL_SHAPES[name]


def parse_stack(text: str) -> tuple[str, ModelShape, int]:
    """`llama-2-7b:4` -> its name, its shape and how many layers; without a number all of them.

    Raises:
        UsageError: an unknown shape, or no number of layers.
    """
    name, colon, count = text.partition(":")
    shape = model_shape(name)
    if not colon:
        return name, shape, shape.layers
    if not count.isdigit() or int(count) < 1:
        raise UsageError(f"{text!r} names no stack", hint="write SHAPE:LAYERS, such as llama-2-7b:4")
    return name, shape, int(count)
