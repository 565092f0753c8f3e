"""From the engine's thread to the event loop: the outputs of all texts of one HTTP request, as they come.

What a slow reader has not taken yet waits here, bounded by max_tokens; its slot is free meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from easylm_like.serve.request import Busy, Deliver, Output, Request

Batch = list[tuple[int, Output]]  # number of the request, its next output
PATIENCE = 0.05  # seconds between two attempts to get into a queue that others have filled


class Submits(Protocol):
    """An Engine, as far as it is asked here."""

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Begin, and return a ticket."""

    def cancel(self, ticket: int) -> None:
        """End it early."""


@contextmanager
def answering(engine: Submits, requests: Sequence[Request]) -> Iterator[AsyncIterator[Batch]]:
    """Have `engine` answer the requests while the block runs, and cancel what is left of them when it ends.

    More requests than the engine's queue holds are submitted as earlier ones end.

    Raises:
        Busy, Closing, UserError: what the first `submit` raises.
    """
    answers = _Answers(engine, requests)
    try:
        answers.submit()
        yield answers.batches()
    finally:
        answers.cancel()


class _Answers:
    """The requests that wait, those that run, and what has arrived of them."""

    def __init__(self, engine: Submits, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._waiting = deque(enumerate(requests))
        self._tickets: dict[int, int] = {}
        self._arrived: deque[tuple[int, Output]] = deque()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._told = False  # the loop will look at `_arrived`: one wake-up for many outputs

    def submit(self) -> None:
        """Give the engine as many requests as it takes; only if it takes none at all is it busy."""
        while self._waiting:
            index, request = self._waiting[0]
            try:
                self._tickets[index] = self._engine.submit(request, self._deliver_to(index))
            except Busy:
                if not self._tickets:
                    raise
                return
            self._waiting.popleft()

    async def batches(self) -> AsyncIterator[Batch]:
        while self._tickets or self._waiting:
            if not self._tickets:
                await self._submit_later()
            await self._news.wait()
            self._news.clear()
            batch = [self._arrived.popleft() for _ in range(len(self._arrived))]
            for index, output in batch:
                if output.finish is not None:
                    self._tickets.pop(index, None)
            if self._waiting:
                with suppress(Busy):
                    self.submit()
            yield batch

    def cancel(self) -> None:
        self._waiting.clear()
        while self._tickets:
            self._engine.cancel(self._tickets.popitem()[1])

    async def _submit_later(self) -> None:
        while not self._tickets:
            with suppress(Busy):
                self.submit()
                return
            await asyncio.sleep(PATIENCE)

    def _deliver_to(self, index: int) -> Deliver:
        def deliver(output: Output) -> None:  # on the engine's thread
            self._arrived.append((index, output))
            if not self._told:
                self._told = True
                with suppress(RuntimeError):  # the loop is closed: the server ends, and nobody waits any more
                    self._loop.call_soon_threadsafe(self._wake)

        return deliver

    def _wake(self) -> None:
        self._told = False  # before the look into `_arrived`, so that what comes from now on is told again
        self._news.set()
