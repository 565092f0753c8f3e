"""`python -m easylm_like.serve`, as a user types it: its start, its end, and mistakes told before it computes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from easylm_like.command import run_command
from easylm_like.errors import UserError
from easylm_like.serve.__main__ import main, named_models

Capture = pytest.CaptureFixture[str]
ASK = {"model": "koala", "prompt": "Once upon a time", "temperature": 0.0}
LONG = {**ASK, "max_tokens": 250, "ignore_eos": True, "n": 16, "stream": True}  # seconds, with one slot


def test_models_have_names(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    step = tmp_path / "run" / "checkpoints" / "500"
    step.mkdir(parents=True)
    given = [f"{tmp_path}/a=b", str(step), f"mine={tmp_path}", "other=relative/path/", "last"]
    assert named_models(given) == {
        "a=b": tmp_path / "a=b",
        "run-500": step,
        "mine": tmp_path,
        "other": Path("relative/path"),
        "last": Path("last"),
    }
    with pytest.raises(UserError, match="two models are called hf: name them, --model=hf-2=b/hf"):
        named_models(["a/hf", "b/hf"])


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--model=TMP/none"], 1, "TMP/none: neither a work directory (checkpoints/) nor a Hugging Face folder"),
        (["--model=TMP"], 1, "TMP: neither a work directory"),
        (["--model=DIR", "--api_key_file=TMP/none"], 1, "TMP/none: the API keys cannot be read"),
        (["--model=DIR", "--model=DIR"], 1, "two models are called koala: name them"),
        (["--model=DIR", "--template=llama"], 1, "unknown template 'llama'; known templates are koala"),
        (["--model=DIR", "--port=BUSY"], 1, "cannot listen on 127.0.0.1:BUSY: Address already in use"),
        (
            ["--model=DIR", "--port=0", "--context=9999"],
            1,
            "context must be from 2 to the model's length 512, got 9999",
        ),
        (["--model=DIR", "--port=0", "--tensor=3"], 1, "mesh tensor=3: the model's n_kv_heads"),
        (["chat", "--model=TMP/none"], 1, "TMP/none: neither a work directory"),
        (["--model=DIR", "--port=99999"], 2, "99999 must be at least 0 and at most 65535"),
        (["--model=DIR", "--slots=none"], 2, "'none' is not a number"),
        ([], 2, "--model"),
    ],
)
def test_mistakes_are_told(
    folder: Path, tmp_path: Path, capsys: Capture, arguments: list[str], status: int, sentence: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        places = {"TMP": str(tmp_path), "DIR": str(folder), "BUSY": str(busy.getsockname()[1])}

        def fill(text: str) -> str:
            for name, place in places.items():
                text = text.replace(name, place)
            return text

        with pytest.raises(SystemExit) as end:
            run_command(main, [fill(argument) for argument in arguments])
    assert end.value.code == status
    printed = capsys.readouterr()
    assert fill(sentence) in printed.err
    if status == 1:
        assert (printed.err.count("\n"), printed.out) == (1, "")


@contextmanager
def server(folder: Path, cache: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server as a process of its own; yield it and its address."""
    command = [sys.executable, "-m", "easylm_like.serve", f"--model={folder}", "--port=0", "--slots=1", "--context=256"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_COMPILATION_CACHE_DIR": str(cache),  # for the second one
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    process = subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving on "):
                break
        else:
            raise AssertionError(process.communicate()[1])
        assert lines[0] == "koala: context 256, slots 1, template koala\n"
        yield process, lines[-1].removeprefix("serving on ").strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_a_server_begins_answers_and_ends_without_losing_an_answer(folder: Path, cache: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-test\n")
    with server(folder, cache, f"--api_key_file={keys}", "--max_tokens=7") as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0, timeout=60) as client:
            assert httpx2.get(f"{url}/ready").status_code == 200
            chat = client.chat.completions.create(model="koala", messages=[{"role": "user", "content": "Hi"}])
            assert chat.usage.completion_tokens <= 7
            fields = {**ASK, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            whole = client.completions.create(**fields).choices[0].text
            texts = [""] * 8  # one after the other in the one slot: seconds
            for number, chunk in enumerate(client.completions.create(**fields, n=8, stream=True)):
                if number == 0:
                    process.send_signal(signal.SIGTERM)
                    refused = wait_for_refusal(client)
                    assert refused.status_code == 503
                    assert refused.response.headers["retry-after"] == "1"
                texts[chunk.choices[0].index] += chunk.choices[0].text
            assert texts == [whole] * 8
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output == ""
        assert "Traceback" not in errors
        assert re.search(r"^\S+ \S+ 127\.0\.0\.1 POST /v1/chat/completions 200 [0-9.]+s$", errors, re.MULTILINE)
        assert "sk-test" not in errors
        assert "Once upon" not in errors


def wait_for_refusal(client: openai.OpenAI) -> openai.APIStatusError:
    """Ask until the server takes no more requests."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            client.chat.completions.create(model="koala", messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
        except openai.APIStatusError as error:
            return error
    raise AssertionError("it still answers")


@pytest.mark.slow
def test_grace_ends_and_a_second_signal_ends_at_once(folder: Path, cache: Path) -> None:
    with server(folder, cache, "--grace=0.2") as (process, url):
        with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as stream:
            parts = stream.iter_text()
            text = next(parts)
            process.send_signal(signal.SIGTERM)
            assert "could not finish this answer" in (text + "".join(parts)).split("\n\n")[-2]
        assert process.wait(timeout=20) == 0
    with (
        server(folder, cache, "--grace=60") as (process, url),
        httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as stream,
    ):
        next(stream.iter_raw())
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM
