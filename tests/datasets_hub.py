"""The stand-in hub of `fixtures_hub`, with what `datasets` asks of it besides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from fixtures_hub import Hub, Repo, _Handler, _Server, serving


class _DatasetsHandler(_Handler):
    """Datasets live under their own prefix; otherwise they are repositories like any other."""

    def _answer(self) -> None:
        path, _, _ = self.path.partition("?")
        in_folder = "/tree/" in path and path.count("/") > path[: path.index("/tree/")].count("/") + 2
        if in_folder or not (path.startswith("/api/datasets/") or "/resolve/" in path):
            return self._error(404, "EntryNotFound", "Nothing is served there; the repositories have no folders.")
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
        return super()._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.removeprefix("/api/datasets/")
        name, _, rest = path.partition("/paths-info/")
        found = self._find(name, rest)
        if found is not None:
            paths = json.loads(body)["paths"]
            files = found[1]
            self._json([self._entry(p, files[p], "path") | {"type": "file"} for p in paths if p in files])

    def _api(self, rest: str) -> None:
        name = "/".join(rest.split("/")[:2])
        repo: Repo | None = self.hub.repos.get(name)
        if repo is not None and repo.gated and self._token() is None:
            return self._error(401, "GatedRepo", "Access is restricted.")
        return super()._api(rest)


@contextmanager
def datasets_hub(hub: Hub) -> Iterator[str]:
    """Serve the repositories of `hub` as datasets; gives the address."""
    with serving(_Server(("127.0.0.1", 0), type("Handler", (_DatasetsHandler,), {"hub": hub}))) as url:
        yield url
