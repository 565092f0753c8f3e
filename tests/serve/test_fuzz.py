"""Whatever is sent, the server answers as OpenAI's specification says and goes on: requests made by schemathesis from
that specification, right and wrong ones, and damaged bytes."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection

import hypothesis
import jsonschema_rs
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.serve.api import Service
from easylm_like.serve.engine import Engine

from .conftest import Start
from .openai_spec import CHAT_CHUNK, TEXT_CHUNK, Schema, specification
from .test_chat import TOOLS_TEMPLATE
from .toy import ToyEngine

CHECKS = "not_a_server_error status_code_conformance content_type_conformance response_schema_conformance".split()
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EXAMPLES = 60
DAMAGED = 600

Valid = Callable[[str, object], None]  # (name of a schema, what must be of it); raises if it is not


@pytest.fixture(scope="module")
def service(engine: Engine, tokenizer: Tokenizer) -> Service:
    """Return the real model, and one that is not run but has a chat template with tools."""
    return Service(engines={"koala": engine, "tools": ToyEngine(tokenizer, chat_template=TOOLS_TEMPLATE)})


@pytest.fixture(scope="module")
def url(start: Start, service: Service, engine: Engine) -> Iterator[str]:
    yield start(service)


@pytest.fixture
def idle(engine: Engine) -> Iterator[None]:
    """After a test, see that nothing is left running and nothing had to be compiled."""
    yield
    snapshot = engine.snapshot()
    assert (snapshot.running, snapshot.queued, snapshot.compilations) == (0, 0, 0)
    assert engine.alive
    assert snapshot.finished.keys() <= {"stop", "length"} | {"cancelled"}


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
            if kind == TEXT_CHUNK:  # null before the end, which OpenAI's specification of completions forgets
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        valid(kind, content)
    assert set(ended.values()) == {1}, text


def operations(spec: Schema, url: str) -> dict[str, schemathesis.BaseSchema]:
    checks = {"enabled": False, **{name: {"enabled": True} for name in CHECKS}}
    config = schemathesis.Config.from_dict({"base-url": f"{url}/v1", "checks": checks})
    schema = schemathesis.openapi.from_dict(spec, config=config)
    return {(operation := result.ok()).label: operation for result in schema.get_all_operations()}


@pytest.mark.parametrize("label", ["GET /models", "GET /models/{model}", "POST /chat/completions", "POST /completions"])
@pytest.mark.parametrize("kind", ["easy", "right", "wrong"])
def test_requests_made_from_openais_specification(url: str, idle: None, kind: str, label: str) -> None:
    if label == "GET /models" and kind != "easy":
        pytest.skip("it has no input")
    models = ["koala"] if kind == "easy" else ["koala", "tools"]
    spec = specification(*models, easy=kind == "easy")
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
