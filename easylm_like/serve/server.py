"""The process around the application: its socket, its signals, and an end in which no answer is lost.

SIGTERM or Ctrl+C: new requests get 503, running ones may finish within `grace` seconds, then the process ends with
status 0. A second signal ends it at once.
"""

import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from easylm_like.errors import UserError
from easylm_like.serve.api import Service, State, build_app

# Clients must let go of an idle connection first, or a request meets its end: httpx, and so OpenAI's client, does it
# after 5 seconds, which is uvicorn's default too.
KEEP_ALIVE = 75
FLUSH = 5  # seconds for the last bytes of answers whose client does not read
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything else is done: port 0 takes a free one.

    Raises:
        UserError: the address is in use or not of this machine.
    """
    listener = None
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not to wait for a former server's connections
        listener.bind(place)
        listener.listen(2048)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host= or --port="
        ) from error
    return listener


def address(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def running(service: Service, listener: socket.socket) -> Iterator[threading.Thread]:
    """Speak HTTP in a thread while the block runs; at its end what is open is flushed and closed."""
    config = uvicorn.Config(
        build_app(service),
        loop="asyncio",  # and not what happens to be installed
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=FLUSH,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join()


def run(service: Service, listener: socket.socket, load: Callable[[], None], *, grace: float) -> None:
    """Serve until a signal comes. `load` fills `service.engines` while clients are already told to wait."""
    with running(service, listener) as thread:
        try:
            load()
            service.state = State.SERVING
            _wait_for_signal(thread)
        finally:
            service.state = State.DRAINING
            deadline = time.monotonic() + grace
            for engine in service.engines.values():
                engine.close(max(0.0, deadline - time.monotonic()))


def _wait_for_signal(thread: threading.Thread) -> None:
    """Return when the process is asked to end; a signal that comes after that has its usual, immediate effect."""
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put may be called from a signal's handler

    def note(number: int, _: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        asked.put(number)

    for one in SIGNALS:
        signal.signal(one, note)
    while thread.is_alive():
        with suppress(queue.Empty):
            asked.get(timeout=1)
            return
    raise RuntimeError("the HTTP thread has ended; the lines above say why")
