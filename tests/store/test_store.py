"""Writing a store and reading it back: every byte, every shape that the arrays can take."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from fixtures_store import (
    CHANNELS,
    HEADER,
    LAYERS,
    TARGETS,
    dense,
    digest,
    feed,
    header,
    levels,
    row,
    token_of,
    write_store,
)

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.store import shards
from teal_cli.store.schema import PHASES
from teal_cli.store.shards import SiteFiles
from teal_cli.store.writer import StoreWriter
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, SITES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with 100 tokens in two levels: six whole blocks and a partial one."""
    path = tmp_path_factory.mktemp("store") / "out.zarr"
    write_store(path)
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_row_comes_back(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 37, dtype=dtype)
    opened = open_store(path)
    assert opened.complete
    for head in levels():
        level = opened.level(head.target)
        assert (level.thresholds == head.thresholds).all()
        for site in SITES:
            for layer in range(LAYERS):
                expected = dense(head, site, layer, 37, dtype)
                rows = level.site(layer, site)
                assert rows.shape == expected.shape
                assert rows.dtype == expected.dtype
                np.testing.assert_array_equal(np.asarray(rows), expected)
                np.testing.assert_array_equal(rows.mask[:], expected != 0)
                assert (rows.row_nnz == (expected != 0).sum(axis=1)).all()


def test_a_projection_is_its_site_thresholded_again(store: Path) -> None:
    level = open_store(store).level(0.5)
    for projection, site in PROJECTION_SITE.items():
        rows = np.asarray(level.site(1, site))
        threshold = level.thresholds[1, PROJECTION_INDEX[projection]]
        expected = np.where(np.abs(rows) > threshold, rows, 0)
        found = level.projection(1, projection)
        np.testing.assert_array_equal(np.asarray(found), expected)
        assert (found.row_nnz == (expected != 0).sum(axis=1)).all()
        dropped = 1 - np.count_nonzero(expected) / expected.size
        assert level.realised()[1, PROJECTION_INDEX[projection]] == pytest.approx(dropped)
    assert np.count_nonzero(level.projection(1, "k")[:]) < np.count_nonzero(level.projection(1, "q")[:])


@pytest.mark.parametrize(
    "key",
    [
        5,
        -1,
        slice(None),
        slice(3, 50),
        slice(None, None, -7),
        slice(90, 10),
        [3, 99, 17, 17],
        np.array([], dtype=int),
        np.arange(100) % 3 == 0,
        (5, 7),
        (slice(10, 20), slice(1, 60, 2)),
        (slice(None), -1),
        ([1, 50], slice(5, 9)),
        (7, [1, 5, 62]),
        (slice(0, 4), [1, 5, 62]),
        ...,
        (..., 3),
        (4, ...),
    ],
    ids=str,
)
def test_indexing_is_that_of_numpy(store: Path, key: object) -> None:
    rows = open_store(store).level(0.9).site(2, "attn_in")
    np.testing.assert_array_equal(rows[key], np.asarray(rows)[key])


@pytest.mark.parametrize("key", [100, -101, (0, 63), None, (0, 0, 0), ([1], [2])], ids=str)
def test_indices_out_of_range_are_refused(store: Path, key: object) -> None:
    with pytest.raises(IndexError):
        open_store(store).level(0.9).site(2, "attn_in")[key]


def test_raw_and_csr(store: Path) -> None:
    rows = open_store(store).level(0.5).projection(0, "k")
    expected = np.asarray(rows)
    assert rows.raw.dtype == np.uint16
    bits = rows.raw[:].view(np.int16)
    np.testing.assert_array_equal(torch.from_numpy(bits).view(torch.bfloat16).float().numpy(), expected)
    csr = rows.csr(slice(10, 70))
    back = np.zeros(csr.shape, np.float32)
    back[np.repeat(np.arange(60), np.diff(csr.indptr)), csr.indices] = csr.data
    np.testing.assert_array_equal(back, expected[10:70])
    assert rows.csr(slice(5, 5)).shape == (0, CHANNELS["attn_in"])


def test_tokens_and_prompts(store: Path) -> None:
    opened = open_store(store)
    level = opened.level("s0.90")
    expected = [token_of(token) for token in range(100)]
    for name in ("token_id", "position", "sequence"):
        assert level.tokens[name].tolist() == [token[name] for token in expected]
    assert set(level.tokens.phase.tolist()) == {1}
    assert opened.find("prompt 13") == [13]
    assert level.rows(13) == slice(91, 98)
    with pytest.raises(NotFoundError):
        level.rows(99)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32])
def test_block_boundaries(tmp_path: Path, count: int) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, count)
    for head in levels():
        level = open_store(path).level(head.target)
        assert len(level) == count
        assert level.complete
        for site in SITES:
            rows = np.asarray(level.site(0, site))
            assert rows.shape == (count, CHANNELS[site])
            if count:
                np.testing.assert_array_equal(rows, dense(head, site, 0, count))
        assert np.isnan(level.realised()).all() == (count == 0)


def test_blocks_are_read_as_zarr_reads_them(store: Path) -> None:
    """All layers and some, the last block too, which is not full."""
    root, head = zarr.open_group(store, mode="r"), open_store(store).header
    for site in SITES:
        values, mask, row_nnz = (root[f"s0.50/{site}/{name}"] for name in ("values", "mask", "row_nnz"))
        files = SiteFiles(store / "s0.50" / site, head, CHANNELS[site])
        for layers in (range(3), range(1, 2)):
            for block, tokens in ((0, 16), (6, 4)):
                found = files.read(block, layers, tokens)
                chosen, rows = slice(layers.start, layers.stop), slice(16 * block, 16 * block + tokens)
                kept = found[2].sum(axis=1)
                each = [slots[:count] for slots, count in zip(values[chosen, block], kept, strict=True)]
                np.testing.assert_array_equal(found[0], np.concatenate(each))
                np.testing.assert_array_equal(found[1], mask[chosen, rows])
                np.testing.assert_array_equal(found[2], row_nnz[chosen, rows])


def test_names_and_codecs_are_those_of_the_schema(store: Path) -> None:
    root = zarr.open_group(store, mode="r")
    attributes = root.attrs["teal"]
    wanted = {"schema", "teal_version", "model", "model_revision", "config_sha256", "calibration", "dtype"}
    wanted |= {"value_dtype", "prompts", "seed", "sampling", "backend", "block_tokens", "compare", "bitorder"}
    assert wanted | {"complete"} <= set(attributes)
    assert attributes["schema"] == "teal-activations/2"
    assert attributes["compare"] == "abs(x) > t"
    assert root.metadata.consolidated_metadata is not None
    assert root["s0.50"].attrs["teal"]["tokens_committed"] == 100
    assert root["s0.50/attn_in"].attrs["teal"] == {"channels": 63, "projections": ["q", "k", "v"]}
    values, mask, row_nnz = (root[f"s0.50/attn_in/{name}"] for name in ("values", "mask", "row_nnz"))
    assert (values.shape, values.chunks, values.shards) == ((3, 7, 1008), (1, 1, 1008), (3, 1, 1008))
    assert (mask.shape, mask.chunks, mask.shards) == ((3, 100, 8), (1, 16, 8), (3, 16, 8))
    assert (row_nnz.shape, row_nnz.chunks, row_nnz.fill_value) == ((3, 100), (3, 16), 0xFFFFFFFF)
    assert values.metadata.dimension_names == ("layer", "block", "slot")
    codecs = json.loads((store / "s0.50/attn_in/values/zarr.json").read_text())["codecs"]
    inner = codecs[0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "blosc", "crc32c"]
    assert inner[1]["configuration"] == {
        "typesize": 2,
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle",
        "blocksize": 1 << 20,
    }


def test_zarr_itself_would_write_the_same_bytes(store: Path, tmp_path: Path) -> None:
    made = levels()
    copy = tmp_path / "copy.zarr"
    with StoreWriter.create(copy, header(), made):
        pass
    for name in SITES:
        for part in ("values", "mask", "row_nnz"):
            path = f"s0.50/{name}/{part}"
            data = zarr.open_array(store, path=path, mode="r")[...]
            target = zarr.open_array(copy, path=path, mode="r+", config={"write_empty_chunks": True})
            target[:, : data.shape[1]] = data
    for name in header().token_columns:
        data = zarr.open_array(store, path=f"s0.50/{name}", mode="r")[...]
        zarr.open_array(copy, path=f"s0.50/{name}", mode="r+")[: len(data)] = data
    ours, theirs = digest(store / "s0.50"), digest(copy / "s0.50")
    chunks = [name for name in ours if "/c/" in name and name.split("/")[0] != "thresholds"]
    assert len(chunks) == 4 * 3 * 7 + 4
    assert {name: ours[name] for name in chunks} == {name: theirs[name] for name in chunks}


def test_only_committed_tokens_are_seen_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    head = levels()[0]
    with StoreWriter.create(path, header(), levels()) as writer:
        level = writer.level(0.5)
        assert len(open_store(path).level(0.5)) == 0
        feed(level, 20)
        level.flush()  # 16 of a whole block, then 4 of a partial one
        seen = open_store(path).level(0.5)
        assert len(seen) == 20
        assert not seen.complete
        np.testing.assert_array_equal(np.asarray(seen.site(1, "mlp_mid")), dense(head, "mlp_mid", 1, 20))


@pytest.mark.parametrize("durable", [False, True])
def test_rows_may_follow_in_a_block_that_was_flushed(tmp_path: Path, durable: bool) -> None:
    once, often = tmp_path / "once.zarr", tmp_path / "often.zarr"
    write_store(once, 37)
    with StoreWriter.create(often, header(), levels(37), durable=durable) as writer:
        for target in (0.5, 0.9):
            level, rows = writer.level(target), 0
            for count in (3, 2, 0, 11, 20, 1):  # within a block, nothing, to its end, over one, one more
                feed(level, rows + count)
                rows += count
                level.flush()
                assert len(open_store(often).level(target)) == rows
            level.finish()
        writer.complete()
    assert digest(often) == digest(once)


def test_reserved_rows_lie_in_several_blocks_and_are_added_in_order(tmp_path: Path) -> None:
    once, apart = tmp_path / "once.zarr", tmp_path / "apart.zarr"
    write_store(once, 45)
    with StoreWriter.create(apart, header(), levels(45)) as writer:
        for target in (0.5, 0.9):
            level = writer.level(target)
            feed(level, 5)
            places = [level.reserve(count) for count in (30, 0, 10)]  # two sequences, and one without rows
            assert [[part["mlp_mid"].shape[1] for part in parts] for parts in places] == [[11, 16, 3], [], [10]]
            assert level.rows == 5
            token = 5
            for part in [part for parts in places for part in parts]:
                for index in range(part["mlp_mid"].shape[1]):
                    for site, values in row(level.header, token, "bfloat16").items():
                        part[site][:, index].copy_(values)
                    token += 1
            fed = [{**token_of(token), "phase": PHASES["decode"]} for token in range(5, 45)]
            for span in (slice(0, 25), slice(25, 25), slice(25, 40)):
                columns = {name: np.array([each[name] for each in fed[span]], np.int64) for name in fed[0]}
                level.add_reserved(columns)
            with pytest.raises(ValueError, match="0 rows that could be added, not 1"):
                level.add_reserved({name: column[:1] for name, column in columns.items()})
            with pytest.raises(ValueError, match="takes no 1 rows more"):
                level.reserve(1)
            level.finish()
        writer.complete()
    assert digest(apart) == digest(once)


def test_a_kill_while_a_flushed_block_is_written_anew_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replaced = tmp_path / "out.zarr", shards._replace
    for most in range(1, 17):  # files of the block that come before the kill
        calls: list[Path] = []

        def killed(file: Path, *rest: Any, most: int = most, calls: list[Path] = calls, **options: bool) -> None:
            calls.append(file)
            if len(calls) > 16 + most:
                raise OSError("killed")
            replaced(file, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(shards, "_replace", killed)
            with (
                contextlib.suppress(OSError, TealError),
                StoreWriter.create(path, header(), levels(), force=True) as writer,
            ):
                feed(writer.level(0.5), 5)
                writer.level(0.5).flush()
                feed(writer.level(0.5), 16)
        seen = open_store(path).level(0.5)
        assert len(seen) == (5 if most < 16 else 16)
        np.testing.assert_array_equal(np.asarray(seen.site(1, "mlp_mid")), dense(levels()[0], "mlp_mid", 1, len(seen)))
        with StoreWriter.resume(path, header(), levels()) as writer:
            assert writer.level(0.5).rows == len(seen) // 16 * 16


def test_interrupting_keeps_every_added_row(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    with pytest.raises(KeyboardInterrupt), StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 21)
        writer.level(0.5).room()  # asked for, never added
        raise KeyboardInterrupt
    opened = open_store(path)
    assert not opened.complete
    assert len(opened.level(0.5)) == 21
    np.testing.assert_array_equal(np.asarray(opened.level(0.5).site(2, "mlp_in")), dense(levels()[0], "mlp_in", 2, 21))


def test_a_row_that_was_not_filled_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"s0\.50/attn_in, tokens 0 to 1: layer 0: a row holds NaN"):
        with StoreWriter.create(tmp_path / "out.zarr", header(), levels()) as writer:
            writer.level(0.5).room()
            writer.level(0.5).add(0, 0, 0)


def test_rows_may_be_filled_in_inference_mode(tmp_path: Path) -> None:
    made = levels(20)
    with torch.inference_mode(), StoreWriter.create(tmp_path / "out.zarr", header(), made) as writer:
        feed(writer.level(0.5), 20)
    rows = open_store(tmp_path / "out.zarr").level(0.5).site(0, "attn_in")
    np.testing.assert_array_equal(rows[:], dense(made[0], "attn_in", 0, 20))


def test_misuse_of_the_writer_is_refused(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "out.zarr", header(), levels(2)) as writer:
        level = writer.level(0.5)
        with pytest.raises(ValueError, match="no row that could be added"):
            level.add(0, 0, 0)
        assert level.room(5)[0] == 2
        level.flush()  # none of these was added
        feed(level, 2)
        with pytest.raises(ValueError, match="no row that could be added"):
            level.add(2, 2, 0)
        with pytest.raises(ValueError, match="full"):
            level.room()
        with pytest.raises(ValueError, match="not finished"):
            writer.complete()
        level.finish()
        level.finish()
        with pytest.raises(ValueError, match="complete"):
            level.room()
        with pytest.raises(NotFoundError):
            writer.level(0.7)


def test_paths_may_be_in_any_script(tmp_path: Path) -> None:
    path = tmp_path / "données ☂ 数据" / "слои.zarr"
    write_store(path, 3)
    assert len(open_store(path).level(0.5)) == 3


@pytest.mark.parametrize("name", ["values", "mask", "row_nnz"])
def test_a_missing_chunk_is_never_read_as_zeros(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out.zarr"
    write_store(path, 20)
    chunk = next(file for file in (path / "s0.50/mlp_in" / name / "c").rglob("*") if file.is_file())
    chunk.unlink()
    with pytest.raises(TealError, match=r"s0\.50/mlp_in, layer 0, tokens"):
        open_store(path).level(0.5).site(0, "mlp_in")[:]


def test_what_is_no_store_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_store(tmp_path / "nothing")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(UsageError, match="not a teal store"):
        open_store(tmp_path / "other")
    zarr.create_group(tmp_path / "newer").attrs["teal"] = {"schema": "teal-activations/3"}
    with pytest.raises(UsageError, match="teal-activations/3") as caught:
        open_store(tmp_path / "newer")
    assert caught.value.hint
    zarr.create_group(tmp_path / "damaged").attrs["teal"] = {"schema": "teal-activations/2", "model": "x"}
    with pytest.raises(TealError, match="damaged"):
        open_store(tmp_path / "damaged")


def test_unknown_names_are_refused(store: Path) -> None:
    level = open_store(store).level(TARGETS[0])
    for wrong in (lambda: level.site(3, "attn_in"), lambda: level.site(0, "q"), lambda: level.projection(0, "mlp_in")):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(NotFoundError, match=r"s0\.70"):
        open_store(store).level("s0.70")
    assert level.site(-1, "attn_in")[3].tolist() == level.site(2, "attn_in")[3].tolist()


def test_block_size_follows_from_the_widths() -> None:
    assert header(block_tokens=0).block_tokens == 8192  # 16 channels of 2 bytes
    assert HEADER.block_tokens == 16
