"""What teal 0.1.0 wrote still opens, verifies and resumes; `fixtures_v1/README.md` says how it was made."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_cli import Teal

from teal_cli import open_store
from teal_cli.bench.results import load
from teal_cli.registry.registry import Registry
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import Plan, uniform_plan
from teal_cli.store.reader import Level
from teal_kernels.spec import SITES

FIXTURES = Path(__file__).with_name("fixtures_v1")
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
LAYERS = 2
STORES = sorted(EXPECTED["stores"])
COMPLETE = {"whole", "many", "bfloat16"}

_GREEDY = ("--temperature", 0, "--ignore-eos", "--device", "cpu", "--backend", "reference")
TWO_PROMPTS = ("dump", "-m", "tiny", "--prompts", "prompts.txt", "-s", "0.5,0.9", "--max-new-tokens", 15,
               "--dtype", "float32", *_GREEDY)  # fmt: skip
MANY_PROMPTS = ("dump", "-m", "tiny", "--prompts", "many.txt", "-s", 0.98, "--max-new-tokens", 97,
                "--dtype", "float32", *_GREEDY)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the files of prompts; $TEAL_HOME is the registry that 0.1.0 left."""
    shutil.unpack_archive(FIXTURES / "home.zip", tmp_path)
    (tmp_path / "home").rename(teal_home)
    pointed = teal_home / "models" / "pointed" / "model.json"  # a checkpoint folder is registered by its absolute path
    pointed.write_text(pointed.read_text().replace("/tmp/teal-v1/home", teal_home.as_posix()))
    for name in ("prompts.txt", "many.txt"):
        shutil.copy(FIXTURES / name, tmp_path)
    monkeypatch.chdir(tmp_path)  # a store remembers its file of prompts as it was named: relative
    return tmp_path


def unpacked(name: str, folder: Path) -> Path:
    """A copy of the store `name` in `folder`."""
    shutil.unpack_archive(FIXTURES / f"{name}.zip", folder)
    return folder / f"{name}.zarr"


def digest(array: Any) -> str:
    """sha256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def site_digests(level: Level) -> dict[str, list[str]]:
    """Site -> the digest of its rows, dense float32 [rows, K], in each layer."""
    return {site: [digest(level.site(i, site)[:]) for i in range(LAYERS)] for site in SITES}


def contents(level: Level) -> dict[str, np.ndarray]:
    """Everything that a level says of its rows, by name; rows along the first axis."""
    arrays = {name: level.tokens[name] for name in ("token_id", "position", "sequence", "phase")}
    return arrays | {f"{site}/{i}": np.asarray(level.site(i, site)[:]) for site in SITES for i in range(LAYERS)}


def test_models_are_listed_and_verified(teal: Teal, here: Path) -> None:
    listed = teal("models", "ls", "--json").json
    assert listed["default"] == "tiny"
    assert [model["name"] for model in listed["models"]] == ["pointed", "tiny"]
    for model in listed["models"]:
        assert model["family"] == "llama"
        assert model["parameters"] == 102720
        assert teal("models", "verify", model["name"]).code == 0


@pytest.mark.parametrize("target", sorted(EXPECTED["thresholds"]))
def test_the_calibration_gives_the_same_thresholds(teal: Teal, here: Path, target: str) -> None:
    found = teal("models", "info", "tiny", "--calibration", "text", "-s", target, "--json").json
    assert found["thresholds"] == EXPECTED["thresholds"][target]


def test_a_plan_is_the_one_that_the_calibration_gives(here: Path) -> None:
    plan = Plan.load(FIXTURES / "plan.json")
    again = uniform_plan(Calibration.load(Registry().find_calibration("tiny", "text")), 0.5)
    assert (plan.target, plan.allocation, plan.calibration) == (0.5, "uniform", "text")
    assert plan.by_projection() == again.by_projection() == EXPECTED["thresholds"]["0.5"]
    np.testing.assert_array_equal(plan.sparsity, again.sparsity)


def test_the_model_still_decodes_the_same_tokens(teal: Teal, here: Path) -> None:
    made = teal("generate", "-m", "tiny", "-p", "The quick brown fox", "-s", 0.5, "--max-new-tokens", 15,
                "--dtype", "float32", *_GREEDY, "--json").json  # fmt: skip
    assert made["token_ids"][:14] == EXPECTED["stores"]["whole"]["s0.50"]["token_id"][:14]


@pytest.mark.parametrize("name", STORES)
def test_a_store_reads_as_it_did(tmp_path: Path, name: str) -> None:
    store = open_store(unpacked(name, tmp_path))
    assert store.complete == (name in COMPLETE)
    assert store.header.model == "tiny"
    assert store.header.calibration == "text"
    assert list(store.levels) == sorted(EXPECTED["stores"][name])
    for level_name, expected in EXPECTED["stores"][name].items():
        level = store.level(level_name)
        assert level.tokens.token_id.tolist() == expected["token_id"]
        assert level.tokens.position.tolist() == expected["position"]
        assert np.bincount(level.tokens.sequence).tolist() == expected["rows_per_sequence"]
        assert digest(level.thresholds) == expected["thresholds"]
        assert site_digests(level) == expected["sites"]


def test_known_entries_of_a_row(tmp_path: Path) -> None:
    row = np.asarray(open_store(unpacked("whole", tmp_path)).level(0.9).site(1, "attn_in")[3])
    assert np.flatnonzero(row).tolist() == [14, 24, 43, 48, 55]
    np.testing.assert_array_equal(
        row[row != 0], np.array([-1.6829449, 1.776723, 1.8965825, 1.6477488, 1.9159063], np.float32)
    )


@pytest.mark.parametrize("name", STORES)
def test_a_store_verifies(teal: Teal, tmp_path: Path, name: str) -> None:
    store = unpacked(name, tmp_path)
    result = teal("store", "verify", store, *([] if name in COMPLETE else ["--partial"]), "--json")
    assert result.code == 0, result.err
    assert result.json["ok"]
    assert teal("store", "verify", store).code == (0 if name in COMPLETE else 1)


@pytest.mark.parametrize("name", ["whole", "bfloat16"])
def test_a_store_opens_in_xarray(tmp_path: Path, name: str) -> None:
    xarray = pytest.importorskip("xarray")
    from teal_cli.store.xarray import TealBackendEntrypoint

    path = unpacked(name, tmp_path)
    level = open_store(path).level(0.5)
    data = xarray.open_dataset(path, engine=TealBackendEntrypoint, level=0.5)
    for site in SITES:
        layers = [np.asarray(level.site(i, site)[:]) for i in range(LAYERS)]
        np.testing.assert_array_equal(data[site].values, np.stack(layers))
    np.testing.assert_array_equal(data.thresholds.values, level.thresholds)


@pytest.mark.parametrize(
    ("name", "uninterrupted", "command", "held"),
    [
        # Stopped by Ctrl-C: the first level is complete; the second has no full block, so that it is decoded again.
        ("interrupted", "whole", TWO_PROMPTS, {"s0.50": 28, "s0.90": 0}),
        # Killed: one full block of 1024 rows is there, which ends after 64 of the 96 rows of sequence 10.
        ("killed", "many", MANY_PROMPTS, {"s0.98": 1024}),
    ],
)
def test_a_dump_that_was_stopped_goes_on(
    teal: Teal, here: Path, name: str, uninterrupted: str, command: tuple[object, ...], held: dict[str, int]
) -> None:
    path, whole = unpacked(name, here), open_store(unpacked(uninterrupted, here))
    before = open_store(path)
    stored = {level: contents(before.level(level)) for level in held}
    result = teal(*command, "-o", path, "--resume", "--json")
    assert result.code == 0, result.err
    assert result.json["new_rows"] == sum(len(whole.level(level)) - rows for level, rows in held.items())
    assert teal("store", "verify", path).code == 0
    assert teal(*command, "-o", here / "again.zarr").code == 0

    resumed, again = open_store(path), open_store(here / "again.zarr")
    assert resumed.complete
    for level, rows in held.items():
        then, now = contents(whole.level(level)), contents(again.level(level))
        for key, array in contents(resumed.level(level)).items():
            np.testing.assert_array_equal(array[:rows], stored[level][key][:rows], err_msg=f"{level}/{key}, held")
            np.testing.assert_array_equal(array[rows:], now[key][rows:], err_msg=f"{level}/{key}, decoded here")
            # Sums of another processor may differ in the last bits; no entry is so near its threshold that it moves.
            np.testing.assert_array_equal(array == 0, then[key] == 0, err_msg=f"{level}/{key}, kept")
            np.testing.assert_allclose(array, then[key], rtol=1e-4, atol=1e-5, err_msg=f"{level}/{key}")


@pytest.mark.parametrize(("name", "command"), [("whole", TWO_PROMPTS), ("many", MANY_PROMPTS)])
def test_resuming_a_complete_store_changes_no_row(
    teal: Teal, here: Path, name: str, command: tuple[object, ...]
) -> None:
    path = unpacked(name, here)
    assert teal(*command, "-o", path, "--resume", "--json").json["new_rows"] == 0
    store = open_store(path)
    for level in store.levels:
        assert site_digests(store.level(level)) == EXPECTED["stores"][name][level]["sites"]


def test_a_dump_cannot_go_on_with_other_settings(teal: Teal, here: Path) -> None:
    path = unpacked("interrupted", here)
    run = teal(*TWO_PROMPTS, "--seed", 1, "-o", path, "--resume")
    assert run.code == 2
    assert "seed" in run.err
    assert len(open_store(path).level(0.9)) == 20


def test_a_result_of_bench_loads() -> None:
    result = load(FIXTURES / "bench.json")
    assert result.command == "kernels"
    assert not result.failed
    assert [(row.product, row.sparsity) for row in result.rows] == [
        ("torch [K,N]", 0.0), ("torch [N,K]", 0.0), ("numba", 0.0), ("cpu", 0.5), ("numba", 0.5),
    ]  # fmt: skip
