"""What a model says: answers to the last question of conversations, under a marker of choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from easylm_like.convert.load import LoadedModel
from easylm_like.data.conversation import Conversation, Message, Quality, Role
from easylm_like.data.template import RenderError
from easylm_like.model.generate import Sampling
from easylm_like.train.samples import answer_texts


@dataclass(frozen=True, slots=True)
class Answer:
    """`text` is None where there is no prompt to answer; `problem` then says why. `reference` is the one on file."""

    id: str
    source: str
    marker: str
    question: str
    text: str | None
    reference: str | None
    problem: str | None = None


def answer(
    model: LoadedModel, messages: Sequence[Sequence[Message]], quality: Quality, *, max_new: int, sampling: Sampling
) -> list[str]:
    """Return the model's answer to each list of messages (the last one a user's) under the marker `quality`.

    Raises:
        UserError: a prompt does not fit the model with `max_new` more tokens, or the template cannot hold it.
    """
    weights, spoken = (model.config, model.params), (model.template, model.tokenizer)
    with jax.default_matmul_precision("highest"):
        return answer_texts(weights, spoken, messages, quality, max_new=max_new, sampling=sampling)


def answer_conversations(
    model: LoadedModel, conversations: Sequence[Conversation], quality: Quality, *, max_new: int, sampling: Sampling
) -> list[Answer]:
    """Answer the last user message of every conversation; those that cannot be asked are returned with the problem."""
    cuts = [_cut(conversation) for conversation in conversations]
    problems = [_problem(model, chat, max_new) for chat, _ in cuts]
    asked = [chat for (chat, _), problem in zip(cuts, problems, strict=True) if problem is None]
    texts = iter(answer(model, asked, quality, max_new=max_new, sampling=sampling))
    return [
        Answer(
            id=conversation.id,
            source=conversation.source,
            marker=quality.value,
            question=chat[-1].content if chat else "",
            text=next(texts) if problem is None else None,
            reference=reference,
            problem=problem,
        )
        for conversation, (chat, reference), problem in zip(conversations, cuts, problems, strict=True)
    ]


def _cut(conversation: Conversation) -> tuple[tuple[Message, ...], str | None]:
    """Return (the messages up to the last user's, the assistant message after it if there is one)."""
    last = max((i for i, m in enumerate(conversation.messages) if m.role == Role.USER), default=-1)
    after = conversation.messages[last + 1 :]
    return conversation.messages[: last + 1], after[-1].content if after else None


def _problem(model: LoadedModel, messages: Sequence[Message], max_new: int) -> str | None:
    if not messages:
        return "no user message"
    try:
        text = model.template.prompt(messages, model.tokenizer.special)
    except RenderError as error:
        return str(error)
    length, room = len(model.tokenizer.encode([text])[0][0]), model.config.max_length - max_new
    return None if length <= room else f"prompt of {length} ids, there is room for {room}"
