"""The clients of benchmarks/serve_soak.py: requests whose answers are known, and everybody who does not behave."""

import asyncio
import json
import random
import socket
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

KEY = "sk-soak"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATIENCE = 180.0  # seconds in which a request that is told to come again must have been answered
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
SENTENCE = "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it. "


@dataclass(frozen=True, slots=True)
class Told:
    """An answer: by choice its text, why it ended and its tokens, if asked for; tokens of prompt and answer."""

    texts: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()
    usage: tuple[int, int] = (0, 0)
    logprobs: tuple[float, ...] = field(default=(), compare=False, repr=False)


@dataclass(slots=True)
class Ask:
    """A request whose answer is known once it has been asked alone."""

    name: str
    path: str
    fields: dict[str, Any]
    told: Told | None = None


@dataclass(slots=True, kw_only=True)
class Soak:
    """The server, what is asked of it, and what came of it."""

    url: str
    model: str
    context: int
    slots: int
    asks: list[Ask]
    most: float  # MiB of a request
    end: float = 0.0
    client: openai.AsyncOpenAI = field(init=False)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    violations: list[str] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # MiB: RSS, KV cache
    worst: float = 0.0

    def note(self, kind: str, outcome: str, seconds: float) -> None:
        """Count what came of a request."""
        self.seconds[kind, outcome].append(seconds)

    def blame(self, sentence: str) -> None:
        """Remember a violation."""
        if len(self.violations) < 20:
            self.violations.append(sentence[:3000])


def known_requests(model: str, context: int, vocabulary: int, *, chat: bool) -> list[Ask]:
    """Return the requests of those who behave: tiny ones and ones that fill the context, greedy and seeded."""
    rng = random.Random(0)
    long = [rng.randrange(3, vocabulary) for _ in range(context - 24)]
    cold: dict[str, Any] = {"temperature": 0}
    texts: dict[str, dict[str, Any]] = {
        "text tiny": {**cold, "prompt": "A", "max_tokens": 8},
        "text": {**cold, "prompt": "Once upon a time", "max_tokens": 64},
        "text to the end": {**cold, "prompt": SENTENCE * 2, "max_tokens": context},
        "text near context": {**cold, "prompt": long, "max_tokens": 40},
        "text half": {**cold, "prompt": long[: context // 2], "max_tokens": 30},
        "text n": {**cold, "prompt": "The dog", "max_tokens": 20, "n": 3},
        "text stop": {**cold, "prompt": "Once upon a time", "max_tokens": 64, "stop": [".", "girl na"]},
        "text logprobs": {**cold, "prompt": "Tom had a", "max_tokens": 12, "logprobs": 3},
        "text echo": {**cold, "prompt": SENTENCE, "max_tokens": 4, "logprobs": 2, "echo": True},
        "text prompts": {**cold, "prompt": ["Lily", SENTENCE, long[:40], "Tim"], "max_tokens": 9},
        "text penalties": {
            **cold,
            "prompt": "Sue",
            "max_tokens": 24,
            "frequency_penalty": 0.7,
            "presence_penalty": 0.2,
        },
        "text seeded": {"prompt": "One day", "max_tokens": 40, "seed": 5, "top_p": 0.9, "n": 2},
    }
    turns = [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": SENTENCE}]
    last = {"role": "user", "content": "And then?"}
    chats: dict[str, dict[str, Any]] = {
        "chat": {**cold, "messages": [last], "max_tokens": 24},
        "chat long": {**cold, "messages": [{"role": "user", "content": SENTENCE * 3}], "max_tokens": 40},
        "chat turns": {**cold, "messages": [*turns, last], "max_tokens": 30},
        "chat logprobs": {**cold, "messages": [last], "max_tokens": 10, "logprobs": True, "top_logprobs": 4, "n": 2},
        "chat seeded": {"messages": [*turns, last], "max_tokens": 50, "seed": -3, "temperature": 0.8},
    }
    found = [Ask(name, TEXT, {"model": model, **fields}) for name, fields in texts.items()]
    return found + [Ask(name, CHAT, {"model": model, **fields}) for name, fields in chats.items() if chat]


async def ask_once(soak: Soak, ask: Ask, *, stream: bool) -> Told:
    """Return the answer through openai's client."""
    create = soak.client.chat.completions.create if ask.path == CHAT else soak.client.completions.create
    if not stream:
        whole = await create(**ask.fields)
        return _told([choice.model_dump() for choice in whole.choices], whole.usage)
    parts: dict[int, list[dict[str, Any]]] = defaultdict(list)
    usage = None
    async for chunk in await create(**ask.fields, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index].append(choice.model_dump())
    return _told([part for index in sorted(parts) for part in parts[index]], usage)


def _told(parts: list[dict[str, Any]], usage: Any) -> Told:
    """Join the parts of choices, which are whole choices if there is one of each."""
    texts, reasons = defaultdict[int, str](str), dict[int, str]()
    tokens, logprobs = defaultdict[int, list[str]](list), list[float]()
    for part in parts:
        index, message = part["index"], part.get("message") or part.get("delta") or {}
        texts[index] += part.get("text") or message.get("content") or ""
        reasons[index] = part["finish_reason"] or reasons.get(index, "")
        told = part.get("logprobs") or {}
        for entry in told.get("content") or []:
            tokens[index].append(entry["token"])
            logprobs.append(entry["logprob"])
        tokens[index] += told.get("tokens") or []
        logprobs += [value for value in told.get("token_logprobs") or [] if value is not None]
    order = sorted(texts)
    return Told(
        texts=tuple(texts[index] for index in order),
        reasons=tuple(reasons[index] for index in order),
        tokens=tuple(tuple(tokens[index]) for index in order),
        usage=(usage.prompt_tokens, usage.completion_tokens),
        logprobs=tuple(logprobs),
    )


async def healthy(soak: Soak, ask: Ask, rng: random.Random, kind: str = "") -> None:
    """Ask, again when told to come again, and compare with what is known."""
    stream, begun = rng.random() < 0.5, time.monotonic()
    while True:
        asked = time.monotonic()
        try:
            told = await ask_once(soak, ask, stream=stream)
            break
        except openai.RateLimitError as error:
            soak.note(kind or ask.name, "429, comes again", time.monotonic() - asked)
            seconds = error.response.headers.get("retry-after", "")
            if not seconds.isdigit():
                soak.blame(f"a 429 without a Retry-After: {dict(error.response.headers)}")
            if asked - begun > PATIENCE:
                soak.blame(f"{ask.name} was told to come again for {asked - begun:.0f} s")
                return
            await asyncio.sleep(float(seconds or 1) * rng.uniform(0.2, 1.2))
        except openai.OpenAIError as error:
            soak.blame(f"{ask.name}: {error!r} from {error.__cause__!r}")
            return
    assert ask.told is not None
    if told != ask.told:
        soak.blame(f"{ask.name}, {'streamed' if stream else 'whole'}: got {told}, {ask.told} was wanted")
    pairs = zip(told.logprobs, ask.told.logprobs, strict=False)
    soak.worst = max([soak.worst, *(abs(one - other) for one, other in pairs)])
    soak.note(kind or ask.name, "right" if told == ask.told else "WRONG", time.monotonic() - asked)


@asynccontextmanager
async def _connected(soak: Soak, buffer: int = 0) -> AsyncIterator[socket.socket]:
    host, port = soak.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        yield connection


async def _send(connection: socket.socket, path: str, body: bytes, *, key: str = KEY, length: int = -1) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body) if length < 0 else length}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(connection, head.encode() + body)


async def _receive(connection: socket.socket, most: int = 1 << 30, *, within: float = 120) -> bytes:
    """Return what comes until the other side closes, or `most` bytes."""
    received = bytearray()
    async with asyncio.timeout(within):
        while len(received) < most:
            part = await asyncio.get_running_loop().sock_recv(connection, min(1 << 16, most - len(received)))
            if not part:
                break
            received += part
    return bytes(received)


async def _refused(soak: Soak, path: str, body: bytes, status: int, *, key: str = KEY) -> str:
    """Send what must be refused, and see that it is, with OpenAI's error object."""
    async with _connected(soak) as connection:
        await _send(connection, path, body, key=key)
        head, _, content = (await _receive(connection)).partition(b"\r\n\r\n")
    got = head[9:12].decode()
    try:
        assert isinstance(json.loads(content)["error"]["message"], str)
    except (ValueError, KeyError, AssertionError):
        got += " without an error object"
    if got != str(status):
        soak.blame(f"{path} with {body[:200]!r} was answered {got}, {status} was wanted")
    return got


def _body(soak: Soak, **fields: object) -> bytes:
    return json.dumps({"model": soak.model, **fields}).encode()


def _endless(soak: Soak, rng: random.Random, *, stream: bool, **fields: object) -> bytes:
    return _body(
        soak, prompt=rng.choice(["A", SENTENCE]), max_tokens=soak.context, ignore_eos=True, stream=stream, **fields
    )


async def _aborts(soak: Soak, rng: random.Random) -> str:
    """Go away at any moment: in the body, while waiting, in the answer; politely or not."""
    body = _endless(soak, rng, stream=rng.random() < 0.7, n=rng.choice([1, 1, 4]))
    async with _connected(soak) as connection:
        moment = rng.choice(["body", "wait", "answer", "answer"])
        await _send(connection, TEXT, body[:20] if moment == "body" else body, length=len(body))
        if moment == "answer":
            await _receive(connection, rng.randint(1, 20_000))
        else:
            await asyncio.sleep(rng.expovariate(10))
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return f"gone in the {moment}"


async def _reads_slowly(soak: Soak, rng: random.Random) -> str:
    """Take a byte now and then of an answer of megabytes, then go, or take the rest."""
    body = _endless(soak, rng, stream=True, n=3, logprobs=20, temperature=0)
    async with _connected(soak, buffer=4096) as connection:
        await _send(connection, TEXT, body)
        received = b""
        for _ in range(rng.randint(20, 100)):
            received += await _receive(connection, 1)
            await asyncio.sleep(0.05)
        if received[:12] != b"HTTP/1.1 200":
            return received[9:12].decode()
        if rng.random() < 0.3:
            return "gone"
        received += await _receive(connection)
    if b"data: [DONE]" not in received[-200:] or received.count(b'"finish_reason":"length"') != 3:
        soak.blame(f"a slow reader's stream ended with {received[-200:]!r}")
    return "all of it"


async def _sends_slowly(soak: Soak, rng: random.Random) -> str:
    ask = rng.choice(soak.asks)
    body, loop = json.dumps(ask.fields).encode(), asyncio.get_running_loop()
    async with _connected(soak) as connection:
        await _send(connection, ask.path, b"", length=len(body))
        step = max(1, len(body) // 40)
        for start in range(0, len(body), step):
            if rng.random() < 0.005:
                return "gone"
            await loop.sock_sendall(connection, body[start : start + step])
            await asyncio.sleep(0.05)
        head, _, content = (await _receive(connection)).partition(b"\r\n\r\n")
    if head[9:12] == b"429":
        return "429"
    answer = json.loads(content)
    assert ask.told is not None
    texts = tuple(choice.get("text", choice.get("message", {}).get("content")) for choice in answer["choices"])
    if (texts, answer["usage"]["completion_tokens"]) != (ask.told.texts, ask.told.usage[1]):
        soak.blame(f"{ask.name}, sent slowly: got {texts}, {ask.told} was wanted")
    return "right"


async def _sends_broken_json(soak: Soak, rng: random.Random) -> str:
    ask = rng.choice(soak.asks)
    body = json.dumps(ask.fields).encode()
    body = rng.choice([body[: rng.randrange(len(body))], body[1:], body + b"]", b"\xff" + body, b"[" * 9999, b""])
    return await _refused(soak, ask.path, body, 400)


async def _sends_huge_bodies(soak: Soak, rng: random.Random) -> str:
    size = int(soak.most * 2**20)
    return await _refused(soak, rng.choice([CHAT, TEXT]), b" " * rng.randint(size + 1, 3 * size), 413)


async def _sends_huge_prompts(soak: Soak, rng: random.Random) -> str:
    text = SENTENCE * rng.randint(soak.context, int(soak.most * 2**20) // len(SENTENCE) - 10)
    return await _refused(soak, TEXT, _body(soak, prompt=text), 400)


async def _has_a_wrong_key(soak: Soak, rng: random.Random) -> str:
    ask = rng.choice(soak.asks)
    return await _refused(soak, ask.path, json.dumps(ask.fields).encode(), 401, key=rng.choice(["", "sk-soak2", "é"]))


async def _only_connects(soak: Soak, rng: random.Random) -> str:
    """Open connections, send nothing or the beginning of a request or no HTTP at all, and drop them together."""
    beginnings = [
        b"",
        b"POST /v1/comp",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 500,
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    ]
    loop = asyncio.get_running_loop()
    async with _connected(soak) as one, _connected(soak) as two, _connected(soak) as three:
        for connection in (one, two, three):
            await loop.sock_sendall(connection, rng.choice(beginnings))
        await asyncio.sleep(rng.expovariate(1))
    return "gone"


async def _floods(soak: Soak, rng: random.Random) -> str:
    """Ask for much more than the queue holds, at once."""
    await asyncio.sleep(rng.uniform(0, 4))
    await asyncio.gather(*(healthy(soak, rng.choice(soak.asks), rng, "one of a flood") for _ in range(32)))
    return "answered"


CLIENTS: dict[str, Callable[[Soak, random.Random], Awaitable[str]]] = {
    "aborts": _aborts,
    "aborts, too": _aborts,
    "reads slowly": _reads_slowly,
    "sends slowly": _sends_slowly,
    "broken JSON": _sends_broken_json,
    "huge body": _sends_huge_bodies,
    "huge prompt": _sends_huge_prompts,
    "wrong key": _has_a_wrong_key,
    "only connects": _only_connects,
    "flood": _floods,
}
