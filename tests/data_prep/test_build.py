"""A whole build: counts that add up, a split that does not leak, re-use, and nothing left behind by a failure."""

import errno
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.build
from data_prep.build import build
from data_prep.config import Feedback, Format, MixtureConfig, Source
from data_prep.split import prompt_key
from easylm_like.data.conversation import Conversation, read_conversations
from easylm_like.errors import UserError


def task(number: int, answer: str = "a") -> dict[str, str]:
    return {"instruction": f"Prompt {number}", "output": f"{answer} {number}"}


@pytest.fixture
def config(lines: Callable[..., Path]) -> MixtureConfig:
    """Return a mixture of three sources with prompts in common, one of them with its own held-out file."""
    pairs = [
        {key: f"\n\nHuman: Prompt {i}\n\nAssistant: {key} {i}" for key in ("chosen", "rejected")} for i in range(40, 60)
    ]
    tasks = lines(*(task(i) for i in range(100)), task(3), {"instruction": "x", "output": ""}, name="tasks.jsonl")
    return MixtureConfig(
        sources=(
            Source(format=Format.ALPACA, path=str(tasks), heldout_fraction=0.2, licence="CC BY-NC 4.0"),
            Source(
                format=Format.ALPACA,
                name="more",
                path=str(lines(*(task(i, "b") for i in range(50, 150)), name="more.jsonl")),
                heldout_path=str(lines(*(task(i, "c") for i in range(0, 100, 10)), name="more_heldout.jsonl")),
            ),
            Source(format=Format.HH, path=str(lines(*pairs, name="pairs.jsonl"))),
        )
    )


def written(out: Path) -> tuple[list[Conversation], list[Conversation], list[dict], dict]:
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().splitlines()]
    train, heldout = (list(read_conversations(out / f"{name}.jsonl")) for name in ("train", "heldout"))
    return train, heldout, rejects, json.loads((out / "manifest.json").read_text("utf-8"))


def test_files_and_counts(config: MixtureConfig, tmp_path: Path) -> None:
    assert build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    for name, source in manifest["sources"].items():
        assert source["train"] == sum(c.source == name for c in train)
        assert source["heldout"] == sum(c.source == name for c in heldout)
        assert source["rejected"] == Counter(r["reason"] for r in rejects if r["source"] == name)
        assert source["read"] == source["train"] + source["heldout"] + sum(source["rejected"].values())
    assert {name: source["read"] for name, source in manifest["sources"].items()} == {
        "alpaca": 102,
        "more": 110,
        "hh": 40,
    }
    assert (
        manifest["sources"]["alpaca"]["rejected"]["empty"]
        == manifest["sources"]["alpaca"]["rejected"]["duplicate"]
        == 1
    )
    assert (manifest["sources"]["alpaca"]["good"], manifest["sources"]["alpaca"]["bad"]) == (0, 0)
    assert manifest["sources"]["hh"]["good"] == manifest["sources"]["hh"]["bad"] > 0
    assert all(step["in"] == step["out"] + sum(step.get("rejected", {}).values()) for step in manifest["steps"])
    assert [(i["licence"], i["heldout"], i["bytes"] > 0) for i in manifest["inputs"][:3]] == [
        ("CC BY-NC 4.0", False, True),
        ("", False, True),
        ("", True, True),
    ]
    assert manifest["config"]["seed"] == 0
    assert manifest["config"]["feedback"] == "positive_and_negative"
    empty = next(r for r in rejects if r["reason"] == "empty")
    assert empty["where"] == f"{tmp_path}/tasks.jsonl:102"
    assert empty["raw"] == {"instruction": "x", "output": ""}


def test_no_prompt_is_on_both_sides(config: MixtureConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "out")
    train, heldout, rejects, _ = written(tmp_path / "out")
    held = {prompt_key(c) for c in heldout}
    assert not held & {prompt_key(c) for c in train}
    own = {f"prompt {i}" for i in range(0, 100, 10)}
    assert own < held  # the set's own file and the fraction of the other set
    leaks = [r for r in rejects if r["reason"] == "prompt_in_heldout"]
    assert {r["source"] for r in leaks} == {"alpaca", "more", "hh"}
    assert {r["raw"]["messages"][0]["content"].casefold() for r in leaks} <= held


def test_limit_and_feedback_reach_the_files(config: MixtureConfig, tmp_path: Path) -> None:
    config.feedback = Feedback.POSITIVE
    config.sources[1].limit = 7
    build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    assert manifest["sources"]["hh"]["rejected"]["bad_answer"] == 20
    assert not [c for c in train if c.id.endswith("-bad")]
    assert manifest["sources"]["more"]["rejected"]["over_limit"] == 93
    assert sum(c.source == "more" for c in heldout) == 10
    assert {r["raw"] for r in rejects if r["reason"] == "over_limit"} == {None}


def test_the_same_build_is_reused_and_any_change_builds_again(config: MixtureConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build(config, out)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert not build(config, out)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    config.seed = 1
    assert build(config, out)
    assert before["train.jsonl"][0] != (out / "train.jsonl").read_bytes()
    assert not build(config, out)
    with open(config.sources[2].path, "a") as pairs:
        pairs.write("\n")
    assert build(config, out)
    assert not build(config, out)
    with (out / "heldout.jsonl").open("a") as heldout:
        heldout.write("\n")
    assert build(config, out)
    config.seed = 0
    assert build(config, out)
    assert before["train.jsonl"][0] == (out / "train.jsonl").read_bytes()


def test_an_interrupted_build_leaves_nothing(
    config: MixtureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    names = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(data_prep.build, "_write_rejects", interrupt)  # train.jsonl and heldout.jsonl are written
    with pytest.raises(KeyboardInterrupt):
        build(config, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_interrupted_rebuild_leaves_the_earlier_build(
    config: MixtureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    build(config, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    config.seed = 1
    monkeypatch.setattr(data_prep.build, "_write_rejects", full)
    with pytest.raises(UserError, match=r"cannot write .*out: .*No space left"):
        build(config, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_a_folder_or_file_of_somebody_else_is_not_replaced(config: MixtureConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"digest": "x", "outputs": {}}')
    for out in (tmp_path, tmp_path / "mine", tmp_path / "tasks.jsonl"):
        with pytest.raises(UserError, match="is no build"):
            build(config, out)
    assert (tmp_path / "mine" / "manifest.json").is_file()


def test_doubled_ids_name_both_sources(config: MixtureConfig, lines: Callable[..., Path], tmp_path: Path) -> None:
    message = {"role": "assistant", "content": "z"}
    own = lines({"id": "more-3", "source": "ann", "messages": [message]}, name="own.jsonl")
    config.sources += (Source(format=Format.CONVERSATIONS, name="own", path=str(own)),)
    with pytest.raises(UserError, match="'more-3' occurs twice, in sources 'more' and 'own'"):
        build(config, tmp_path / "out")


def test_nothing_left_to_train_on_is_an_error(config: MixtureConfig, tmp_path: Path) -> None:
    config.sources = (config.sources[2],)
    config.sources[0].heldout_fraction = 0.999999999
    with pytest.raises(UserError, match="nothing is left to train on; 40 held out"):
        build(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "alpacca"}, "'alpacca'"),
        ({"name": "more"}, "2 sources are called 'more'"),
        ({"path": "gone.json"}, "source 'alpaca': gone.json: no such file"),
        ({"path": ""}, "path is empty"),
        ({"heldout_path": "gone.json", "heldout_fraction": 0.0}, "gone.json: no such file"),
        ({"heldout_path": __file__}, "heldout_fraction must be 0, got 0.2"),
        ({"heldout_fraction": 1.0}, "below 1, got 1.0"),
        ({"limit": -1}, "limit must be"),
    ],
)
def test_check_names_what_is_wrong(config: MixtureConfig, changes: dict[str, object], sentence: str) -> None:
    for field, value in changes.items():
        setattr(config.sources[0], field, value)
    with pytest.raises(UserError, match=sentence):
        config.check()


def test_check_wants_sources_and_a_known_feedback(config: MixtureConfig) -> None:
    with pytest.raises(UserError, match="no sources"):
        MixtureConfig().check()
    config.feedback = "positive only"
    with pytest.raises(UserError, match="positive only"):
        config.check()


def test_real_files_together(shared_data: Path, tmp_path: Path) -> None:
    files = {
        Format.ALPACA: "alpaca/alpaca_davinci003_0000-2999.json",
        Format.SHAREGPT: "sharegpt/sharegpt_v3_slice_dev.json",
        Format.HC3: "hc3/hc3_600.jsonl",
        Format.HH: "hh_rlhf/harmless-base_test_0000-1499.jsonl.gz",
        Format.OASST: "oasst/en_100_tree_00-59.jsonl",
    }
    sources = [Source(format=kind, path=str(shared_data / path), heldout_fraction=0.1) for kind, path in files.items()]
    build(MixtureConfig(sources=tuple(sources)), tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    assert len(train) + len(heldout) + len(rejects) == sum(s["read"] for s in manifest["sources"].values()) == 9597
    assert not {prompt_key(c) for c in heldout} & {prompt_key(c) for c in train}
    assert not {c.group for c in heldout if c.group} & {c.group for c in train if c.group}
    assert manifest["sources"]["hc3"]["rejected"] == {"duplicate": 38}
    assert manifest["sources"]["sharegpt"]["rejected"]["duplicate"] == 6
