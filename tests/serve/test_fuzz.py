"""Whatever is sent, the server answers as OpenAI's specification says and goes on.

Requests that schemathesis makes from that specification, right ones and wrong ones, and damaged bytes.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection

import hypothesis
import jsonschema_rs
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.serve.api import Service
from easylm_like.serve.asked import Defaults
from easylm_like.serve.engine import Engine

from .conftest import Start
from .openai_spec import CHAT_CHUNK, TEXT_CHUNK, Schema, specification
from .test_chat import TOOLS_TEMPLATE
from .toy import ToyEngine

CHECKS = "not_a_server_error status_code_conformance content_type_conformance response_schema_conformance".split()
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EXAMPLES = 60
DAMAGED = 500
MODELS = ("koala", "tools")

Valid = Callable[[str, object], None]  # (name of a schema, what must be of it); raises if it is not


@pytest.fixture(scope="module")
def service(engine: Engine, tokenizer: Tokenizer) -> Service:
    """Return the real model, and one that is not run but has a chat template with tools."""
    engines = dict(zip(MODELS, (engine, ToyEngine(tokenizer, chat_template=TOOLS_TEMPLATE)), strict=True))
    return Service(engines=engines, defaults=Defaults(max_tokens=4))


@pytest.fixture(scope="module")
def url(start: Start, service: Service) -> str:
    return start(service)


@pytest.fixture
def idle(engine: Engine) -> Iterator[None]:
    """After a test, see that nothing is left running and nothing had to be compiled."""
    yield
    snapshot = engine.snapshot()
    assert (snapshot.running, snapshot.queued, snapshot.compilations) == (0, 0, 0)
    assert engine.alive


def validator(spec: Schema) -> Valid:
    schemas: dict[str, jsonschema_rs.Draft202012Validator] = {}

    def check(name: str, content: object) -> None:
        if name not in schemas:
            whole = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
            schemas[name] = jsonschema_rs.Draft202012Validator(whole)
        schemas[name].validate(content)

    return check


def check_stream(text: str, kind: str, valid: Valid) -> None:
    """Check every event: chunks of OpenAI's, each choice ended once, then the end; or an error as the last event."""
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events), text
    contents = [event.removeprefix("data: ") for event in events]
    assert contents.pop() == "[DONE]", text
    ended: Counter[int] = Counter()
    for content in map(json.loads, contents):
        for choice in content["choices"]:
            ended[choice["index"]] += choice["finish_reason"] is not None
            if kind == TEXT_CHUNK:  # null before the end, in OpenAI's answers but not in its specification of these
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        if kind == TEXT_CHUNK and content.get("usage", {}) is None:  # the same
            del content["usage"]
        valid(kind, content)
    assert set(ended.values()) == {1}, text


def whole(content: object) -> object:
    """Return it with 2 where it has 2.0: the same number to JSON Schema, but not to this server or to OpenAI's."""
    if isinstance(content, dict):
        return {name: whole(value) for name, value in content.items()}
    if isinstance(content, list):
        return [whole(value) for value in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content


def operations(spec: Schema, url: str) -> dict[str, schemathesis.APIOperation]:
    checks = {"enabled": False, **{name: {"enabled": True} for name in CHECKS}}
    config = schemathesis.Config.from_dict({"base-url": f"{url}/v1", "checks": checks, "max-stream-events": 10_000})
    schema = schemathesis.openapi.from_dict(spec, config=config)
    return {(operation := result.ok()).label: operation for result in schema.get_all_operations()}


LABELS = ("GET /models/{model}", "POST /chat/completions", "POST /completions")


@pytest.mark.parametrize(
    ("kind", "label"),
    [("easy", "GET /models"), *((kind, label) for kind in ("easy", "right", "wrong") for label in LABELS)],
)
def test_requests_made_from_openais_specification(url: str, idle: None, kind: str, label: str) -> None:
    spec = specification(*MODELS[: 1 if kind == "easy" else 2], easy=kind != "right")  # a wrong one has one mistake
    valid, seen = validator(spec), Counter[str]()
    mode = GenerationMode.NEGATIVE if kind == "wrong" else GenerationMode.POSITIVE

    with requests.Session() as session:

        @hypothesis.given(case=operations(spec, url)[label].as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            if kind == "easy" and isinstance(case.body, dict):
                case.body = whole(case.body)
            response = case.call(session=session)
            case.validate_response(response)
            streamed = response.headers["content-type"][0].startswith("text/event-stream")
            if streamed:
                check_stream(response.text, CHAT_CHUNK if "chat" in label else TEXT_CHUNK, valid)
            seen[f"{response.status_code}{' stream' * streamed}"] += 1

        check()
    print(label, kind, dict(seen))
    if kind == "easy":  # else everything may have been refused
        assert seen["200"] + seen["200 stream"] >= 0.7 * seen.total(), seen
        assert seen["200 stream"] or "GET" in label, seen


CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TALK = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Yes?", "quality": "good", "wording": 0},
    {"role": "user", "content": "Who?"},
]
TOOL_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "2"},
]
SAMPLING: dict[str, object] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "seed": 3,
    "stop": ["a b"],
    "ignore_eos": False,
    "max_tokens": 3,
    "n": 2,
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
PROMPTS: list[object] = ["Once", [1, 2, 3], ["Once", "Lily"], [[1, 5], [7]]]
SOUND: list[tuple[str, dict[str, object]]] = [  # what is damaged
    (CHAT, {"model": "koala", "messages": TALK, "logprobs": True, "top_logprobs": 2, "marker": "good", "wording": 0}),
    (CHAT, {"model": "tools", "messages": TOOL_TALK, "tools": [TOOL], "documents": [{"title": "a"}], "max_tokens": 2}),
    (CHAT, {"model": "koala", "messages": TALK, **SAMPLING, **USAGE}),
    *((TEXT, {"model": "koala", "prompt": prompt, **SAMPLING, "logprobs": 1, "echo": True}) for prompt in PROMPTS),
    (TEXT, {"model": "koala", "prompt": "Once", **SAMPLING, **USAGE, "add_special_tokens": False}),
]
MILD = """0 1 2 3 true false null "a" " " "koala" "user" "text" [1] ["a"] ["text"] 0.5 2.0 -1 {} []""".split(" ")
NASTY = [  # as they stand in the JSON, or in what should have been JSON
    *"NaN Infinity -Infinity 1e999 -1e999 1e-400 -0 -0.0 1e22 1e-9 01 +1 .5 1. 1_0 0x1 2147483648".split(),
    *"9223372036854775807 9223372036854775808 -9223372036854775809 undefined 'a' [[]] [[[]]] [null] [[null]]".split(),
    *('""', r'"\u0000"', r'"\ud800"', r'"\udc00\ud800"', r'"\ud83e\udd99"', '"</s>"', '"<unk>"', '"USER:"', "", "{"),
    *('"\U0001f999\u202e\ufeff\u0300"', '"\x00"', '"\x1b[31m\n"', '"' + "a " * 3000 + '"', "[" + "1," * 3000 + "1]"),
    *("9" * 400, "-" + "9" * 5000, "[" * 150 + "]" * 150, "[" * 5000 + "]" * 5000, "[" * 100_000),
    *('{"a":' * 150 + "1" + "}" * 150, '{"a":' * 100_000),
    *('{"type":"text","text":"a"}', '{"role":"user","content":"a"}'),
]


def places(content: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value inside a JSON value."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for step, value in inside:
        yield (*path, step)
        yield from places(value, (*path, step))


def damaged(body: dict[str, object], rng: random.Random) -> bytes:
    """Return a request with something wrong in it: a value, a name, a name that is there twice, or any bytes."""
    how = rng.choice(["value", "value", "value", "name", "twice", "bytes"])
    if how == "bytes":
        return with_other_bytes(json.dumps(body).encode(), rng)
    copy, mark = json.loads(json.dumps(body)), "@@mark@@"
    *path, last = rng.choice([*places(copy)])
    parent = copy
    for step in path:
        parent = parent[step]
    value = rng.choice(rng.choice((MILD, NASTY)))
    if how == "name" and isinstance(parent, dict):
        parent[mark] = parent.pop(last)
    elif how == "twice" and isinstance(parent, dict):
        value = f"{json.dumps(parent[last])},{json.dumps(last)}:{value}"
        parent[last] = mark
    else:
        parent[last] = mark
    return json.dumps(copy).replace(f'"{mark}"', value, 1).encode()


def with_other_bytes(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(damaged))
        end = start + rng.choice((0, 1, 1, 8))
        others = (rng.randbytes(2), b"", b'"', b"}", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\u", content[:end])
        damaged[start:end] = rng.choice(others)
    return bytes(damaged)


def post(connection: HTTPConnection, path: str, content: bytes) -> tuple[int, str, str]:
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.headers["content-type"], response.read().decode()


@contextmanager
def connected(url: str) -> Iterator[HTTPConnection]:
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
        yield connection


@pytest.mark.parametrize("seed", range(3))
def test_damaged_requests(url: str, idle: None, seed: int) -> None:
    rng, valid, seen = random.Random(seed), validator(specification(*MODELS, easy=False)), Counter[int]()
    with connected(url) as connection:
        assert [post(connection, path, json.dumps(body).encode())[0] for path, body in SOUND] == [200] * len(SOUND)
        for _ in range(DAMAGED):
            path, body = rng.choice(SOUND)
            content = damaged(body, rng)
            try:
                status, kind, text = post(connection, path, content)
                seen[status] += 1
                assert status in (200, 400, 404), text
                if kind.startswith("text/event-stream"):
                    check_stream(text, CHAT_CHUNK if path == CHAT else TEXT_CHUNK, valid)
                    continue
                assert kind == "application/json"
                answer = "CreateChatCompletionResponse" if path == CHAT else TEXT_CHUNK
                valid(answer if status == 200 else "ErrorResponse", json.loads(text))
                assert status == 200 or len(text) < 1000  # nothing long is sent back
            except Exception as error:  # whatever it is, say which request it was
                raise AssertionError(f"POST {path}, {len(content)} bytes: {content[:3000]!r}") from error
    assert min(seen[200], seen[400]) > DAMAGED / 10, seen


@pytest.mark.parametrize(
    "path", [*"models/%ff models/a%00b models/..%2f.. models/ / %".split(), "models/" + "a" * 9000]
)
def test_odd_paths(url: str, path: str) -> None:
    with connected(url) as connection:
        connection.request("GET", f"/v1/{path}")
        response = connection.getresponse()
        text = response.read()
    assert response.status == 404
    validator(specification(easy=False))("ErrorResponse", json.loads(text))
    assert len(text) < 1000
