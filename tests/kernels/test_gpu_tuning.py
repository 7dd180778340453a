"""The search for configurations with a real clock."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_finds_a_configuration_no_slower_than_the_default(tmp_path, monkeypatch):
    from teal_kernels.configs import table_file, tuned_configs
    from teal_kernels.tuning import tune

    monkeypatch.setenv("TEAL_KERNEL_CACHE", str(tmp_path))
    table_file.cache_clear()
    tuned_configs.cache_clear()
    (result,) = tune([(4096, (4096, 1024, 1024))], torch.bfloat16, torch.device("cuda"), bands=[0.6])
    table_file.cache_clear()
    assert 0 < result.seconds <= result.default_seconds
    assert list(tmp_path.glob("*.json"))
