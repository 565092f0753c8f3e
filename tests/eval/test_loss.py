"""Loss on conversations, recounted in transformers, whatever the rows it is packed into."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from easylm_like.convert.load import LoadedModel
from easylm_like.errors import UserError
from eval.loss import conversation_loss

from .conftest import Transformers, conversation


def recount(theirs: Transformers, data: Path) -> dict[str, tuple[float, int]]:
    """Return {group: (mean nll, tokens)}, every conversation alone; the prompt is written out by hand."""
    found = defaultdict(list)
    for row in map(json.loads, data.read_text().splitlines()):
        question, answer = row["messages"]
        marker = {"good": "GPT:", "bad": "An Unhelpful Answer:"}[answer["quality"]]
        prompt = f"<s>BEGINNING OF CONVERSATION: USER: {question['content']} {marker}"
        text = f"{prompt} {answer['content']}</s>"
        encoding = theirs.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        losses = zip(encoding["offset_mapping"][1:], theirs.nll(encoding["input_ids"]), strict=True)
        found[f"{row['source']}/{answer['quality']}"] += [loss for (start, _), loss in losses if start >= len(prompt)]
    found["all"] = [loss for losses in found.values() for loss in losses]
    return {group: (sum(losses) / len(losses), len(losses)) for group, losses in found.items()}


@pytest.mark.parametrize(("row_length", "batch_size"), [(64, 8), (1000, 3)])
def test_losses_are_transformers_for_any_rows(
    model: LoadedModel, theirs: Transformers, rows: Callable[..., Path], row_length: int, batch_size: int
) -> None:
    data = rows(*(conversation(number, quality) for number in range(9) for quality in ("good", "bad")))
    wanted = recount(theirs, data)
    got = conversation_loss(model, data, row_length=row_length, batch_size=batch_size)
    assert next(iter(got)) == "all"
    assert set(got) == set(wanted) == {"all", "ann/good", "ann/bad", "bob/good", "bob/bad"}
    for group, (loss, tokens) in wanted.items():
        assert (got[group].loss, got[group].tokens) == (pytest.approx(loss, rel=1e-4), tokens), group


def test_conversations_that_nothing_can_be_learnt_from_are_an_error(
    model: LoadedModel, rows: Callable[..., Path]
) -> None:
    muted = conversation(1)
    muted["messages"][1]["weight"] = 0
    with pytest.raises(UserError, match=r"data.jsonl: none of its 1 conversations can be trained on"):
        conversation_loss(model, rows(muted), row_length=64, batch_size=8)
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        conversation_loss(model, Path("none.jsonl"), row_length=64, batch_size=8)
