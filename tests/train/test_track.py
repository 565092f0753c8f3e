"""Trackers and traces by themselves; what TensorBoard shows of a whole run is in test_loop."""

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from easylm_like.errors import UserError
from easylm_like.train.config import LogConfig, RunConfig
from easylm_like.train.loop import train
from easylm_like.train.track import Profiler, WeightsAndBiases, check_trackers, open_trackers


@pytest.mark.parametrize(
    ("config", "package"), [(LogConfig(tensorboard=True), "tensorboard"), (LogConfig(wandb_project="koala"), "wandb")]
)
def test_a_missing_package_is_told_before_anything_is_written(
    new_config: Callable[[], RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: LogConfig,
    package: str,
) -> None:
    check_trackers(config)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    run = new_config()
    run.log = config
    with pytest.raises(UserError, match=rf"needs the package {package}, which is not installed; pip install {package}"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_trackers(LogConfig())


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path) -> None:
    assert open_trackers(LogConfig(), tmp_path, {}, []) == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set what wandb reads from the environment: nothing is sent, and nothing is kept in the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = {
        "MODE": "offline",
        "SILENT": "true",
        "ERROR_REPORTING": "false",
        "CONSOLE": "off",
        "DISABLE_GIT": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    import wandb

    yield
    wandb.teardown()  # else its process keeps these settings for the next test


def messages(path: Path) -> Iterator[bytes]:
    """Yield the messages of wandb's file: 7 bytes, then LevelDB's log format (blocks of 32768, headers of 7)."""
    content, message, at = path.read_bytes(), b"", 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        message += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""


def sent(workdir: Path) -> list[tuple[str, dict[str, object], list[dict[str, object]]]]:
    """Return (id, config, history) of every part of a run that waits to be sent."""
    from wandb.proto.wandb_internal_pb2 import Record

    parts = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        records = [Record.FromString(message) for message in messages(path)]
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        lines = [{"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in histories]
        parts.append((run.run_id, config, lines))
    return parts


@pytest.mark.slow
def test_weights_and_biases_gets_the_numbers_and_a_resumed_run_stays_the_same_one(
    tmp_path: Path, offline: None
) -> None:
    import wandb

    workdir = tmp_path / "run"
    for steps, history in (((1, 2), []), ((3,), [{"step": 2, "kind": "train", "time": 0.0, "loss": 0.5}])):
        (tracker,) = open_trackers(LogConfig(wandb_project="koala"), workdir, {"config": {"steps": 3}}, history)
        for step in steps:
            tracker.scalars(step, 0.0, {"train/loss": 1 / step})
            tracker.scalars(step, 0.0, {"heldout/hh/good": 2 / step})
        tracker.close(failed=False)
        wandb.teardown()  # the end of the process
    (first, config, one), (second, _, two) = sent(workdir)
    assert first == second == (workdir / "wandb" / "run_id").read_text().strip()
    assert config["config"] == {"steps": 3}
    got = [(line["_step"], line["train/loss"], line["heldout/hh/good"]) for line in one + two]
    assert got == [(1, 1, 2), (2, 0.5, 1), (3, 1 / 3, 2 / 3)]


class Server:
    """A run of wandb's that already has step 6, as after a kill."""

    def __init__(self) -> None:
        self.step, self.got = 7, []

    def log(self, values: dict[str, float], step: int) -> None:
        self.got.append((step, values))


def test_steps_that_were_sent_are_not_sent_again() -> None:
    tracker = WeightsAndBiases.__new__(WeightsAndBiases)
    tracker._run = server = Server()
    for step in (5, 6, 7, 8):
        tracker.scalars(step, 0.0, {"train/loss": 1.0})
    assert server.got == [(7, {"train/loss": 1.0}), (8, {"train/loss": 1.0})]


@pytest.mark.slow
def test_who_is_not_logged_in_is_told_so(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"config.log.wandb_project=koala: .*; run `wandb login`, or set WANDB_MODE="):
        WeightsAndBiases("koala", tmp_path, {}, goes_on=False)


@pytest.mark.parametrize(
    ("steps", "ran", "traces"),
    [((), (1, 2, 3), 0), ((2, 4), (1, 2, 3, 4), 1), ((2, 5), (4, 5), 1), ((1, 3), (3, 4), 0)],
)
def test_a_trace_takes_the_steps_that_are_left_of_those_asked_for(
    tmp_path: Path, steps: tuple[int, ...], ran: tuple[int, ...], traces: int
) -> None:
    said: list[str] = []
    with Profiler(tmp_path / "profile", steps, said.append) as profiler:
        for step in ran:
            profiler.before(step)
            assert (profiler.after(step, None) > 0) == bool(traces and step == steps[1] - 1)
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == len(said) == traces
