"""An engine's outputs as OpenAI's JSON, for chats and for completions, whole and as the chunks of a stream."""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from easylm_like.data.tokenizer import Tokenizer
from easylm_like.serve.asked import Asked
from easylm_like.serve.failures import Json
from easylm_like.serve.logprobs import AnswerOffsets, chat_logprobs, prompt_offsets, text_logprobs
from easylm_like.serve.request import Counts, Finish, Output, Request, TokenLogprob


class Form(Protocol):
    """What differs between chats and completions."""

    kind: str  # `object` of a whole answer
    chunk_kind: str
    id_prefix: str

    def opening(self, index: int) -> Json | None:
        """Return the choice that is sent before the first token."""

    def piece(self, index: int, output: Output) -> Json:
        """Return a choice with what is new."""

    def end(self, index: int, finish: str) -> Json:
        """Return the choice that says why the answer ended."""

    def whole(self, index: int, outputs: Sequence[Output], finish: str) -> Json:
        """Return a complete choice."""


def chat_form(tokenizer: Tokenizer, stop_ids: Iterable[int], asked: Asked) -> Form:
    """Return how chats are written."""
    return _ChatForm(tokenizer, frozenset(stop_ids), asked)


def text_form(tokenizer: Tokenizer, asked: Asked) -> Form:
    """Return how completions are written."""
    return _TextForm(tokenizer, asked)


@dataclass(slots=True)
class _ChatForm:
    """Choices of /v1/chat/completions. The end-of-answer token, which is no text, has no log-probability there."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    asked: Asked
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"
    id_prefix: str = "chatcmpl-"

    def opening(self, index: int) -> Json:
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)

    def piece(self, index: int, output: Output) -> Json:
        return self._chunk(index, {"content": output.text}, self._logprobs(index, [output]))

    def end(self, index: int, finish: str) -> Json:
        return {**self._chunk(index, {}, None), "finish_reason": finish}

    def whole(self, index: int, outputs: Sequence[Output], finish: str) -> Json:
        message = {"role": "assistant", "content": "".join([output.text for output in outputs]), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index, outputs),
            "finish_reason": finish,
        }

    def _chunk(self, index: int, delta: Json, logprobs: Json | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, index: int, outputs: Sequence[Output]) -> Json | None:
        request = self.asked.requests[index]
        if request.top_logprobs is None:
            return None
        entries = [entry for output in outputs for entry in output.logprobs]
        if entries and outputs[-1].finish == Finish.STOP and not request.ignore_eos and entries[-1].id in self.stop_ids:
            entries.pop()
        return chat_logprobs(self.tokenizer, entries)


@dataclass(slots=True)
class _TextForm:
    """Choices of /v1/completions. Every token that was generated has a log-probability, the end-of-answer one too."""

    tokenizer: Tokenizer
    asked: Asked
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    id_prefix: str = "cmpl-"
    _begun: dict[int, AnswerOffsets] = field(default_factory=dict)

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, output: Output) -> Json:
        return self._choice(index, [output], None)

    def end(self, index: int, finish: str) -> Json:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish}

    def whole(self, index: int, outputs: Sequence[Output], finish: str) -> Json:
        return self._choice(index, outputs, finish)

    def _choice(self, index: int, outputs: Sequence[Output], finish: str | None) -> Json:
        request, first = self.asked.requests[index], index not in self._begun
        echo = self.asked.echo[index // self.asked.n] if self.asked.echo is not None else ""
        offsets = self._begun.setdefault(index, AnswerOffsets(len(echo)))
        text = "".join([echo if first else "", *(output.text for output in outputs)])
        logprobs = None
        if request.top_logprobs is not None:
            ids, entries, places = self._prompt(request, outputs[0], echo) if first else ([], [], [])
            answer = [id_ for output in outputs for id_ in output.ids]
            entries += [entry for output in outputs for entry in output.logprobs]
            places += offsets.take(self.tokenizer, answer)
            logprobs = text_logprobs(self.tokenizer, [*ids, *answer], entries, places)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _prompt(
        self, request: Request, output: Output, echo: str
    ) -> tuple[list[int], list[TokenLogprob | None], list[int]]:
        if output.prompt_logprobs is None:
            return [], [], []
        ids = request.prompt.tolist()
        return ids, list(output.prompt_logprobs), prompt_offsets(self.tokenizer, ids, echo)


@dataclass(slots=True)
class Reply:
    """One HTTP answer: what all its parts share, and the tokens of its texts."""

    form: Form
    model: str
    asked: Asked
    id: str = ""
    created: int = 0
    _counts: dict[int, Counts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = self.form.id_prefix + uuid.uuid4().hex
        self.created = int(time.time())

    def count(self, index: int, output: Output) -> None:
        """Remember how many tokens choice `index` has by now."""
        self._counts[index] = output.counts

    def whole(self, outputs: Sequence[Sequence[Output]]) -> Json:
        """Return the whole answer; `outputs` are those of each choice."""
        choices = [self.form.whole(index, parts, _reason(parts[-1])) for index, parts in enumerate(outputs)]
        return {**self._head(self.form.kind), "choices": choices, "usage": self.usage()}

    def openings(self, *, with_usage: bool) -> Iterator[Json]:
        """Yield the chunks that come before the first token."""
        for index in range(len(self.asked.requests)):
            opening = self.form.opening(index)
            if opening is not None:
                yield self._chunk(opening, with_usage=with_usage)

    def chunks(self, index: int, output: Output, *, with_usage: bool) -> Iterator[Json]:
        """Yield the chunks for an engine's output; with usage wanted at the end, they say that it is yet to come."""
        tells = output.text or output.logprobs or output.prompt_logprobs or (self.asked.echo and not self._known(index))
        if tells:
            yield self._chunk(self.form.piece(index, output), with_usage=with_usage)
        self.count(index, output)
        if output.finish is not None:
            yield self._chunk(self.form.end(index, _reason(output)), with_usage=with_usage)

    def usage_chunk(self) -> Json:
        """Return the chunk that ends a stream whose client wants to know the usage."""
        return {**self._head(self.form.chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> Json:
        """Return the tokens so far; the prompt of several choices counts once, as OpenAI counts it."""
        firsts = [counts for index, counts in self._counts.items() if index % self.asked.n == 0]
        prompt, answer = sum(c.prompt for c in firsts), sum(c.answer for c in self._counts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached for c in firsts)},
        }

    def _known(self, index: int) -> bool:
        return index in self._counts

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json, *, with_usage: bool) -> Json:
        chunk = {**self._head(self.form.chunk_kind), "choices": [choice]}
        return {**chunk, "usage": None} if with_usage else chunk


def _reason(output: Output) -> str:
    assert output.finish in (Finish.STOP, Finish.LENGTH), output.finish  # every other end is an error of its own
    return str(output.finish)
