"""An engine under trouble: clients that go, full queues, time limits, shutting down, devices that fail."""

import queue
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from easylm_like.convert.load import OpenModel, open_model
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.serve.engine import Engine, EngineConfig
from easylm_like.serve.request import Busy, Closing, Finish, Output, Request, Sampling

from .asking import Answered, ask, ask_one, collect

PROMPT = np.array([1, 441, 416, 331, 407], np.int32)
LONG = Request(prompt=PROMPT, max_tokens=240, ignore_eos=True)


@pytest.fixture(scope="module")
def model(shared_data) -> OpenModel:
    return open_model(shared_data / "models" / "stories260K-hf")


@pytest.fixture
def new_engine(model: OpenModel) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(**settings: int) -> Engine:
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        engines.append(Engine(model, mesh, EngineConfig(**{"slots": 1, "context": 256, **settings})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


class Held:
    """A request whose deliveries wait until they are let through: the engine stands still where the test wants it."""

    def __init__(self, engine: Engine, request: Request = LONG, after: int = 1) -> None:
        self.inbox: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self.go, self.reached, self.after = threading.Event(), threading.Event(), after
        self.ticket = engine.submit(request, self._deliver)

    def _deliver(self, output: Output) -> None:
        self.inbox.put(output)
        if self.inbox.qsize() == self.after:
            self.reached.set()
            assert self.go.wait(60)

    def finish(self) -> Answered:
        self.go.set()
        return collect(self.inbox)


def test_a_cancelled_answer_frees_its_slot_one_step_later(new_engine) -> None:
    engine = new_engine()
    held = Held(engine, after=5)
    assert held.reached.wait(60)
    waiting: queue.SimpleQueue[Output] = queue.SimpleQueue()
    engine.submit(Request(prompt=PROMPT, max_tokens=3, ignore_eos=True), waiting.put)
    steps = engine.snapshot().steps
    engine.cancel(held.ticket)
    gone = held.finish()
    assert (gone.finish, len(gone.ids), gone.last.ids) == (Finish.CANCELLED, 5, ())
    assert len(collect(waiting).ids) == 3
    # At most the one that was on its way, and the two after the first token of the other answer.
    assert engine.snapshot().steps - steps <= 3
    engine.cancel(held.ticket)  # nothing happens
    engine.cancel(10**6)
    assert ask_one(engine, PROMPT, 2).finish == Finish.LENGTH


def test_requests_that_wait_can_be_cancelled_and_time_out(new_engine) -> None:
    engine = new_engine()
    held = Held(engine)
    assert held.reached.wait(60)
    cancelled, late = (queue.SimpleQueue() for _ in range(2))
    ticket = engine.submit(LONG, cancelled.put)
    engine.submit(Request(prompt=PROMPT, max_tokens=5, timeout=0.01), late.put)
    assert engine.snapshot().queued == 2
    engine.cancel(ticket)
    time.sleep(0.05)
    assert held.finish().finish == Finish.LENGTH
    for inbox, finish in ((cancelled, Finish.CANCELLED), (late, Finish.TIMEOUT)):
        answer = collect(inbox)
        assert (answer.finish, answer.ids, len(answer.outputs)) == (finish, [], 1)
    assert engine.snapshot().finished == {"length": 1, "cancelled": 1, "timeout": 1}


def test_an_answer_that_takes_too_long_ends_with_what_there_is(new_engine) -> None:
    engine = new_engine()
    held = Held(engine, Request(prompt=PROMPT, max_tokens=240, ignore_eos=True, timeout=0.2), after=3)
    assert held.reached.wait(60)
    time.sleep(0.25)
    answer = held.finish()
    assert answer.finish == Finish.TIMEOUT
    assert 3 <= len(answer.ids) <= 4


def test_a_full_queue_says_so_and_serves_on(new_engine) -> None:
    engine = new_engine(queue=2)
    held = Held(engine)
    assert held.reached.wait(60)
    inboxes = [queue.SimpleQueue() for _ in range(2)]
    for inbox in inboxes:
        engine.submit(Request(prompt=PROMPT, max_tokens=2, ignore_eos=True), inbox.put)
    with pytest.raises(Busy, match="2 requests are waiting already"):
        engine.submit(LONG, print)
    held.finish()
    assert [len(collect(inbox).ids) for inbox in inboxes] == [2, 2]
    assert len(ask_one(engine, PROMPT, 2).ids) == 2


def test_closing_lets_answers_finish_within_the_grace_and_then_cancels(new_engine) -> None:
    for grace, wanted in ((60.0, Finish.LENGTH), (0.0, Finish.CANCELLED)):
        engine = new_engine()
        held = Held(engine)
        assert held.reached.wait(60)
        closer = threading.Thread(target=engine.close, args=(grace,))
        closer.start()
        while engine.ready:
            time.sleep(0.01)
        with pytest.raises(Closing, match="shutting down"):
            engine.submit(LONG, print)
        assert engine.alive
        if not grace:
            time.sleep(0.1)
        assert held.finish().finish == wanted
        closer.join(60)
        assert not engine.alive


def test_a_failure_of_the_devices_is_told_and_the_next_request_is_served(new_engine, monkeypatch, capsys) -> None:
    engine = new_engine(slots=2)
    wanted = ask_one(engine, PROMPT, 20, ignore_eos=True).ids
    real, calls = engine._decoder._programs["step"], []

    def fails(*arguments: object) -> object:
        calls.append(real(*arguments))  # the cache is given away, as in a real failure
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setitem(engine._decoder._programs, "step", fails)
    failed = ask(engine, [LONG, LONG])
    assert {answer.finish for answer in failed} == {Finish.ERROR}
    assert failed[0].last.error == "the model could not be run; the server's log says why"
    assert "RESOURCE_EXHAUSTED: out of memory" in capsys.readouterr().err
    monkeypatch.setitem(engine._decoder._programs, "step", real)
    assert ask_one(engine, PROMPT, 20, ignore_eos=True).ids == wanted
    assert engine.alive


def test_nothing_is_mixed_up_when_many_come_and_go(new_engine) -> None:
    engine = new_engine(slots=4)
    random = np.random.default_rng(0)
    requests = []
    for n in range(60):
        prompt = np.concatenate([[1], random.integers(3, 500, random.integers(1, 150))]).astype(np.int32)
        sampling = Sampling(temperature=float(n % 3 == 0), seed=n, frequency_penalty=float(n % 4 == 0))
        new = int(random.integers(1, 60))
        requests.append(Request(prompt=prompt, max_tokens=new, ignore_eos=True, sampling=sampling))
    alone = [ask(engine, [request])[0].ids for request in requests]
    inboxes, tickets = [], []
    for n, request in enumerate(requests):
        inboxes.append(queue.SimpleQueue())
        tickets.append(engine.submit(request, inboxes[-1].put))
        if n % 5 == 4:
            engine.cancel(tickets[n - 2])
            time.sleep(0.02)
    for n, (inbox, ids) in enumerate(zip(inboxes, alone, strict=True)):
        answer = collect(inbox)
        assert answer.ids == (ids if answer.finish == Finish.LENGTH else ids[: len(answer.ids)]), n
        assert answer.finish == Finish.LENGTH or n % 5 == 2
    snapshot = engine.snapshot()
    assert (snapshot.running, snapshot.queued, snapshot.compilations) == (0, 0, 0)
    assert sum(snapshot.finished.values()) == 120
