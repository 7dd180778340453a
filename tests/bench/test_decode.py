"""Rows of `bench_decode` on tiny random stacks: complete, consistent, and without times for what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from teal_cli.bench import decode, engines
from teal_cli.bench.checks import Check
from teal_cli.bench.decode import DecodeRequest, bench_decode, fair_share
from teal_cli.bench.engines import check_gguf
from teal_cli.bench.prefill import PrefillRequest, bench_prefill
from teal_cli.bench.rows import DecodeRow, PrefillRow
from teal_cli.bench.shapes import ModelShape
from teal_cli.bench.subjects import Subject, packed, stack
from teal_cli.decoding.decoder import step_bytes
from teal_cli.errors import HardwareError, NotFoundError, UsageError
from teal_kernels.packed import PackedMatrix

FAMILIES = ("llama", "mistral", "qwen3")


def shape(family: str = "llama") -> ModelShape:
    return ModelShape(64, 96, 4, 2, 16, family, 8, 320, 96, 1e4, tied=family == "qwen3")


def subject(family: str = "llama", *, backend: str = "cpu") -> Subject:
    return stack(
        "tiny", shape(family), 2, (0.5, 0.9), 8, dtype=torch.float32, device=torch.device("cpu"), backend=backend
    )


def request(*dumps: float) -> DecodeRequest:
    return DecodeRequest((0.5, 0.9), dumps, new_tokens=5, rounds=2, probe_bytes=1 << 16)


def rows(made: Subject, asked: DecodeRequest) -> dict[str, DecodeRow]:
    return {event.label: event for event in bench_decode(made, asked) if isinstance(event, DecodeRow)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_is_a_model_whose_thresholds_drop_what_they_say(family: str) -> None:
    made = subject(family)
    assert made.name == "tiny:2"
    assert len(made.model.layers) == 2
    assert made.thresholds[0.0] is None
    found = rows(made, request())
    assert set(found) == {"torch dense", "teal dense", "teal 50%", "teal 90%"}
    assert {row.check for row in found.values()} == {"passed"}
    assert found["teal 50%"].realised == pytest.approx(0.5, abs=0.12)
    assert found["teal 90%"].realised == pytest.approx(0.9, abs=0.08)


def test_figures_of_a_row() -> None:
    made = subject()
    found = rows(made, request())
    dense, sparse = found["teal dense"], found["teal 50%"]
    assert dense.bytes == round(step_bytes(made.model, 8 + 5 / 2))
    assert sparse.bytes < dense.bytes
    for row in found.values():
        assert row.p20 is not None
        assert row.p20 <= row.p50 <= row.p80
        assert row.floor == pytest.approx(row.read_gbps * 1e9 / row.bytes, rel=1e-6)
        assert row.to_floor == pytest.approx(row.floor / row.p50, rel=1e-6)
        assert row.gbps == pytest.approx(row.bytes * row.p50 / 1e9, rel=1e-4)
        assert (row.rounds, row.prompt_tokens, row.tokens, row.layers) == (2, 8, 5, 2)
    assert set(sparse.faster_than) == {"dense", "torch"}
    assert set(dense.faster_than) == {"torch"}


def test_a_dump_is_compared_with_the_same_decoder_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.tempfile, "tempdir", str(tmp_path))
    found = rows(subject(), request(0.5))
    dump = found["teal 50% + dump"]
    assert dump.passed
    assert dump.to_undumped is not None
    assert dump.tokens > 5, "as many as fill blocks of the store, or as the context has room for"
    assert not list(tmp_path.iterdir()), "the store is temporary"


def test_a_wrong_step_has_no_time_and_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sparse step forgets an output."""
    right = decode.Teal.__init__

    def broken(self: engines.Teal, *args: object, **kwargs: object) -> None:
        right(self, *args, **kwargs)  # type: ignore[arg-type]
        step = self.decoder.step
        if self.sparsity == 0.5:
            called = type(step).__call__

            def forgetful(self: object, *args: object) -> Tensor:
                logits = called(step, *args)
                logits[: len(logits) // 4] = 0
                return logits

            step.__class__ = type("Forgetful", (type(step),), {"__call__": forgetful})

    monkeypatch.setattr(decode.Teal, "__init__", broken)
    found = rows(subject(), request(0.5))
    for label in ("teal 50%", "teal 50% + dump"):
        wrong = found[label]
        assert wrong.check.startswith("failed: error")
        assert {wrong.p20, wrong.p50, wrong.p80, wrong.gbps, wrong.to_floor, wrong.to_undumped} == {None}
        assert wrong.faster_than == {}
    assert found["teal 90%"].passed


def test_a_wrong_threshold_is_noticed_though_the_logits_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    made = subject()
    thresholds = made.thresholds[0.9]
    assert thresholds is not None
    right = engines.open_step

    def other_plan(model: object, cache: object, given: np.ndarray | None, *args: object) -> object:
        return right(model, cache, thresholds if given is not None else None, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engines, "open_step", other_plan)
    found = rows(made, request())
    assert not found["teal 50%"].passed
    assert found["teal 90%"].passed


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_other_weights_take_part_in_the_same_rounds(width: str) -> None:
    first = subject(backend="reference")
    other = packed(first, width)
    found = [event for event in bench_decode(first, request(), [other]) if isinstance(event, DecodeRow)]
    assert {row.check for row in found} == {"passed"}
    by_weights = {(row.weights, row.label): row for row in found}
    dense, sparse = by_weights[width, "teal dense"], by_weights[width, "teal 50%"]
    assert dense.model == f"tiny:2 {width}"
    assert dense.bytes < by_weights["float32", "teal dense"].bytes / {"int8": 3, "int4": 5}[width]
    assert sparse.bytes < dense.bytes
    assert set(sparse.faster_than) == {"torch", "dense", f"tiny:2 {width} dense"}
    alone = rows(other, request())
    assert set(alone) == {"teal dense", "teal 50%", "teal 90%"}, "no step that unpacks the model for every token"


def test_beside_a_busy_core() -> None:
    made = subject()
    asked = DecodeRequest((0.5,), (), new_tokens=5, rounds=2, busy=1, probe_bytes=1 << 16)
    found = rows(made, asked)
    busy, idle = found["teal 50% beside 1 busy"], found["teal 50%"]
    assert (busy.busy, idle.busy) == (1, 0)
    assert busy.to_idle is not None
    assert busy.to_fair_share == pytest.approx(busy.to_idle * fair_share(1))
    assert idle.to_idle is None
    assert fair_share(0) == 1


def test_the_best_peer_has_equal_bits() -> None:
    def entry(label: str, weights: str, kind: type) -> decode._Entry:
        engine = object.__new__(kind)
        engine.weights, engine.sparsity = weights, 0.0
        return decode._Entry(engine, Check(0.0, 1.0), label)

    ours = entry("0.50", "int4", engines.Teal)
    dense = [
        entry("dense", "int4", engines.Teal), entry("slow", "q4_0", engines.LlamaCpp),
        entry("fast", "q4_1", engines.LlamaCpp), entry("eight", "q8_0", engines.LlamaCpp),
    ]  # fmt: skip
    seconds = {"0.50": [1.0, 1.0], "slow": [4.0, 4.0], "fast": [2.0, 2.0], "eight": [1.5, 1.5], "dense": [1.0, 1.0]}
    assert decode._best_peer(ours, dense, seconds) == {"best_peer": "fast", "to_best_peer": 2.0}
    assert decode._best_peer(entry("0.50", "bfloat16", engines.Teal), dense, seconds) == {}


def test_prefill_of_every_kind_of_weights() -> None:
    first = subject()
    asked = PrefillRequest(rounds=2, probe_bytes=1 << 16)
    subjects = [first, packed(first, "int8"), packed(first, "int4")]
    found = [event for event in bench_prefill(subjects, asked) if isinstance(event, PrefillRow)]
    assert [row.weights for row in found] == ["float32", "int8", "int4"]
    for row in found:
        assert row.passed
        assert row.tokens == 8
        assert row.p20 <= row.p50 <= row.p80  # type: ignore[operator]
        assert len(row.faster_than) == 2


def test_a_wrong_prefill_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = packed(subject(), "int8")
    right = PackedMatrix.dense
    monkeypatch.setattr(PackedMatrix, "dense", lambda self, x, projection=None: right(self, x, projection) * 1.1)
    wrong = next(e for e in bench_prefill([made], PrefillRequest(2, probe_bytes=1 << 16)) if isinstance(e, PrefillRow))
    assert wrong.check.startswith("failed")
    assert wrong.p50 is None


def test_tokens_must_fit_the_context() -> None:
    with pytest.raises(UsageError, match="context of 96"):
        list(bench_decode(subject(), DecodeRequest((0.5,), (), new_tokens=90, rounds=2, probe_bytes=1 << 16)))


def test_a_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(HardwareError):
        subject(backend="triton-graph" if not torch.cuda.is_available() else "triton")


def test_gguf_needs_llama_cpp_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match="not installed"):
        check_gguf([tmp_path / "model.gguf"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(NotFoundError, match=r"model\.gguf"):
        check_gguf([tmp_path / "model.gguf"])
    check_gguf([])
