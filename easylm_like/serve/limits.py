"""What a client may do before anything is computed for it: how large and how slow a body is, and who asks."""

import asyncio
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from easylm_like.errors import UserError
from easylm_like.serve.failures import ApiError

KEYS_VARIABLE = "EASYLM_LIKE_API_KEYS"
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics"})  # for probes, scrapers, and the page that asks for a key
LINGER = 4  # how many times the largest body is read and thrown away, so that its sender hears why


class ClientGone(Exception):
    """The client closed its connection: nobody waits for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyLimits:
    """The largest body, in bytes, and the longest time that it may take to arrive, in seconds."""

    most_bytes: int = 8 << 20
    most_seconds: float = 30.0


async def read_body(scope: Scope, receive: Receive, limits: BodyLimits) -> bytes:
    """Return a request's JSON, still encoded.

    Raises:
        ApiError: 415 (not declared as JSON, which also keeps other sites' forms out), 413 or 408.
        ClientGone: it went away before the body was complete.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "")
    if kind.split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {kind or 'none'}")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, f"Content-Encoding must be identity, got {headers['content-encoding']}")
    length = headers.get("content-length", "0")
    if int(length) > LINGER * limits.most_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.most_seconds):
            return await _read(receive, limits)
    except TimeoutError:
        raise ApiError(
            408, f"the body must arrive within {limits.most_seconds:g} seconds", headers={"Connection": "close"}
        ) from None


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed its connection, or has its whole answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Receive, limits: BodyLimits) -> bytes:
    body, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size <= limits.most_bytes:
            body.append(part)
        elif size > LINGER * limits.most_bytes:
            break
    if size > limits.most_bytes:
        raise _too_large(limits)
    return b"".join(body)


def _too_large(limits: BodyLimits) -> ApiError:
    sentence = f"the body must be at most {limits.most_bytes} bytes"
    return ApiError(413, sentence, code="request_too_large", headers={"Connection": "close"})


class ApiKeys:
    """Let requests through to `app` that carry one of the keys, and those to the paths that need none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or call the app."""
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._known(given.strip()):
                sentence = "no API key was given" if not given else "this API key is not known here"
                error = ApiError(401, f"{sentence}: send Authorization: Bearer KEY", code="invalid_api_key")
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(error.body(), error.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _known(self, given: str) -> bool:
        """Compare with every key, in a time that tells nothing about them."""
        sent = given.encode("latin-1", "replace")
        return sum([hmac.compare_digest(sent, key) for key in self._keys]) > 0


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the API keys of a file, one a line, `#` before a comment; without one, those of EASYLM_LIKE_API_KEYS.

    Raises:
        UserError: the file cannot be read or holds no key, or a key cannot stand in a header.
    """
    if file is None:
        text, where = environment.get(KEYS_VARIABLE, "").replace(",", "\n"), KEYS_VARIABLE
    else:
        where = str(file)
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: the API keys cannot be read ({error})") from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    if file is not None and not keys:
        raise UserError(f"{file}: no API key there; write one a line")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UserError(f"{where}: an API key must be printable ASCII without spaces")
    return keys
