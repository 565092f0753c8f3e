"""One line on stderr for each HTTP request, and its place in the metrics. Never a prompt, a key or a query."""

import sys
import time
from datetime import datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easylm_like.serve.metrics import Measures

GONE = 499  # nginx's number for a client that did not wait for the answer


class AccessLog:
    """Call `app`, and write down what it answered."""

    def __init__(self, app: ASGIApp, measures: Measures, paths: frozenset[str]) -> None:
        self._app = app
        self._measures = measures
        self._paths = paths  # others are counted as one, or anybody could fill the metrics with names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - began
            self._measures.statuses.labels(self._name(scope["path"]), str(status)).inc()
            address = scope["client"][0] if scope.get("client") else "-"
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")  # still encoded: one line, no tricks
            now = datetime.now().isoformat(" ", "seconds")
            print(f"{now} {address} {scope['method']} {path} {status} {seconds:.3f}s", file=sys.stderr, flush=True)

    def _name(self, path: str) -> str:
        return path if path in self._paths else "other"
