"""Lost and changed files, kills at any moment and full disks: what is listed is whole, every fault has its sentence.

Run as a script it is what the tests kill, and what fills a disk: see the end.
"""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.train.checkpoint import restore_state, saved_steps, step_damage
from easylm_like.train.config import Damaged, RunConfig
from easylm_like.train.saver import Saver, steps_to_keep
from easylm_like.train.start import step_to_resume
from easylm_like.train.state import TrainState

CONFIG = RunConfig(keep_checkpoints=2, keep_best=1, milestone_every=20)
PAGE = 4096


def state(step: int) -> TrainState:
    """Return the one state that a checkpoint of `step` may hold."""
    numbers = np.random.default_rng(step)
    weights, moments = (
        {name: jax.device_put(numbers.random(shape, np.float32)) for name, shape in (("a", (60, 80)), ("b", (5,)))}
        for _ in range(2)
    )
    count = jax.device_put(np.int32(step))
    return TrainState(count, weights, ({"mu": moments, "count": count},))


def loss(step: int) -> float:
    return (step * 37 % 101) / 10


def expect_whole(folder: Path, step: int) -> None:
    assert step_damage(folder, step) == []
    jax.tree.map(np.testing.assert_array_equal, restore_state(folder, step, state(step)), state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints of steps 3 and 6; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Saver(folder, CONFIG, {"number": 1}) as saver:
        saver.save(state(3))
        saver.save(state(6))
    return folder


@contextmanager
def holding(path: Path, content: bytes | None) -> Iterator[None]:
    """Give a file another content, or none, for the time of a block."""
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    yield
    path.write_bytes(before)


def flipped(content: bytes, byte: int, bit: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]


def test_a_flipped_bit_a_cut_or_a_loss_of_any_file_is_named(saved: Path) -> None:
    draw = random.Random(0)
    paths = sorted(path for path in (saved / "6").rglob("*") if path.is_file())
    names = {str(path.relative_to(saved / "6")) for path in paths}
    assert names > {"files.json", "run.json", "_CHECKPOINT_METADATA", "params/_METADATA", "optimizer/manifest.ocdbt"}
    for path in paths:
        content = path.read_bytes()
        flip = flipped(content, draw.randrange(len(content)), draw.randrange(8))
        for fault in (flip, content[:-1], content[: draw.randrange(len(content))], b"", content + b"\0", None):
            with holding(path, fault):
                [sentence] = step_damage(saved, 6)
                assert sentence.startswith(f"{path} ")
                with pytest.raises(UserError, match=re.escape(sentence)) as stopped:
                    step_to_resume(saved, 9, Damaged.STOP, print)
                assert str(stopped.value).endswith("Copy it again, or go back to step 3 with --config.damaged=previous")
    assert step_damage(saved, 6) == []
    assert step_to_resume(saved, 9, Damaged.STOP, print) == 6


def test_no_bit_of_the_list_of_files_can_flip_unnoticed(saved: Path, tmp_path: Path) -> None:
    # Also when only the weights are compared: a flip in a file's name must not take it out of the comparison.
    folder, draw = shutil.copytree(saved, tmp_path / "checkpoints"), random.Random(0)
    path = folder / "6" / "files.json"
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:  # in place, because a disk is slow to cut a file and write it anew
        for place, byte in enumerate(content):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << draw.randrange(8)]), place)
            assert step_damage(folder, 6, "params/") == [f"{path} is damaged: its content is not what was written"]
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert step_damage(folder, 6, "params/") == []


def test_the_previous_good_step_is_used_when_asked(saved: Path, tmp_path: Path) -> None:
    folder, said = shutil.copytree(saved, tmp_path / "checkpoints"), list[str]()
    broken = folder / "6" / "optimizer" / "_METADATA"
    content = broken.read_bytes()
    broken.write_bytes(flipped(content, len(content) // 2, 3))
    assert step_to_resume(folder, 9, Damaged.PREVIOUS, said.append) == 3
    assert said == [
        f"{broken} is damaged: its content is not what was written: step 6 is set aside as {folder}/6.damaged"
    ]
    assert saved_steps(folder) == [3]
    assert (folder / "6.damaged" / "optimizer" / "_METADATA").exists()
    with Saver(folder, CONFIG, {}) as saver:  # the run goes on and comes to step 6 again
        saver.save(state(6))
    expect_whole(folder, 6)
    for step in (3, 6):
        (folder / str(step) / "run.json").unlink()
    assert step_to_resume(folder, 9, Damaged.PREVIOUS, said.append) is None
    assert sorted(path.name for path in folder.iterdir()) == ["3.damaged", "6.damaged"]


def test_without_a_good_step_the_run_stops_or_begins_anew(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    shutil.rmtree(folder / "3")
    (folder / "6" / "params" / "_sharding").unlink()
    with pytest.raises(UserError, match=r"_sharding is missing\. Copy it again, or begin anew with --config\.dama"):
        step_to_resume(folder, 9, Damaged.STOP, print)
    assert saved_steps(folder) == [6]
    # After its last step a run restores nothing, so that whether it is finished costs no reading of all.
    assert step_to_resume(folder, 6, Damaged.STOP, print) == 6


# Where a life ends: before an os.rename(source, target), or the n-th event of a kind after it; and what it leaves.
MOMENTS = {
    "arrays": (r".*/params\.orbax-checkpoint-tmp .*", "os.rename", 1, ["partial.orbax-checkpoint-tmp"]),
    "unlisted": (r".*\.partial .*/\d+", "os.rename", 1, ["partial"]),
    "listed": (r".*\.partial .*/\d+", "open", 1, []),
    "unwanted": (r".*/\d+ .*\.deleted", "os.rename", 1, []),
    "deleting": (r".*/\d+ .*\.deleted", "os.remove", 7, ["deleted"]),
}


class Victim:
    """A process that saves step after step in `folder`, forked anew for each of its lives: that costs no imports."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, "save", str(folder)],
            cwd=root,
            env=os.environ | {"PYTHONPATH": ":".join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._orders, self._answers = self.process.stdin, self.process.stdout

    def live(self, moment: str = "", after: float = 0.0) -> None:
        """Begin a life that ends at one of MOMENTS, or so many seconds after its first save; then look at `folder`."""
        print(moment, file=self._orders, flush=True)
        child, committed = int(self._answers.readline()), 0
        for line in iter(self._answers.readline, "killed\n"):
            if not moment and not committed:
                time.sleep(after)
                os.kill(child, signal.SIGKILL)
            committed = int(line)
        listed = saved_steps(self.folder)
        assert listed[-1] >= committed, "a step was lost that had been committed"
        losses = {step: loss(step) for step in range(1, listed[-1] + 1)}
        wanted = steps_to_keep(losses, CONFIG)
        del losses[listed[-1]]
        assert wanted <= set(listed) <= wanted | steps_to_keep(losses, CONFIG)
        for step in listed:
            expect_whole(self.folder, step)

    def left(self) -> list[str]:
        """Return what lies in the folder that is no checkpoint, its step taken away."""
        return [path.name.partition(".")[2] for path in self.folder.iterdir() if not path.name.isdigit()]


@pytest.fixture
def victim(root: Path, tmp_path: Path) -> Iterator[Victim]:
    victim = Victim(root, tmp_path / "checkpoints")
    yield victim
    victim.process.communicate()
    assert victim.process.returncode == 0
    with Saver(victim.folder, CONFIG, {}):
        assert victim.left() == [], "what the killed ones left goes when the next run begins"


def test_a_kill_in_the_middle_of_a_save_or_a_deletion_loses_nothing_older(victim: Victim) -> None:
    for moment, (_, _, _, left) in MOMENTS.items():
        victim.live(moment)
        assert victim.left() == left


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_that_was_committed(victim: Victim) -> None:
    draw, left = random.Random(), list[str]()
    for _ in range(20):
        victim.live(after=draw.uniform(0, 0.5))
        left += victim.left()
    assert left, "not one of them came in the middle of a save"


def run_on_small_disk(root: Path, folder: Path, arguments: list[str], size: str) -> subprocess.CompletedProcess[str]:
    """Run this file as a script with a file system of its own at `folder`, that only it sees."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o {size} none '{folder}' && exec "
    try:
        subprocess.run([*mount, f"{mounted} true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here to be filled: {error}")
    return subprocess.run(
        [*mount, f'{mounted} "$@"', "sh", sys.executable, __file__, *arguments, str(folder)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("what", "step"),
    [
        pytest.param("bytes", 6 * PAGE),
        pytest.param("bytes", PAGE, marks=pytest.mark.slow),
        pytest.param("files", 1, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_sentence_at_the_save_that_failed_and_the_next_succeeds(
    root: Path, tmp_path: Path, what: str, step: int
) -> None:
    result = run_on_small_disk(root, tmp_path, ["fill", what, str(step)], "size=2m,nr_inodes=300")
    assert result.stderr == ""
    assert result.returncode == 0
    tries = int(result.stdout)
    assert tries > 30 * (PAGE if what == "bytes" else 1) // step // 2, "a save has some thirty files"


def save_until_killed(folder: Path, moment: str) -> None:
    """Save the state of step after step from the last one on, and say so, until killed."""
    first = max(saved_steps(folder), default=0) + 1
    with Saver(folder, CONFIG, {"number": 1}) as saver:
        for step in range(first, first + 200):  # should nobody kill it
            if moment and step == first + 3:
                end_at(*MOMENTS[moment][:3])
            saver.save(state(step), loss(step))
            saver.wait()
            print(step, flush=True)


def end_at(rename: str, kind: str, number: int) -> None:
    """Kill this process before the `number`-th event of a kind from a rename on."""
    met, left = False, number

    def end(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal met, left
        if event == "os.rename" and re.fullmatch(rename, f"{arguments[0]} {arguments[1]}"):
            met = True
        if met and event == kind:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(end)


def serve_lives(folder: Path) -> None:
    """Begin a life at every line of stdin, say its number, and when it has ended."""
    for line in sys.stdin:
        child = os.fork()  # the imports have started no thread
        if not child:
            print(os.getpid(), flush=True)
            save_until_killed(folder, line.strip())
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        print("killed", flush=True)


def try_to_save(saver: Saver, step: int) -> str:
    """Save a state; return what the error says."""
    try:
        saver.save(state(step))
        saver.wait()
    except UserError as error:
        return str(error)
    return ""


def fill_disk(disk: Path, what: str, step: int) -> None:
    """Save on a disk with 0, `step`, 2 `step`, ... bytes or files free until that succeeds; say how often it failed."""
    folder, filler, number = disk / "checkpoints", disk / "filler", itertools.count(1)
    with Saver(folder, CONFIG, {"number": 1}) as saver:
        saver.save(state(next(number)))
    with Saver(folder, CONFIG, {"number": 1}) as saver:
        for free in itertools.count(0, step):
            before = saved_steps(folder)
            filler.mkdir()
            if what == "bytes":
                room = os.statvfs(disk)
                (filler / "0").write_bytes(bytes(room.f_bavail * room.f_frsize - free))
            else:
                for file in range(os.statvfs(disk).f_favail - free):
                    (filler / str(file)).touch()
            error = try_to_save(saver, next(number))
            shutil.rmtree(filler)
            if not error:
                break
            assert error == (
                f"{folder}: the checkpoint of step {before[-1] + 1} could not be written: the disk is full. Those of "
                f"steps {before} are whole; make room and start the run again: it goes on from the newest"
            )
            assert sorted(path.name for path in folder.iterdir()) == sorted(map(str, before))
            for left in before:
                expect_whole(folder, left)
            assert not try_to_save(saver, next(number))
    for left in saved_steps(folder):
        expect_whole(folder, left)
    print(free // step)


if __name__ == "__main__":
    if sys.argv[1] == "save":
        serve_lives(Path(sys.argv[2]))
    else:
        fill_disk(Path(sys.argv[4]), sys.argv[2], int(sys.argv[3]))
