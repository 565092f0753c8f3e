"""An engine's outputs on their way to one client: whole or as server-sent events, for as long as it is there."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field

from starlette.types import Message, Receive, Send

from easylm_like.errors import UserError
from easylm_like.serve.answers import Batch, Submits, answering
from easylm_like.serve.failures import ApiError, Json, invalid, turned_away
from easylm_like.serve.limits import ClientGone, until_gone
from easylm_like.serve.metrics import Measures
from easylm_like.serve.request import Busy, Closing, Finish, Output
from easylm_like.serve.wire import Reply

GRACE = 5.0  # seconds that an engine may take to end what has run out of time
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events until it has a few kilobytes
]


@dataclass(slots=True, kw_only=True)
class Answer:
    """What one client gets: `reply` says how it is written, `with_usage` that its stream ends with the usage."""

    engine: Submits
    reply: Reply
    stream: bool
    with_usage: bool
    timeout: float
    measures: Measures
    began: float = field(default_factory=time.perf_counter)


async def send_answer(answer: Answer, receive: Receive, send: Send) -> None:
    """Have the engine answer, and send it; what is not finished when this returns or raises is cancelled.

    Raises:
        ApiError: the engine takes no request, or failed before anything was sent.
        ClientGone: the client closed its connection.
    """
    started = False

    async def watched(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        with answering(answer.engine, answer.reply.asked.requests) as batches:
            batches = _timed(answer, batches)
            work = _send_stream(answer, batches, watched) if answer.stream else _send_whole(answer, batches, watched)
            async with asyncio.timeout(answer.timeout + GRACE):
                await _unless_gone(work, receive)
    except TimeoutError:
        if not started:  # else the client does not read: its connection is closed without an end of the stream
            raise _out_of_time(answer.timeout) from None
    except (Busy, Closing) as error:
        raise turned_away(error) from error
    except UserError as error:
        raise invalid(str(error)) from error


async def _unless_gone(work: Coroutine[object, object, None], receive: Receive) -> None:
    task, gone = asyncio.create_task(work), asyncio.create_task(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _send_whole(answer: Answer, batches: AsyncIterator[Batch], send: Send) -> None:
    outputs: list[list[Output]] = [[] for _ in answer.reply.asked.requests]
    async for batch in batches:
        for index, output in batch:
            failed = _failure(output, answer.timeout)
            if failed is not None:
                raise failed
            outputs[index].append(output)
            answer.reply.count(index, output)
    content = await asyncio.to_thread(lambda: _json(answer.reply.whole(outputs)))  # log-probabilities may be megabytes
    await send(_start(200, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]))
    await send(_part(content, more=False))


async def _send_stream(answer: Answer, batches: AsyncIterator[Batch], send: Send) -> None:
    started = False
    try:
        async for block in _blocks(answer, batches):
            if not started:
                await send(_start(200, STREAM_HEADERS))
                started = True
            await send(_part(block))
    except (ApiError, UserError) as error:  # UserError: the engine closed before it had taken all of several prompts
        if not started:
            raise
        failed = error if isinstance(error, ApiError) else ApiError(503, str(error), code="service_unavailable")
        await send(_part(_event(failed.body()), more=False))
        return
    usage = _event(answer.reply.usage_chunk()) if answer.with_usage else b""
    await send(_part(usage + b"data: [DONE]\n\n", more=False))


async def _blocks(answer: Answer, batches: AsyncIterator[Batch]) -> AsyncIterator[bytes]:
    """Yield events, from the first token on: an error that comes before it can have a status of its own."""
    reply, begun = answer.reply, False
    events = [_event(chunk) for chunk in reply.openings(with_usage=answer.with_usage)]
    async for batch in batches:
        for index, output in batch:
            failed = _failure(output, answer.timeout)
            if failed is not None:
                if begun and events:
                    yield b"".join(events)
                raise failed
            events += [_event(chunk) for chunk in reply.chunks(index, output, with_usage=answer.with_usage)]
        if events:
            yield b"".join(events)
        events, begun = [], True


async def _timed(answer: Answer, batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
    """Pass the outputs on, and note how long their tokens took."""
    measures, model, firsts = answer.measures, answer.reply.model, dict[int, float]()
    async for batch in batches:
        now = time.perf_counter()
        for index, output in batch:
            if output.ids and index not in firsts:
                firsts[index] = now
                measures.first_token.labels(model).observe(now - answer.began)
            if output.finish is not None and index in firsts and output.counts.answer > 1:
                measures.each_token.labels(model).observe((now - firsts[index]) / (output.counts.answer - 1))
        yield batch
    measures.whole.labels(model).observe(time.perf_counter() - answer.began)


def _failure(output: Output, timeout: float) -> ApiError | None:
    """Return the error that an output ends with, if it does."""
    if output.finish == Finish.ERROR:
        return ApiError(500, f"the engine failed: {output.error}")
    if output.finish == Finish.TIMEOUT:
        return _out_of_time(timeout)
    if output.finish == Finish.CANCELLED:  # by the engine, since what this process cancels nobody reads any more
        return turned_away(Closing("the server is shutting down and could not finish this answer"))
    return None


def _out_of_time(timeout: float) -> ApiError:
    sentence = f"the answer was not finished within {timeout:g} seconds: ask for fewer tokens, or stream it"
    headers = {"x-should-retry": "false"}  # OpenAI's client would send it again, to the same end
    return ApiError(504, sentence, code="timeout", headers=headers)


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def _event(content: Json) -> bytes:
    return b"data: %b\n\n" % _json(content)


def _json(content: Json) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
