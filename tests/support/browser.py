"""A headless Chromium, told what to do over its debugging pipe: JSON between NUL bytes.

The protocol is https://chromedevtools.github.io/devtools-protocol/; a pipe needs neither a driver
nor a WebSocket client.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
"""Debian's package, or Google's; None: neither is installed."""
SECONDS = 60
"""Silence after which a browser is given up."""

Ask = Callable[..., dict[str, Any]]


@dataclass
class Seen:
    """What a browser made of a page."""

    text: str
    requests: list[str]
    """Everything it asked for, the page itself first."""
    complaints: list[str] = field(default_factory=list)
    """What failed to load, what was logged as an error or warning, and what a script threw."""
    overflow: int = 0
    """Pixels by which the page is wider than its window."""
    wide: list[str] = field(default_factory=list)
    """Elements that stick out to the right, unless inside something that scrolls."""


class Browser:
    """One Chromium with a profile of its own; use as a context manager."""

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        mine_in, its_out = os.pipe()
        its_in, mine_out = os.pipe()
        # Above 9, so that giving them the numbers 3 and 4 overwrites neither.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_in, its_out)]
        os.close(its_in)
        os.close(its_out)
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}',
                "bash",
                str(CHROMIUM),
                "--headless=new",
                "--remote-debugging-pipe",
                f"--user-data-dir={self._profile.name}",
                "--no-sandbox",  # root, as in containers, has none; the pages are our own
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-extensions",
                "--disable-background-networking",
                "--no-first-run",
                "--hide-scrollbars",
            ],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self._in, self._out = mine_in, mine_out
        self._buffer = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # it ends when its pipe does
        os.close(self._in)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def open(
        self, page: Path, width: int, *, dark: bool = False, screenshot: str | None = None
    ) -> Seen:
        """Open a file in a window of `width` pixels; `screenshot`: the name to keep one under."""
        target, ask = self._load(page, width, dark)
        measure = _MEASURE.replace("WIDTH", str(width))
        answer = ask("Runtime.evaluate", expression=measure, returnByValue=True)
        found = json.loads(answer["result"]["value"])
        if screenshot is not None:
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            shot = ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            (SCREENSHOTS / f"{screenshot}.png").write_bytes(base64.b64decode(shot["data"]))
        ask("Runtime.evaluate", expression="0")  # whatever was logged has arrived before this
        events = list(self._events)
        self._ask("Target.closeTarget", targetId=target)
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == _REQUEST]
        return Seen(
            found["text"],
            [url for url in asked if not url.startswith("data:")],
            _complaints(events),
            found["width"] - width,
            found["wide"],
        )

    def tabbed(self, page: Path, presses: int) -> list[str]:
        """What has the focus after each press of Tab on a page, as "tag text"."""
        target, ask = self._load(page, 1400, dark=False)
        reached = []
        for _ in range(presses):
            for kind in ("rawKeyDown", "keyUp"):
                key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
                ask("Input.dispatchKeyEvent", type=kind, **key)
            answer = ask("Runtime.evaluate", expression=_FOCUSED, returnByValue=True)
            reached.append(answer["result"]["value"])
        self._ask("Target.closeTarget", targetId=target)
        return reached

    def _load(self, page: Path, width: int, dark: bool) -> tuple[str, Ask]:
        """A new tab with the page in it; events from its start on are kept."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        ask = partial(self._ask, session=session)
        for domain in ("Page", "Network", "Log", "Runtime"):
            ask(f"{domain}.enable")
        ask("Page.setLifecycleEventsEnabled", enabled=True)
        ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=2 if width < 600 else 1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        ask("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        loader = ask("Page.navigate", url=page.resolve().as_uri())["loaderId"]
        while not any(_loaded(event, loader) for event in self._events):
            self._events.append(self._read())
        return target, ask

    def _ask(self, method: str, session: str | None = None, **arguments: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number = self._number
        while (answer := self._read()).get("id") != number:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"chromium said nothing for {SECONDS} s, or ended")
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


_REQUEST = "Network.requestWillBeSent"

_MEASURE = """(() => {
  const wide = [...document.querySelectorAll('body *')].filter(element => {
    const scroller = element.parentElement.closest('.scroll, pre, svg, .skip');
    const skipped = element.closest('.skip') || scroller;
    return !skipped && element.getBoundingClientRect().right > WIDTH + 1;
  });
  const page = document.documentElement;
  return JSON.stringify({
    text: document.body.innerText,
    width: page.scrollWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 100)),
  });
})()"""

_FOCUSED = """(() => {
  const at = document.activeElement;
  const name = at.getAttribute('aria-label') || at.innerText;
  return at.tagName.toLowerCase() + ' ' + name.trim();
})()"""


def _loaded(event: dict[str, Any], loader: str) -> bool:
    given = event.get("params", {})
    return (given.get("name"), given.get("loaderId")) == ("load", loader)


def _complaints(events: list[dict[str, Any]]) -> list[str]:
    found = []
    for event in events:
        given = event.get("params", {})
        if event["method"] == "Network.loadingFailed":
            found.append(f"failed to load: {given['errorText']}")
        elif event["method"] == "Log.entryAdded" and given["entry"]["level"] != "verbose":
            found.append(f"logged: {given['entry']['text']}")
        elif event["method"] == "Runtime.exceptionThrown":
            found.append(f"threw: {given['exceptionDetails']['text']}")
        elif event["method"] == "Runtime.consoleAPICalled":
            found.append(f"console.{given['type']}: {given['args']}")
    return found
