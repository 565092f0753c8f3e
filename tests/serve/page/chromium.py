"""Debian's Chromium, driven over the DevTools protocol on a pipe: no package, no port, no download.

The browser reads JSON that ends in a zero byte on file descriptor 3 and writes it on 4 (--remote-debugging-pipe).
https://chromedevtools.github.io/devtools-protocol/ describes the messages.
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,800 --remote-debugging-pipe"
).split()
CODES = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9, "\\": 220, ",": 188, "/": 191, "?": 191}


class Browser:
    """One page of a running Chromium. `errors` are what its console says, uncaught exceptions among it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb", 0)
        self.rest, self.numbers = b"", itertools.count(1)
        self.session: str | None = None
        self.events: list[dict] = []
        self.errors: list[str] = []
        self.new_page()

    def new_page(self) -> None:
        """Go on in a new tab with a storage of its own."""
        self.session = None
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.errors.clear()

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            chunk = self.from_browser.read(1 << 16)
            if not chunk:
                raise EOFError("Chromium closed the pipe")
            self.rest += chunk
        message, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(message)
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
            case "Runtime.exceptionThrown":
                detail = parameters["exceptionDetails"]
                self.errors.append(detail.get("exception", {}).get("description", detail["text"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        self.events.append(event)
        return event

    def call(self, method: str, **parameters: object) -> dict:
        number = next(self.numbers)
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": number, "method": method, "params": parameters, **session}
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != number:
            pass
        assert "error" not in reply, f"{method}: {reply}"
        return reply["result"]

    def open(self, address: str) -> None:
        self.events.clear()
        failed = self.call("Page.navigate", url=address).get("errorText")
        assert not failed, f"{address}: {failed}"
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.receive()

    def js(self, expression: str) -> object:
        """Return the value of a JavaScript expression; a promise is awaited, an exception is raised here."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"].get("exception", {}).get("description")
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> object:
        """Return the expression's value as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            shown = self.js("document.body.innerText") if time.monotonic() > end else None
            assert shown is None, f"{expression} stayed false; {self.errors}; {shown}"
            time.sleep(0.03)
        return value

    def click(self, element: str) -> None:
        """Click, as a mouse does, the middle of what a selector or a JavaScript expression in parentheses finds."""
        found = element if element.startswith("(") else f"document.querySelector({json.dumps(element)})"
        box = self.js(f"{found}.scrollIntoView({{block: 'nearest'}}), {found}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, control: bool = False, shift: bool = False) -> None:
        modifiers = 2 * control + 8 * shift
        code = CODES.get(key) or ord(key.upper())
        text = "" if control else "\r" if key == "Enter" else key if len(key) == 1 else ""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                modifiers=modifiers,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def running_chromium() -> Iterator[Browser | None]:
    """Start Chromium with an empty profile and end it; None where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        yield None
        return
    child_reads, to_browser = os.pipe()
    from_browser, child_writes = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(f"{profile}/log", "wb") as log:
        # bash puts the pipes on 3 and 4: a preexec_fn may deadlock in a process with threads, as jax's is
        script = f'exec "$@" 3<&{child_reads} 4>&{child_writes}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", found, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(child_reads, child_writes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": profile},
        )
        os.close(child_reads)
        os.close(child_writes)
        browser = Browser(to_browser, from_browser)
        try:
            yield browser
        finally:
            browser.to_browser.close()  # it exits by itself then
            browser.from_browser.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
