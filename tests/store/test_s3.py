"""Stores in a bucket of a real S3 server: opened lazily, copied there and back, and what goes wrong on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_s3 import S3
from fixtures_store import LAYERS, TARGETS, digest, write_store

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.store.copy import copy
from teal_kernels.spec import SITES

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")
URL = "s3://bucket/out.zarr"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("s3") / "out.zarr"
    write_store(path, 40)
    return path


@pytest.fixture
def there(s3: S3, store: Path) -> S3:
    """The server with the store in its bucket."""
    s3.fs.put(str(store), URL, recursive=True)
    s3.requests.clear()
    return s3


def test_it_opens_lazily(store: Path, there: S3) -> None:
    far, near = open_store(URL), open_store(store)
    assert len(there.requests) <= 2, "its metadata come with the root's"
    there.requests.clear()
    row = far.level(0.5).projection(1, "down")[33]
    assert 0 < len(there.requests) < 10, there.requests
    np.testing.assert_array_equal(row, near.level(0.5).projection(1, "down")[33])
    assert not any("s0.90" in request or "attn" in request for request in there.requests), "nothing else is read"
    for target in TARGETS:
        for site in SITES:
            rows = [np.asarray(found.level(target).site(LAYERS - 1, site)) for found in (far, near)]
            np.testing.assert_array_equal(*rows)


def test_a_copy_there_and_back(teal: Teal, store: Path, s3: S3, tmp_path: Path) -> None:
    found = teal("store", "copy", store, "-o", URL, "--json").json
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert (found["bytes"], found["moved"], found["output"]) == (size, size, URL)
    puts = [request.split()[1] for request in s3.requests if request.startswith("PUT")]
    assert puts[-1] == "/bucket/out.zarr/zarr.json", "until then it is no store"
    assert len(puts) == len(digest(store))
    assert not any(request.startswith("GET") and "/c/" in request for request in s3.requests), "nothing is read back"
    for name in digest(store):
        assert s3.fs.cat_file(f"{URL}/{name}") == (store / name).read_bytes()
    assert teal("store", "copy", URL, "-o", tmp_path / "back.zarr", "-q").code == 0
    assert digest(tmp_path / "back.zarr") == digest(store)
    write_store(tmp_path / "other.zarr", 20)
    ran = teal("store", "copy", tmp_path / "other.zarr", "-o", URL)
    assert (ran.code, f"{URL} exists and holds another store" in ran.err) == (2, True)
    s3.fs.pipe_file(f"{URL}/notes.txt", b"mine")
    assert teal("store", "copy", tmp_path / "other.zarr", "-o", URL, "--force", "-q").code == 0
    there = {name.removeprefix("bucket/out.zarr/") for name in s3.fs.find(URL)}
    assert there == {*digest(tmp_path / "other.zarr"), "notes.txt"}
    assert open_store(URL).state.digest == open_store(tmp_path / "other.zarr").state.digest


def test_copies_go_on_where_they_stopped(teal: Teal, store: Path, there: S3, tmp_path: Path) -> None:
    # There: what a copy that was cut off leaves, and a file that is not what it should be.
    there.fs.rm_file(f"{URL}/zarr.json")
    there.fs.rm(f"{URL}/s0.90", recursive=True)
    there.fs.pipe_file(f"{URL}/s0.50/mlp_in/mask/c/0/0/0", b"x" * 10)
    with pytest.raises(NotFoundError):
        open_store(URL)
    found = teal("store", "copy", store, "-o", URL, "--json").json
    rest = [name for name in digest(store) if name.startswith("s0.90") or name in ("zarr.json", _MASK)]
    assert found["moved"] == sum((store / name).stat().st_size for name in rest)
    assert {name: there.fs.cat_file(f"{URL}/{name}") for name in rest} == {n: (store / n).read_bytes() for n in rest}
    # And back: an object that cannot be had ends the first run.
    object_ = f"{URL}/s0.90/mlp_mid/values/c/0/1/0"
    data = there.fs.cat_file(object_)
    there.fs.rm_file(object_)
    far = tmp_path / "back.zarr"
    assert teal("store", "copy", URL, "-o", far).code != 0
    there.fs.pipe_file(object_, data)
    found = teal("store", "copy", URL, "-o", far, "--json").json
    assert 0 < found["moved"] < found["bytes"]
    assert digest(far) == digest(store)


_MASK = "s0.50/mlp_in/mask/c/0/0/0"


def test_damage_names_the_chunk(store: Path, there: S3, tmp_path: Path) -> None:
    data = bytearray(there.fs.cat_file(f"{URL}/{_MASK}"))
    data[len(data) // 3] ^= 4
    there.fs.pipe_file(f"{URL}/{_MASK}", bytes(data))
    with pytest.raises(TealError, match=f"{URL}/{_MASK} is damaged: a checksum does not match") as raised:
        for _ in copy(URL, tmp_path / "here.zarr"):
            pass
    assert "run the same command again" in str(raised.value.hint)
    with pytest.raises(TealError, match=r"s0\.50/mlp_in, layer \d, tokens 0 to 16"):
        for layer in range(LAYERS):
            open_store(URL).level(0.5).site(layer, "mlp_in")[0:4]


def test_what_is_not_there(teal: Teal, store: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("s3://nobucket/out.zarr", "s3://bucket/none.zarr", "s3://bucket"):
        with pytest.raises(NotFoundError, match=f"there is no store at {url}"):
            open_store(url)
    with pytest.raises(UsageError, match="is no URL that can be read"):
        open_store("s4://bucket/out.zarr")
    ran = teal("store", "copy", store, "-o", "s3://nobucket/out.zarr")
    assert (ran.code, "s3://nobucket/out.zarr" in ran.err, "Traceback" in ran.err) == (1, True, False), ran.err
    ran = teal("store", "copy", "s3://bucket/none.zarr", "-o", "s3://bucket/two.zarr")
    assert (ran.code, "cannot be sent to another" in ran.err) == (2, True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.forget()
    with pytest.raises(TealError, match="cannot be reached"):
        open_store(URL)
