"""Stores pushed to a stand-in of the Hugging Face hub by huggingface_hub itself, and opened from there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_hub import GOOD_TOKEN, WEAK_TOKEN, no_account, point_at
from fixtures_store import digest, feed, header, levels, write_store
from hub_uploads import UploadHub, upload_hub

from teal_cli import open_store
from teal_cli.registry.sources import UnreachableError
from teal_cli.store.publish import Publication
from teal_cli.store.writer import StoreWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # how huggingface_hub calls its HTTP library
]
URL = "hf://datasets/org/acts"
CARD = {"README.md": b"mine"}
"""A dataset that has a card keeps it, and no store is measured for one."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("publish") / "out.zarr"
    write_store(path, 20)
    return path


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """The hub, which this process talks to with a good token, over LFS: the stand-in knows no xet."""
    from huggingface_hub import HfFileSystem, constants

    with upload_hub() as hub:
        no_account(tmp_path, monkeypatch)
        point_at(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        HfFileSystem.clear_instance_cache()
        yield hub
        HfFileSystem.clear_instance_cache()


def main(hub: UploadHub) -> dict[str, bytes]:
    return hub.repos["org/acts"].revisions["main"]


def test_a_push_and_what_its_card_says(teal: Teal, store: Path, far: UploadHub, tmp_path: Path) -> None:
    found = teal("store", "copy", store, "-o", URL, "--json").json
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert (found["output"], found["bytes"], found["moved"]) == (URL, size, size)
    files = main(far)
    assert found["commit"] == far.repos["org/acts"].commit(files)
    assert found["digest"] == open_store(store).state.digest
    ours = {name: data for name, data in files.items() if name in digest(store)}
    assert {name: (store / name).read_bytes() for name in digest(store)} == ours
    assert set(files) - set(ours) == {"README.md", "teal-store.png", ".gitattributes"}
    assert len(far.commits) == 1, "nobody ever sees a part of a store"
    assert files["teal-store.png"].startswith(b"\x89PNG")

    card = files["README.md"].decode()
    from huggingface_hub import DatasetCard

    assert DatasetCard(card).data.tags == ["teal", "activations", "activation-sparsity", "zarr"]
    assert found["digest"] in card
    assert "![" in card
    level = open_store(store).level(0.9)
    kept = np.mean([(np.asarray(level.projection(layer, "k")) != 0).mean() for layer in range(3)])
    (row,) = re.findall(r"^\| s0\.90 \|.*\|$", card.partition("## Densities")[2].partition("##")[0], re.MULTILINE)
    assert row.split(" | ")[2] == f"{kept:.1%}"

    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    near = open_store(store).level("s0.50").projection(0, "down")[0:16]
    np.testing.assert_array_equal(names["rows"], near)
    np.testing.assert_array_equal(names["dataset"]["down"][0, :16], near)
    assert teal("store", "copy", URL, "-o", tmp_path / "back.zarr").code == 0
    assert digest(tmp_path / "back.zarr") == digest(store)

    again = teal("store", "copy", store, "-o", URL, "--json").json
    assert (again["moved"], again["commit"], len(far.commits)) == (0, found["commit"], 1)


def test_a_push_goes_on_where_it_stopped(teal: Teal, store: Path, far: UploadHub) -> None:
    far.add("org/acts", CARD)
    far.refuse_after = 7
    ran = teal("store", "copy", store, "-o", URL)
    assert (ran.code, f"your token may not write to {URL}" in ran.err) == (4, True)
    first = list(far.uploads)
    assert len(first) == 7
    assert main(far) == CARD
    far.refuse_after = None
    assert teal("store", "copy", store, "-o", URL, "-q").code == 0
    assert not set(first) & set(far.uploads[7:]), "what went up is not sent again"
    assert set(digest(store)) | set(CARD) == set(main(far))


def test_what_is_there_is_not_overwritten(teal: Teal, store: Path, far: UploadHub, tmp_path: Path) -> None:
    write_store(tmp_path / "other.zarr", 17)
    write_store(tmp_path / "long.zarr", 40)
    far.add("org/acts", CARD)
    assert teal("store", "copy", tmp_path / "long.zarr", "-o", URL, "-q").code == 0
    ran = teal("store", "copy", tmp_path / "other.zarr", "-o", URL)
    assert (ran.code, f"{URL} exists and holds another store" in ran.err) == (2, True)
    main(far)["LICENSE"] = b"mine"
    assert teal("store", "copy", tmp_path / "other.zarr", "-o", URL, "--force", "-q").code == 0
    ours = set(main(far)) - {"LICENSE", "README.md", "teal-store.png"}
    assert ours == set(digest(tmp_path / "other.zarr")), "nothing of the old store is left"
    assert main(far)["LICENSE"] == b"mine"
    assert f"| {open_store(tmp_path / 'other.zarr').state.digest}" not in main(far)["README.md"].decode()
    far.add("org/taken", {"train.csv": b"a,b"})
    ran = teal("store", "copy", store, "-o", "hf://datasets/org/taken")
    assert (ran.code, "holds files that teal did not write, such as train.csv" in ran.err) == (2, True)


def test_what_arrived_is_held_against_what_was_sent(teal: Teal, store: Path, far: UploadHub, tmp_path: Path) -> None:
    far.alter = True
    far.add("org/acts", CARD)
    ran = teal("store", "copy", store, "-o", URL)
    assert (ran.code, "is not what was sent: its hash is another" in ran.err) == (1, True)
    write_store(tmp_path / "bad.zarr", 20)
    chunk = tmp_path / "bad.zarr/s0.50/mlp_in/values/c/0/0/0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 4
    chunk.write_bytes(data)
    far.add("org/bad", CARD)
    ran = teal("store", "copy", tmp_path / "bad.zarr", "-o", "hf://datasets/org/bad")
    assert "bad.zarr/s0.50/mlp_in/values/c/0/0/0 is damaged" in ran.err
    assert far.repos["org/bad"].revisions["main"] == CARD


def test_rights_and_network(
    teal: Teal, store: Path, far: UploadHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    far.add("org/acts", CARD)

    def fails(url: str = URL, path: Path = store, *more: str) -> tuple[int, str]:
        ran = teal("store", "copy", path, "-o", url, *more)
        return ran.code, ran.err

    for token, said in (
        (None, "wants a token"),
        (WEAK_TOKEN, "your token may not write to"),
        ("hf_wrong", "does not accept your token"),
    ):
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        code, err = fails()
        assert (code, said in err) == (4, True), err
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    for url, said in (("hf://datasets/org/acts/sub", "is no dataset of the hub"), ("hf://org/acts", "is no dataset")):
        code, err = fails(url)
        assert (code, said in err) == (2, True), err
    code, err = fails("memory://bucket/x", store, "--private")
    assert (code, "--private is for a dataset" in err) == (2, True)
    code, err = fails(URL, Path(URL))
    assert (code, "cannot be pushed to the hub" in err) == (2, True)
    with StoreWriter.create(tmp_path / "half.zarr", header(), levels()) as writer:
        feed(writer.level(0.5), 20)
    assert "is not complete" in fails(URL, tmp_path / "half.zarr")[1]
    with monkeypatch.context() as patch:
        point_at("http://127.0.0.1:9", patch)
        with pytest.raises(UnreachableError, match=r"the hub \(http://127\.0\.0\.1:9\) cannot be reached"):
            Publication(store, "org/acts").check()
    with monkeypatch.context() as patch:
        from huggingface_hub import constants

        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        code, err = fails()
        assert (code, "switched off by HF_HUB_OFFLINE" in err) == (1, True), err
    assert far.commits == []
