"""Decoding against transformers' generate, with real weights; sampling against the distribution that it should have."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from easylm_like.convert.load import LoadedModel
from easylm_like.errors import UserError
from easylm_like.model.config import Attention, Compute
from easylm_like.model.generate import Sampling, generate, sample
from easylm_like.model.llama import param_shardings
from easylm_like.model.partition import MeshConfig, make_mesh

from .conftest import Twins

TEXTS = ("Once upon a time", "The", "One day, Lily and Ben went to the park. They saw a big", "\n\n", "Tom said: no")
NEW = 32


@pytest.fixture(scope="module")
def prompts(stories: LoadedModel) -> list[np.ndarray]:
    return [ids for ids, _ in stories.tokenizer.encode(["<s>" + text for text in TEXTS])]


@pytest.fixture(scope="module")
def theirs(stories: LoadedModel) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(stories.path).eval()


def continued(model: transformers.LlamaForCausalLM, prompt: np.ndarray, stop_ids: tuple[int, ...]) -> list[int]:
    """Return transformers' greedy continuation of one prompt, without the stop id."""
    ids = torch.tensor(prompt, dtype=torch.long)[None]
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[
        0, len(prompt) :
    ].tolist()
    return out[:-1] if out[-1] in stop_ids else out


def decode(model: LoadedModel, prompts: list[np.ndarray], stop: tuple[int, ...] = (), **others: object) -> list[list]:
    answers = generate(model.config, model.params, prompts, max_new=NEW, stop_ids=stop, **others)
    assert {answer.dtype for answer in answers} <= {np.dtype(np.int32)}
    return [answer.tolist() for answer in answers]


def test_greedy_ids_are_those_of_transformers(
    stories: LoadedModel, theirs: transformers.LlamaForCausalLM, prompts: list[np.ndarray]
) -> None:
    assert len({len(prompt) for prompt in prompts}) > 2
    got = decode(stories, prompts)
    assert got == [continued(theirs, prompt, ()) for prompt in prompts]
    assert all(len(answer) == NEW for answer in got)
    assert stories.tokenizer.decode(got[0]).startswith(", there was a little girl named")
    for i in (0, 2):  # alone, with other padding
        assert decode(stories, [prompts[i]]) == [got[i]]


def test_a_stop_id_ends_an_answer_and_is_not_part_of_it(
    stories: LoadedModel, theirs: transformers.LlamaForCausalLM, prompts: list[np.ndarray]
) -> None:
    stop = tuple(stories.tokenizer.backend.token_to_id(piece) for piece in (".", ","))
    got = decode(stories, prompts, stop)
    assert got == [continued(theirs, prompt, stop) for prompt in prompts]
    assert got[0] == []  # the first id was a comma
    assert len({len(answer) for answer in got}) > 2


def test_more_prompts_than_fit_a_batch_come_back_in_order(stories: LoadedModel, prompts: list[np.ndarray]) -> None:
    several = [prompts[i % 5] for i in range(37)]
    alone = decode(stories, prompts)
    assert decode(stories, several) == [alone[i % 5] for i in range(37)]
    assert decode(stories, []) == []


@pytest.mark.parametrize(
    ("name", "scan"), [("gqa", True), ("mistral", False), ("qwen2, tied, with a window", True), ("qwen3", False)]
)
def test_random_weights_of_every_family_too(
    stories: LoadedModel, twins: Callable[[str], Twins], name: str, scan: bool
) -> None:
    both, random = twins(name), np.random.default_rng(0)
    prompts = [random.integers(0, 96, length, dtype=np.int32) for length in (5, 1, 13)]
    model = replace(stories, config=replace(both.config, compute=Compute(scan_layers=scan)), params=both.params)
    assert decode(model, prompts, (7, 8)) == [continued(both.theirs, prompt, (7, 8)) for prompt in prompts]


def test_a_prompt_that_does_not_fit_is_an_error(stories: LoadedModel) -> None:
    fits = np.ones(stories.config.max_length - NEW, np.int32)
    for prompts in ([np.append(fits, 1)], [fits, np.zeros(0, np.int32)]):
        with pytest.raises(UserError, match=f"prompts need 1 to {len(fits)} ids"):
            decode(stories, prompts)


def test_the_text_of_a_seed_does_not_depend_on_its_neighbours(stories: LoadedModel, prompts: list[np.ndarray]) -> None:
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95)
    got = decode(stories, prompts[:3], sampling=sampling, seed=7)
    assert decode(stories, prompts[:3], sampling=sampling, seed=7) == got
    assert decode(stories, prompts[:1], sampling=sampling, seed=7) == got[:1]
    assert decode(stories, prompts[:3], sampling=sampling, seed=8) != got
    first, _, again = decode(stories, [prompts[0], prompts[3], prompts[0]], sampling=sampling, seed=7)
    assert first == got[0] != again  # the same prompt twice is two draws


LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 2.0], np.float32)
ORDER = [1, 3, 5, 0, 4, 2]  # likeliest first
DRAWS = 20_000


def drawn(sampling: Sampling) -> np.ndarray:
    """Return how often each id was drawn."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    ids = jax.jit(jax.vmap(lambda key: sample(sampling, jnp.asarray(LOGITS), key)))(keys)
    return np.bincount(ids, minlength=len(LOGITS))


def expected(temperature: float, keep: int) -> np.ndarray:
    p = np.where(np.isin(np.arange(6), ORDER[:keep]), np.exp(LOGITS.astype(np.float64) / temperature), 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("sampling", "keep"),
    [
        (Sampling(temperature=1.0), 6),
        (Sampling(temperature=0.5), 6),
        (Sampling(temperature=2.0), 6),
        (Sampling(temperature=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_k=6), 6),
        (Sampling(temperature=1.0, top_p=0.7), 2),  # probabilities .45 .27 .16 .06 .02 .003, likeliest first
        (Sampling(temperature=1.0, top_p=0.8), 3),
        (Sampling(temperature=2.0, top_p=0.7), 3),  # .33 .26 .20: the nucleus is of the tempered distribution
        (Sampling(temperature=1.0, top_k=2, top_p=0.6), 1),  # and of what top_k left: .62 .38
        (Sampling(temperature=1.0, top_k=2, top_p=0.65), 2),
    ],
    ids=str,
)
def test_ids_are_drawn_with_their_probabilities(sampling: Sampling, keep: int) -> None:
    counts, p = drawn(sampling), expected(sampling.temperature, keep)
    assert counts[p == 0].sum() == 0
    likely = p > 0
    chi_squared = np.sum((counts[likely] - DRAWS * p[likely]) ** 2 / (DRAWS * p[likely]))
    assert chi_squared < 25  # with at most 5 degrees of freedom once in 7,000 seeds


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0, top_k=1), Sampling(temperature=5.0, top_p=1e-6)],
    ids=str,
)
def test_greedy_by_any_name(sampling: Sampling) -> None:
    assert drawn(sampling).tolist() == [0, DRAWS, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("sizes", "several"),
    [(MeshConfig(), 3), (MeshConfig(fsdp=2, sequence=2, tensor=2), 5)],
    ids=["fewer rows than devices", "all axes"],
)
def test_a_mesh_changes_no_id(stories: LoadedModel, prompts: list[np.ndarray], sizes: MeshConfig, several: int) -> None:
    """As in a training run: the weights lie in parts, and the model trains with chunked attention."""
    mesh, config = make_mesh(sizes), replace(stories.config, compute=Compute(attention=Attention.CHUNKED))
    params = jax.device_put(stories.params, param_shardings(config, mesh))
    with jax.set_mesh(mesh):
        got = generate(config, params, prompts[:several], max_new=8, stop_ids=())
    assert [ids.tolist() for ids in got] == [ids[:8] for ids in decode(stories, prompts)[:several]]
