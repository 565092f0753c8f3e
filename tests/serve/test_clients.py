"""The clients that people have, against a real model: openai's (sync, async, streams) and curl.

What they get is compared with transformers, on the same weights.
"""

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator

import openai
import pytest

from easylm_like.serve.api import Service
from easylm_like.serve.engine import Engine

from .conftest import Reference, Start

TALK = [
    {"role": "user", "content": "Tell me a story about a cat."},
    {"role": "assistant", "content": "There was a cat."},
    {"role": "user", "content": "And a dog?"},
]


@pytest.fixture(scope="module")
def compiled(engine: Engine) -> int:
    """Return how many programs other tests of this process have compiled."""
    return engine.snapshot().compilations


@pytest.fixture(scope="module")
def url(start: Start, engine: Engine, compiled: int) -> str:
    return start(Service(engines={"koala": engine}, keys=("sk-test",)))


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0, timeout=60) as client:
        yield client


def wanted_answer(reference: Reference, most: int, **fields: object) -> str:
    return reference.text(reference.chat(TALK, **fields), most).split("USER:")[0].removeprefix(" ")


def test_openais_client_gets_transformers_answer(client: openai.OpenAI, reference: Reference) -> None:
    for marker in ("good", "bad"):
        answer = client.chat.completions.create(
            model="koala", messages=TALK, temperature=0, max_tokens=40, extra_body={"marker": marker}
        )
        assert answer.choices[0].message.content == wanted_answer(reference, 40, quality=marker)
        assert answer.usage.prompt_tokens == len(reference.chat(TALK, quality=marker))
        assert answer.usage.completion_tokens == 40


def test_streams_say_what_the_whole_says(client: openai.OpenAI, reference: Reference) -> None:
    fields = {"model": "koala", "messages": TALK, "temperature": 0, "max_tokens": 40}
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == wanted_answer(reference, 40)
    assert len(chunks) > 20
    assert chunks[-1].usage.completion_tokens == 40
    with client.chat.completions.stream(**fields) as events:  # openai's own way to put the chunks together
        *_, last = (event for event in events if event.type == "content.delta")
    assert last.snapshot == text


def test_many_at_once_get_what_each_gets_alone(url: str, reference: Reference) -> None:
    prompts = [f"Once upon a time there was a {thing}" for thing in ("cat", "dog", "boat", "tree", "girl", "ball")] * 2

    async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
        answer = await client.completions.create(
            model="koala", prompt=prompt, temperature=0, max_tokens=30, stream=stream
        )
        if not stream:
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, prompt, n % 2 == 0) for n, prompt in enumerate(prompts)))

    texts = [reference.text(reference.tokenizer(prompt)["input_ids"], 30) for prompt in prompts]
    assert asyncio.run(ask_all()) == texts


def test_a_second_turn_is_read_from_the_cache(client: openai.OpenAI) -> None:
    fields = {"model": "koala", "temperature": 0, "max_tokens": 8}
    first = [{"role": "user", "content": "Tell me about the sea and all that lives there, large and small."}]
    client.chat.completions.create(**fields, messages=first)
    again = client.chat.completions.create(**fields, messages=first)
    usage = again.usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 3) -> list[str]:
        answer = client.chat.completions.create(model="koala", messages=TALK, max_tokens=30, seed=seed, n=n)
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content for choice in answer.choices]

    assert texts(1) == texts(1)
    assert len(set(texts(1))) == 3
    assert texts(2, 1) == texts(1)[1:2]  # seeds of choices are counted up


def test_stop_strings_end_an_answer(client: openai.OpenAI, reference: Reference) -> None:
    whole = reference.text(reference.tokenizer("Once upon a time")["input_ids"], 60)
    stop = whole[20:26]
    answer = client.completions.create(
        model="koala", prompt="Once upon a time", temperature=0, max_tokens=60, stop=stop
    )
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_transformers(client: openai.OpenAI, reference: Reference) -> None:
    answer = client.chat.completions.create(
        model="koala", messages=TALK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=5
    )
    prompt = reference.chat(TALK)
    ids = reference.greedy(prompt, 6)
    scores = reference.logprobs([*prompt, *ids])[len(prompt) - 1 :]
    entries = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx(
        [float(row[id_]) for row, id_ in zip(scores, ids, strict=True)], abs=1e-3
    )
    for entry, row in zip(entries, scores, strict=True):
        top = row.topk(5)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert bytes(entry.bytes).decode() == entry.token
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert joined.removeprefix(" ") == answer.choices[0].message.content


def test_echo_scores_a_prompt_as_lm_eval_asks_for_it(client: openai.OpenAI, reference: Reference) -> None:
    ids = reference.tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]
    answer = client.completions.create(
        model="koala", prompt=[ids, ids[:5]], echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1234
    )
    for choice, given in zip(answer.choices, (ids, ids[:5]), strict=True):
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(given) + 1
        assert logprobs.token_logprobs[0] is None
        scores = reference.logprobs(given)
        wanted = [float(row[id_]) for row, id_ in zip(scores, given[1:], strict=True)]
        assert logprobs.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-3)
        best = [max(top, key=top.get) for top in logprobs.top_logprobs[1:]]
        texts = reference.tokenizer.convert_ids_to_tokens([*scores.argmax(-1).tolist(), reference.greedy(given, 1)[0]])
        assert best == [text.replace("▁", " ") for text in texts]


def test_mistakes_become_openais_exceptions(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model="koala", messages=[{"role": "user", "content": "a " * 400}])
    assert refused.value.code == "context_length_exceeded"
    assert refused.value.param == "messages"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-4o", messages=TALK)
    assert missing.value.code == "model_not_found"
    other = client.with_options(api_key="sk-other")
    with pytest.raises(openai.AuthenticationError, match="this API key is not known here"):
        other.models.list()
    assert [model.id for model in client.models.list()] == ["koala"]
    assert client.models.retrieve("koala").max_model_len == 256


def test_a_client_that_goes_frees_its_slot(client: openai.OpenAI, engine: Engine) -> None:
    fields = {"model": "koala", "messages": TALK[:1], "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    before = engine.snapshot().finished.get("cancelled", 0)
    with client.chat.completions.create(**fields, stream=True) as stream:
        next(iter(stream))
    end = time.monotonic() + 5
    while engine.snapshot().running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert engine.snapshot().finished.get("cancelled", 0) == before + 1


def test_curl(url: str) -> None:
    body = json.dumps({"model": "koala", "prompt": "Once upon a time", "max_tokens": 8, "stream": True})
    command = ["curl", "-sN", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    told = subprocess.run([*command, "-H", "Authorization: Bearer sk-test"], capture_output=True, text=True, timeout=30)
    assert told.stdout.startswith("data: {")
    assert told.stdout.endswith("data: [DONE]\n\n")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert json.loads(refused.stdout)["error"]["code"] == "invalid_api_key"


def test_nothing_was_compiled_for_all_this(engine: Engine, compiled: int) -> None:
    assert engine.snapshot().compilations == compiled
