"""Answers of a model that is in memory: to the fixed prompts of a run, and to whoever else has messages to answer."""

from collections.abc import Sequence

from easylm_like.data.conversation import Message, Quality
from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.model.config import LlamaConfig
from easylm_like.model.generate import Sampling, generate
from easylm_like.model.llama import Params

GREEDY = Sampling()


def answer_texts(
    model: tuple[LlamaConfig, Params],
    spoken: tuple[Template, Tokenizer],
    chats: Sequence[Sequence[Message]],
    quality: Quality,
    *,
    max_new: int,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Return the model's answer to each list of messages (the last one a user's) under the marker `quality`.

    Raises:
        UserError: a prompt does not fit the model with `max_new` more tokens, or the template cannot hold it.
    """
    template, tokenizer = spoken
    texts = [template.prompt(chat, tokenizer.special, quality) for chat in chats]
    prompts = [ids for ids, _ in tokenizer.encode(texts)]
    outputs = generate(*model, prompts, max_new=max_new, stop_ids=(tokenizer.eos_id,), sampling=sampling)
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        before = tokenizer.decode(prompt.tolist())
        text = tokenizer.decode([*prompt.tolist(), *output.tolist()])[len(before) :]
        answers.append(template.read_answer(text, tokenizer.special))
    return answers
