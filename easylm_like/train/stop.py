"""How a run is asked to end, and how it is kept from being two."""

import errno
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

from easylm_like.errors import UserError

# sysexits.h: a temporary failure, try again. A supervisor starts a run that ended so again; 1 is an error, which stays.
EXIT_SAVED = 75


class StopRequest:
    """SIGTERM asks the run to save and to end; used with `with`."""

    def __init__(self) -> None:
        self._asked = False
        self._alone = jax.process_count() == 1
        self._before: object = None

    def __enter__(self) -> Self:
        # With several hosts jax catches the signal, because all must stop at the same step.
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]  # what signal returned

    def asked(self, step: int) -> bool:
        """Return whether to save and end after `step`; every host asks after every step and gets the same answer."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


@contextmanager
def sole_run(workdir: Path) -> Iterator[None]:
    """Hold WORKDIR/.lock; it is let go when the process ends, however it does.

    Raises:
        UserError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{workdir}: another run is training there ({lock.read().strip() or 'it does not say which'}); wait "
                "for it, or take another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK):
                raise
            # A file system without locks, such as a mounted bucket: nothing to hold.
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
