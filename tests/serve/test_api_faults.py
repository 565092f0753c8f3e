"""What a client sees when something goes wrong, and that nothing is computed for one that has gone."""

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from easylm_like.errors import UserError
from easylm_like.serve.api import Service, State
from easylm_like.serve.asked import Defaults
from easylm_like.serve.limits import BodyLimits, read_keys
from easylm_like.serve.server import listen

from .conftest import Start
from .toy import ToyEngine

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=20) as client:
        yield client


def chat(url: str, **settings: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, **settings)


def ask(client: openai.OpenAI, **fields: object) -> object:
    return client.chat.completions.create(model="toy", messages=HI, **fields)


def wait_until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


def raw(url: str, path: str, body: bytes, *, length: int | None = None, headers: str = "") -> socket.socket:
    """Send a POST by hand and return the socket."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    length_line = "" if "chunked" in headers else f"Content-Length: {len(body) if length is None else length}\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{length_line}{headers}\r\n"
    connection.sendall(head.encode() + body)
    return connection


def receive(connection: socket.socket, last: bytes) -> bytes:
    """Return what comes, up to `last`."""
    received = bytearray()
    while last not in received[-1_000_000:]:
        part = connection.recv(1 << 20)
        assert part, received[-1000:]
        received += part
    return bytes(received)


def body(**fields: object) -> bytes:
    return json.dumps({"model": "toy", "messages": HI, "max_tokens": 500, **fields}).encode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_slot_is_free_as_soon_as_its_client_has_gone(start: Start, toy: ToyEngine, stream: bool) -> None:
    toy.pace = 0.02
    connection = raw(start(Service(engines={"toy": toy})), CHAT, body(stream=stream, n=3))
    wait_until(lambda: len(toy.live) == 3)
    if stream:
        receive(connection, b"data: ")
    began = time.monotonic()
    connection.close()
    wait_until(lambda: not toy.live)
    assert time.monotonic() - began < 2


def test_a_stream_that_is_closed_early_by_openais_client(start: Start, toy: ToyEngine) -> None:
    toy.pace = 0.01
    with chat(start(Service(engines={"toy": toy}))) as client, ask(client, stream=True, max_tokens=500) as stream:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
    wait_until(lambda: not toy.live)


def test_a_reader_who_does_not_read_holds_no_slot(start: Start, toy: ToyEngine) -> None:
    toy.width = 10_000  # 40 MB in all, more than the buffers between the two
    with raw(start(Service(engines={"toy": toy})), CHAT, body(stream=True, n=8, max_tokens=500)) as connection:
        wait_until(lambda: len(toy.asked) == 8 and not toy.live)
        assert receive(connection, b"data: [DONE]").count(b'"length"') == 8  # all of it waits for the reader


def test_a_full_queue_is_told_with_when_to_come_again(start: Start, toy: ToyEngine) -> None:
    toy.pace, toy.room = 0.02, 1
    url = start(Service(engines={"toy": toy}))
    with raw(url, CHAT, body()), chat(url) as client:
        wait_until(lambda: len(toy.live) == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert refused.value.response.headers["retry-after"] == "1"
        assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "rate_limit_error")
    wait_until(lambda: not toy.live)


@pytest.mark.parametrize("state", [State.LOADING, State.DRAINING])
def test_a_server_that_takes_nothing_says_so(start: Start, toy: ToyEngine, client: httpx2.Client, state: State) -> None:
    service = Service(engines={"toy": toy})
    url = start(service)
    assert client.get(f"{url}/ready").status_code == 200
    service.state = state
    for response in (client.get(f"{url}/ready"), client.post(f"{url}{CHAT}", json={})):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["message"] == state.value
    assert client.get(f"{url}/health").status_code == 200


def test_an_engine_that_is_not_ready_or_dead(start: Start, toy: ToyEngine, client: httpx2.Client) -> None:
    url = start(Service(engines={"toy": toy}))
    toy.ready = False
    assert client.get(f"{url}/ready").status_code == 503
    toy.alive = False
    response = client.get(f"{url}/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the engine of toy has died: restart the server"


def test_an_engine_that_fails(start: Start, toy: ToyEngine, client: httpx2.Client) -> None:
    toy.breaks = 2
    url = start(Service(engines={"toy": toy}))
    with chat(url) as asked:
        with pytest.raises(openai.InternalServerError, match="the engine failed: out of memory"):
            ask(asked, max_tokens=9)
        toy.pace = 0.02
        texts = []
        with pytest.raises(openai.APIError, match="the engine failed: out of memory"):
            texts += [chunk.choices[0].delta.content for chunk in ask(asked, max_tokens=9, stream=True)]
    lines = client.post(f"{url}{CHAT}", content=body(stream=True), headers={"Content-Type": "application/json"}).text
    assert lines.split("\n\n")[-2].startswith('data: {"error":{"message":"the engine failed: out of memory"')
    toy.breaks = 0  # before anything was sent, a stream's error has a status, too
    with chat(url) as asked, pytest.raises(openai.InternalServerError):
        ask(asked, max_tokens=9, stream=True)


def test_an_answer_that_takes_too_long(start: Start, toy: ToyEngine, client: httpx2.Client) -> None:
    toy.pace = 0.05
    url = start(Service(engines={"toy": toy}, defaults=Defaults(timeout=0.2)))
    response = client.post(f"{url}{CHAT}", json=json.loads(body()))
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"  # openai's client would only wait again
    assert response.json()["error"]["message"].startswith("the answer was not finished within 0.2 seconds")
    assert '"code":"timeout"' in client.post(f"{url}{CHAT}", json=json.loads(body(stream=True))).text


def test_an_engine_that_says_nothing_any_more(
    start: Start, toy: ToyEngine, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easylm_like.serve.reply.GRACE", 0.1)
    toy.submit = lambda request, deliver: 1  # type: ignore[method-assign]
    url = start(Service(engines={"toy": toy}, defaults=Defaults(timeout=0.1)))
    assert client.post(f"{url}{CHAT}", json=json.loads(body())).status_code == 504


def test_an_engine_that_closes_cancels_what_is_left(start: Start, toy: ToyEngine) -> None:
    toy.pace = 0.02
    url = start(Service(engines={"toy": toy}))
    connection = raw(url, CHAT, body(stream=True))
    receive(connection, b"data: ")
    toy.close()
    receive(connection, b"shutting down")
    connection.close()
    with chat(url) as client, pytest.raises(openai.InternalServerError, match="closing"):
        ask(client)


def test_a_defect_is_told_without_its_details(
    start: Start, toy: ToyEngine, client: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: object, deliver: object) -> int:
        raise ZeroDivisionError("secret")

    toy.submit = broken  # type: ignore[method-assign]
    url = start(Service(engines={"toy": toy}))
    with caplog.at_level(logging.ERROR):
        response = client.post(f"{url}{CHAT}", json=json.loads(body()))
        wait_until(lambda: "secret" in caplog.text)  # whoever runs the server finds the cause
    assert response.status_code == 500
    assert "ZeroDivisionError" in response.json()["error"]["message"]
    assert "secret" not in response.text


def test_keys_are_asked_for_and_compared(start: Start, toy: ToyEngine, client: httpx2.Client) -> None:
    url = start(Service(engines={"toy": toy}, keys=("one", "two"), origins=("https://a.example",)))
    for key, known in (
        ("one", True),
        ("two", True),
        ("on", False),
        ("oneone", False),
        ("one two", False),
        ("ключ", False),
    ):
        headers = {"Authorization": f"Bearer {key}".encode()}
        response = client.get(f"{url}/v1/models", headers=headers)
        assert response.status_code == (200 if known else 401)
        assert known or response.json()["error"]["code"] == "invalid_api_key"
    assert client.get(f"{url}/v1/models").json()["error"]["message"].startswith("no API key was given")
    assert client.get(f"{url}/v1/models", headers={"Authorization": "Basic one"}).status_code == 401
    assert {client.get(f"{url}{path}").status_code for path in ("/", "/health", "/ready", "/metrics")} == {200}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="three", max_retries=0) as asked:
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(asked)
        assert refused.value.code == "invalid_api_key"
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    allowed = client.options(f"{url}{CHAT}", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert (
        "access-control-allow-origin"
        not in client.options(f"{url}{CHAT}", headers={**asks, "Origin": "https://b"}).headers
    )


def test_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-one\n\n  sk-two  \n")
    assert read_keys(file, {}) == ("sk-one", "sk-two")
    assert read_keys(None, {"EASYLM_LIKE_API_KEYS": "a,b"}) == ("a", "b")
    assert read_keys(None, {}) == ()
    file.write_text("# none\n")
    with pytest.raises(UserError, match="no API key there; write one a line"):
        read_keys(file, {})
    file.write_text("two words\n")
    with pytest.raises(UserError, match="must be printable ASCII without spaces"):
        read_keys(file, {})
    with pytest.raises(UserError, match="the API keys cannot be read"):
        read_keys(tmp_path / "none", {})


def test_a_body_that_is_too_large(start: Start, toy: ToyEngine, client: httpx2.Client) -> None:
    url = start(Service(engines={"toy": toy}, limits=BodyLimits(most_bytes=1000)))
    headers = {"Content-Type": "application/json"}

    def parts(number: int) -> Iterator[bytes]:
        yield from [b" " * 500] * number

    for content in (b" " * 1001, b" " * 3000, parts(3), parts(7)):  # with a length, and in chunks without
        response = client.post(f"{url}{CHAT}", content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the body must be at most 1000 bytes"
    with raw(url, CHAT, b"", length=10**12) as connection:  # nobody waits for this to come
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    chunk = b"1f4\r\n" + b" " * 500 + b"\r\n"
    with raw(url, CHAT, chunk * 9, headers="Transfer-Encoding: chunked\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")  # nor for the end of this
    small = body(max_tokens=1)
    content = small + b" " * (1000 - len(small))
    assert client.post(f"{url}{CHAT}", content=content, headers=headers).status_code == 200


def test_a_body_that_does_not_come(start: Start, toy: ToyEngine) -> None:
    url = start(Service(engines={"toy": toy}, limits=BodyLimits(most_seconds=0.2)))
    with raw(url, CHAT, body()[:20], length=100) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    with raw(url, CHAT, body()[:20], length=100):
        pass  # a client that goes in the middle of its body is nobody's error
    with chat(url) as client:
        assert ask(client, max_tokens=1)


def test_a_line_for_every_request_without_its_secrets(
    start: Start, toy: ToyEngine, client: httpx2.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    url = start(Service(engines={"toy": toy}, keys=("sk-secret",)))
    client.post(f"{url}{CHAT}?key=sk-secret", content=body(), headers={"Authorization": "Bearer sk-secret"})
    client.get(f"{url}/a%0Ab")
    lines: list[str] = []
    wait_until(lambda: len(lines.extend(capfd.readouterr().err.splitlines()) or lines) == 2)
    assert [line.split(" ")[2:6] for line in lines] == [
        ["127.0.0.1", "POST", CHAT, "415"],
        ["127.0.0.1", "GET", "/a%0Ab", "401"],
    ]
    assert "sk-secret" not in "".join(lines)


def test_a_port_in_use(start: Start, toy: ToyEngine) -> None:
    port = int(start(Service(engines={"toy": toy})).rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another"):
        listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot listen on no\.such\.host\.invalid"):
        listen("no.such.host.invalid", 0)


def test_one_line_of_two_requests_in_one_packet(start: Start, toy: ToyEngine) -> None:
    """A client may send its next request before the answer to the first has come."""
    url = start(Service(engines={"toy": toy}))
    connection = raw(url, TEXT, b'{"model": "toy", "prompt": "a", "max_tokens": 1}')
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    received = receive(connection, b'"ok"')
    connection.close()
    assert received.count(b"HTTP/1.1 200 OK") == 2
