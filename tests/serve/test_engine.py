"""The engine against transformers on a real model: alone, in a full batch, over cache borders, with every setting."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers

from easylm_like.convert.load import OpenModel, open_model
from easylm_like.errors import UserError
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.serve.engine import Engine, EngineConfig
from easylm_like.serve.request import Finish, Request, Sampling, TokenLogprob

from .asking import ask, ask_one

TEXTS = ("Once upon a time", "The", "One day, Lily and Ben went to the park. They saw a big", "\n\n", "Tom said: no")
NEW = 24


def new_engine(model: OpenModel, mesh: MeshConfig | None = None, **settings: object) -> Engine:
    config = mesh or MeshConfig(fsdp=1)
    devices = jax.devices()[: config.fsdp * config.tensor]
    return Engine(model, make_mesh(config, devices), EngineConfig(**{"slots": 4, "context": 512, **settings}))


@pytest.fixture(scope="module")
def model(shared_data) -> OpenModel:
    return open_model(shared_data / "models" / "stories260K-hf")


@pytest.fixture(scope="module")
def engine(model: OpenModel) -> Iterator[Engine]:
    engine = new_engine(model)
    yield engine
    assert engine.snapshot().compilations == 0  # whatever the tests of this module asked
    engine.close()


@pytest.fixture(scope="module")
def theirs(model: OpenModel) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(model.path).eval()


@pytest.fixture(scope="module")
def prompts(model: OpenModel) -> list[np.ndarray]:
    return [ids for ids, _ in model.tokenizer.encode(["<s>" + text for text in TEXTS])]


@pytest.fixture(scope="module")
def story(model: OpenModel, shared_data) -> np.ndarray:
    text = (shared_data / "corpora" / "tinystories_sample.txt").read_text()[:4000]
    return model.tokenizer.encode(["<s>" + text])[0][0]


def continued(model: transformers.LlamaForCausalLM, prompt: np.ndarray, new: int = NEW, **settings: object) -> list:
    ids = torch.tensor(prompt, dtype=torch.long)[None]
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **settings
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(prompt) :].tolist()


def their_logprobs(model: transformers.LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor(ids, dtype=torch.long)[None]).logits[0], -1).numpy()


def greedy(prompt: np.ndarray, new: int = NEW, **others: object) -> Request:
    return Request(prompt=prompt, max_tokens=new, ignore_eos=True, **others)


def test_greedy_ids_are_those_of_transformers_alone_and_in_a_full_batch(engine, theirs, prompts) -> None:
    wanted = [continued(theirs, prompt) for prompt in prompts]
    assert [ask(engine, [greedy(prompt)])[0].ids for prompt in prompts] == wanted
    several = ask(engine, [greedy(prompt) for prompt in prompts * 4])  # five times as many as there are slots
    assert [answer.ids for answer in several] == wanted * 4
    assert {answer.finish for answer in several} == {Finish.LENGTH}


def test_texts_of_all_lengths_grow_over_the_borders_of_caches(engine, theirs, story) -> None:
    lengths = (1, 15, 16, 17, 63, 64, 65, 200, 250, 255, 256, 257, 300, 400, 470)
    wanted = [continued(theirs, story[:length], 40) for length in lengths]
    answers = ask(engine, [greedy(story[:length], 40) for length in lengths])
    assert [answer.ids for answer in answers] == wanted


def test_an_answer_ends_where_the_context_does(engine, story) -> None:
    answer = ask(engine, [greedy(story[:500], 100)])[0]
    assert (len(answer.ids), answer.finish) == (12, Finish.LENGTH)
    with pytest.raises(UserError, match="the prompt has 512 tokens; with the answer there is room for 512"):
        engine.submit(greedy(story[:512]), print)


def test_the_end_of_a_text_ends_the_answer(engine, theirs, model, story) -> None:
    prompt = model.tokenizer.encode(["<s>The end."])[0][0]
    wanted = continued(theirs, prompt, 200)
    end = next(token for token in wanted if wanted.count(token) < 8)
    biased = Sampling(logit_bias={model.tokenizer.eos_id: 100.0})
    answer = ask(engine, [Request(prompt=prompt, max_tokens=8, sampling=biased)])[0]
    assert (answer.ids, answer.text, answer.finish) == ([model.tokenizer.eos_id], "", Finish.STOP)
    ignored = ask(engine, [Request(prompt=prompt, max_tokens=8, sampling=biased, ignore_eos=True)])[0]
    assert (ignored.ids, ignored.finish) == ([model.tokenizer.eos_id] * 8, Finish.LENGTH)
    banned = ask(engine, [Request(prompt=prompt, max_tokens=200, sampling=Sampling(logit_bias={end: -100.0}))])[0]
    assert end not in banned.ids


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(engine, theirs, prompts, penalty) -> None:
    wanted = [continued(theirs, prompt, repetition_penalty=penalty) for prompt in prompts]
    sampling = Sampling(repetition_penalty=penalty)
    assert [a.ids for a in ask(engine, [greedy(prompt, sampling=sampling) for prompt in prompts])] == wanted
    plain = [continued(theirs, prompt) for prompt in prompts]
    which = next(n for n in range(len(prompts)) if wanted[n] != plain[n])
    mixed = ask(engine, [greedy(prompts[which], sampling=sampling), greedy(prompts[which])])
    assert [a.ids for a in mixed] == [wanted[which], plain[which]]  # a neighbour without penalties is left alone


def test_presence_and_frequency_are_taken_off_as_openai_says(engine, theirs, prompts) -> None:
    prompt, answer = prompts[0], []
    for _ in range(80):
        logits = their_logprobs(theirs, np.append(prompt, np.array(answer, np.int32)))[-1]
        counts = np.bincount(answer, minlength=len(logits))
        answer.append(int(np.argmax(logits - 2.0 * (counts > 0) - 1.0 * counts)))
    sampling = Sampling(presence_penalty=2.0, frequency_penalty=1.0)
    both = ask(engine, [greedy(prompt, 80, sampling=sampling), greedy(prompts[1])])
    assert both[0].ids == answer
    assert both[0].ids != continued(theirs, prompt, 80)


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(engine, prompts) -> None:
    def drawn(seed: int, **others: float) -> Request:
        return greedy(prompts[0], sampling=Sampling(temperature=1.0, seed=seed, **others))

    settings = ({}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"frequency_penalty": 1.0})
    requests = [drawn(seed, **others) for seed in (0, 2**63 + 5) for others in settings]
    alone = [ask(engine, [request])[0].ids for request in requests]
    assert len({tuple(ids) for ids in alone}) > 6
    crowd = ask(engine, [*requests, *(greedy(prompt) for prompt in prompts), *reversed(requests)])
    assert [answer.ids for answer in crowd[: len(requests)]] == alone
    assert [answer.ids for answer in crowd[: -len(requests) - 1 : -1]] == alone


def test_log_probabilities_are_the_models_own(engine, theirs, prompts) -> None:
    hot = Sampling(temperature=0.5, repetition_penalty=1.5, seed=4)
    for prompt, sampling in ((prompts[0], Sampling()), (prompts[2], hot)):
        answer = ask(engine, [greedy(prompt, sampling=sampling, top_logprobs=3), greedy(prompts[1])])[0]
        wanted = their_logprobs(theirs, np.append(prompt, np.array(answer.ids, np.int32)))[len(prompt) - 1 : -1]
        assert [one.id for one in answer.logprobs] == answer.ids
        np.testing.assert_allclose([one.logprob for one in answer.logprobs], wanted[range(NEW), answer.ids], atol=2e-4)
        for one, row in zip(answer.logprobs, wanted, strict=True):
            assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:3].tolist()
            np.testing.assert_allclose([value for _, value in one.top], np.sort(row)[::-1][:3], atol=2e-4)


def scored(scores: tuple[TokenLogprob | None, ...] | None) -> tuple[list[int], list[float]]:
    assert scores is not None
    assert scores[0] is None
    return [one.id for one in scores[1:] if one], [one.logprob for one in scores[1:] if one]


@pytest.mark.parametrize("length", [1, 2, 16, 17, 100, 257, 300, 511])
def test_a_prompt_is_scored_over_all_its_chunks(engine, theirs, story, length) -> None:
    prompt = story[:length]
    answer = ask_one(engine, prompt, 1, prompt_logprobs=2, top_logprobs=0)
    ids, values = scored(answer.outputs[0].prompt_logprobs)
    wanted = their_logprobs(theirs, prompt)
    assert ids == prompt[1:].tolist()
    np.testing.assert_allclose(values, wanted[range(length - 1), ids], atol=3e-4)
    assert answer.logprobs[0].logprob == pytest.approx(wanted[-1].max(), abs=2e-4)
    only = ask_one(engine, prompt, 0, prompt_logprobs=2)
    assert (only.ids, only.text, only.finish) == ([], "", Finish.LENGTH)
    assert scored(only.last.prompt_logprobs) == (ids, values)


def test_a_stop_string_over_the_border_of_tokens_ends_the_text_before_it(engine, model, prompts) -> None:
    whole = ask(engine, [greedy(prompts[0])])[0]
    pieces = [output.text for output in whole.outputs if output.text]
    middle = len(pieces) // 2
    stop = pieces[middle][-1] + pieces[middle + 1][0]
    assert stop not in pieces
    answer = ask(engine, [greedy(prompts[0], stop=("never", stop))])[0]
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.finish == Finish.STOP
    assert answer.last.counts.answer == len(answer.ids) < len(whole.ids)
    assert model.tokenizer.decode([*prompts[0], *answer.ids]).rfind(answer.text + stop) > 0


def test_what_could_be_a_stop_string_comes_when_it_is_none(engine, prompts) -> None:
    whole = ask(engine, [greedy(prompts[0])])[0].text
    held = ask(engine, [greedy(prompts[0], stop=(whole + "and more",))])[0]
    assert held.text == whole
    assert [bool(output.text) for output in held.outputs] == [False] * (NEW - 1) + [True]


def test_a_prompt_that_begins_like_an_earlier_text_is_read_from_where_it_differs(model, theirs, story) -> None:
    engine = new_engine(model)
    first = ask_one(engine, story[:100], 20, ignore_eos=True)
    assert first.last.counts.cached == 0
    turn = np.concatenate([story[:100], np.array(first.ids, np.int32), story[100:130]])
    requests = {
        "the same": (story[:100], 99),
        "its beginning": (story[:60], 59),
        "the next turn": (turn, 119),  # the last token of an answer is never read
        "another end": (np.append(story[:80], story[200:230]), 80),
        "too short to copy": (story[:10], 0),
        "another text": (story[300:400], 0),
    }
    for name, (prompt, known) in requests.items():
        answer = ask_one(engine, prompt, 20, ignore_eos=True)
        assert (name, answer.last.counts.cached) == (name, known)
        assert answer.ids == continued(theirs, prompt, 20), name
    scored_again = ask_one(engine, story[:100], 1, prompt_logprobs=0)
    assert scored_again.last.counts.cached == 0  # every place needs its logits
    together = ask(engine, [greedy(story[400:460], sampling=Sampling(temperature=1, seed=n)) for n in range(4)])
    assert [answer.last.counts.cached for answer in together] == [0, 59, 59, 59]
    assert engine.snapshot().compilations == 0
    engine.close()


def test_what_is_kept_of_past_texts_is_bounded(model, story) -> None:
    small = new_engine(model, slots=1, context=256, prefix_gib=3 * 256 * 5 * 4 * 8 * 2 * 4 / 2**30)  # three rows of 256
    starts = (0, 100, 200, 300, 0, 300)
    cached = [ask_one(small, story[start : start + 40], 2).last.counts.cached for start in starts]
    assert cached == [0, 0, 0, 0, 0, 39]
    small.close()
    none = new_engine(model, slots=1, context=256, prefix_gib=0)
    assert [ask_one(none, story[:40], 2).last.counts.cached for _ in range(2)] == [0, 0]
    none.close()


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=1, tensor=4), MeshConfig(fsdp=2, tensor=2)], ids=str)
def test_a_mesh_changes_no_id(model, theirs, prompts, story, mesh) -> None:
    engine = new_engine(model, mesh, slots=2, context=256)
    texts = [*prompts, story[:200]]
    answers = ask(engine, [greedy(prompt) for prompt in texts])
    assert [answer.ids for answer in answers] == [continued(theirs, prompt) for prompt in texts]
    assert engine.snapshot().compilations == 0
    engine.close()


def test_a_mesh_that_does_not_divide_the_heads_is_a_sentence(model) -> None:
    with pytest.raises(UserError, match="mesh tensor=8: the model's n_kv_heads 4 and d_ff 172 does not divide by it"):
        new_engine(model, MeshConfig(fsdp=1, tensor=8))


def test_one_size_gives_the_same_numbers_to_the_bit(model, prompts, story) -> None:
    engine = new_engine(model, one_size=True)
    requests = [greedy(prompt, top_logprobs=2, sampling=Sampling(temperature=1, seed=3)) for prompt in prompts]
    alone = [ask(engine, [request])[0].logprobs for request in requests]
    crowd = [answer.logprobs for answer in ask(engine, [greedy(story[:300]), *requests, *requests[::-1]])[1:]]
    assert crowd == [*alone, *alone[::-1]]
    engine.close()


def test_int8_weights_change_little(model, engine, story) -> None:
    narrow = new_engine(model, slots=1, int8=True)
    both = [ask_one(one, story[:500], 0, prompt_logprobs=0).last.prompt_logprobs for one in (engine, narrow)]
    exact, rounded = (np.array(scored(scores)[1]) for scores in both)
    assert 0 < np.abs(exact - rounded).max() < 0.5
    assert abs(exact.mean() - rounded.mean()) < 0.01  # nats a token
    narrow.close()


def test_a_request_that_means_nothing_is_a_sentence(engine, prompts) -> None:
    good = greedy(prompts[0])
    for request, sentence in (
        (replace(good, prompt=np.array([], np.int32)), "the prompt has no token"),
        (replace(good, prompt=np.array([1, 512], np.int32)), "token ids must be from 0 to 511, got 1 to 512"),
        (replace(good, max_tokens=0), "max_tokens must be at least 1, got 0"),
        (replace(good, top_logprobs=21), "top_logprobs must be from 0 to 20, got 21"),
        (replace(good, sampling=Sampling(temperature=-1)), "temperature must be 0 or more, got -1"),
        (replace(good, sampling=Sampling(top_p=0)), "top_p must be above 0 and at most 1, got 0"),
        (replace(good, sampling=Sampling(temperature=float("nan"))), "temperature must be 0 or more, got nan"),
        (replace(good, sampling=Sampling(logit_bias={512: 1})), "logit_bias: token ids must be from 0 to 511, got 512"),
    ):
        with pytest.raises(UserError, match=sentence):
            engine.submit(request, print)
