"""Stores behind URLs: read lazily, copied file by file, what is wrong with them told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fixtures_cli import Teal
from fixtures_ranks import together
from fixtures_store import LAYERS, TARGETS, digest, feed, header, levels, write_store

from teal_cli import open_store
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.store.copy import copy
from teal_cli.store.export import convert
from teal_cli.store.placing import check_target
from teal_cli.store.remote import Remote
from teal_cli.store.selection import select
from teal_cli.store.stats import measure
from teal_cli.store.verify import verify
from teal_cli.store.writer import StoreWriter
from teal_kernels.spec import SITES

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "out.zarr"
    write_store(path, 60)
    return path


@pytest.fixture
def bucket() -> Iterator[Any]:
    """fsspec's memory file system, empty."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/", recursive=True)


class _Ranges(SimpleHTTPRequestHandler):
    """Python's server with byte ranges; notes each request on its server."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        self.server.asked.append((self.path, self.headers.get("Range")))  # type: ignore[attr-defined]
        if not file.is_file():
            self.send_error(404)
            return
        data, wanted = file.read_bytes(), self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(data) - int(last)
            stop = int(last) + 1 if first and last else len(data)
            self.send_header("Content-Range", f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}")
            data = data[start:stop]
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(store: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: _Ranges(*a, directory=str(store.parent)))
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def upload(fs: Any, path: Path, url: str) -> str:
    for file in path.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"{url}/{file.relative_to(path)}", file.read_bytes())
    return url


def test_a_url_reads_like_a_folder(store: Path, bucket: Any, tmp_path: Path) -> None:
    far, near = open_store(upload(bucket, store, "memory://bucket/out.zarr")), open_store(store)
    assert far.levels == near.levels
    assert far.complete
    for target in TARGETS:
        a, b = far.level(target), near.level(target)
        np.testing.assert_array_equal(a.tokens.position, b.tokens.position)
        np.testing.assert_array_equal(a.thresholds, b.thresholds)
        for site in SITES:
            for layer in range(LAYERS):
                np.testing.assert_array_equal(np.asarray(a.site(layer, site)), np.asarray(b.site(layer, site)))
    rows = [[event.site for event in measure(found, found.levels)] for found in (far, near)]
    assert rows[0] == rows[1]
    for _ in convert(far, tmp_path / "npz", "npz", select(far, levels=[0.5], layers=[0], names=["q"])):
        pass
    assert (tmp_path / "npz/s0.50/layer_0/q.npz").exists()


def test_a_row_takes_few_requests(store: Path, server: ThreadingHTTPServer) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{server.server_port}/{store.name}"
    row = open_store(url).level(0.5).projection(1, "down")[41]
    asked: list[Any] = server.asked  # type: ignore[attr-defined]
    assert len(asked) < 10, asked
    whole = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert whole > 0
    np.testing.assert_array_equal(row, open_store(store).level(0.5).projection(1, "down")[41])


def test_a_collection_behind_a_url(bucket: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    assert together(path, 2) == [None, None]
    far = open_store(upload(bucket, path, "memory://bucket/both.zarr"))
    near = open_store(path).level(0.5).site(1, "mlp_in")
    np.testing.assert_array_equal(np.asarray(far.level(0.5).site(1, "mlp_in")), np.asarray(near))
    for _ in copy("memory://bucket/both.zarr", tmp_path / "copied.zarr"):
        pass
    assert digest(tmp_path / "copied.zarr") == digest(path)
    bucket.rm("/bucket/both.zarr/part-00001", recursive=True)
    with pytest.raises(TealError, match=r"part-00001 of the collection .* is missing"):
        open_store("memory://bucket/both.zarr")


def test_a_copy_goes_on_where_it_stopped(
    teal: Teal, store: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, target = upload(bucket, store, "memory://bucket/out.zarr"), tmp_path / "here.zarr"
    read, names = Remote.read, []

    def breaking(self: Remote, name: str, most: int) -> bytes:
        names.append(name)
        if len(names) > 20:
            raise OSError(5, "it cannot be reached: gone", name)
        return read(self, name, most)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "read", breaking)
        ran = teal("store", "copy", url, "-o", target)
    assert (ran.code, "did not come" in ran.err, "run the same command again" in ran.err) == (1, True, True)
    assert not target.exists()
    (half,) = tmp_path.glob(".here.zarr.copy")
    sound = [file for file in half.rglob("*") if "/c/" in str(file) and file.is_file()]
    sound[0].write_bytes(b"x" * sound[0].stat().st_size)  # what a crash may leave
    found = teal("store", "copy", url, "-o", target, "--json").json
    assert 0 < found["moved"] < found["bytes"]
    assert found["digest"] == open_store(store).state.digest
    assert digest(target) == digest(store)
    assert not half.exists()
    assert teal("store", "copy", url, "-o", target).code == 2
    assert teal("store", "copy", store, "-o", target, "--force").code == 0
    assert digest(target) == digest(store)


@pytest.mark.parametrize("place", ["values/c/0/1/0", "row_nnz/c/0/2", "mask/c/0/0/0"])
def test_damage_on_the_way_is_named(store: Path, bucket: Any, tmp_path: Path, place: str) -> None:
    url = upload(bucket, store, "memory://bucket/out.zarr")
    name = f"bucket/out.zarr/s0.50/mlp_in/{place}"
    data = bytearray(bucket.cat_file(name))
    data[len(data) // 3] ^= 4
    bucket.pipe_file(name, bytes(data))
    with pytest.raises(TealError, match=f"mlp_in/{place} is damaged"):
        for _ in copy(url, tmp_path / "here.zarr"):
            pass
    assert not (tmp_path / "here.zarr").exists()


def test_what_is_no_store_is_told(teal: Teal, store: Path, bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no store at memory://bucket/none"):
        open_store("memory://bucket/none")
    bucket.pipe_file("bucket/other/zarr.json", b"{}")
    with pytest.raises(UsageError, match="is not a teal store"):
        open_store("memory://bucket/other")
    with pytest.raises(UsageError, match="is no URL that can be read"):
        open_store("nonsense://bucket/other")
    url = upload(bucket, store, "memory://bucket/out.zarr")
    with pytest.raises(UsageError, match="cannot be verified"):
        next(iter(verify(Path(url))))  # what the command line makes of it
    with StoreWriter.create(tmp_path / "half.zarr", header(), levels()) as writer:
        feed(writer.level(0.5), 20)
    ran = teal("store", "copy", tmp_path / "half.zarr", "-o", tmp_path / "x.zarr")
    assert (ran.code, "is not complete" in ran.err) == (2, True)


def test_what_is_made_here_is_written_to_folders(
    teal: Teal, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command line makes the path s3:/bucket/x of a URL, which would be a folder of that name here."""
    monkeypatch.chdir(tmp_path)
    there = Path("s3://bucket/out.zarr")
    with pytest.raises(UsageError, match=r"s3://bucket/out\.zarr is a URL, .* local disks only"):
        check_target(there, force=False)
    with pytest.raises(UsageError, match="local disks only"):
        StoreWriter.create(there, header(), levels())
    ran = teal("store", "convert", store, "-o", "s3://bucket/out")
    assert (ran.code, "`teal store copy FOLDER -o s3://bucket/out`" in " ".join(ran.err.split())) == (2, True), ran.err
    assert not list(tmp_path.glob("s3*"))


def test_an_unreachable_server_is_told() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(TealError, match="cannot be reached"):
        open_store("http://127.0.0.1:9/out.zarr")
