"""Held-out loss by source and marker, against a recount in transformers, one conversation at a time."""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from easylm_like.data.dataset import TooLong, load_or_tokenize
from easylm_like.data.loader import Batch, Loader, make_loader
from easylm_like.data.template import KOALA
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params, abstract_model
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.heldout import Loss, group_names, heldout_losses
from easylm_like.train.step import group_loss

from .conftest import Twin, conversation

Measure = Callable[..., dict[str, Loss]]


@pytest.fixture
def measure(data: Path, tmp_path: Path, shape: LlamaConfig, params: Params) -> Measure:
    """Return a function that gives the losses of some conversations in batches of so many rows."""

    def load(numbers: range, rows: int) -> Loader:
        path = tmp_path / f"{numbers.start}.jsonl"
        path.write_text("".join(json.dumps(conversation(number)) + "\n" for number in numbers))
        tokenizer = load_tokenizer(data / "tokenizer")
        dataset = load_or_tokenize(
            str(path), KOALA, tokenizer, row_length=64, too_long=TooLong.CUT, cache=tmp_path / "tokens"
        )
        return make_loader(dataset, 64, rows, seed=0, shuffle=False)

    def losses(numbers: range, rows: int, weights: Params = params) -> dict[str, Loss]:
        loader, mesh = load(numbers, rows), make_mesh(MeshConfig())
        loss = jax.jit(partial(group_loss, graphdef=abstract_model(shape)[0], n_groups=len(group_names(loader))))
        with jax.set_mesh(mesh):
            return heldout_losses(loss, weights, loader, mesh)

    return losses


def recount(twin: Twin, data: Path, params: Params, numbers: range) -> dict[str, tuple[float, int]]:
    """Return {group: (mean nll, tokens)}; the prompt is written out by hand, the answers are found by their letters."""
    backend, model = load_tokenizer(data / "tokenizer").backend, twin.model(params)
    nll = defaultdict(list)
    for c in map(conversation, numbers):
        text, groups = "<s>BEGINNING OF CONVERSATION: ", ["" for _ in "<s>BEGINNING OF CONVERSATION: "]
        for question, answer in zip(c["messages"][::2], c["messages"][1::2], strict=True):
            marker = {"good": "GPT:", "bad": "An Unhelpful Answer:"}[answer["quality"]]
            before, after = f"USER: {question['content']} {marker}", f" {answer['content']}</s>"
            text += before + after
            groups += [""] * len(before) + [f"{c['source']}/{answer['quality']}"] * len(after)
        encoding = backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids)[None]
        ones = np.ones_like(ids[:, 1:])
        batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, np.arange(ones.size)[None])
        with torch.no_grad():
            losses = twin.nll(model, batch)[0].tolist()
        for (start, _), loss in zip(encoding.offsets[1:], losses, strict=True):
            nll[groups[start]] += [loss]
    del nll[""]
    nll["all"] = [loss for losses in nll.values() for loss in losses]
    return {group: (float(np.mean(losses)), len(losses)) for group, losses in nll.items()}


def test_groups_are_recounted_and_all_is_weighted_by_tokens(
    measure: Measure, twin: Twin, data: Path, params: Params
) -> None:
    wanted = recount(twin, data, params, range(60, 76))
    got = measure(range(60, 76), 8)
    assert set(got) == set(wanted) == {"all", "ann/good", "ann/bad", "bob/good", "bob/bad"}
    for group, (loss, tokens) in wanted.items():
        assert (got[group].loss, got[group].tokens) == (pytest.approx(loss, rel=1e-5), tokens), group
    spread = [loss for loss, _ in wanted.values()]
    assert max(spread) - min(spread) > 0.05, "swapped groups would not be noticed"


def test_a_batch_that_is_not_full_counts_every_row_once(
    measure: Measure, twin: Twin, data: Path, params: Params
) -> None:
    wanted = recount(twin, data, params, range(62, 64))
    got = measure(range(62, 64), 8)
    assert {group: loss.tokens for group, loss in got.items()} == {group: n for group, (_, n) in wanted.items()}
    assert got["all"].loss == pytest.approx(wanted["all"][0], rel=1e-5)


def test_a_group_without_tokens_is_left_out(measure: Measure) -> None:
    assert set(measure(range(61, 62), 8)) == {"all", "bob/good"}


def test_a_loss_that_is_no_number_is_an_error_that_names_its_groups(measure: Measure, params: Params) -> None:
    broken = params | {"final_norm": params["final_norm"] * float("nan")}
    with pytest.raises(UserError, match="held-out loss of ann/good, ann/bad, bob/good, bob/bad is not a number"):
        measure(range(60, 76), 8, broken)
