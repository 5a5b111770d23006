"""Headless Chromium, steered through a pipe by its DevTools protocol, and the static server that pages come from."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 120
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FREE = 10  # file descriptors below are for the browser's own ends
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions")


def installed() -> str | None:
    """The browser of this machine."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab, and the workers it starts.

    Attributes:
        requests: every address that was asked for.
        received: bytes that came over the network.
        complaints: errors of the console, exceptions that nobody caught, requests that failed.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.requests: list[str] = []
        self.received = 0
        self.complaints: list[str] = []

    def send(self, method: str, **options: Any) -> dict[str, Any]:
        """Send a command of this tab, and wait for its answer."""
        return self._browser.send(method, self._session, **options)

    def open(self, address: str) -> None:
        """Go to an address."""
        self.send("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an async function's body."""
        found = self.send(
            "Runtime.evaluate", expression=f"(async () => {{{script}}})()", awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"]["exception"].get("description", found))
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        self.run(f"""
            const end = performance.now() + {SECONDS * 1000};
            while (!({condition})) {{
                if (performance.now() > end) throw new Error("never came true: " + {json.dumps(condition)}
                    + "; " + document.body.innerText);
                await new Promise((resolve) => setTimeout(resolve, 20));
            }}""")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            told = {"type": kind, "key": key, "windowsVirtualKeyCode": code}
            self.send("Input.dispatchKeyEvent", **told, **({"text": text} if text and kind == "keyDown" else {}))

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        """Give the window a size in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def picture(self, path: Path) -> None:
        """A screenshot, as PNG."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


class Browser:
    """A running browser with a profile of its own."""

    def __init__(self, program: str, *flags: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, _FREE) for end in (theirs_in, theirs_out)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [program, *_FLAGS, *flags, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (*ends, theirs_in, theirs_out):
            os.close(end)
        self._out, self._in = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb", buffering=0)
        self._lock = threading.Lock()
        self._next = 0
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, method: str, session: str | None = None, **options: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._post(method, session, options, answers)
        answer = answers.get(timeout=SECONDS + 10)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def page(self) -> Page:
        """A new tab in a store of its own, as of somebody who has never been there."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        page.send("Page.enable")
        self._listen(session)
        return page

    def close(self) -> None:
        """End the browser and all that it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(SECONDS)
        self._out.close()
        self._in.close()
        self._profile.cleanup()

    def _listen(self, session: str) -> None:
        for method in ("Runtime.enable", "Log.enable", "Network.enable"):
            self._post(method, session, {})
        told = {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}
        self._post("Target.setAutoAttach", session, told)

    def _post(
        self,
        method: str,
        session: str | None,
        options: dict[str, Any],
        answers: queue.Queue[dict[str, Any]] | None = None,
    ) -> None:
        with self._lock:
            self._next += 1
            message: dict[str, Any] = {"id": self._next, "method": method, "params": options}
            if answers is not None:
                self._answers[self._next] = answers
            if session is not None:
                message["sessionId"] = session
            self._out.write(json.dumps(message).encode() + b"\0")

    def _read(self) -> None:
        rest = b""
        while chunk := self._in.read(1 << 20):
            *whole, rest = (rest + chunk).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if "id" in message:
                    answers = self._answers.pop(message["id"], None)
                    if answers is not None:
                        answers.put(message)
                else:
                    self._happened(message["method"], message["params"], message.get("sessionId", ""))

    def _happened(self, event: str, told: dict[str, Any], session: str) -> None:
        page = self._pages.get(session)
        if page is None:
            return
        if event == "Target.attachedToTarget":
            worker = told["sessionId"]
            self._pages[worker] = page
            self._listen(worker)
            self._post("Runtime.runIfWaitingForDebugger", worker, {})
        elif event == "Network.requestWillBeSent":
            page.requests.append(told["request"]["url"])
        elif event == "Network.loadingFinished":
            page.received += int(told["encodedDataLength"])
        elif event == "Network.loadingFailed" and not told.get("canceled"):
            page.complaints.append(f"a request failed: {told['errorText']}")
        elif event == "Runtime.exceptionThrown":
            page.complaints.append(json.dumps(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            page.complaints.append(json.dumps(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] == "error":
            page.complaints.append(json.dumps(told["entry"]))


@contextmanager
def opened(*flags: str) -> Iterator[Browser]:
    """A browser.

    Raises:
        FileNotFoundError: none is installed.
    """
    program = installed()
    if program is None:
        raise FileNotFoundError(f"none of {', '.join(_NAMES)} is installed")
    browser = Browser(program, *flags)
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, from Python's own static server."""
    words = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        said = server.stdout.readline() if server.stdout is not None else ""
        port = re.search(r"port (\d+)", said)
        try:
            if port is None:
                raise AssertionError(f"the server says: {said!r}")
            yield f"http://127.0.0.1:{port.group(1)}/"
        finally:
            server.terminate()
