"""`teal doctor`: what it finds when something is wrong."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_cli import Teal

from teal_cli.commands import health
from teal_cli.commands.health import Finding, examine, summary
from teal_kernels.backends import OPS


def findings(area: str | None = None) -> dict[str, Finding]:
    return {f.name: f for f in examine(offline=True) if area in (None, f.area)}


pytestmark = pytest.mark.usefixtures("teal_home")


def test_this_machine_is_sound(teal: Teal) -> None:
    result = teal("doctor", "--offline", "--json")
    assert result.code == 0
    assert result.json["ok"] is True
    assert {finding["area"] for finding in result.json["findings"]} == {
        "versions", "settings", "storage", "devices", "kernels", "models", "network",
    }  # fmt: skip


def test_for_people(teal: Teal) -> None:
    result = teal("doctor", "--offline")
    assert result.code == 0
    assert "sparse_gemv" in result.out
    assert "Everything essential works" in result.out


def test_every_op_says_what_it_uses_and_why_not_the_rest() -> None:
    kernels = findings("kernels")
    for op in OPS:
        used, unavailable = kernels[op].data["used"], kernels[op].data["unavailable"]
        assert kernels[f"{op}/{used}"].status == "ok"
        assert used not in unavailable
        for backend, reason in unavailable.items():
            assert f"not {backend}: {reason}" in kernels[op].detail


@pytest.mark.parametrize("garbage", [float("nan"), 0.0, 1e9])
def test_a_kernel_that_computes_garbage_is_found(monkeypatch: pytest.MonkeyPatch, garbage: float) -> None:
    from teal_kernels.ops.sparse_gemv import op

    def broken(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
        return torch.full_like(weight[0], garbage)

    monkeypatch.setitem(op._IMPLEMENTATIONS, "cpu", broken)
    found = findings("kernels")["sparse_gemv/cpu"]
    assert (found.status, found.exit_code) == ("fail", 5)
    assert summary([found]) == (False, 5)


def test_a_kernel_that_does_not_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from teal_kernels.ops.sparse_gemv import op

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("ptxas\n  says no")

    monkeypatch.setitem(op._IMPLEMENTATIONS, "cpu", broken)
    found = findings("kernels")["sparse_gemv/cpu"]
    assert found.status == "fail"
    assert found.detail == "failed: ptxas says no"


def test_a_torch_that_does_not_import_is_found(teal: Teal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = teal("doctor", "--offline")
    assert result.code == 5
    assert "Something essential is broken" in result.out


def test_an_unwritable_home_is_found(teal: Teal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "file" / "home"))
    result = teal("doctor", "--offline", "--json")
    assert result.code == 1
    failed = [finding["name"] for finding in result.json["findings"] if finding["status"] == "fail"]
    assert "TEAL_HOME" in failed


def test_missing_and_old_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("gguf", "triton"):
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "zarr" else real(name)

    monkeypatch.setattr(health.metadata, "version", version)
    versions = findings("versions")
    assert versions["gguf"].status == "fail"
    assert versions["triton"] == Finding("versions", "triton", "warn", "not installed: no triton backend")
    assert versions["zarr"].status == "warn"
    assert "pip install 'zarr" in (versions["zarr"].hint or "")


def test_misspelt_variable_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_SPARSTY", "0.5")
    found = findings("settings")["TEAL_SPARSTY"]
    assert (found.status, found.hint) == ("warn", "did you mean TEAL_SPARSITY?")


def test_settings_show_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAL_SPARSITY", "0.4")
    assert findings("settings")["sparsity"].detail == "0.4 from TEAL_SPARSITY"


def test_a_hub_that_cannot_be_reached_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    found = [finding for finding in examine() if finding.area == "network"]
    assert [finding.status for finding in found] == ["warn"]
    assert "127.0.0.1:1 cannot be reached" in found[0].detail
