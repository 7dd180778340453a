"""The pass that calibrates: layer by layer it sees exactly what the whole model sees, and holds one layer at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_tiny import VOCAB, make_tiny

from teal_cli.errors import TealError, UsageError
from teal_cli.model.config import load_config
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.passes.forward import Advance
from teal_cli.passes.observe import Observed, expected_peak, observe
from teal_cli.sparsity.histogram import MagnitudeHistogram
from teal_kernels.matrix import Matrix
from teal_kernels.spec import SITES

CPU = torch.device("cpu")


def tokens(sequences: int = 3, seq_len: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (sequences, seq_len))


def run(path: Path, blocks: np.ndarray, dtype: torch.dtype = torch.float32) -> tuple[list[Advance], Observed]:
    *layers, end = observe(Checkpoint(path), blocks, dtype, CPU)
    assert isinstance(end, Observed)
    return layers, end  # type: ignore[return-value]


def through_the_whole_model(path: Path, blocks: np.ndarray, dtype: torch.dtype) -> MagnitudeHistogram:
    """The same histogram from a model that is in memory as a whole and decodes with a cache."""
    model = Transformer.from_checkpoint(path, dtype)
    histogram = MagnitudeHistogram.empty(model.config.layers, str(dtype).removeprefix("torch."))

    def project(layer: int, site: str, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        histogram.add(layer, site, x)
        return x @ matrix.tensor()

    for row in blocks:
        model.forward(torch.from_numpy(row), 0, model.cache(len(row)), project)
    return histogram


def test_it_sees_what_the_whole_model_sees(tiny_family: Path) -> None:
    blocks = tokens()
    _, end = run(tiny_family, blocks)
    whole = through_the_whole_model(tiny_family, blocks, torch.float32)
    assert (end.histogram.counts.sum(axis=2) == whole.counts.sum(axis=2)).all()
    # Attention with and without a cache may round differently, and a rounding may cross into the next magnitude.
    assert np.abs(end.histogram.counts - whole.counts).sum() <= 0.002 * whole.counts.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_are_counted_as_they_are(tiny: Callable[[str], Path], dtype: torch.dtype) -> None:
    blocks = tokens(1)
    _, end = run(tiny("qwen3"), blocks, dtype)
    whole = through_the_whole_model(tiny("qwen3"), blocks, dtype)
    assert end.histogram.dtype == str(dtype).removeprefix("torch.")
    assert (end.histogram.counts[0, 0] == whole.counts[0, 0]).all(), "no attention before it, so equal to the bit"


def test_events_and_figures(tiny: Callable[[str], Path]) -> None:
    config = load_config(tiny("llama3"))
    layers, end = run(tiny("llama3"), tokens(2, 15))
    assert [(event.done, event.total, event.layers) for event in layers] == [(step, 6, 3) for step in range(1, 7)]
    assert 0 < layers[0].seconds < end.seconds
    assert end.peak_memory_bytes is not None
    assert end.peak_memory_bytes > 50e6, "the interpreter and PyTorch alone take more"
    assert end.peak_device_bytes is None
    for layer in range(3):
        for site in SITES:
            assert end.histogram.total(layer, site) == 2 * 15 * config.channels(site)


def test_one_layer_is_in_memory_at_a_time(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    load = Checkpoint.layer

    def watched(self: Checkpoint, index: int, *args: Any) -> Any:
        assert [ref() for ref in alive if ref() is not None] == [], f"layer {index} is loaded beside another"
        weights = load(self, index, *args)
        alive[:] = [weakref.ref(weights.qkv), weakref.ref(weights.down)]
        return weights

    monkeypatch.setattr(Checkpoint, "layer", watched)
    run(tiny("llama3"), tokens())
    assert len(alive) == 2


def test_activations_that_are_not_finite_name_layer_and_site(tmp_path: Path) -> None:
    path = make_tiny(tmp_path, "llama2", initializer_range=1.0)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TealError, match=r"layer 1, mlp_mid: .* are not finite"):
        run(path, tokens(), torch.float16)


def test_sequences_longer_than_the_context(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"257 tokens are longer than the model's context of 256"):
        run(tiny("llama3"), tokens(1, 257))


def test_a_token_that_the_model_does_not_know(tiny: Callable[[str], Path]) -> None:
    blocks = tokens()
    blocks[1, 3] = VOCAB
    with pytest.raises(TealError, match="gave the token 320, but the model knows 320"):
        run(tiny("llama3"), blocks)


def test_the_peak_of_a_large_model_is_a_layer_and_what_flows(tiny: Callable[[str], Path]) -> None:
    """Llama-2-70B, 10 sequences of 2048 in bf16: 1.7 GB of weights at a time instead of 138 GB."""
    from dataclasses import replace

    large = replace(
        load_config(tiny("llama2")),
        layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000,
    )  # fmt: skip
    peak = expected_peak(large, sequences=10, seq_len=2048, itemsize=2)
    assert peak.layer == 2 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert peak.hidden == 10 * 2048 * 8192 * 2
    assert peak.histogram == 80 * 4 * 32768 * 8
    assert 3.5e9 < peak.total < 4.5e9
    on_gpu = expected_peak(large, sequences=10, seq_len=2048, itemsize=2, device="cuda")
    assert 2.4e9 < on_gpu.total < 3.0e9


def test_a_large_vocabulary_can_be_the_peak(tiny: Callable[[str], Path]) -> None:
    from dataclasses import replace

    wide = replace(load_config(tiny("llama2")), vocab=10_000_000)
    peak = expected_peak(wide, sequences=1, seq_len=10, itemsize=2)
    assert peak.total == 2 * peak.embedding, "mapped and copied"
    on_gpu = expected_peak(wide, sequences=1, seq_len=10, itemsize=2, device="cuda")
    assert on_gpu.total == on_gpu.embedding + on_gpu.hidden
