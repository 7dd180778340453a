"""A real S3 server in this process, moto's, and s3fs pointed at it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass
class S3:
    """The server.

    Attributes:
        fs: s3fs, set up by the environment alone; it has one empty bucket, `bucket`.
        requests: what it was asked for, in order, such as "GET /bucket/out.zarr/zarr.json HTTP/1.1".
    """

    fs: Any
    requests: list[str]

    def forget(self) -> None:
        """Have the next file system read the environment anew."""
        _forget(type(self.fs))


class _Requests(logging.Handler):
    """The server's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().partition('"')[2].partition('"')[0])


_KEPT: list[Any] = []


def _forget(kind: Any) -> None:
    """Have the next file system read the environment anew; the old ones live on, as they warn when they are deleted."""
    _KEPT.extend(kind._cache.values())
    kind.clear_instance_cache()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the requests that it gets."""
    from moto.server import ThreadedMotoServer

    handler, logger = _Requests(), logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}", handler.lines
    server.stop()
    logger.removeHandler(handler)


@pytest.fixture
def s3(s3_server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server, and this process's s3fs set up for it as a user's environment would."""
    import fsspec
    import s3fs

    url, requests = s3_server
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    _forget(s3fs.S3FileSystem)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    requests.clear()
    yield S3(fs, requests)
    fs.rm("bucket", recursive=True)
    _forget(s3fs.S3FileSystem)
