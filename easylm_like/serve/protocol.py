"""The bodies of POST requests: OpenAI's fields, as strict as its server and as tolerant as its clients need.

An explicit null means the default (LangChain sends them), an unknown field is ignored. A known field that this server
does not do is refused if leaving it out would change the answer. Beyond OpenAI's: top_k, min_p, repetition_penalty,
ignore_eos, `marker` and `wording` (which answer a model with good and bad markers is asked for), `documents`, and
`add_special_tokens` for plain prompts.
"""

from collections.abc import Callable
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from easylm_like.serve.failures import ApiError, invalid
from easylm_like.serve.request import MOST_ALTERNATIVES

MOST_STOPS = 16
MOST_CHOICES = 16  # n
MOST_PROMPTS = 1024  # in one request for completions
MOST_WORDING = 999  # no template has as many
Allowed = Callable[[object], bool]


def _nothing(_: object) -> bool:
    return False


# A field and what it may hold here, because it changes nothing then. First OpenAI's, then those of vLLM and llama.cpp.
_REFUSED_EVERYWHERE: dict[str, Allowed] = {
    "moderation": _nothing,
    **dict.fromkeys(
        ("allowed_token_ids", "bad_words", "logits_processors", "stop_token_ids"), lambda value: value == []
    ),
    **dict.fromkeys(("guided_choice", "guided_grammar", "guided_json", "guided_regex", "structured_outputs"), _nothing),
    **dict.fromkeys(("grammar", "json_schema"), lambda value: value in ("", {})),
    "include_stop_str_in_output": lambda value: value is False,
    "min_tokens": lambda value: value == 0,
    "prompt_logprobs": _nothing,
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "truncate_prompt_tokens": _nothing,
    "use_beam_search": lambda value: value is False,
}
_REFUSED_IN_CHAT: dict[str, Allowed] = {
    **_REFUSED_EVERYWHERE,
    "add_generation_prompt": lambda value: value is True,
    "audio": _nothing,
    "chat_template": _nothing,
    "chat_template_kwargs": lambda value: value == {},
    "continue_final_message": lambda value: value is False,
    "echo": lambda value: value is False,
    "function_call": lambda value: value == "none",
    "functions": lambda value: value == [],
    "modalities": lambda value: value == ["text"],
    "tool_choice": lambda value: value in ("auto", "none"),
    "web_search_options": _nothing,
}
_REFUSED_IN_COMPLETIONS: dict[str, Allowed] = {**_REFUSED_EVERYWHERE, "suffix": lambda value: value == ""}


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a text or a list of texts, none of them empty")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"must be at most {MOST_STOPS} texts")
    return stops


def _prompts(value: object) -> object:
    prompts = value if isinstance(value, list) else [value]
    if prompts and all(isinstance(item, int) and not isinstance(item, bool) for item in prompts):
        prompts = [prompts]
    if not prompts or not all(isinstance(prompt, str) or _ids(prompt) for prompt in prompts):
        raise ValueError("must be a text, a list of token ids, or a list of several such prompts")
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(f"must be at most {MOST_PROMPTS} prompts")
    return prompts


def _ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)


def _content(value: object) -> object:
    """Return the text of a message that may come in parts; other parts than text would be lost, so they are refused."""
    if not isinstance(value, list):
        return value
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        text = part.get("text") if isinstance(part, dict) and kind == "text" else None
        if not isinstance(text, str):
            raise ValueError(f"must be text or a list of text parts; part {number} is {_short(kind)}")
        texts.append(text)
    return "\n".join(texts)


class _Fields(BaseModel):
    """An object in which null means that a field was left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_defaults(cls, fields: object) -> object:
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class ChatMessage(_Fields):
    """One message; what else it carries (tool_calls, name, ...) is for the model's own template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_content)] = None
    quality: Literal["good", "bad"] | None = None
    wording: Annotated[int, Field(ge=0, le=MOST_WORDING)] = 0
    tool_calls: list[dict[str, object]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("must have content")
        if self.role != "assistant" and (self.quality or self.wording):
            raise ValueError("must be an assistant's to have a quality or a wording")
        return self

    def fields(self) -> dict[str, object]:
        """Return the message as a template reads it: `content` as text, the arguments of calls as objects."""
        fields = {**self.model_dump(exclude_unset=True), "content": self.content}
        if self.tool_calls is not None:
            fields["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return fields


def _with_arguments(call: dict[str, object]) -> dict[str, object]:
    """Return a tool call with its arguments decoded: OpenAI sends JSON in a string, templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": _decoded(function["arguments"])}}
    except ValueError as error:
        raise invalid(f"the arguments of a tool call must be JSON: {error}", param="messages") from error


class StreamOptions(_Fields):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class _Body(_Fields):
    """What both kinds of request have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0  # vLLM's clients say -1 for all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] = 0
    marker: Literal["good", "bad"] | None = None
    wording: Annotated[int, Field(ge=0, le=MOST_WORDING)] = 0
    tools: list[dict[str, object]] = []
    tool_choice: str = "auto"
    documents: list[dict[str, object]] = []

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: object) -> object:
        return _refused(fields, _REFUSED_IN_CHAT)

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self


class CompletionBody(_Body):
    """POST /v1/completions. `max_tokens` 0 with `echo` only scores the prompt."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] = 16  # OpenAI's default
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: object) -> object:
        return _refused(fields, _REFUSED_IN_COMPLETIONS)

    @model_validator(mode="after")
    def _best_are_all(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of is not supported: leave it out or make it n ({self.n}), got {self.best_of}")
        return self


Body = TypeVar("Body", ChatBody, CompletionBody)


def read_request(kind: type[Body], content: bytes) -> Body:
    """Check a request's JSON.

    Raises:
        ApiError: 400, with one sentence that names the field, what was got and what was wanted.
    """
    try:
        fields = _decoded(content)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise invalid(f"the body must be a JSON object, got {_short(fields)}")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explained(error) from error


def _decoded(content: bytes | str) -> object:
    """Return what JSON says, or raise ValueError; unlike Python's own reader it takes no half characters."""
    try:
        return TypeAdapter(object).validate_json(content)
    except ValidationError as error:
        raise ValueError(error.errors(include_url=False)[0]["ctx"]["error"]) from None


def _refused(fields: object, table: dict[str, Allowed]) -> object:
    if isinstance(fields, dict):
        for name, value in fields.items():
            if name in table and value is not None and not table[name](value):
                raise invalid(f"{name} {_short(value)} is not supported by this server", param=name, code="unsupported")
    return fields


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = ""
    for step in first["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    if first["type"] == "missing":
        return invalid(f"{path} is required", param=path)
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    for words, ours in (("Input should", "must"), ("List should", "must"), (" after validation", "")):
        reason = reason.replace(words, ours)
    if not path:  # a sentence about several fields, complete in itself
        return invalid(reason)
    got = "" if first["type"].endswith(("too_short", "too_long")) else f", got {_short(first['input'])}"
    return invalid(f"{path} {reason[0].lower()}{reason[1:]}{got}", param=path)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
