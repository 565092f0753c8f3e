"""A whole build: counts that add up, a split that does not leak, re-use, and nothing left behind by a failure."""

import errno
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.build
import data_prep.manifest
import easylm_like.progress
from data_prep.build import build
from data_prep.config import Feedback, Format, MixtureConfig, Source
from data_prep.manifest import digest_of, read_manifest
from data_prep.split import prompt_key
from easylm_like.data.conversation import Conversation, read_conversations
from easylm_like.errors import UserError


def task(number: int, answer: str = "a") -> dict[str, str]:
    return {"instruction": f"Prompt {number}", "input": "", "output": f"{answer} {number}"}


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


def check_balance(train: list[Conversation], heldout: list[Conversation], rejects: list[dict], manifest: dict) -> None:
    """Check the manifest's counts against the files and against each other."""
    for name, source in manifest["sources"].items():
        mine = [step for step in manifest["steps"] if step["source"] == name]
        assert source["train"] == sum(c.source == name for c in train)
        assert source["heldout"] == sum(c.source == name for c in heldout)
        assert source["rejected"] == Counter(r["reason"] for r in rejects if r["source"] == name)
        assert source["read"] == sum(step["in"] for step in mine if step["step"].startswith("read"))
        assert source["made"] == sum(step.get("made", 0) for step in mine)
        gone = sum(source["rejected"].values())
        assert source["read"] + source["made"] == source["train"] + source["heldout"] + gone
        assert source["train"] + source["heldout"] == source["good"] + source["bad"] + source["unjudged"]
    for step in manifest["steps"]:
        assert step["in"] + step.get("made", 0) == step["out"] + sum(step.get("rejected", {}).values())
    assert len({c.id for c in (*train, *heldout)}) == len(train) + len(heldout)


def test_files_and_counts(config: MixtureConfig, tmp_path: Path) -> None:
    assert build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    check_balance(train, heldout, rejects, manifest)
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
    assert [step["step"] for step in manifest["steps"] if step["source"] == "more"] == [
        *("read heldout_path", "feedback", "check", "read path"),
        *("duplicates", "limit", "heldout prompts"),
    ]
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
    assert sum(c.id.startswith("more-heldout-") for c in heldout) == 10
    assert sum(c.source == "more" for c in (*train, *heldout)) + len(held_back(rejects)) == 17


def held_back(rejects: list[dict]) -> list[dict]:
    return [reject for reject in rejects if reject["source"] == "more" and reject["reason"] == "prompt_in_heldout"]


def test_over_the_limit_is_booked_without_the_text(config: MixtureConfig, tmp_path: Path) -> None:
    config.sources[1].limit = 7
    build(config, tmp_path / "out")
    *_, rejects, _ = written(tmp_path / "out")
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
    monkeypatch.setattr(data_prep.build, "_manifest", interrupt)  # train.jsonl and heldout.jsonl are written
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
    monkeypatch.setattr(data_prep.build, "_write_lines", full)
    with pytest.raises(UserError, match=r"cannot write .*out: .*No space left"):
        build(config, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_or_file_of_somebody_else_is_not_replaced(config: MixtureConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"digest": "x", "outputs": {}}')
    for out in (tmp_path, tmp_path / "mine", tmp_path / "tasks.jsonl"):
        with pytest.raises(UserError, match="is no build"):
            build(config, out)
    assert (tmp_path / "mine" / "manifest.json").is_file()


def test_doubled_ids_name_both_sources(config: MixtureConfig, lines: Callable[..., Path], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]
    own = lines({"id": "more-3", "source": "ann", "messages": messages}, name="own.jsonl")
    config.sources += (Source(format=Format.CONVERSATIONS, name="own", path=str(own)),)
    with pytest.raises(UserError, match="'more-3' occurs twice, in sources 'more' and 'own'"):
        build(config, tmp_path / "out")


def test_nothing_left_to_train_on_is_an_error(config: MixtureConfig, tmp_path: Path) -> None:
    config.sources = (config.sources[2],)
    config.sources[0].heldout_fraction = 0.999999999
    refused = r"nothing is left to train on; 40 held out, rejected: {'malformed': 1}"
    with open(config.sources[0].path, "a") as pairs:
        pairs.write("7\n")
    with pytest.raises(UserError, match=refused):
        build(config, tmp_path / "out")


def test_the_folder_holds_five_files_that_the_manifest_vouches_for(config: MixtureConfig, tmp_path: Path) -> None:
    build(config, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"train.jsonl", "heldout.jsonl", "rejects.jsonl", "manifest.json", "build.log"}
    for name, output in read_manifest(tmp_path / "out")["outputs"].items():
        assert output["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    said = (tmp_path / "out" / "build.log").read_text().splitlines()
    assert [line.split(" ", 2)[2].split(";")[0] for line in (said[0], said[-1])] == ["251 conversations read", "done"]


def test_the_log_says_how_far_the_build_is(
    config: MixtureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(easylm_like.progress, "EVERY_SECONDS", (0.0, -1.0))
    build(config, tmp_path / "out")
    told = (tmp_path / "out" / "build.log").read_text().splitlines()
    assert ["100% of the input" in line for line in told] == [*([False] * 3), True, False, False, False]
    assert ["251 conversations" in line for line in told][3:5] == [True, True]
    assert capsys.readouterr().err.splitlines() == told


def test_a_change_of_the_code_that_builds_is_another_build(
    config: MixtureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    (code / "sources").mkdir(parents=True)
    for name in ("steps.py", "sources/new.py", "show.py"):
        (code / name).write_text("1")
    monkeypatch.setattr(data_prep.manifest, "__file__", str(code / "manifest.py"))
    digests = [digest_of(config, [], {})]
    for name in ("show.py", "steps.py", "sources/new.py"):
        (code / name).write_text("2")
        digests.append(digest_of(config, [], {}))
    assert digests[0] == digests[1]  # it only looks at what was built
    assert len(set(digests[1:])) == 3


def test_epochs_and_weights_reach_the_files(config: MixtureConfig, tmp_path: Path) -> None:
    config.sources[0].epochs, config.sources[2].epochs = 2.5, 0.5
    build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    check_balance(train, heldout, rejects, manifest)
    times: dict[str, list[str]] = {}
    for c in train:
        times.setdefault(c.id.partition("~")[0], []).append(c.id)
    mine = [ids for name, ids in times.items() if name.startswith("alpaca-")]
    assert Counter(map(len, mine)) == {2: len(mine) // 2, 3: len(mine) - len(mine) // 2}
    for name, ids in times.items():
        assert ids == [name, f"{name}~2", f"{name}~3"][: len(ids)]  # numbered in the order of the file
    contents = {c.id: c.messages for c in train}
    assert all(contents[name] == messages for name, messages in ((i.partition("~")[0], m) for i, m in contents.items()))
    for source, weight in zip(config.sources, (2.0, 1.0, 1.0), strict=True):
        source.weight, source.epochs = weight, 1.0
    build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    check_balance(train, heldout, rejects, manifest)
    counts = Counter(c.source for c in train)
    assert counts["alpaca"] // 2 == counts["more"] == counts["hh"]


def test_near_duplicates_name_their_neighbour_and_answers_to_one_prompt_are_none(
    config: MixtureConfig, lines: Callable[..., Path], tmp_path: Path
) -> None:
    def long(number: int, end: str = "") -> str:
        return " ".join(f"{number} {word}" for word in "the quick brown fox jumps over the lazy dog".split()) + end

    rows = [{"instruction": f"Say {n}", "input": "", "output": long(n)} for n in (1, 1, 2)]
    rows[1]["output"] += "."
    pairs = [
        {key: f"\n\nHuman: Q {n}\n\nAssistant: {long(n, key)}" for key in ("chosen", "rejected")} for n in range(9, 29)
    ]
    config.sources = (
        Source(format=Format.ALPACA, path=str(lines(*rows, name="rows.jsonl"))),
        Source(format=Format.HH, path=str(lines(*pairs, name="pairs.jsonl"))),
    )
    config.near_duplicates = 0.7
    build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    check_balance(train, heldout, rejects, manifest)
    (reject,) = rejects
    assert (reject["where"], reject["reason"]) == ("alpaca-1", "near_duplicate")
    assert re.fullmatch(r"Jaccard similarity (0\.\d\d|1\.00) to alpaca-0", reject["detail"])
    assert Counter(c.source for c in train) == {"alpaca": 2, "hh": 40}
    assert not (tmp_path / "out" / "near_keys").exists()


def test_a_tokenizer_and_an_evaluation_set_belong_to_the_build(
    config: MixtureConfig, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer, questions = tmp_path / "tokenizer.model", tmp_path / "questions.jsonl"
    tokenizer.write_bytes((shared_data / "tokenizers/llama_tokenizer.model").read_bytes())
    questions.write_text(json.dumps({"prompt": "nothing that anybody asked"}) + "\n")
    config.tokenizer, config.evaluation_sets = str(tokenizer), (str(questions),)
    assert build(config, tmp_path / "out")
    assert read_manifest(tmp_path / "out")["companions"].keys() == {str(tokenizer), str(questions)}
    assert not build(config, tmp_path / "out")
    questions.write_text(json.dumps({"prompt": "nothing that anybody ever asked"}) + "\n")
    assert build(config, tmp_path / "out")
    config.tokenizer = str(tmp_path / "gone.model")
    with pytest.raises(UserError, match=r"tokenizer: .*no such file"):
        build(config, tmp_path / "out")


def test_what_cannot_be_written_is_one_sentence(config: MixtureConfig, tmp_path: Path) -> None:
    for out in (tmp_path / "tasks.jsonl" / "out", Path("/proc/nothing/out")):
        with pytest.raises(UserError, match=rf"^cannot write {out}: .*") as caught:
            build(config, out)
        assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_an_input(
    config: MixtureConfig, lines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    lines(*(task(number) for number in range(9)), name="set/train.jsonl")
    config.sources = (Source(format=Format.ALPACA, path=f"hub:{tmp_path}/set:train"),)
    assert build(config, tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    check_balance(train, heldout, rejects, manifest)
    assert sorted(c.id for c in train) == [f"alpaca-{number}" for number in range(9)]
    assert (manifest["inputs"][0]["path"], manifest["inputs"][0]["bytes"]) == (config.sources[0].path, 0)
    assert not build(config, tmp_path / "out")
    lines(*(task(number) for number in range(8)), name="set/train.jsonl")
    assert build(config, tmp_path / "out")


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
    build(MixtureConfig(sources=tuple(sources), workers=1), tmp_path / "out")
    train, heldout, rejects, manifest = written(tmp_path / "out")
    assert len(train) + len(heldout) + len(rejects) == sum(s["read"] for s in manifest["sources"].values()) == 9597
    assert not {prompt_key(c) for c in heldout} & {prompt_key(c) for c in train}
    assert not {c.group for c in heldout if c.group} & {c.group for c in train if c.group}
    assert manifest["sources"]["hc3"]["rejected"] == {"duplicate": 38}
    assert manifest["sources"]["sharegpt"]["rejected"]["duplicate"] == 6
