"""The stand-in hub of `fixtures_hub`, with what huggingface_hub asks of it to make and fill a dataset."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from fixtures_hub import GOOD_TOKEN, Hub, Repo, _Handler, _Server, serving


class UploadHub(Hub):
    """The state of the hub, and what it was sent.

    Attributes:
        large: sha256 -> bytes of what was sent to LFS, committed or not.
        refuse_after: after so many uploads to LFS the server hangs up.
        alter: flips a bit of what it is sent.
        uploads: sha256 of each upload, in order. commits: files of each commit, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.large: dict[str, bytes] = {}
        self.refuse_after: int | None = None
        self.alter = False
        self.uploads: list[str] = []
        self.commits: list[list[str]] = []


class _UploadHandler(_Handler):
    hub: UploadHub

    def _answer(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        super()._answer()

    def _is_large(self, path: str, data: bytes) -> bool:
        return b"\0" in data[:512]

    def _api(self, rest: str) -> None:
        """Of a folder, what is right in it; of all else, as for models."""
        name, tree, place = rest.partition("/tree/")
        revision, _, folder = place.partition("/")
        if not tree or "recursive=true" in self.path.lower():
            super()._api(rest)
        elif (found := self._find(name, revision)) is not None:
            _, files = found
            inside = {
                path.removeprefix(f"{folder}/"): path for path in files if path.startswith(f"{folder}/") or not folder
            }
            entries = [
                self._entry(path, files[path], "path") | {"type": "file"} for n, path in inside.items() if "/" not in n
            ]
            folders = {n.partition("/")[0] for n in inside if "/" in n}
            entries += [_folder(f"{folder}/{n}".strip("/")) for n in sorted(folders)]
            if entries:
                self._json(entries)
            else:
                self._error(404, "EntryNotFound", f"{folder} does not exist")

    def do_PUT(self) -> None:
        data, oid = self._body(), self.path.removeprefix("/lfs/")
        self.hub.requests.append(("PUT", self.path, None))
        if self.hub.refuse_after is not None and len(self.hub.uploads) >= self.hub.refuse_after:
            self._error(403, message="no more")
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.uploads.append(oid)
        self.hub.large[oid] = data[:-1] + bytes([data[-1] ^ 1]) if self.hub.alter else data
        self._json({})

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.hub.requests.append(("POST", path, None))
        if self.hub.status is not None:
            self._error(self.hub.status)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self._token() is None:
            self._error(401, message="Invalid username or password.")
        elif self._token() != GOOD_TOKEN:
            self._error(403, message="You don't have the rights to create a dataset under this namespace")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.hub.repos[name] = Repo({"main": {".gitattributes": b"*.zip filter=lfs\n"}})
            self._json({"url": f"{self.hub.url}/datasets/{name}"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        else:
            name, _, rest = path.removeprefix("/api/datasets/").partition("/preupload/")
            if rest:
                self._preupload(name, json.loads(body)["files"])
            elif "/paths-info/" in path:
                self._paths(*name.split("/paths-info/"), json.loads(body)["paths"])
            else:
                self._commit(name.partition("/commit/")[0], body)

    def _body(self) -> bytes:
        if (length := self.headers.get("Content-Length")) is not None:
            return self.rfile.read(int(length))
        data = b""  # in chunks, as a file is sent
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _preupload(self, name: str, files: list[dict[str, Any]]) -> None:
        there = self.hub.repos[name].revisions["main"]
        self._json({"files": [self._mode(file, there.get(file["path"])) for file in files]})

    def _mode(self, file: dict[str, Any], there: bytes | None) -> dict[str, Any]:
        large = self._is_large(file["path"], base64.b64decode(file["sample"]))
        found = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if there is not None:
            found["oid"] = hashlib.sha256(there).hexdigest() if large else _blob(there)
        return found

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for item in objects:
            there = item["oid"] in self.hub.large
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            answers.append({"oid": item["oid"], "size": item["size"], **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": answers})

    def _paths(self, name: str, revision: str, paths: list[str]) -> None:
        found = self._find(name, revision)
        if found is not None:
            _, files = found
            entries = [self._entry(p, files[p], "path") | {"type": "file"} for p in paths if p in files]
            folders = [p for p in paths if any(file.startswith(f"{p}/") for file in files)]
            self._json(entries + [_folder(p) for p in folders])

    def _commit(self, name: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.revisions["main"])
        head, *operations = (json.loads(line) for line in body.splitlines())
        if head["value"].get("parentCommit") not in (None, Repo.commit(files)):
            self._error(412, message="The branch was changed")
            return
        for operation in operations:
            value, path = operation["value"], operation["value"]["path"]
            if operation["key"] == "deletedFile":
                del files[path]
            elif operation["key"] == "lfsFile":
                files[path] = self.hub.large[value["oid"]]
            else:
                files[path] = base64.b64decode(value["content"])
        self.hub.commits.append([operation["value"]["path"] for operation in operations])
        repo.revisions["main"] = files
        commit = Repo.commit(files)
        self._json({"commitUrl": f"{self.hub.url}/datasets/{name}/commit/{commit}", "commitOid": commit})


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """A running hub that takes datasets."""
    hub = UploadHub()
    with serving(_Server(("127.0.0.1", 0), type("Handler", (_UploadHandler,), {"hub": hub}))) as hub.url:
        yield hub
