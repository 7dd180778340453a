"""The search for configurations with a real clock."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_what_was_found_is_what_is_used(tmp_path, monkeypatch):
    from teal_cli.bench.tuning import tune
    from teal_kernels.configs import config_key, table_file, tuned_configs

    monkeypatch.setenv("TEAL_KERNEL_CACHE", str(tmp_path))
    table_file.cache_clear()
    tuned_configs.cache_clear()
    (result,) = tune([(4096, (4096, 1024, 1024))], torch.bfloat16, torch.device("cuda"), bands=[0.6])
    (table,) = tmp_path.glob("*.json")
    assert tuned_configs(table) == {config_key(4096, 6144, 2, 0.5): result.config}
    assert 0 < result.seconds < 1e-3
    table_file.cache_clear()
