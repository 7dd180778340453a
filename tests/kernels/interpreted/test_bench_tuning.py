"""The search for configurations, with a clock that is told what to say, and the table it leaves."""

from __future__ import annotations

import pytest
import torch

from teal_cli.bench.tuning import candidates, tune
from teal_kernels import configs
from teal_kernels.configs import GemvConfig, config_key, gemv_config, sparsity_band, table_file, tuned_configs

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The table of a machine that has never been tuned."""
    monkeypatch.setenv("TEAL_KERNEL_CACHE", str(tmp_path))
    for cached in (table_file, tuned_configs):
        cached.cache_clear()
    yield table_file(CPU)
    for cached in (table_file, tuned_configs):
        cached.cache_clear()


def test_the_fastest_correct_candidate_is_kept_and_found_again(table, monkeypatch):
    wanted = GemvConfig(32, 16, 2)
    monkeypatch.setattr(
        "teal_cli.bench.tuning.candidates", lambda *_: [GemvConfig(64, 8, 1), wanted, GemvConfig(16, 8, 4)]
    )
    clock = iter([3.0, 1.0, 2.0])
    (result,) = tune([(96, (40, 24))], torch.float32, CPU, bands=[0.6], measure=lambda launches: next(clock))
    assert (result.config, result.seconds, result.default_seconds) == (wanted, 1.0, 3.0)
    assert tuned_configs(table) == {config_key(96, 64, 4, 0.5): wanted}
    monkeypatch.setattr(configs, "table_file", lambda device: table)
    assert gemv_config(96, 64, 4, 0.55, torch.device("cuda")) == wanted
    assert gemv_config(96, 64, 4, 0.9, torch.device("cuda")) == configs.default_gemv_config(96, 64, 4)


def test_a_wrong_candidate_stops_the_search(table, monkeypatch):
    monkeypatch.setattr("teal_cli.bench.tuning.GatherGemv.reduce", lambda self, out: out.zero_())
    with pytest.raises(RuntimeError, match="relative error of 1"):
        list(tune([(32, (16,))], torch.float32, CPU, bands=[0.6], measure=lambda launches: 1.0))
    assert not table.exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {"block_n": 1}}', '{"a": 3}'])
def test_a_damaged_table_holds_nothing(table, content):
    table.write_text(content)
    assert tuned_configs(table) == {}


def test_bands_cover_every_sparsity():
    assert [sparsity_band(s) for s in (0.0, 0.3, 0.5, 0.65, 0.9, 0.99)] == [0.3, 0.3, 0.6, 0.8, 1.0, 1.0]


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (4096, 28672), (14336, 4096), (576, 960)])
def test_candidates_are_few_and_begin_with_the_default(inputs, outputs):
    found = candidates(inputs, outputs, 2)
    assert found[0] == configs.default_gemv_config(inputs, outputs, 2)
    assert len(found) <= 25
