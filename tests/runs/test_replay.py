"""`teal store verify --replay`: stored rows against the model that made them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_store import write_store

from teal_cli import open_session, open_store
from teal_cli.registry.registry import Registry
from teal_cli.runs.replay import replay
from teal_cli.store import layout
from teal_cli.store.digest import level_digest, store_digest
from teal_cli.store.metadata import level_state, read_attributes, read_state
from teal_cli.store.shards import SiteFiles

pytestmark = pytest.mark.usefixtures("ready")
SMALL = ("dump", "-d", "python-docs", "-n", 2, "--prompt-tokens", 8, "--max-new-tokens", 9, "--ignore-eos")
ROWS = 2 * 8


def change_a_value(path: Path, level: str) -> None:
    """Double a kept value in all rows of a site, with checksums and digests that agree: only the model can tell."""
    store = open_store(path)
    reader = store.level(level).site_reader("mlp_in")
    rows = np.stack([block.dense() for block in reader.read_layers(0)])
    rows[rows != 0] += np.uint16(1 << 7)  # the exponent of a bfloat16, plus one
    files = SiteFiles(path / level / "mlp_in", store.header, rows.shape[-1], None)
    files.write(0, rows)
    for name in store.levels:
        state = level_state(path, name)
        layout.set_attributes(path, name, {"digest": level_digest(path, name, store.header, state)})
    digests = [str(level_state(path, name).digest) for name in read_state(path).levels]
    layout.set_attributes(path, "", {"digest": store_digest(read_attributes(path), digests)})
    layout.consolidate(path)


@pytest.mark.parametrize(
    "options",
    [("--backend", "numba"), ("--backend", "reference", "--dtype", "float32"), ("--follow", "text"),
     ("--follow", "dense", "--dtype", "float16")],
)  # fmt: skip
def test_rows_come_out_again_bit_for_bit(teal: Teal, tmp_path: Path, options: tuple[str, ...]) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*SMALL, "-s", "0,0.5,0.9", "-o", store, *options).code == 0
    ran = teal("store", "verify", store, "--replay", 1000, "--json")
    assert ran.code == 0, ran.err
    rows = ran.json["replay"]
    assert len({(row["level"], row["sequence"], row["position"]) for row in rows}) == 3 * ROWS
    assert all(row["equal"] for row in rows)
    shown = teal("store", "verify", store, "--replay", 5)
    assert "5 rows computed again: 5 bit for bit" in shown.out


def test_a_row_that_the_model_does_not_give_is_found(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*SMALL, "-s", "0.5,0.9", "-o", store, "--dtype", "bfloat16").code == 0
    change_a_value(store, "s0.90")
    assert teal("store", "verify", store).code == 0
    ran = teal("store", "verify", store, "--replay", 1000, "--json")
    assert ran.code == 1
    assert {problem["where"].split(",")[0] for problem in ran.json["problems"]} == {"s0.90"}
    assert len(ran.json["problems"]) == ROWS
    assert "a vector does not follow" in ran.json["problems"][0]["what"]


def test_another_backend_gives_rows_within_the_tolerance(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*SMALL, "-s", "0.5", "-o", store, "--dtype", "float32", "--backend", "numba").code == 0
    session = open_session("tiny", dtype="float32", backend="reference")
    rows = list(replay(session, open_store(store), 1000))
    assert len(rows) == ROWS
    assert all(row.close and not row.equal for row in rows)


def test_the_choice_of_rows_follows_its_seed(teal: Teal, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    assert teal(*SMALL, "-s", "0.5", "-o", store).code == 0
    session, opened = open_session("tiny"), open_store(store)
    picked = [{(row.sequence, row.position) for row in replay(session, opened, 4, seed)} for seed in (1, 1, 2)]
    assert picked[0] == picked[1] != picked[2]


def test_what_is_not_here_is_said(teal: Teal, tmp_path: Path) -> None:
    foreign, store = tmp_path / "foreign.zarr", tmp_path / "out.zarr"
    write_store(foreign, 20)
    ran = teal("store", "verify", foreign, "--replay", 2)
    assert (ran.code, "the store's model synthetic is not here" in " ".join(ran.err.split())) == (3, True)
    assert teal(*SMALL, "-s", "0.5", "-o", store).code == 0
    calibration = str(open_store(store).header.calibration)
    assert teal("calibrations", "rm", calibration).code == 0
    ran = teal("store", "verify", store, "--replay", 2)
    assert (ran.code, f"calibration {calibration} is not here" in " ".join(ran.err.split())) == (0, True), ran.err
    config = Registry().get("tiny").path / "config.json"
    own = config.read_text()
    config.write_text(json.dumps(json.loads(own) | {"rms_norm_eps": 0.5}))
    try:
        ran = teal("store", "verify", store, "--replay", 2)
    finally:
        config.write_text(own)  # the folder is every test's
    assert (ran.code, "tiny is another model here" in " ".join(ran.err.split())) == (1, True)
