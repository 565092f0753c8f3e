"""OpenAI's HTTP interface over one or several engines, as an ASGI application.

    GET  /v1/models, /v1/models/NAME      POST /v1/chat/completions, /v1/completions      (all of it also without /v1)
    GET  /health, /ready, /metrics        GET  /   a page to chat on

Every error has OpenAI's shape. What runs for a client that has gone is cancelled at once.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from easylm_like.serve.access import AccessLog
from easylm_like.serve.asked import Defaults, chat_requests, completion_requests
from easylm_like.serve.chat import can_chat, markers
from easylm_like.serve.engine import Engine
from easylm_like.serve.failures import ApiError, Json, turned_away
from easylm_like.serve.limits import ApiKeys, BodyLimits, ClientGone, read_body
from easylm_like.serve.metrics import Measures
from easylm_like.serve.protocol import ChatBody, CompletionBody, read_request
from easylm_like.serve.reply import Answer, send_answer
from easylm_like.serve.request import Closing
from easylm_like.serve.wire import Reply, chat_form, text_form

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"


class State(Enum):
    """What a server is doing."""

    LOADING = "the models are still being loaded"
    SERVING = "serving"
    DRAINING = "the server is shutting down"


@dataclass(slots=True, kw_only=True)
class Service:
    """The models that are served, by name, and how. Its state may be changed from another thread."""

    engines: dict[str, Engine] = field(default_factory=dict)
    state: State = State.LOADING
    defaults: Defaults = field(default_factory=Defaults)
    limits: BodyLimits = field(default_factory=BodyLimits)
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # of web pages elsewhere that may call this server
    started: int = field(default_factory=lambda: int(time.time()))

    def check_open(self) -> None:
        """Raise ApiError (503) unless requests are taken."""
        if self.state is not State.SERVING:
            raise turned_away(Closing(self.state.value))

    def engine(self, name: str) -> Engine:
        """Return the engine of a model; ApiError (404) if there is none."""
        engine = self.engines.get(name)
        if engine is None:
            known = ", ".join(self.engines)
            raise ApiError(404, f"no model {name[:80]!r} here; there is {known}", code="model_not_found", param="model")
        return engine


def build_app(service: Service) -> ASGIApp:
    """Return the application that speaks for `service`."""
    measures = Measures(service.engines)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(measures.text(), media_type=METRICS_TYPE)

    routes = [
        Route("/", _page),
        Route("/health", _Get(service, _health).answer),
        Route("/ready", _Get(service, _ready).answer),
        Route("/metrics", metrics),
    ]
    for prefix in ("/v1", ""):
        routes += [
            Route(f"{prefix}/models", _Get(service, _models).answer),
            Route(prefix + "/models/{name:path}", _Get(service, _model).answer),
            Route(f"{prefix}/chat/completions", _Post(service, measures, _read_chat), methods=["POST"]),
            Route(f"{prefix}/completions", _Post(service, measures, _read_completion), methods=["POST"]),
        ]
    inner = Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _defect},
    )
    inner.router.redirect_slashes = False
    app: ASGIApp = ApiKeys(inner, service.keys)
    if service.origins:
        app = CORSMiddleware(app, allow_origins=service.origins, allow_methods=["*"], allow_headers=["*"])
    return AccessLog(app, measures, frozenset(route.path for route in routes))


Reader = Callable[[Service, bytes], tuple[Engine, Reply, ChatBody | CompletionBody]]


class _Post:
    """An endpoint that answers with what an engine writes."""

    def __init__(self, service: Service, measures: Measures, read: Reader) -> None:
        self._service = service
        self._measures = measures
        self._read = read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        self._service.check_open()
        try:
            content = await read_body(scope, receive, self._service.limits)
            engine, reply, body = await asyncio.to_thread(self._read, self._service, content)
            answer = Answer(
                engine=engine,
                reply=reply,
                stream=body.stream,
                with_usage=body.stream_options.include_usage,
                timeout=self._service.defaults.timeout,
                measures=self._measures,
                began=began,
            )
            await send_answer(answer, receive, send)
        except ClientGone:
            return


def _read_chat(service: Service, content: bytes) -> tuple[Engine, Reply, ChatBody]:
    body = read_request(ChatBody, content)
    engine = service.engine(body.model)
    asked = chat_requests(engine, engine.context, body, service.defaults)
    return engine, Reply(chat_form(engine.tokenizer, engine.stop_ids, asked), body.model, asked), body


def _read_completion(service: Service, content: bytes) -> tuple[Engine, Reply, CompletionBody]:
    body = read_request(CompletionBody, content)
    engine = service.engine(body.model)
    asked = completion_requests(engine, engine.context, body, service.defaults)
    return engine, Reply(text_form(engine.tokenizer, asked), body.model, asked), body


class _Get:
    """An endpoint that answers with a JSON object."""

    def __init__(self, service: Service, tell: Callable[[Service, Request], Json]) -> None:
        self._service = service
        self._tell = tell

    async def answer(self, request: Request) -> Response:
        return JSONResponse(self._tell(self._service, request))


async def _page(_: Request) -> Response:
    return HTMLResponse((files("easylm_like.serve") / "page.html").read_text("utf-8"), headers=PAGE_HEADERS)


def _health(service: Service, _: Request) -> Json:
    dead = [name for name, engine in service.engines.items() if not engine.alive]
    if dead:
        raise ApiError(503, f"the engine of {', '.join(dead)} has died: restart the server", code="engine_died")
    return {"status": "ok"}


def _ready(service: Service, request: Request) -> Json:
    service.check_open()
    waiting = [name for name, engine in service.engines.items() if not engine.ready]
    if waiting:
        raise turned_away(Closing(f"{', '.join(waiting)} is not ready yet"))
    return _health(service, request)


def _models(service: Service, _: Request) -> Json:
    return {"object": "list", "data": [_described(service, name) for name in list(service.engines)]}


def _model(service: Service, request: Request) -> Json:
    name = str(request.path_params["name"])
    service.engine(name)
    return _described(service, name)


def _described(service: Service, name: str) -> Json:
    """Return OpenAI's fields of a model, vLLM's for its context, and what our page wants to know."""
    engine = service.engines[name]
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "easylm_like",
        "max_model_len": engine.context,
        "chat": can_chat(engine),
        "markers": list(markers(engine)),
    }


def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    sentence = {404: f"there is no {what} here", 405: f"{what} is not possible"}.get(error.status_code, error.detail)
    return _api_error(request, ApiError(error.status_code, sentence, headers=error.headers))


def _defect(request: Request, error: Exception) -> Response:
    """Answer for a defect of ours; starlette raises it again, so that the server's log has the traceback."""
    sentence = f"the server has a defect ({type(error).__name__}); its log has the details"
    return _api_error(request, ApiError(500, sentence))
