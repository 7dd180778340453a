"""`verify` finds what is wrong and says where."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from fixtures_store import feed, header, levels, write_store

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError
from teal_cli.store import layout
from teal_cli.store.digest import Digested
from teal_cli.store.verify import Checked, Problem, verify
from teal_cli.store.writer import StoreWriter


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "out.zarr"
    write_store(path, 20)
    return path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Path:
    """A good store that a test may damage."""
    return shutil.copytree(template, tmp_path / "out.zarr")


def problems(path: Path, *, allow_incomplete: bool = False) -> list[str]:
    events = verify(path, allow_incomplete=allow_incomplete)
    return [str(event) for event in events if isinstance(event, Problem)]


def test_a_good_store_has_no_problem(store: Path) -> None:
    events = list(verify(store))
    assert [e for e in events if isinstance(e, Checked)][-1] == Checked(16, 16)  # 2 levels, 4 sites, 2 blocks
    digested = [e for e in events if isinstance(e, Digested)]
    assert [e.done for e in digested] == list(range(1, digested[-1].total + 1))  # each array of both levels
    assert events[-1] == digested[-1]
    assert problems(store) == []


def test_an_unfinished_store_is_a_problem_unless_accepted(tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels()) as writer:
        feed(writer.level(0.5), 20)
    found = problems(path)
    assert any("not complete" in text for text in found)
    assert any("20 tokens are committed" in text for text in found)
    assert problems(path, allow_incomplete=True) == []


ARRAYS = (
    "attn_in/values",
    "attn_in/mask",
    "attn_in/row_nnz",
    "token_id",
    "position",
    "sequence",
    "phase",
    "thresholds",
)


def last_chunk(store: Path, array: str) -> Path:
    return max(file for file in (store / "s0.50" / array / "c").rglob("*") if file.is_file())


def test_flipped_or_cut_chunks_are_found(store: Path) -> None:
    chance = random.Random(0)
    for array in ARRAYS:
        file = last_chunk(store, array)
        good = file.read_bytes()
        place = chance.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << chance.randrange(8)
        for bad in (bytes(flipped), good[: chance.randrange(len(good))]):
            file.write_bytes(bad)
            found = problems(store)
            said = any(text.startswith("s0.50") for text in found)
            assert said, f"{array} with byte {place} of {len(good)} changed, or {len(bad)} bytes left"
        file.write_bytes(good)
    assert problems(store) == []


def test_missing_chunks_are_found(store: Path) -> None:
    for array in ARRAYS:
        file = last_chunk(store, array)
        good = file.read_bytes()
        file.unlink()
        assert problems(store), file
        file.write_bytes(good)


def test_changed_metadata_are_found(store: Path) -> None:
    for node in ("s0.50", "s0.50/attn_in", "s0.50/attn_in/values", "s0.90/thresholds"):
        file = store / node / "zarr.json"
        good = file.read_text()
        wrong = json.loads(good)
        wrong["attributes"]["note"] = "changed"
        file.write_text(json.dumps(wrong))
        assert any("differs from the copy" in text for text in problems(store)), file
        file.write_text(good)
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["teal"]["compare"] = "abs(x) >= t"
    (store / "zarr.json").write_text(json.dumps(root))
    assert any("compare" in text for text in problems(store))


Change = Callable[[dict[str, np.ndarray]], None]


def kept_value_below_threshold(site: dict[str, np.ndarray]) -> None:
    site["values"][1, 0, 3] = 0x3C00  # 0.0078 in bfloat16


def kept_zero(site: dict[str, np.ndarray]) -> None:
    site["values"][1, 0, 3] = 0x8000


def value_beyond_the_kept(site: dict[str, np.ndarray]) -> None:
    site["values"][2, 1, -1] = 0x4000


def padding_bit(site: dict[str, np.ndarray]) -> None:
    """Sets the padding bit of a row whose channel 0 is kept, and clears that one, so that the counts agree."""
    row = int(np.flatnonzero(site["mask"][0, :, 0] & 1)[0])
    site["mask"][0, row, 0] &= 0xFE
    site["mask"][0, row, -1] |= 0x80


def count_off_by_one(site: dict[str, np.ndarray]) -> None:
    site["row_nnz"][1, 19] += 1


def never_written(site: dict[str, np.ndarray]) -> None:
    site["row_nnz"][1, 19] = 0xFFFFFFFF


def not_a_number(site: dict[str, np.ndarray]) -> None:
    site["values"][1, 0, 0] = 0x7FC0


def test_a_reader_refuses_a_padding_bit(store: Path) -> None:
    array = zarr.open_array(store, path="s0.50/attn_in/mask", mode="r+")
    mask = np.array(array[...])
    padding_bit({"mask": mask})
    array[...] = mask
    with pytest.raises(TealError, match="layer 0, tokens 0 to 16: a padding bit of the bitmap is set"):
        open_store(store).level(0.5).site(0, "attn_in")[:]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (kept_value_below_threshold, r"tokens 0 to 16, layer 1: a kept value is not above the threshold 0.75"),
        (kept_zero, "tokens 0 to 16, layer 1: a kept value is zero"),
        (value_beyond_the_kept, "tokens 16 to 20, layer 2: there are values beyond the kept ones"),
        (padding_bit, "layer 0: a padding bit of the bitmap is set"),
        (count_off_by_one, "tokens 16 to 20, layer 1: the bitmap disagrees with row_nnz"),
        (never_written, "tokens 16 to 20, layer 1: a committed row was never written"),
        (not_a_number, "layer 1: a kept value is not above"),
    ],
)
def test_wrong_content_with_right_checksums_is_found(store: Path, change: Change, what: str) -> None:
    names = ("values", "mask", "row_nnz")
    arrays = {name: zarr.open_array(store, path=f"s0.50/attn_in/{name}", mode="r+") for name in names}
    content = {name: np.array(array[...]) for name, array in arrays.items()}
    change(content)
    for name, array in arrays.items():
        array[...] = content[name]
    found = problems(store)
    assert [text for text in found if text.startswith("s0.50/attn_in") and what in text] == found
    assert len(found) == 1


@pytest.mark.parametrize(
    ("column", "token", "value", "what"),
    [
        ("position", 3, 5, "position, token 3: positions do not increase"),
        ("sequence", 10, 0, "a sequence is not contiguous"),
        ("sequence", 19, 40, "beyond the 40 prompts"),
        ("phase", 0, 9, "none of"),
        ("token_id", 0, 0xFFFFFFFF, "never written"),
        ("thresholds", (0, 0), -1.0, "negative or not a number"),
    ],
)
def test_wrong_columns_are_found(store: Path, column: str, token: object, value: float, what: str) -> None:
    zarr.open_array(store, path=f"s0.50/{column}", mode="r+")[token] = value
    assert any(what in text for text in problems(store))


@pytest.mark.parametrize("tokens", [19, 21])
def test_a_wrong_number_of_tokens_is_found(store: Path, tokens: int) -> None:
    for path in (store / "s0.50" / "zarr.json", store / "zarr.json"):
        path.write_text(path.read_text().replace('"tokens_committed": 20', f'"tokens_committed": {tokens}'))
    assert any("shape" in text for text in problems(store))


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        problems(tmp_path / "nothing")


@pytest.mark.parametrize("length", [48, 33, 112])
def test_an_unfinished_level_may_be_cut_but_not_below_its_tokens(tmp_path: Path, length: int) -> None:
    path = tmp_path / "out.zarr"
    with StoreWriter.create(path, header(), levels(100)) as writer:
        feed(writer.level(0.5), 33)
    layout.resize_rows(path, "s0.50", header(), tokens=length)
    assert problems(path, allow_incomplete=True) == []
    layout.resize_rows(path, "s0.50", header(), tokens=32)
    assert any("shape" in text for text in problems(path, allow_incomplete=True))
