"""A checked HTTP body -> the requests that an engine is given for it: one for each prompt and each of its n answers."""

import secrets
from dataclasses import dataclass, replace
from functools import lru_cache

import tokenizers

from easylm_like.errors import UserError
from easylm_like.serve.chat import PromptError, Speaker, chat_prompt, text_prompt
from easylm_like.serve.failures import invalid
from easylm_like.serve.protocol import ChatBody, CompletionBody
from easylm_like.serve.request import Request, Sampling

SEEDS = 1 << 63  # a seed is taken modulo this; OpenAI's may be negative


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The requests for one HTTP request: choice i of prompt p is number p * n + i. `echo` are the prompts' texts."""

    requests: tuple[Request, ...]
    n: int
    echo: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request gets that says nothing: tokens of a chat's answer, and seconds until it is given up."""

    max_tokens: int = 512
    timeout: float = 600.0


def chat_requests(model: Speaker, context: int, body: ChatBody, defaults: Defaults) -> Asked:
    """Return what a chat asks for.

    Raises:
        ApiError: the model's template cannot hold the messages, the context not the prompt, or a value means nothing.
    """
    _check_text("messages", sum(len(message.content or "") for message in body.messages), model, context)
    try:
        prompt = chat_prompt(
            model,
            [message.fields() for message in body.messages],
            marker=body.marker,
            wording=body.wording,
            tools=() if body.tool_choice == "none" else body.tools,
            documents=body.documents,
        )
    except PromptError as error:
        raise invalid(str(error), param=error.field, code=error.code) from error
    _check_length("messages", len(prompt.ids), context, 1)
    wanted = body.max_completion_tokens or body.max_tokens or defaults.max_tokens
    request = Request(
        prompt=prompt.ids,
        max_tokens=wanted,
        sampling=_sampling(model, body),
        stop=(*body.stop, *prompt.stop),
        gap=prompt.gap,
        ignore_eos=body.ignore_eos,
        top_logprobs=body.top_logprobs if body.logprobs else None,
        timeout=defaults.timeout,
    )
    return Asked(requests=_choices(request, body.n), n=body.n)


def completion_requests(model: Speaker, context: int, body: CompletionBody, defaults: Defaults) -> Asked:
    """Return what a body for /v1/completions asks for.

    Raises:
        ApiError: a prompt is empty, too long for the context or not of the vocabulary, or a value means nothing.
    """
    sampling = _sampling(model, body)
    score = body.logprobs if body.echo else 0 if body.max_tokens == 0 else None
    requests: list[Request] = []
    echo: list[str] = []
    for number, given in enumerate(body.prompt):
        if isinstance(given, str):
            _check_text("prompt", len(given), model, context)
        try:
            ids = text_prompt(model, given, add_special_tokens=body.add_special_tokens)
        except PromptError as error:
            raise invalid(str(error), param=error.field) from error
        _check_length(f"prompt[{number}]" if len(body.prompt) > 1 else "prompt", len(ids), context, body.max_tokens)
        request = Request(
            prompt=ids,
            max_tokens=body.max_tokens,
            sampling=sampling,
            stop=tuple(body.stop),
            ignore_eos=body.ignore_eos,
            top_logprobs=body.logprobs,
            prompt_logprobs=score,
            timeout=defaults.timeout,
        )
        requests += _choices(request, body.n)
        echo.append(given if isinstance(given, str) else model.tokenizer.decode(given))
    return Asked(requests=tuple(requests), n=body.n, echo=tuple(echo) if body.echo else None)


def _check_text(field: str, characters: int, model: Speaker, context: int) -> None:
    """Refuse a text that cannot fit, whatever its tokens are: megabytes take seconds to tokenise."""
    longest = _longest_token(model.tokenizer.backend)
    if characters > context * longest:
        raise invalid(
            f"{field} has {characters} characters; this model's context holds {context} tokens, of at most {longest}",
            param=field,
            code="context_length_exceeded",
        )


@lru_cache(maxsize=16)
def _longest_token(backend: tokenizers.Tokenizer) -> int:
    return max(map(len, backend.get_vocab(with_added_tokens=True)))


def _check_length(field: str, tokens: int, context: int, max_tokens: int) -> None:
    if tokens == 0:
        raise invalid(f"{field} must hold at least one token, got none", param=field)
    if tokens + min(max_tokens, 1) > context:
        raise invalid(
            f"{field} has {tokens} tokens, but this model's context holds {context} for prompt and answer together",
            param=field,
            code="context_length_exceeded",
        )


def _sampling(model: Speaker, body: ChatBody | CompletionBody) -> Sampling:
    sampling = Sampling(
        temperature=body.temperature,
        top_p=max(body.top_p, 1e-6),  # 0, which clients send, keeps the likeliest token alone
        top_k=min(max(body.top_k, 0), model.tokenizer.vocab_size),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_bias(model, body.logit_bias),
        seed=(secrets.randbits(63) if body.seed is None else body.seed) % SEEDS,
    )
    try:
        sampling.check()
    except UserError as error:
        raise invalid(str(error)) from error
    return sampling


def _bias(model: Speaker, biases: dict[str, float]) -> dict[int, float]:
    size = model.tokenizer.vocab_size
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < size):
            raise invalid(f"logit_bias must name token ids from 0 to {size - 1}, got {name[:40]!r}", param="logit_bias")
    return {int(name): bias for name, bias in biases.items()}


def _choices(request: Request, n: int) -> tuple[Request, ...]:
    """Return the request n times, each with a seed of its own."""
    seeds = [(request.sampling.seed + number) % SEEDS for number in range(n)]
    return tuple(replace(request, sampling=replace(request.sampling, seed=seed)) for seed in seeds)
