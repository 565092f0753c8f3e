"""What a run wrote down survives a kill in the middle of a line, and steps that are run again are counted once."""

import json
import resource
from pathlib import Path

import jax
import pytest

from easylm_like.train.runlog import RunLog, clock, memory, step_line


def test_steps_that_will_be_run_again_are_forgotten_and_so_is_half_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=True, resume_at=0)
    for step in (2, 4, 6):
        log.metrics(step, "train", {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 8, "ki')
    RunLog(tmp_path, active=True, resume_at=4).metrics(6, "train", {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0), (4, 1.0), (6, 0.5)]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    RunLog(tmp_path, active=True, resume_at=-1).metrics(0, "heldout", {"all": 2.0})
    log = RunLog(tmp_path, active=True, resume_at=-1)
    assert log.history() == []
    log.metrics(0, "heldout", {"all": 1.0})
    assert [line["all"] for line in log.history()] == [1.0]


class Kept:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.got: list[object] = []

    def scalars(self, step: int, when: float, values: dict[str, float]) -> None:
        self.got.append((step, values))

    def close(self, failed: bool) -> None:
        self.got.append(failed)


def test_trackers_get_the_numbers_by_kind_and_are_told_how_it_ended(tmp_path: Path) -> None:
    trackers = Kept(), Kept()
    with RunLog(tmp_path, active=True, resume_at=-1) as log:
        log.track(trackers[:1])
        log.metrics(3, "heldout", {"all": 1.0, "hh/bad": 2.0})
    assert trackers[0].got == [(3, {"heldout/all": 1.0, "heldout/hh/bad": 2.0}), False]
    log.track(trackers[1:])
    with pytest.raises(OSError, match="full"), log:
        raise OSError("the disk is full")
    assert trackers[1].got == [True]


NUMBERS = {
    "loss": 1.23456,
    "learning_rate": 2e-5,
    "grad_norm": 123.456,
    "tokens_per_second": 1234567.8,
    "trained_tokens_per_second": 987654.3,
    "tflops_per_device": 401.26,
}


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"mfu": 0.4051, "mfu_palm": 0.4312, "device_memory_gib": 121.32}, "MFU 40.5% (PaLM 43.1%)  device 121.3 GiB"),
        ({"host_memory_gib": 1.25}, "401.3 TFLOP/s  host 1.2 GiB"),
        ({"host_memory_gib": 1.25, "tflops_per_device": 0.0123}, "12.3 GFLOP/s  host 1.2 GiB"),
    ],
)
def test_a_line_says_what_is_known(more: dict[str, float], part: str) -> None:
    line = step_line(120, 4800, NUMBERS | more | {"data_share": 0.012}, left=3661)
    assert line == (
        "step    120/4800  loss 1.2346  lr 2.00e-05  grad 123.46  1,234,568 tokens/s (987,654 trained)  "
        f"{part}  data 1.2%  1:01:01 left"
    )


class Device:
    def __init__(self, stats: dict[str, int] | None) -> None:
        self.memory_stats = lambda: stats


def test_memory_is_that_of_the_fullest_device_or_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    (host,) = memory().items()
    assert host[0] == "host_memory_gib"
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    assert 0.5 * resident < host[1] < 100
    devices = [Device({"peak_bytes_in_use": size << 30, "bytes_in_use": 1}) for size in (3, 5, 4)]
    monkeypatch.setattr(jax, "local_devices", lambda: [*devices, Device(None)])
    assert memory() == {"device_memory_gib": 5.0}


def test_only_one_host_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, active=False, resume_at=0)
    log.line("hello")
    log.metrics(1, "train", {})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
