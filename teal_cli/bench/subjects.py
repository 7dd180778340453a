"""What `teal bench decode` decodes: a registered model, or a stack of random layers of real shapes.

A stack needs no checkpoint: random weights move the same bytes as trained ones, and its thresholds are quantiles of its
own activations, so that its sparsity is real. Its tokens mean nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal_cli.bench.inputs import fill_random
from teal_cli.bench.shapes import ModelShape
from teal_cli.decoding.projector import empty_rows
from teal_cli.decoding.steps import PlainStep, choose_step
from teal_cli.errors import HardwareError, NotFoundError, UsageError
from teal_cli.model.config import ModelConfig, load_config, refuse_mixture
from teal_cli.model.quantized import WIDTHS
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import LayerWeights
from teal_cli.registry.registry import Registry
from teal_cli.runs.session import Session, open_session
from teal_kernels.backends import BackendError
from teal_kernels.matrix import FloatMatrix, Matrix
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout, quantize
from teal_kernels.spec import PROJECTIONS, SITES, columns
from teal_kernels.thresholds import Thresholds

Levels = Mapping[float, Thresholds | None]
"""Sparsity -> what entries are compared with; None for the dense step."""

_TEXT = (
    "Single-batch decoding is bound by memory: for every new token all weights are read once, and each is used for one "
    "multiplication. Where an input is close to zero, its column of weights hardly matters and need not be read. "
)
_OBSERVED = 16


@dataclass(frozen=True)
class Subject:
    """A model ready to be decoded.

    Attributes:
        name: as it is shown.
        model, backend: its weights, and what runs a step.
        prompt: token ids.
        thresholds: per sparsity; 0 is there and dense.
        checkpoint: the folder that transformers loads; None for a stack or packed weights.
    """

    name: str
    model: Transformer
    backend: str
    prompt: tuple[int, ...]
    thresholds: Levels
    checkpoint: Path | None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def weights(self) -> str:
        """The kind of its matrices: bfloat16, int8 and so on."""
        return self.model.layers[0].down.kind


Load = Callable[[Session], object]
"""Reads the weights of a session, where that is to be shown."""


def registered(session: Session, sparsities: Iterable[float], prompt_tokens: int, load: Load = Session.load) -> Subject:
    """A model of the registry, under its calibration.

    Args:
        load: called once all else is known to be right.

    Raises:
        NotFoundError: a sparsity above 0 and no calibration.
        UsageError: the prompt does not fit the model's context.
    """
    refuse_mixture(session.config, "the benchmark", "time `teal generate`, whose result says its speed")
    if prompt_tokens >= session.config.context:
        raise UsageError(
            f"a prompt of {prompt_tokens} tokens does not fit the context of {session.config.context}",
            hint="lower --prompt-tokens",
        )
    once = session.encode(_TEXT)
    prompt = (once * -(-prompt_tokens // len(once)))[:prompt_tokens]
    thresholds = {s: session.thresholds(session.plan(s)) for s in (0.0, *sparsities)}
    checkpoint = None if session.entry.parent else session.entry.path
    load(session)
    return Subject(session.entry.name, session.model, session.backend, tuple(prompt), thresholds, checkpoint)


def stack(
    name: str, shape: ModelShape, layers: int, sparsities: Iterable[float], prompt_tokens: int, *, dtype: torch.dtype,
    device: torch.device, backend: str | None = None, seed: int = 0,
) -> Subject:  # fmt: skip
    """Layers of a shape with random weights, with embedding and head.

    Args:
        backend: as `choose_step` takes it.

    Raises:
        HardwareError: the backend cannot run there.
    """
    try:
        chosen, _ = choose_step(device, backend)
    except BackendError as error:
        raise HardwareError(str(error), hint="`teal doctor` shows what this machine can run") from None
    generator = torch.Generator().manual_seed(seed)
    model = _random_model(_config(shape, layers), dtype, device, generator)
    prompt = torch.randint(model.config.vocab, (prompt_tokens,), generator=generator).tolist()
    thresholds: dict[float, Thresholds | None] = {0.0: None}
    thresholds |= _quantiles(model, [s for s in sparsities if s > 0], generator)
    return Subject(f"{name}:{layers}", model, chosen, tuple(prompt), thresholds, None)


def parse_widths(text: str | None) -> list[str]:
    """`int8,int4` as a list.

    Raises:
        UsageError: something else is in it.
    """
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in WIDTHS:
            raise UsageError(f"--weights takes {' and '.join(WIDTHS)}, not {name}", hint="e.g. --weights int8,int4")
    return names


def child_names(parent: str, widths: Iterable[str]) -> list[str]:
    """What `teal quantize` made of a model, under the names that it gives by itself.

    Raises:
        NotFoundError: one is not there.
    """
    names = {width: f"{parent}-{width}" for width in widths}
    for width, name in names.items():
        if name not in Registry().names():
            raise NotFoundError(f"there is no model {name}", hint=f"make it with `teal quantize {parent} --to {width}`")
    return list(names.values())


def children(
    parent: Subject, names: Iterable[str], sparsities: Iterable[float], load: Load = Session.load, **opening: Any
) -> list[Subject]:
    """Models of these names, with the prompt of another.

    Args:
        load: as `registered` takes it.
        opening: as `open_session` takes it.
    """
    sessions = [open_session(name, **opening, load=False) for name in names]
    return [registered(session, tuple(sparsities), len(parent.prompt), load) for session in sessions]


def packed(subject: Subject, weights: str) -> Subject:
    """A stack whose matrices are rounded to int8 or int4, embedding and head to int8, in groups of 64, under the same
    thresholds: what `teal quantize` makes unless it is told otherwise."""

    def pack(matrix: Matrix, bits: int = WIDTHS[weights]) -> PackedMatrix:
        layout = RowLayout(bits, 64, matrix.segments)
        return PackedMatrix(quantize(matrix.tensor(), layout), layout, matrix.dtype)

    model = subject.model
    layers = [
        replace(w, qkv=pack(w.qkv), attn_out=pack(w.attn_out), gate_up=pack(w.gate_up), down=pack(w.down))
        for w in model.layers
    ]
    embedding = pack(model.embedding, WIDTHS["int8"])
    head = embedding if model.lm_head is model.embedding else pack(model.lm_head, WIDTHS["int8"])
    made = Transformer(model.config, layers, embedding, model.final_norm, head)
    return replace(subject, name=f"{subject.name} {weights}", model=made)


def _config(shape: ModelShape, layers: int) -> ModelConfig:
    with tempfile.TemporaryDirectory(prefix="teal-bench-") as folder:
        Path(folder, "config.json").write_text(json.dumps(shape.config_fields(layers)), encoding="utf-8")
        return load_config(folder)


def _random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Transformer:
    def matrix(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns, dtype=dtype, device=device)
        fill_random(weight, generator)
        return weight

    def norm(width: int) -> Tensor:
        return torch.ones(width, dtype=dtype, device=device)

    def layer() -> LayerWeights:
        sites = {
            site: FloatMatrix(matrix(config.channels(site), sum(config.segments(site))), config.segments(site))
            for site in SITES
        }
        heads = norm(config.head_dim) if config.qk_norm else None
        return LayerWeights(
            attn_norm=norm(config.hidden), qkv=sites["attn_in"], qkv_bias=None, q_norm=heads, k_norm=heads,
            attn_out=sites["attn_out"], o_bias=None, mlp_norm=norm(config.hidden), gate_up=sites["mlp_in"],
            down=sites["mlp_mid"],
        )  # fmt: skip

    embedding = FloatMatrix(matrix(config.vocab, config.hidden))
    head = embedding if config.tied else FloatMatrix(matrix(config.vocab, config.hidden))
    return Transformer(config, [layer() for _ in range(config.layers)], embedding, norm(config.hidden), head)


def _quantiles(
    model: Transformer, sparsities: list[float], generator: torch.Generator
) -> dict[float, Thresholds | None]:
    """Thresholds that drop these shares of what flows through the model, from some random tokens."""
    config = model.config
    cache = model.cache(_OBSERVED)
    step = PlainStep(model, cache, None, "reference")
    rows = empty_rows(config, model.dtype, model.device)
    seen: dict[str, list[Tensor]] = {site: [] for site in SITES}
    for position in range(_OBSERVED if sparsities else 0):
        step(int(torch.randint(config.vocab, (), generator=generator)), position, rows)
        for site in SITES:
            seen[site].append(rows[site].float().abs().cpu())
    found: dict[float, Thresholds | None] = {}
    for sparsity in sparsities:
        table = np.empty((config.layers, len(PROJECTIONS)), np.float32)
        for site, vectors in seen.items():
            magnitudes = torch.cat(vectors, dim=1)
            limits = magnitudes.kthvalue(max(1, round(sparsity * magnitudes.shape[1])), dim=1).values
            table[:, columns(site)] = limits.numpy()[:, None]
        found[sparsity] = Thresholds(table)
    return found
