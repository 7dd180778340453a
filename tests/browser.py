"""A headless Chromium over its remote debugging pipe: one page, what it asked the network for, what it complained of.

`PATH` is searched for it; tests are skipped where there is none. Nothing but the standard library is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip


def find_browser() -> str | None:
    """The browser's command, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of the browser.

    Attributes:
        complaints: errors and warnings of the console, exceptions of scripts.
        requests: URLs that were asked for, but for those that hold their data.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._data, self._number = read, write, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(
            self._write, json.dumps({"id": self._number, "method": method, "params": params} | session).encode() + b"\0"
        )
        while (message := self._next()).get("id") != self._number:
            pass
        assert "error" not in message, message
        return dict(message["result"])

    def open(self, url: str, width: int, height: int) -> None:
        """Show a page in a window of this size, and wait until all of it is there."""
        self.complaints, self.requests, self._loaded = [], [], False
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self, height: int | None = None) -> bytes:
        """The page as a PNG, all of it or its first pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while b"\0" not in self._data:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser says nothing"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser ended"
            self._data += more
        first, _, self._data = self._data.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent" if not params["request"]["url"].startswith("data:"):
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(str(params["entry"]["text"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]["text"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
        return message


@contextmanager
def browser(command: str, profile: Path) -> Iterator[Page]:
    """A running browser with one empty page; `profile` is an empty folder of its own."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    line = 'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"'  # it talks on these two descriptors
    process = subprocess.Popen(
        ["bash", "-c", line, command, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        env={**os.environ, "IN": str(theirs_in), "OUT": str(theirs_out), "HOME": str(profile)},
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_in, ours_out)
    finally:
        os.close(ours_out)  # it ends when nobody talks to it any more
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_in)


def main(html: str, picture: str, width: str = "1280", height: str = "") -> None:
    """`python tests/browser.py PAGE.html OUT.png [WIDTH [HEIGHT]]`: how the README's picture is made."""
    command = find_browser()
    assert command, "no Chromium here: apt-get install chromium"
    with TemporaryDirectory() as profile, browser(command, Path(profile)) as page:
        page.open(Path(html).resolve().as_uri(), int(width), 844)
        Path(picture).write_bytes(page.screenshot(int(height) if height else None))


if __name__ == "__main__":
    main(*sys.argv[1:])
