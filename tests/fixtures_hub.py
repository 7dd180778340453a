"""A stand-in for the hub: the endpoints that huggingface_hub uses for models, on a local port.

It can ask for tokens, cut transfers off, hold them up, and remembers every request. `hub` points this process at it,
`hub_env` a child process.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

GOOD_TOKEN = "hf_good"
WEAK_TOKEN = "hf_weak"


def safetensors(tensors: dict[str, list[int]], dtype: str = "BF16", fill: int = 7) -> bytes:
    """The bytes of a well-formed safetensors file with these tensor shapes."""
    width = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = width
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes([fill]) * end


def model_files(architecture: str = "LlamaForCausalLM", *, rows: int = 64, fill: int = 7) -> dict[str, bytes]:
    """What a small repository holds: the files that are wanted, and the copies that are not."""
    config = {"architectures": [architecture], "model_type": "llama", "max_position_embeddings": 128}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"eos_token_id": 2}',
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "model.safetensors": safetensors({"model.embed_tokens.weight": [rows, 64]}, fill=fill),
        "pytorch_model.bin": b"pickle" * 100,
        "consolidated.safetensors": b"again" * 100,
        "original/consolidated.00.pth": b"meta" * 100,
        "onnx/model.onnx": b"onnx" * 100,
        "model-q4.gguf": b"GGUF" * 100,
        "README.md": b"# a model",
    }


@dataclass
class Repo:
    """One repository; `revisions` maps a branch or tag to its files, each of which is a commit."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False

    @staticmethod
    def commit(files: dict[str, bytes]) -> str:
        listing = "".join(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(files.items()))
        return hashlib.sha1(listing.encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for name, files in self.revisions.items():
            if revision in (name, self.commit(files)):
                return self.commit(files), files
        return None


@dataclass
class Hub:
    """The server's state, which a test sets and reads.

    Attributes:
        repos: "org/name" -> repository.
        url: where it listens.
        cut_at: at this offset of a large file the connection is dropped, however often it is asked for again.
        hold: set to an unset Event, large files wait for it after `hold_after` bytes.
        status: answer everything with this status instead.
        requests: (method, path, Range header) of all requests so far.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    url: str = ""
    cut_at: int | None = None
    hold: threading.Event | None = None
    hold_after: int = 0
    status: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes] | None = None, **kwargs: Any) -> Repo:
        self.repos[name] = Repo({"main": model_files() if files is None else files}, **kwargs)
        return self.repos[name]

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [path.split("/resolve/")[1].partition("/")[2] for method, path, _ in self.requests if method == "GET"
                and "/resolve/" in path]  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Tests look at `Hub.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            self._error(self.hub.status)
            return
        if path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
            return
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        self._file(name, *rest.split("/", 1))

    def _token(self) -> str | None:
        value = self.headers.get("Authorization")
        return value.removeprefix("Bearer ") if value else None

    def _error(self, status: int, code: str | None = None, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message or f"error {status}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if self._token() not in (None, GOOD_TOKEN, WEAK_TOKEN):
            self._error(401, message="Invalid credentials in Authorization header")
            return None
        if name not in self.hub.repos:
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return None
        found = self.hub.repos[name].at(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _api(self, rest: str) -> None:
        parts = rest.split("/")
        name, what, revision = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "", "/".join(parts[3:]) or "main"
        found = self._find(name, revision)
        if found is None:
            return
        commit, files = found
        if what == "tree":
            self._json([self._entry(path, data, "path") | {"type": "file"} for path, data in files.items()])
        else:
            siblings = [self._entry(path, data, "rfilename") for path, data in files.items()]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    def _entry(self, path: str, data: bytes, key: str) -> dict[str, Any]:
        entry: dict[str, Any] = {key: path, "size": len(data)}
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry["oid" if key == "path" else "blobId"] = oid
        if self._is_large(path, data):
            sha = hashlib.sha256(data).hexdigest()
            hashed = {"oid": sha} if key == "path" else {"sha256": sha}
            entry["lfs"] = {**hashed, "size": len(data), "pointerSize": 130}
        return entry

    def _is_large(self, path: str, data: bytes) -> bool:
        return _is_large(path)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        if self.hub.repos[name].gated and self._token() != GOOD_TOKEN:
            status, message = (403, "not in the authorized list") if self._token() else (401, "Access is restricted")
            self._error(status, "GatedRepo", f"{message}. Visit the page to ask for access.")
            return
        commit, files = found
        if path not in files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data = files[path]
        requested = self.headers.get("Range")
        first, _, last = (requested or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
        self.send_response(206 if requested else 200)
        if requested:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("ETag", f'"{_etag(path, data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self._send(path, data[:stop], start)

    def _send(self, path: str, data: bytes, start: int) -> None:
        hub, end = self.hub, len(data)
        if hub.hold is not None and _is_large(path):
            self.wfile.write(data[start : start + hub.hold_after])
            self.wfile.flush()
            hub.hold.wait(30)
            start += hub.hold_after
        if hub.cut_at is not None and _is_large(path):
            end = max(start, hub.cut_at)
        self.wfile.write(data[start:end])
        self.wfile.flush()
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(2)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is part of the tests."""


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".gguf", ".pth"))


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(path) else hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub_server() -> Iterator[Hub]:
    """A running stand-in that nothing points at yet."""
    hub = Hub()
    with serving(_Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))) as hub.url:
        yield hub
        if hub.hold is not None:
            hub.hold.set()


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Runs a server in a thread, and gives its address."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(hub_server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, with this process's huggingface_hub talking to it, an empty cache and no token."""
    point_at(hub_server.url, monkeypatch)
    no_account(tmp_path, monkeypatch)
    return hub_server


def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give huggingface_hub of this process an empty cache, no token, and the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub of this process, which read HF_ENDPOINT when it was imported, talk to `url`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub_env(hub_server: Hub, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A function that gives the environment for a child process that talks to the stand-in."""
    import os

    def env(**more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TEAL_"))}
        ours = {
            "HF_ENDPOINT": hub_server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # also where a caller merges this over an environment that says otherwise
            "TEAL_HOME": str(tmp_path / "teal-home"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
        }
        return kept | ours | more

    return env
