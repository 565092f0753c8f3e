"""How a run is asked to end, and that two never train in one work directory."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from easylm_like.errors import UserError
from easylm_like.train.config import RunConfig
from easylm_like.train.loop import train
from easylm_like.train.stop import StopRequest, sole_run

HOLD = """
import sys
from pathlib import Path
from easylm_like.train.stop import sole_run

with sole_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return another process, which holds the work directory `tmp_path`/run."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_until_the_first_has_ended_even_by_a_kill(
    tmp_path: Path, holder: subprocess.Popen[str], new_config: Callable[[], RunConfig]
) -> None:
    workdir = tmp_path / "run"
    says = rf"run: another run is training there \(process {holder.pid} on .+\); wait for it, or take another --workdir"
    with pytest.raises(UserError, match=says), sole_run(workdir):
        pytest.fail("two runs hold it")
    with pytest.raises(UserError, match=says):
        train(new_config(), workdir)
    assert {path.name for path in workdir.iterdir()} <= {".lock", "tokens"}, "the second one has changed something"
    with sole_run(tmp_path / "another"):
        pass
    holder.kill()
    holder.wait()
    with sole_run(workdir):
        assert (workdir / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), sole_run(workdir):
            pytest.fail("one process runs twice")
    with sole_run(workdir):
        pass


def test_sigterm_asks_to_stop_once_inside_the_block_and_then_means_what_it_meant_before() -> None:
    caught = list[int]()

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before = signal.signal(signal.SIGTERM, catch)
    try:
        with StopRequest() as stop:
            assert not stop.asked(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked(2)
            assert stop.asked(3)
        assert caught == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        with pytest.raises(ZeroDivisionError), StopRequest() as stop:
            1 / stop.asked(1)  # a run that fails; and the signal was for the one before
        assert signal.getsignal(signal.SIGTERM) is catch
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_in_another_thread_leaves_the_signals_alone() -> None:
    asked = list[bool]()

    def run() -> None:
        with StopRequest() as stop:
            asked.append(stop.asked(1))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]
    assert signal.getsignal(signal.SIGTERM) is before
