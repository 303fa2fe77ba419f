"""A headless Chromium, driven over its own debugging protocol; needs no package but Jupyter's."""

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")

OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # a container's root has none; only our own pages are opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves the machine
)


class Page:
    """One tab: what it was told, and what it said (console errors, addresses it asked for)."""

    def __init__(self, address: str):
        """Attach to the tab whose debugging address is given."""
        import websocket  # jupyter_server brings it

        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=300)
        self.ids = itertools.count(1)
        self.errors, self.requests = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method: str, **parameters) -> dict:
        """Send a command and wait for its answer, noting the events in between."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (said := json.loads(self.socket.recv())).get("id") != number:
            self._note(said["method"], said["params"])
        assert "error" not in said, f"{method}: {said['error']}"
        return said["result"]

    def _note(self, event: str, what: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"].get("exception", what))
        elif event == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(what["entry"])
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "assert"):
            self.errors.append(what["args"])

    def js(self, expression: str):
        """The value of an expression in the page; a promise is waited for."""
        options = {"awaitPromise": True, "returnByValue": True}
        said = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, expression: str, seconds: float = 30):
        """The expression's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"still not true after {seconds} s: {expression}"
            time.sleep(0.1)
        return value

    def open(self, address: str) -> None:
        """Load an address and wait until everything in it is there."""
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Look at the page through a window of this size, below 600 pixels a phone's."""
        options = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **options)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Keep a picture of the page, the whole of it or what the window shows."""
        path.parent.mkdir(parents=True, exist_ok=True)
        said = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(said["data"]))


@contextmanager
def browser(profile: Path):
    """A page of a Chromium of its own, which keeps what it must in the folder ``profile``."""
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    try:
        yield Page(_tab(profile / "DevToolsActivePort"))
    finally:
        stop(process)


def stop(process: subprocess.Popen, seconds: float = 30) -> None:
    """End a process that was started here: asked to first, then without asking."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tab(file: Path, seconds: float = 60) -> str:
    """The debugging address of the first tab, once Chromium has written its port to the file."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and (lines := file.read_text(encoding="utf-8").split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise TimeoutError(f"Chromium did not start within {seconds} s")
