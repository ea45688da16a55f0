"""Debian's chromium without a screen, spoken to over a pipe in its own protocol (CDP): what a page shows and says."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


# The protocol is on 3 and 4, whatever was there.
PIPES = """
import fcntl, os, sys
kept = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in zip((3, 4), kept):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def where() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser. `said` has the console's messages of every level, and exceptions; `asked` the addresses loaded."""

    def __init__(self, seconds: float = 900) -> None:
        self.seconds = seconds
        self.said: list[str] = []
        self.asked: list[str] = []
        self._number, self._rest = 0, b""

    def __enter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()

        program = where()
        assert program is not None
        starter = [sys.executable, "-S", "-c", PIPES, str(reads), str(writes)]
        self._process = subprocess.Popen(
            [*starter, program, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(reads, writes),
        )
        os.close(reads)
        os.close(writes)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> Any:
        """Ask, and wait for the answer; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._to, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], self.seconds)
            assert ready, f"the browser has not answered in {self.seconds} s: {self.said}"
            more = os.read(self._from, 1 << 20)
            assert more, "the browser is gone"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                text = " ".join(str(argument.get("value", argument.get("description"))) for argument in told["args"])
                self.said.append(f"{told['type']}: {text}")
            case "Runtime.exceptionThrown":
                self.said.append(f"exception: {told['exceptionDetails']}")
            case "Log.entryAdded":
                self.said.append(f"{told['entry']['level']}: {told['entry']['text']}")
            case "Network.requestWillBeSent":
                self.asked.append(told["request"]["url"])

    def look(self, width: int, dark: bool, height: int = 900) -> None:
        """How wide the window is, and what its owner prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path, until: str) -> None:
        """Load a file and wait until the expression is true there."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait(until)

    def wait(self, until: str) -> None:
        """Until the expression is true in the page."""
        deadline = time.monotonic() + self.seconds
        while not self.value(until):
            assert time.monotonic() < deadline, f"{until} did not come true: {self.said}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression is in the page, as JSON has it; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, as high as it is."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
