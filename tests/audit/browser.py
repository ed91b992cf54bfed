"""A headless browser that a page is opened in: Chromium, spoken to by its DevTools protocol.

The protocol goes through two pipes (`--remote-debugging-pipe`), so no port and no library is needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = "chromium", "chromium-browser", "google-chrome", "chrome"
TIME_LIMIT = 60  # seconds
ABOVE_STANDARD = 10  # file descriptors that the child's 3 and 4 are made from


def chromium() -> str | None:
    """The program, if it is there."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Opened:
    """What one page did in the browser, and what it looks like."""

    def __init__(self, browser: _Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.requests: list[str] = []
        self.messages: list[str] = []

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, for this page."""
        return self._browser.call(method, parameters, self._session)

    def note(self, event: dict[str, Any]) -> None:
        """An event of the page: requests and whatever would stand in its console."""
        parameters = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Log.entryAdded":
                self.messages.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.messages.append(json.dumps(parameters))

    def open(self, address: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self._browser.wait_for("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def at_width(self, pixels: int, *, dark: bool = False) -> None:
        """As a window or a screen of that width shows it."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=pixels,
            height=900,
            deviceScaleFactor=1,
            mobile=pixels < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def views(self) -> Iterator[None]:
        """On a phone and on a desk, light and dark: in each nothing stands out of the window."""
        for width in (390, 1280):
            for dark in (False, True):
                self.at_width(width, dark=dark)
                assert self.evaluate("innerWidth") == width
                shown = self.evaluate("document.documentElement.clientWidth")
                assert self.evaluate("document.documentElement.scrollWidth") == shown
                yield

    def screenshot(self, file: Path, *, top: int = 0, height: int = 2400) -> None:
        """A picture of a part of the page."""
        width = self.evaluate("document.documentElement.clientWidth")
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        found = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, file: Path) -> None:
        """The page as it is printed."""
        found = self.call("Page.printToPDF", preferCSSPageSize=True)
        file.write_bytes(base64.b64decode(found["data"]))


class _Browser:
    def __init__(self, process: subprocess.Popen[bytes], to_it: int, from_it: int) -> None:
        self._process, self._to_it, self._from_it = process, to_it, from_it
        self._number, self._read = 0, b""
        self.page: Opened | None = None

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to_it, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def wait_for(self, method: str) -> None:
        while self._next().get("method") != method:
            pass

    def _next(self) -> dict[str, Any]:
        """The next message; an event of the page is noted."""
        deadline = time.monotonic() + TIME_LIMIT
        while b"\0" not in self._read:
            part = os.read(self._from_it, 1 << 20)
            assert part, f"the browser ended with code {self._process.wait()}"
            assert time.monotonic() < deadline
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if self.page is not None and "method" in found:
            self.page.note(found)
        return found


@contextmanager
def opened(address: str, folder: Path) -> Iterator[Opened]:
    """The page at an address, loaded; folder: for what the browser keeps."""
    program = chromium()
    assert program is not None
    command_end, to_it = os.pipe()
    from_it, answer_end = os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, ABOVE_STANDARD) for end in (command_end, answer_end)]
    process = subprocess.Popen(
        [
            *("bash", "-c", f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}', program),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"),
        ],
        pass_fds=theirs,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (*theirs, command_end, answer_end):
        os.close(end)
    browser = _Browser(process, to_it, from_it)
    try:
        target = browser.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = browser.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = browser.page = Opened(browser, attached["sessionId"])
        for domain in ("Page", "Network", "Log", "Runtime"):
            page.call(f"{domain}.enable")
        page.open(address)
        yield page
        browser.call("Browser.close", {})
        process.wait(TIME_LIMIT)
    finally:
        process.kill()
        process.wait()
        os.close(to_it)
        os.close(from_it)
