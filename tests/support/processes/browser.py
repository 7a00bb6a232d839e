"""Headless Chromium, driven over its DevTools protocol: what a page really does, without a driver in between."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.support import http

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str | None:
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Navigated(Exception):
    """The page went before it had answered."""


class Page:
    """One tab. `trouble` collects console errors, warnings and uncaught exceptions as they come."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.trouble: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=300))
            if message.get("id") == number:
                if "navigated" in message.get("error", {}).get("message", ""):
                    raise Navigated(method)
                assert "error" not in message, (method, message)
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.trouble.append(str(details.get("exception", {}).get("description", details["text"])))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.trouble.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.trouble.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, expression: str, is_right: Callable[[Any], bool] = bool, seconds: float = 60.0) -> Any:
        """Ask again until the value is right; returns it."""
        deadline = time.monotonic() + seconds
        while True:
            value = None
            # A question to a page that another one replaces meanwhile has no answer; the next page is asked then.
            with suppress(Navigated):
                if is_right(value := self.run(expression)):
                    return value
            assert time.monotonic() < deadline, f"{expression} stayed {value!r}; {self.trouble}"
            time.sleep(0.05)

    def press(self, text: str) -> None:
        """Type into what has the focus, replacing what is selected."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """With the mouse, where the element is: a covered or disabled one does not get it."""
        where = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            " found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browsing(chromium: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> Iterator[Page]:
    """Start a Chromium with a profile of its own; yields its one tab."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Root may not use the sandbox, and small containers have a small /dev/shm.
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
        ]
        where = [f"--user-data-dir={profile}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
        process = subprocess.Popen(
            [chromium, *flags, *where, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = _port(process, Path(profile) / "DevToolsActivePort")
            tabs = http.get(f"http://127.0.0.1:{port}/json/list").json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            with connect(address, max_size=None, max_queue=None, ping_interval=None, close_timeout=0.2) as socket:
                page = Page(socket)
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                page.call("Emulation.setEmulatedMedia", features=[scheme])
                size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
                page.call("Emulation.setDeviceMetricsOverride", **size)
                yield page
        finally:
            process.terminate()
            process.wait(timeout=300)


def _port(process: subprocess.Popen[bytes], told: Path) -> int:
    deadline = time.monotonic() + 300
    while not (told.exists() and "\n" in told.read_text()):
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        assert time.monotonic() < deadline, "Chromium did not open its DevTools port"
        time.sleep(0.05)
    return int(told.read_text().splitlines()[0])
