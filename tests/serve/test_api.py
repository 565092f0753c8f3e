"""OpenAI's interface to the letter: what is answered, streamed and refused. The engine is a toy; HTTP is real."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from easylm_like.data.template import ALPACA, KOALA
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.serve.api import Service
from easylm_like.serve.asked import Defaults
from easylm_like.serve.request import Request

from .conftest import Start
from .toy import ToyEngine

Json = dict[str, object]
HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Client:
    """Sends JSON, and remembers what the engine was asked."""

    http: httpx2.Client
    toy: ToyEngine

    def post(self, path: str, **fields: object) -> httpx2.Response:
        return self.http.post(path, json={"model": "toy", **fields})

    def answer(self, path: str, **fields: object) -> Json:
        response = self.post(path, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path: str, **fields: object) -> list[Json]:
        """Return the events of a stream, which must end with [DONE]."""
        response = self.post(path, stream=True, **fields)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, end, empty = response.text.split("\n\n")
        assert (end, empty) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def asked(self, path: str, **fields: object) -> Request:
        self.answer(path, **fields)
        return self.toy.asked[-1]


@pytest.fixture(scope="module")
def client(start: Start, tokenizer: Tokenizer) -> Iterator[Client]:
    toy = ToyEngine(tokenizer, template=KOALA)
    engines = {"toy": toy, "base": ToyEngine(tokenizer), "alpaca": ToyEngine(tokenizer, template=ALPACA)}
    url = start(Service(engines=engines, defaults=Defaults(max_tokens=9)))
    with httpx2.Client(base_url=url, timeout=20) as http:
        yield Client(http, toy)


def test_a_chat_is_answered(client: Client) -> None:
    answer = client.answer(CHAT, messages=HI, max_tokens=12)
    whole = ChatCompletion.model_validate(answer, strict=True)
    assert whole.choices[0].message.content == client.toy.text[:12]
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is None
    prompt = len(client.toy.asked[-1].prompt)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert abs(whole.created - time.time()) < 60


def test_a_chat_is_streamed(client: Client) -> None:
    events = client.events(CHAT, messages=HI, max_tokens=3)
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    deltas = [(event["choices"][0]["delta"], event["choices"][0]["finish_reason"]) for event in events]
    assert deltas == [
        ({"role": "assistant", "content": "", "refusal": None}, None),
        *(({"content": letter}, None) for letter in client.toy.text[:3]),
        ({}, "length"),
    ]
    assert all("usage" not in event for event in events)


def test_a_stream_tells_its_usage_if_asked(client: Client) -> None:
    events = client.events(CHAT, messages=HI, max_tokens=3, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    whole = client.answer(CHAT, messages=HI, max_tokens=3)
    assert events[-1]["usage"] == whole["usage"]


def test_completions_are_answered_and_streamed(client: Client) -> None:
    fields = {"prompt": "Once", "max_tokens": 5, "logprobs": 1}
    whole = client.answer(TEXT, **fields)
    Completion.model_validate(whole, strict=True)
    events = client.events(TEXT, **fields, stream_options={"include_usage": True})
    for event in events:
        Completion.model_validate({**event, "choices": []}, strict=True)  # finish_reason is null before the end
    assert events[-1]["usage"] == whole["usage"]
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"] == client.toy.text[:5]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    joined = {name: [item for part in parts for item in part[name]] for name in whole["choices"][0]["logprobs"]}
    assert joined == whole["choices"][0]["logprobs"]
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]


def test_logprobs_of_a_chat(client: Client) -> None:
    answer = client.answer(CHAT, messages=HI, max_tokens=2, logprobs=True, top_logprobs=1)
    ChatCompletion.model_validate(answer, strict=True)
    logprobs = answer["choices"][0]["logprobs"]
    first = {"token": " One", "logprob": -0.5, "bytes": list(b" One")}
    assert logprobs["content"][0] == {**first, "top_logprobs": [first]}
    assert logprobs["refusal"] is None
    events = client.events(CHAT, messages=HI, max_tokens=2, logprobs=True, top_logprobs=1)
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for part in parts if part for entry in part["content"]] == logprobs["content"]


def test_echo_of_text_and_of_ids(client: Client, tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode(["Once upon"])[0][0].tolist()]
    fields = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    of_text = client.answer(TEXT, prompt="Once upon", **fields)["choices"][0]
    of_ids = client.answer(TEXT, prompt=ids, **fields)["choices"][0]
    assert of_text["text"] == "Once uponO"
    assert of_ids["text"] == tokenizer.decode(ids) + "O"
    for choice in (of_text, of_ids):
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["<s>", " Once", " upon", " One"]
        assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.5]
        assert logprobs["top_logprobs"] == [None, {" Once": -1.0}, {" upon": -1.0}, {" One": -0.5}]
        assert choice["text"][logprobs["text_offset"][2] :].startswith(" upon")
    events = client.events(TEXT, prompt="Once upon", **fields)
    assert "".join(event["choices"][0]["text"] for event in events) == "Once uponO"


def test_echo_alone_scores_the_prompt(client: Client) -> None:
    choice = client.answer(TEXT, prompt="Once upon", max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == "Once upon"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert client.events(TEXT, prompt="Once upon", max_tokens=0, echo=True)[0]["choices"][0]["text"] == "Once upon"


def test_several_prompts_and_several_answers_to_each(client: Client) -> None:
    before = len(client.toy.asked)
    prompts = [[1, 403], [1, 404, 405]]
    answer = client.answer(TEXT, prompt=prompts, n=2, best_of=2, max_tokens=1, seed=5, echo=True)
    asked = client.toy.asked[before:]
    assert [(request.prompt.tolist(), request.sampling.seed) for request in asked] == [
        (prompt, seed) for prompt in prompts for seed in (5, 6)
    ]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][1]["text"] == answer["choices"][0]["text"] != answer["choices"][2]["text"]
    assert answer["usage"]["prompt_tokens"] == 5  # once, however many answers
    assert answer["usage"]["completion_tokens"] == 4
    events = client.events(TEXT, prompt=prompts, n=2, max_tokens=1)
    assert {event["choices"][0]["index"] for event in events} == {0, 1, 2, 3}


def test_more_prompts_than_the_queue_holds_take_turns(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.toy, "pace", 0.02)
    prompts = [[1, number] for number in range(3 * client.toy.room)]
    answer = client.answer(TEXT, prompt=prompts, max_tokens=1, echo=True)
    wanted = [client.toy.tokenizer.decode(prompt) + "O" for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == wanted


def test_what_a_request_says_reaches_the_engine(client: Client) -> None:
    said = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "logit_bias": {"5": -100},
        "seed": 42,
    }
    request = client.asked(CHAT, messages=HI, stop=["\n", "END"], max_tokens=4, ignore_eos=True, **said)
    for name, value in said.items():
        assert getattr(request.sampling, name) == ({5: -100} if name == "logit_bias" else value)
    assert (request.stop, request.gap, request.max_tokens, request.ignore_eos) == (("\n", "END", "USER:"), " ", 4, True)
    assert client.asked(TEXT, prompt="a", top_k=-1, top_p=0).sampling.top_k == 0


def test_the_defaults_are_openais_and_finite(client: Client) -> None:
    chat, text = client.asked(CHAT, messages=HI), client.asked(TEXT, prompt="a")
    assert (chat.max_tokens, text.max_tokens) == (9, 16)
    assert (chat.sampling.temperature, chat.sampling.top_p, text.sampling.temperature) == (1.0, 1.0, 1.0)
    assert chat.timeout == 600.0
    assert chat.sampling.seed != client.asked(CHAT, messages=HI).sampling.seed
    assert client.asked(CHAT, messages=HI, max_completion_tokens=3).max_tokens == 3
    assert client.asked(CHAT, messages=HI, max_completion_tokens=3, max_tokens=5).max_tokens == 3


def test_nulls_and_unknown_fields_change_nothing(client: Client) -> None:
    names = (
        "temperature top_p n stop max_tokens max_completion_tokens seed logprobs top_logprobs logit_bias stream tools "
        "presence_penalty frequency_penalty stream_options response_format functions tool_choice marker modalities"
    )
    nulls = dict.fromkeys(names.split())
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "no_such_field": 1}
    harmless = {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none", "functions": []}
    plain = client.asked(CHAT, messages=HI, seed=1)
    for fields in (nulls, ignored, harmless):
        request = client.asked(CHAT, messages=HI, **fields)
        assert request.prompt.tolist() == plain.prompt.tolist()
        assert request.max_tokens == plain.max_tokens
        assert request.stop == plain.stop


def test_a_message_may_come_in_parts(client: Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = client.asked(CHAT, messages=[{"role": "user", "content": parts}])
    assert (
        asked.prompt.tolist() == client.asked(CHAT, messages=[{"role": "user", "content": "one\ntwo"}]).prompt.tolist()
    )


def test_a_marker_is_chosen_by_the_request(client: Client) -> None:
    def text(**fields: object) -> str:
        return client.toy.tokenizer.decode(client.asked(CHAT, messages=HI, **fields).prompt.tolist())

    assert text(marker="bad").endswith("An Unhelpful Answer:")
    assert text(marker="good") == text()
    history = [*HI, {"role": "assistant", "content": "No.", "quality": "bad"}, *HI]
    before = client.asked(CHAT, messages=history).prompt.tolist()
    assert "An Unhelpful Answer: No." in client.toy.tokenizer.decode(before)


REFUSED: list[tuple[str, Json, str | None, str]] = [  # path, fields, param, sentence
    (CHAT, {}, "messages", "messages is required"),
    (CHAT, {"messages": HI, "model": None}, "model", "model is required"),
    (CHAT, {"messages": []}, "messages", "messages must have at least 1 item, not 0"),
    (CHAT, {"messages": "Hi"}, "messages", "messages must be a valid list, got 'Hi'"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0]", "messages[0] must have content"),
    (CHAT, {"messages": [{"role": "you", "content": "Hi"}]}, "messages[0].role", "messages[0].role must be 'system', "),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a valid string, got 5"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
        "messages[0].content",
        "part 0 is 'image_url'",
    ),
    (CHAT, {"messages": [{**HI[0], "quality": "bad"}]}, "messages[0]", "must be an assistant's"),
    (CHAT, {"messages": [*HI, *HI]}, "messages", "the koala template takes user and assistant in turns"),
    (CHAT, {"messages": [{"role": "user", "content": "</s>"}]}, "messages", "special token '</s>'"),
    (CHAT, {"messages": HI, "marker": "ugly"}, "marker", "marker must be 'good' or 'bad', got 'ugly'"),
    (CHAT, {"messages": HI, "model": "base"}, "messages", "this model has no chat template: start the server"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools", "no place for tools"),
    (CHAT, {"messages": HI, "temperature": 3}, "temperature", "temperature must be less than or equal to 2, got 3"),
    (CHAT, {"messages": HI, "temperature": "1"}, "temperature", "temperature must be a valid number, got '1'"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", "max_tokens must be greater than or equal to 1, got 0"),
    (CHAT, {"messages": HI, "n": 99}, "n", "n must be less than or equal to 16, got 99"),
    (CHAT, {"messages": HI, "n": True}, "n", "n must be a valid integer, got True"),
    (CHAT, {"messages": HI, "top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, None, "top_logprobs needs logprobs to be true"),
    (CHAT, {"messages": HI, "stop": ["a", ""]}, "stop", "stop must be a text or a list of texts, none of them empty"),
    (CHAT, {"messages": HI, "stop": ["a"] * 17}, "stop", "stop must be at most 16 texts"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100, got 101"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", "token ids from 0 to 511, got 'x'"),
    (CHAT, {"messages": HI, "logit_bias": {"512": 1}}, "logit_bias", "token ids from 0 to 511, got '512'"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
    (CHAT, {"messages": HI, "modalities": ["text", "audio"]}, "modalities", "is not supported"),
    (CHAT, {"messages": HI, "functions": [{"name": "f"}]}, "functions", "is not supported"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, "tool_choice", "'required' is not supported"),
    (CHAT, {"messages": HI, "guided_json": {}}, "guided_json", "is not supported"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 600}]}, "messages", "this model's context holds 512"),
    (TEXT, {}, "prompt", "prompt is required"),
    (TEXT, {"prompt": []}, "prompt", "prompt must be a text, a list of token ids, or a list of several"),
    (TEXT, {"prompt": [1, "a"]}, "prompt", "prompt must be a text, a list of token ids, or a list of several"),
    (TEXT, {"prompt": [[1], []]}, "prompt[1]", "prompt[1] must hold at least one token"),
    (TEXT, {"prompt": [512]}, "prompt", "prompt must hold ids from 0 to 511, got 512"),
    (TEXT, {"prompt": [5] * 512}, "prompt", "prompt has 512 tokens, but this model's context holds 512"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20, got 21"),
    (TEXT, {"prompt": "a", "best_of": 3}, None, "best_of is not supported: leave it out or make it n (1), got 3"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "suffix 'b' is not supported"),
    (TEXT, {"prompt": "a", "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
]


@pytest.mark.parametrize(("path", "fields", "param", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_one_sentence_says_what_is_wrong(
    client: Client, path: str, fields: Json, param: str | None, sentence: str
) -> None:
    before = len(client.toy.asked)
    response = client.post(path, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert sentence in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["code"] is None or isinstance(error["code"], str)
    assert len(client.toy.asked) == before


def test_a_prompt_that_is_too_long_has_openais_code(client: Client) -> None:
    error = client.post(TEXT, prompt=[5] * 600).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert client.answer(TEXT, prompt=[5] * 512, max_tokens=0)["choices"][0]["finish_reason"] == "length"


def test_a_marker_that_a_template_does_not_have(client: Client) -> None:
    error = client.post(CHAT, model="alpaca", messages=HI, marker="bad").json()["error"]
    assert error["message"] == "the alpaca template cannot ask for a bad answer"
    assert (error["param"], error["code"]) == ("marker", "no_bad_marker")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the body is not JSON: EOF"),
        (b'{"model": ', "the body is not JSON: EOF"),
        (b"[]", "the body must be a JSON object, got []"),
        (b'{"model": "toy", "prompt": "a", "temperature": NaN}', "temperature must be a finite number, got nan"),
        (b"\xff\xfe", "the body is not JSON: expected value"),
        (b"[" * 100_000, "the body is not JSON: recursion limit exceeded"),
        (b'{"prompt": "\\ud800"}', "the body is not JSON:"),
    ],
)
def test_what_is_not_json(client: Client, content: bytes, sentence: str) -> None:
    response = client.http.post(TEXT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "sentence"),
    [
        ("GET", "/v1/nothing", {}, 404, "there is no GET /v1/nothing here"),
        ("GET", "/v1/models/nobody", {}, 404, "no model 'nobody' here; there is toy, base, alpaca"),
        ("GET", TEXT, {}, 405, "GET /v1/completions is not possible"),
        ("POST", "/v1/models", {}, 405, "POST /v1/models is not possible"),
        ("POST", TEXT, {}, 415, "Content-Type must be application/json, got none"),
        ("POST", TEXT, {"Content-Type": "text/plain"}, 415, "got text/plain"),
        ("POST", TEXT, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "got gzip"),
    ],
)
def test_other_mistakes_have_the_same_shape(
    client: Client, method: str, path: str, headers: dict[str, str], status: int, sentence: str
) -> None:
    response = client.http.request(method, path, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert sentence in error["message"]
    if status == 405:
        assert response.headers["allow"]


def test_the_models_are_listed(client: Client) -> None:
    listed = client.http.get("/v1/models").json()
    models = [Model.model_validate(model, strict=True) for model in listed["data"]]
    assert [model.id for model in models] == ["toy", "base", "alpaca"]
    assert [(m["chat"], m["markers"], m["max_model_len"]) for m in listed["data"]] == [
        (True, ["good", "bad"], 512),
        (False, [], 512),
        (True, ["good"], 512),
    ]
    assert client.http.get("/models/base").json() == listed["data"][1]
    assert client.http.post("/completions", json={"model": "base", "prompt": "a"}).status_code == 200


def test_the_page_may_reach_no_other_place(client: Client) -> None:
    page = client.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


def test_metrics_are_prometheus_and_count_what_happened(client: Client) -> None:
    client.answer(TEXT, prompt="a", max_tokens=4)
    response = client.http.get("/metrics")
    samples = {
        (sample.name.removeprefix("easylm_like_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert samples["slots", "toy"] == 4
    assert samples["compilations_total", "toy"] == 0
    assert samples["http_requests_total", TEXT, "200"] >= 1
    assert samples["http_requests_total", "other", "404"] >= 1
    for histogram in ("time_to_first_token", "time_per_output_token", "request"):
        assert samples[f"{histogram}_seconds_count", "toy"] >= 1
        assert 0 <= samples[f"{histogram}_seconds_sum", "toy"] < 60
