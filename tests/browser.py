"""A headless Chromium for tests, driven through its own protocol over two pipes; needs no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""None where no browser is installed."""


@dataclass
class Page:
    """What loading a page did, and the page itself."""

    browser: Browser
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which must be one that JSON can write."""
        done = self.browser.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and let go of a key; ``text`` is what it types."""
        typed = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        for event in (typed, {"type": "keyUp"}):
            self.browser.send("Input.dispatchKeyEvent", **event, key=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.browser.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


class Browser:
    """One browser with one tab, as a context."""

    def __enter__(self) -> Browser:
        assert EXECUTABLE is not None
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        # The protocol's pipes are 3 and 4 by definition; the shell puts ours there.
        line = f'exec "$@" 3<&{commands} 4>&{answers}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={self._profile.name}", "--no-first-run", "--disable-dev-shm-usage", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", EXECUTABLE, *flags],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[dict[str, Any]] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(item["targetId"] for item in targets if item["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = ""
            self.send("Browser.close")
        os.close(self._commands)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and wait for what it returns."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._events.append(answer)
        raise AssertionError("the browser has gone")

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" in self._buffer:
                message, _, self._buffer = self._buffer.partition(b"\0")
                yield json.loads(message)
            read = os.read(self._answers, 1 << 20)
            if not read:
                return
            self._buffer += read

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False, media: str = "screen") -> Page:
        """Load a file at a width in pixels; what it logs and asks for is in the page that is returned."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self._events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        seen = 0
        while not any(event["method"] == "Page.loadEventFired" for event in self._events[seen:]):
            seen = len(self._events)
            self._events.append(next(self._messages()))
        self.send("Runtime.evaluate", expression="document.fonts.ready", awaitPromise=True)
        page = Page(self)
        for event in self._events:
            details = event.get("params", {})
            if event["method"] == "Network.requestWillBeSent":
                page.requests.append(details["request"]["url"])
            elif event["method"] == "Log.entryAdded":
                page.console.append(details["entry"]["text"])
            elif event["method"] in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown"}:
                page.console.append(json.dumps(details))
        return page
