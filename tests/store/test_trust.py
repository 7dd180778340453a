"""A store that lies is refused, as a damaged byte is: metadata, missing parts, replaced and foreign stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_store import CHANNELS, LAYERS, digest, feed, header, levels, write_store

from teal_cli import open_store
from teal_cli.errors import TealError, UsageError
from teal_cli.store.export import convert
from teal_cli.store.reader import describe
from teal_cli.store.schema import MAX_LEVELS, parse_levels
from teal_cli.store.selection import parse_layers, select
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import LevelHeader, StoreWriter
from teal_kernels.thresholds import channel_thresholds


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trust") / "out.zarr"
    write_store(path, 20)
    return path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "out.zarr")


def problems(path: Path) -> list[str]:
    return [str(event) for event in verify(path) if isinstance(event, Problem)]


def change(node: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the zarr.json of a node."""
    file = node / "zarr.json"
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


# ------------------------------------------------------------------------------------------------ wrong data in silence
def test_missing_thresholds_are_never_zeros(store: Path) -> None:
    shutil.rmtree(store / "s0.50/thresholds/c")
    with pytest.raises(TealError, match=r"s0\.50/thresholds"):
        open_store(store).level(0.5).projection(0, "q")


@pytest.mark.parametrize("column", ["token_id", "position", "sequence", "phase"])
def test_a_missing_column_is_never_read(store: Path, column: str) -> None:
    shutil.rmtree(store / "s0.50" / column / "c")
    with pytest.raises(TealError, match=rf"s0\.50/{column}"):
        _ = open_store(store).level(0.5).tokens


def test_levels_are_those_that_the_root_lists(store: Path) -> None:
    shutil.copytree(store / "s0.50", store / "s0.51")
    shutil.copytree(store / "s0.50", store / "0.5")
    assert open_store(store).levels == ("s0.50", "s0.90")
    assert {text.partition(":")[0] for text in problems(store)} == {"s0.51", "0.5"}
    (store / "s0.90/zarr.json").unlink()
    assert open_store(store).levels == ("s0.50", "s0.90")
    with pytest.raises(TealError, match=r"s0\.90"):
        open_store(store).level(0.9)
    with pytest.raises(TealError):
        describe(open_store(store))


def test_a_reader_never_mixes_two_stores(store: Path) -> None:
    opened = open_store(store)
    level = opened.level(0.5)
    rows = level.site(0, "attn_in")
    before = rows[3].copy()
    with StoreWriter.create(store, header(seed=1), levels(20), force=True) as writer:
        feed(writer.level(0.5), 20)
    np.testing.assert_array_equal(rows[3], before)  # decoded before
    for read in (lambda: level.site(1, "attn_in")[:], lambda: level.tokens, lambda: opened.level(0.9)):
        with pytest.raises(TealError):
            read()
    with pytest.raises(TealError, match="replaced or removed"):
        opened.check_same()
    assert len(open_store(store).level(0.5)) == 20


# ------------------------------------------------------------------------------------------------ the digest
def test_the_digest_is_that_of_the_data_and_finds_changed_provenance(store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "again.zarr", 20)
    write_store(tmp_path / "other.zarr", 20, seed=1)
    found = open_store(store).state.digest
    assert found
    assert open_store(tmp_path / "again.zarr").state.digest == found
    assert open_store(tmp_path / "other.zarr").state.digest != found
    assert problems(store) == []
    good = (store / "zarr.json").read_text()
    attributes = json.loads(good)["attributes"]["teal"]
    for name, value in attributes.items():
        new = {str: f"{value}x", int: 7, dict: {**value, "x": 1} if isinstance(value, dict) else None}.get(type(value))
        if new is None or name in ("layers", "block_tokens", "schema", "digest", "channels"):
            continue
        change(store, lambda node, name=name, new=new: node["attributes"]["teal"].__setitem__(name, new))  # type: ignore[misc]
        found_by = ["an error"]
        with suppress(TealError):
            found_by = problems(store)
        assert found_by, f"{name} was changed to {new!r}"
        (store / "zarr.json").write_text(good)
    assert problems(store) == []


@pytest.mark.parametrize("value", [{}, "", 0, None, True])
def test_what_stands_around_the_copies_is_verified(store: Path, value: object) -> None:
    change(store, lambda node: node["consolidated_metadata"].__setitem__("must_understand", value))
    assert problems(store) == ["zarr.json: what stands around the copies of the metadata is not what Zarr writes"]


# ------------------------------------------------------------------------------------------------ resume
@pytest.mark.parametrize("value", [2**40, -1, "x", 1.5, True, None])
def test_resume_trusts_no_number(tmp_path: Path, value: object) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 35)
    change(path / "s0.50", lambda node: node["attributes"]["teal"].__setitem__("tokens_committed", value))
    before = digest(path)
    with pytest.raises(TealError, match="tokens_committed"):
        StoreWriter.resume(path, header(), levels())
    assert digest(path) == before


@pytest.mark.parametrize("part", ["mlp_in/values", "mlp_in/mask", "mlp_in/row_nnz", "sequence"])
def test_resume_notices_a_committed_chunk_that_is_gone(tmp_path: Path, part: str) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 35)
    chunks = sorted(file for file in (path / "s0.50" / part / "c").rglob("*") if file.is_file())
    chunks[min(1, len(chunks) - 1)].unlink()  # the second block is the last whole one
    with pytest.raises(TealError, match=part.partition("/")[0]):
        StoreWriter.resume(path, header(), levels())


@pytest.mark.parametrize("part", ["values", "mask", "row_nnz"])
@pytest.mark.parametrize("damage", ["a bit", "the end", "seven bytes more"])
def test_resume_notices_damage_in_the_last_block(tmp_path: Path, part: str, damage: str) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 35)
    file = path / "s0.50/mlp_mid" / part / ("c/0/1" if part == "row_nnz" else "c/0/1/0")
    data = bytearray(file.read_bytes())
    if damage == "a bit":
        data[len(data) // 3] ^= 4
    elif damage == "the end":
        del data[-1:]
    else:
        data += data[:7]
    file.write_bytes(data)
    before = digest(path)
    with pytest.raises(TealError, match=r"s0\.50/mlp_mid, tokens 16 to 32: "):
        StoreWriter.resume(path, header(), levels())
    assert digest(path) == before, "what is refused is left as it was"


def test_a_root_that_is_no_group_is_not_declared_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 35)
    change(path, lambda node: node.__setitem__("node_type", False))
    with (
        pytest.raises(TealError, match=r"a zarr\.json in .* is damaged"),
        StoreWriter.resume(path, header(), levels()) as writer,
    ):
        for target in (0.5, 0.9):
            feed(writer.level(target), 100)
            writer.level(target).finish()
        writer.complete()


# ------------------------------------------------------------------------------------------------ bounds, links
@pytest.mark.parametrize("text", ["0:0.99:1e-9", "0:1e999999:1", "0:1:1e-999999", "1e-300"])
def test_levels_are_bounded(text: str) -> None:
    with pytest.raises(UsageError):
        parse_levels(text)
    assert len(parse_levels("0:0.999:0.001")) == MAX_LEVELS
    assert parse_levels("-0.0,0") == (0.0,)


@pytest.mark.parametrize("text", ["0:1000000000", "1000000000:", "1000000000:2000000000", "-1000000000:1", "-1", "٣",
                                  "9" * 5000, f"0:{'9' * 5000}", "0:1:2", "x", ",", "2:1"])  # fmt: skip
def test_layers_are_bounded(store: Path, text: str) -> None:
    with pytest.raises(UsageError, match="layer"):
        select(open_store(store), layers=parse_layers(text, LAYERS))


def test_deep_json_is_refused(store: Path) -> None:
    (store / "s0.50/zarr.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(TealError, match="nested too deep"):
        open_store(store).level(0.5)


def test_force_follows_a_link(store: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(store)
    with StoreWriter.create(link, header(seed=1), levels(20), force=True):
        pass
    assert link.is_symlink()
    assert open_store(store).header.seed == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.zarr", "out.zarr"]
    loop = tmp_path / "loop.zarr"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="circle"):
        StoreWriter.create(loop, header(), levels(), force=True)


def test_force_deletes_nothing_of_others(store: Path) -> None:
    (store / "notes.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        StoreWriter.create(store, header(), levels(), force=True)
    (store / "notes.txt").unlink()
    change(store, lambda node: node["attributes"]["teal"].__setitem__("schema", "teal-activations/9"))
    with pytest.raises(UsageError, match="another schema"):
        StoreWriter.create(store, header(), levels(), force=True)


def test_convert_does_not_write_into_the_store(store: Path) -> None:
    opened = open_store(store)
    for target in (store, store / "npz"):
        with pytest.raises(UsageError):
            list(convert(opened, target, "npz", select(opened)))
    assert problems(store) == []


# ------------------------------------------------------------------------------------------------ schema 2
def test_a_projection_has_a_threshold_per_channel_where_there_is_a_scale(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    scale = chance.uniform(0.5, 2.0, (LAYERS, 3, CHANNELS["attn_in"])).astype(np.float32)
    scale[0, :, 5] = 0  # never kept
    centre = chance.normal(size=(LAYERS, CHANNELS["attn_in"])).astype(np.float32)
    thresholds = np.full((LAYERS, 7), 0.75, np.float32)
    head = LevelHeader(0.5, "uniform", thresholds, 20, scale={"attn_in": scale}, centre={"attn_in": centre})
    path = tmp_path / "out.zarr"
    rows = chance.normal(size=(20, LAYERS, CHANNELS["attn_in"])).astype(np.float32)
    limits = channel_thresholds(thresholds[:, :3], scale)
    kept = np.where(np.abs(rows) > limits.min(axis=1), rows, 0).astype(np.float32)
    made = header(dtype="float32", criterion={"name": "made-up"}, columns=("logprob",))
    with StoreWriter.create(path, made, [head]) as writer:
        level = writer.level(0.5)
        for token in range(20):
            _, views = level.room()
            for site, view in views.items():
                view.zero_()
                if site == "attn_in":
                    view.numpy()[:, 0] = kept[token]
            level.add(token, token, 0, logprob=-0.5 * token)
        level.finish()
        writer.complete()
    found = open_store(path).level(0.5)
    for column, projection in enumerate("qkv"):
        expected = np.where(np.abs(rows[:, 1]) > limits[1, column], rows[:, 1], 0)
        np.testing.assert_array_equal(found.projection(1, projection)[:], expected)
        assert found.realised()[1, column] == pytest.approx(1 - np.count_nonzero(expected) / expected.size)
    np.testing.assert_array_equal(found.centre["attn_in"], centre)
    np.testing.assert_array_equal(found.tokens["logprob"], -0.5 * np.arange(20, dtype=np.float32))
    assert problems(path) == []
    shutil.rmtree(path / "s0.50/attn_in/scale/c")
    with pytest.raises(TealError, match="attn_in/scale"):
        open_store(path).level(0.5).projection(0, "q")
