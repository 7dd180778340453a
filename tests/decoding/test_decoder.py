"""The decode loop on a tiny model: what it counts, when it stops, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from teal_cli.decoding.decoder import Decoder, step_bytes
from teal_cli.decoding.projector import Rows, empty_rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.decoding.steps import NUMBA, TRITON_GRAPH, choose_step, open_step
from teal_cli.errors import UsageError
from teal_cli.model.transformer import Transformer
from teal_kernels.backends import BackendError
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS
from teal_kernels.thresholds import Thresholds

GREEDY = Sampling(temperature=0)
PROMPT = [5, 9, 17, 3]
BACKENDS = ["numba", "cpu", "reference"]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Transformer:
    return Transformer.from_checkpoint(tiny("llama3"), torch.float32)


def mixed_thresholds(layers: int) -> np.ndarray:
    """A different threshold for every projection, as a greedy plan has them."""
    return np.random.default_rng(0).uniform(0.05, 0.6, (layers, 7)).astype(np.float32)


def decoder(model: Transformer, thresholds: np.ndarray | None, backend: str, room: int = 64) -> Decoder:
    cache = model.cache(room)
    return Decoder(
        model, cache, open_step(model, cache, None if thresholds is None else Thresholds(thresholds), backend, 0.5)
    )


class Recorder:
    """A capture that keeps copies, and lets every `skip`-th step pass."""

    def __init__(self, model: Transformer, skip: int = 0) -> None:
        self.model, self.skip = model, skip
        self.steps: list[tuple[int, int, int]] = []
        self.rows: list[Rows | None] = []
        self._ahead: list[Rows] = []

    def room(self, count: int) -> tuple[int, Rows | None]:
        until = self.skip - 1 - len(self.steps) % self.skip if self.skip else count
        if not until:
            return 1, None
        some = [empty_rows(self.model.config, self.model.dtype, self.model.device) for _ in range(min(count, until))]
        together = {site: torch.stack([rows[site] for rows in some], 1) for site in some[0]}
        self._ahead = [{site: x[:, i] for site, x in together.items()} for i in range(len(some))]
        return len(some), together

    def add(self, token_id: int, position: int, sequence: int, phase: str = "decode") -> None:
        self.steps.append((token_id, position, sequence))
        skipped = self.skip and len(self.steps) % self.skip == 0
        self.rows.append(None if skipped else self._ahead.pop(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_n_tokens_take_one_prefill_and_n_minus_one_steps(model: Transformer, backend: str) -> None:
    run, capture = decoder(model, mixed_thresholds(3), backend), Recorder(model)
    tokens = list(run.generate(PROMPT, max_new_tokens=9, sampling=GREEDY, sequence=2, capture=capture))
    assert len(tokens) == 9
    assert capture.steps == [(token, 4 + i, 2) for i, token in enumerate(tokens[:-1])]
    assert (run.tally.steps, run.tally.prompt_tokens) == (8, 4)
    assert run.tally.context == sum(range(5, 13))
    assert run.tally.tokens_per_s == pytest.approx(8 / run.tally.decode_s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_entries_are_counted_per_projection(model: Transformer, backend: str) -> None:
    """q, k and v share a row that is cut at the lowest threshold; each counts what its own lets through."""
    thresholds = mixed_thresholds(3)
    run, capture = decoder(model, thresholds, backend), Recorder(model)
    list(run.generate(PROMPT, max_new_tokens=7, sampling=GREEDY, capture=capture))
    expected = np.zeros((3, 7), np.int64)
    for rows in capture.rows:
        assert rows is not None
        for site, group in SITE_PROJECTIONS.items():
            for projection in group:
                column = PROJECTION_INDEX[projection]
                expected[:, column] += (rows[site].abs().numpy() > thresholds[:, column, None]).sum(1)
    np.testing.assert_array_equal(run.step.kept(), expected)
    np.testing.assert_allclose(run.realised(), 1 - expected / (6 * np.array(model.config.inputs())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_that_are_not_recorded_count_all_the_same(model: Transformer, backend: str) -> None:
    runs = [decoder(model, mixed_thresholds(3), backend) for _ in range(2)]
    tokens = [
        list(run.generate(PROMPT, max_new_tokens=9, sampling=GREEDY, capture=capture))
        for run, capture in zip(runs, (None, Recorder(model, skip=2)), strict=True)
    ]
    assert tokens[0] == tokens[1]
    np.testing.assert_array_equal(runs[0].step.kept(), runs[1].step.kept())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taken", [2, 5, 17, 18, 30])
def test_a_caller_that_ends_early_counts_what_it_took(model: Transformer, backend: str, taken: int) -> None:
    """Several tokens are decoded at once; those that nobody took are in no count."""
    early, exact = (decoder(model, mixed_thresholds(3), backend) for _ in range(2))
    for run in (early, exact):
        run.tally.steps, run.tally.decode_s, run.tally.context = 1000, 1.0, 0  # fast enough for the most at once
    stream = early.generate(PROMPT, max_new_tokens=40, sampling=GREEDY)
    tokens = [next(stream) for _ in range(taken)]
    stream.close()
    assert tokens == list(exact.generate(PROMPT, max_new_tokens=taken, sampling=GREEDY))
    assert (early.tally.steps, early.tally.context) == (exact.tally.steps, exact.tally.context)
    np.testing.assert_array_equal(early.step.kept(), exact.step.kept())
    np.testing.assert_array_equal(early.realised(), exact.realised())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stop_token_is_the_last(model: Transformer, backend: str) -> None:
    free = list(decoder(model, None, backend).generate(PROMPT, max_new_tokens=12, sampling=GREEDY))
    stop = free[5]
    stopped = list(decoder(model, None, backend).generate(PROMPT, max_new_tokens=12, sampling=GREEDY, stop=(stop,)))
    assert stopped == free[: free.index(stop) + 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_one_after_the_other_do_not_touch_each_other(model: Transformer, backend: str) -> None:
    run = decoder(model, mixed_thresholds(3), backend)
    alone = list(decoder(model, mixed_thresholds(3), backend).generate(PROMPT, max_new_tokens=8, sampling=GREEDY))
    list(run.generate([1, 2, 3, 4, 5, 6, 7, 8, 9], max_new_tokens=20, sampling=GREEDY))
    assert list(run.generate(PROMPT, max_new_tokens=8, sampling=GREEDY)) == alone


def test_dense_steps_realise_no_sparsity(model: Transformer) -> None:
    run = decoder(model, None, "cpu")
    list(run.generate(PROMPT, max_new_tokens=3, sampling=GREEDY))
    assert run.step.kept() is None
    assert not run.realised().any()
    assert run.effective_gbps() > 0


@pytest.mark.parametrize(
    ("prompt", "new", "says"), [([], 4, "empty"), (PROMPT, 0, "at least 1"), ([1] * 60, 6, "context of 64")]
)
def test_what_cannot_be_decoded_is_refused_before_anything_runs(
    model: Transformer, prompt: list[int], new: int, says: str
) -> None:
    run = decoder(model, None, "cpu")
    with pytest.raises(UsageError, match=says):
        next(run.generate(prompt, max_new_tokens=new, sampling=GREEDY))
    assert run.tally.prompt_tokens == 0


def test_the_last_place_of_the_context_is_used(model: Transformer) -> None:
    """The last token is never fed, so it needs no place in the cache."""
    assert len(list(decoder(model, None, "cpu").generate([1] * 60, max_new_tokens=5, sampling=GREEDY))) == 5


def test_the_floor_counts_every_matrix_once(model: Transformer) -> None:
    config = model.config
    matrices = sum(w.nbytes for layer in model.layers for w in (layer.qkv, layer.attn_out, layer.gate_up, layer.down))
    cache = config.layers * 2 * config.kv_heads * config.head_dim * 10 * 4
    assert step_bytes(model, context=10) == matrices + model.lm_head.nbytes + cache
    half = np.broadcast_to(np.array(config.inputs()) / 2, (config.layers, 7))
    assert step_bytes(model, 10, half) == matrices / 2 + model.lm_head.nbytes + cache
    assert list(config.outputs()) == [72, 24, 24, 72, 100, 100, 72]


def test_a_sliding_window_bounds_what_is_read_of_the_cache(tiny: Callable[[str], Path]) -> None:
    model = Transformer.from_checkpoint(tiny("mistral"), torch.float32)
    assert step_bytes(model, context=100) == step_bytes(model, context=8)


def test_the_fastest_step_is_chosen_and_an_impossible_one_refused() -> None:
    cpu = torch.device("cpu")
    assert choose_step(cpu, None) == (NUMBA, None)
    assert choose_step(cpu, "reference") == ("reference", None)
    for name in (TRITON_GRAPH, "triton", "cuda"):
        with pytest.raises(BackendError):
            choose_step(cpu, name)
    with pytest.raises(BackendError, match="CPU tensors"):
        choose_step(torch.device("cuda"), NUMBA)


def test_without_numba_the_plain_step_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teal_kernels.steps.cpu.compiled.unavailable", lambda: "numba is not installed")
    assert choose_step(torch.device("cpu"), None) == ("cpu", "numba is not installed")
