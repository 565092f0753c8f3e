"""A server of OpenAI's streaming interface that says what a test has written down; it also serves the chat page."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

MODELS = [
    {"id": "koala", "object": "model", "markers": ["good", "bad"], "context": 2048, "chat": True},
    {"id": "vicuna", "object": "model", "context": 4096, "chat": True},
    {"id": "base", "object": "model", "context": 512, "chat": False},
]
Step = str | float | bytes | dict | threading.Event  # words, seconds, raw bytes, a last chunk, wait for it


def finish(reason: str = "stop", tokens: int = 5) -> dict:
    details = {"cached_tokens": 20}
    usage = {"prompt_tokens": 35, "completion_tokens": tokens, "total_tokens": 35 + tokens}
    return {"finish_reason": reason, "usage": usage | {"prompt_tokens_details": details}}


class Scripted(ThreadingHTTPServer):
    """Answers as `plan(request)` says: an int and a dict are an HTTP error, steps are a stream. Keeps the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: Callable[[dict], tuple[int, dict] | Iterable[Step]] = lambda request: ["Hello", " there.", finish()]
        self.models: list[dict] = MODELS
        self.key = ""
        self.requests: list[dict] = []
        self.gone = threading.Event()  # a client went away in mid-stream

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, "text/html; charset=utf-8", (files("easylm_like.serve") / "page.html").read_bytes())
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            error = {"message": "Wrong API key.", "type": "invalid_request_error", "param": None, "code": "401"}
            self.reply(401, "application/json", json.dumps({"error": error}).encode())
        else:
            body = {"object": "list", "data": self.server.models}
            self.reply(200, "application/json", json.dumps(body).encode())

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        plan = self.server.plan(request)
        if isinstance(plan, tuple):
            self.reply(plan[0], "application/json", json.dumps(plan[1]).encode(), Retry_After="7")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for step in plan:
                self.play(step)
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def play(self, step: Step) -> None:
        match step:
            case float():
                time.sleep(step)
            case threading.Event():
                step.wait(30)
            case bytes():
                self.wfile.write(step)
            case str():
                self.chunk([{"index": 0, "delta": {"content": step}, "finish_reason": None}])
            case dict():
                self.chunk([{"index": 0, "delta": {}, "finish_reason": step["finish_reason"]}])
                self.chunk([], usage=step["usage"])
                self.wfile.write(b"data: [DONE]\n\n")

    def chunk(self, choices: list[dict], **more: object) -> None:
        event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **more}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
