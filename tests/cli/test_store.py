"""`teal store`: what it prints, what --json holds, and its exit codes."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_store import feed, header, levels, write_store
from pyarrow import parquet

from teal_cli.store.writer import StoreWriter


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "out.zarr"
    write_store(path, 40)
    return path


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    path = tmp_path / "unfinished.zarr"
    with StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 20)
    return path


def test_info(teal: Teal, store: Path) -> None:
    shown = teal("store", "info", store, "--prompt", "prompt 3")
    assert shown.code == 0
    for text in ("synthetic", "teal-activations/2", "s0.50", "s0.90", "sequence 3: tokens s0.50 21:28"):
        assert text in shown.out
    found = teal("store", "info", store, "--prompt", "prompt 3", "--json").json["store"]
    assert [level["tokens"] for level in found["levels"]] == [40, 40]
    assert found["matches"][0] == {
        "sequence": 3,
        "prompt": "prompt 3",
        "rows": {"s0.50": [21, 28], "s0.90": [21, 28]},
    }
    assert found["attributes"]["model"] == "synthetic"


def test_info_of_an_unfinished_store(teal: Teal, unfinished: Path) -> None:
    shown = teal("store", "info", unfinished, "--prompt", "no such")
    assert "`teal dump --resume` goes on" in shown.out
    assert "no prompt contains that text" in shown.out


def test_verify(teal: Teal, store: Path, unfinished: Path) -> None:
    good = teal("store", "verify", store)
    assert good.code == 0
    assert "nothing wrong" in good.out
    assert teal("store", "verify", store, "--json").json["ok"] is True
    bad = teal("store", "verify", unfinished)
    assert bad.code == 1
    assert "not complete" in bad.out
    assert teal("store", "verify", unfinished, "--partial").code == 0


def test_verify_shows_the_first_problems(teal: Teal, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 40)
    for file in path.glob("s0.*/*/row_nnz/c/0/*"):
        file.unlink()
    shown = teal("store", "verify", path)
    assert shown.code == 1
    assert "72 problems" in shown.out  # 2 levels, 4 sites, 3 blocks, 3 layers
    assert "and 62 more" in shown.out
    result = teal("store", "verify", path, "--json")
    assert result.code == 1
    assert len(result.json["problems"]) == 72


def test_stats(teal: Teal, store: Path) -> None:
    shown = teal("store", "stats", store)
    assert shown.code == 0
    assert "mlp_mid" in shown.out
    sites = teal("store", "stats", store, "--level", "0.9", "--json").json["sites"]
    assert [site["site"] for site in sites] == ["attn_in", "attn_out", "mlp_in", "mlp_mid"]
    assert {site["level"] for site in sites} == {"s0.90"}
    assert 0.7 < sites[0]["realised"]["q"] < 0.95


def test_stats_of_masks(teal: Teal, store: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    options = ("--level", "0.5", "--layers", "1:", "--projections", "q,k,down", "--gbps", "10", "-o", table)
    found = teal("store", "stats", store, *options, "--per-channel", "--json").json
    rows = found["rows"]
    assert [(row["layer"], row["projection"]) for row in rows] == [
        (1, "q"), (1, "k"), (2, "q"), (2, "k"), (1, "down"), (2, "down")
    ]  # fmt: skip
    q, k = rows[:2]
    assert (q["tokens"], q["channels"], q["target"], q["level"]) == (40, 63, 0.5, "s0.50")
    assert k["kept"] < q["kept"] == sum(q["channel_kept"])
    assert q["traffic"]["floor_us"] == pytest.approx(q["kept"] / 40 * 16 * 2 / 10e9 * 1e6)
    assert k["traffic"]["floor_us"] is None  # a store does not tell the width of keys
    assert [site["site"] for site in found["sites"]] == ["attn_in", "mlp_mid"]
    read = parquet.read_table(table).to_pylist()
    assert [row["nm.2:4.fit"] for row in read] == [row["nm"]["2:4"]["fit"] for row in rows]
    assert [row["runs.kept"] for row in read] == [row["runs"]["kept"] for row in rows]
    again = teal("store", "stats", store, "-o", table)
    assert (again.code, "--force" in again.err) == (2, True)
    assert teal("store", "stats", store, "-o", table, "--force").code == 0
    assert teal("store", "stats", store, "-o", tmp_path / "table.csv").code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["table.parquet"]


def test_stats_of_a_level_without_rows(teal: Teal, unfinished: Path) -> None:
    found = teal("store", "stats", unfinished, "--json").json
    assert {row["level"] for row in found["rows"]} == {"s0.50"}
    assert teal("store", "stats", unfinished, "--level", "0.9").code == 0


def test_convert(teal: Teal, store: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = ("--level", "0.5", "--layers", "0,1:3", "--names", "q,mlp_in", "--tokens", "5:")
    result = teal("store", "convert", store, "-o", target, *options, "--json")
    assert result.code == 0
    assert result.json["arrays"] == 6
    with np.load(target / "s0.50/layer_2/mlp_in.npz") as data:
        assert data["rows"].shape == (35, 40)
    again = teal("store", "convert", store, "-o", target)
    assert again.code == 2
    assert "exists" in again.err
    options = (
        "--level",
        "0.5,0.9",
        "--layers",
        "0",
        "--names",
        "q",
        "--sequences",
        "0,2:4",
        "--format",
        "csr",
        "--force",
    )
    assert teal("store", "convert", store, "-o", target, *options, "--json").json["arrays"] == 2
    with np.load(target / "s0.90/layer_0/q.npz") as data:
        assert sorted(set(data["sequence"].tolist())) == [0, 2, 3]


def test_the_help_of_convert_names_every_format() -> None:
    from teal_cli.commands.store import FORMATS_HELP
    from teal_cli.store.formats import FORMATS

    assert [part.split()[0] for part in FORMATS_HELP.rstrip(".").split(", ")] == list(FORMATS)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--format", "hdf5"), 2, "npz, csr, mtx, pt"),
        (("--layers", "2:2"), 2, "names no layers"),
        (("--sequences", "x"), 2, "names no sequences"),
        (("--layers", "a"), 2, "names no layers"),
        (("--layers", "0:x"), 2, "'0:x' names no layers"),
        (("--layers", "9"), 2, "there is no layer 9"),
        (("--names", "qkv"), 2, "no site or projection 'qkv'"),
        (("--tokens", "7"), 2, "no range"),
        (("--tokens", "30:50"), 2, "40 tokens"),
        (("--tokens", "0:5", "--sequences", "1"), 2, "exclude each other"),
        (("--sequences", "30"), 3, "no row of sequence 30"),
        (("--level", "0.7"), 3, "s0.50, s0.90"),
    ],
)
def test_bad_conversions(
    teal: Teal, store: Path, tmp_path: Path, options: tuple[str, ...], code: int, text: str
) -> None:
    result = teal("store", "convert", store, "-o", tmp_path / "out", *options)
    assert (result.code, text in result.err) == (code, True), result.err
    assert not (tmp_path / "out").exists()


def test_what_is_no_store(teal: Teal, tmp_path: Path) -> None:
    for command in ("info", "verify", "stats"):
        missing = teal("store", command, tmp_path / "nothing")
        assert missing.code == 3
        assert teal("store", command, tmp_path).code == 2


def test_a_hint_names_only_options_that_there_are(teal: Teal, store: Path, tmp_path: Path) -> None:
    assert teal("store", "copy", store, "-o", tmp_path / "copy.zarr").code == 0
    again = teal("store", "copy", store, "-o", tmp_path / "copy.zarr")
    assert (again.code, "--force" in again.err, "--resume" in again.err) == (2, True, False)


@pytest.mark.parametrize("file", ["values/c/0/0/0", "mask/c/0/0/0", "row_nnz/c/0/0"])
def test_damage_names_the_chunk_and_the_way_out(teal: Teal, store: Path, tmp_path: Path, file: str) -> None:
    path = tmp_path / "out.zarr"
    shutil.copytree(store, path)
    chunk = path / "s0.50" / "mlp_in" / file
    data = bytearray(chunk.read_bytes())
    data[3] ^= 0x41
    chunk.write_bytes(data)
    read = teal("store", "stats", path)
    err = " ".join(read.err.split())
    assert (read.code, f"{file} is unreadable: a checksum does not match" in err) == (1, True), err
    assert "`teal dump --resume`" in err
    copied = teal("store", "copy", path, "-o", tmp_path / "copy.zarr")
    err = " ".join(copied.err.split())
    assert (copied.code, f"mlp_in/{file} is damaged" in err, "run the same command again" in err) == (1, True, False)
    assert not (tmp_path / "copy.zarr").exists()


def test_what_begins_anew_on_a_full_disk_does_not_promise_to_go_on(
    teal: Teal, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("teal_cli.store.export.new_folder", full)
    ran = teal("store", "convert", store, "-o", tmp_path / "out")
    assert (ran.code, "is full" in ran.err, "run the same command again" in " ".join(ran.err.split())) == (
        1,
        True,
        True,
    )
    assert "where it stopped" not in ran.err
    assert not (tmp_path / "out").exists()
