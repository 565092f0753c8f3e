"""Libraries built on OpenAI's interface, against a real model: LangChain, LiteLLM, and lm-eval's API models."""

import asyncio
from pathlib import Path

import pytest

from easylm_like.serve.api import Service
from easylm_like.serve.engine import Engine

from .conftest import Reference, Start

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

STORY = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module")
def url(start: Start, engine: Engine) -> str:
    return start(Service(engines={"koala": engine}))


def chat(reference: Reference, question: str, most: int) -> str:
    ids = reference.chat([{"role": "user", "content": question}])
    return reference.text(ids, most).split("USER:")[0].removeprefix(" ")


def test_langchain(url: str, reference: Reference) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="koala", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=20, max_retries=0)
    wanted = chat(reference, "Who is Lily?", 20)
    assert model.invoke("Who is Lily?").content == wanted
    parts = list(model.stream("Who is Lily?"))
    assert "".join(part.content for part in parts) == wanted

    async def ask() -> list[str]:
        return [answer.content for answer in await model.abatch(["Who is Lily?"] * 3)]

    assert asyncio.run(ask()) == [wanted] * 3


def test_litellm(url: str, reference: Reference) -> None:
    import litellm

    fields = {"model": "openai/koala", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 20}
    messages = [{"role": "user", "content": "Who is Lily?"}]
    wanted = chat(reference, "Who is Lily?", 20)
    assert litellm.completion(**fields, messages=messages).choices[0].message.content == wanted
    parts = litellm.completion(**fields, messages=messages, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == wanted


def test_lm_evals_local_completions(url: str, folder: Path, reference: Reference) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="koala", tokenizer=str(folder), max_length=255, batch_size=2
    )
    pairs = [(STORY, " She liked to play."), (STORY, " Xylophones hum"), ("The", " cat")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (before, after), (total, greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        ids = reference.tokenizer(before + after, add_special_tokens=False)["input_ids"]
        start = len(reference.tokenizer(before, add_special_tokens=False)["input_ids"])
        scores = reference.logprobs(ids)[start - 1 :]
        assert total == pytest.approx(
            sum(float(row[id_]) for row, id_ in zip(scores, ids[start:], strict=True)), abs=1e-3
        )
        assert greedy == (scores.argmax(-1).tolist() == ids[start:])
    settings = {"until": ["."], "max_gen_toks": 30}
    (text,) = model.generate_until([Instance("generate_until", {}, (STORY, settings), 0)])
    ids = reference.tokenizer(STORY, add_special_tokens=False)["input_ids"]
    assert text == reference.text(ids, 30).split(".")[0]


def test_lm_evals_local_chat_completions(url: str, reference: Reference) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    model = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="koala")
    question = JsonChatStr('[{"role": "user", "content": "Who is Lily?"}]')
    settings = {"until": ["\n"], "max_gen_toks": 20}
    (text,) = model.generate_until([Instance("generate_until", {}, (question, settings), 0)])
    assert text == chat(reference, "Who is Lily?", 20).split("\n")[0]
