"""The conversion commands: nothing is done twice, nothing half, and nothing that is somebody's is replaced."""

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from easylm_like.command import run_command
from easylm_like.convert.__main__ import main
from easylm_like.hf.keys import as_stacks
from easylm_like.train.checkpoint import load_params, read_run_info, save_params
from easylm_like.train.config import DataConfig, ModelConfig, RunConfig
from easylm_like.train.loop import train

from .conftest import SHAPES, Export, convert


@pytest.fixture
def limit_files() -> Iterator[Callable[[int], None]]:
    """Return a function that forbids files of more than so many bytes, as a full disk does, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


Capture = pytest.CaptureFixture[str]
NewRun = Callable[..., Path]


def fails(capsys: Capture, *arguments: str | Path) -> str:
    """Run a command that must end with one sentence, and return that sentence."""
    with pytest.raises(SystemExit) as end:
        run_command(main, [str(argument) for argument in arguments])
    assert end.value.code == 1
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ")
    assert sentence.count("\n") == 1
    return sentence


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_conversion_is_re_used_and_a_new_checkpoint_is_not(
    new_run: NewRun, new_params: Callable[..., dict[str, np.ndarray]], tmp_path: Path, capsys: Capture
) -> None:
    run, out = new_run(tmp_path / "run", SHAPES["tied"]), tmp_path / "hf"
    arguments = ["to-hf", f"--model={run}", f"--out={out}"]
    main(arguments)
    assert "step 0, in float32; 20 arrays equal to the bit, logits at" in capsys.readouterr().out
    record = json.loads((out / "conversion.json").read_text())
    assert (record["template"], record["from"]["step"], record["to"]["dtype"]) == ("koala", 0, "float32")
    assert record["run"] == read_run_info(run / "checkpoints")[1]
    first, weights = listing(out), load_file(out / "model.safetensors")
    main(arguments)
    assert f"{out}: already holds {run}, step 0, in float32" in capsys.readouterr().out
    assert listing(out) == first
    main([*arguments, "--dtype=float16"])
    assert "step 0, in float16; 20 arrays equal to the bit after rounding" in capsys.readouterr().out
    _, info = read_run_info(run / "checkpoints")
    save_params(run / "checkpoints", as_stacks(new_params(SHAPES["tied"], 1)), info, step=5)
    main(arguments)
    assert "step 5, in float32" in capsys.readouterr().out
    assert (load_file(out / "model.safetensors")["model.norm.weight"] != weights["model.norm.weight"]).all()
    main([*arguments, "--step=0"])
    assert "step 0, in float32" in capsys.readouterr().out
    assert (load_file(out / "model.safetensors")["model.norm.weight"] == weights["model.norm.weight"]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def test_a_start_is_re_used_and_can_be_converted_on(export: Export, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["to-orbax", f"--model={export.folder}", f"--out={tmp_path / 'start'}"]
    main(arguments)
    assert "logits at" in capsys.readouterr().out
    step, info = read_run_info(tmp_path / "start" / "checkpoints")
    assert (step, info["template"], info["source"]["path"]) == (0, "koala", str(export.folder))
    for name, weight in load_params(tmp_path / "start" / "checkpoints", 0).items():
        assert weight.tobytes() == export.params[name].tobytes()
    before = listing(tmp_path / "start")
    main(arguments)
    assert "already holds" in capsys.readouterr().out
    assert listing(tmp_path / "start") == before


@pytest.mark.slow
@pytest.mark.parametrize("export", ["qwen3"], indirect=True)
def test_a_folder_is_trained_on_and_comes_out_as_the_same_family(
    export: Export, tmp_path: Path, capsys: Capture
) -> None:
    main(["to-orbax", f"--model={export.folder}", f"--out={tmp_path / 'start'}"])
    chat = [{"role": "user", "content": "What is 3 and 4?"}, {"role": "assistant", "content": "3 and 4 make 7"}]
    lines = [json.dumps({"id": f"c{i}", "source": "sums", "messages": chat}) + "\n" for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    config = RunConfig(steps=2, batch_size=8, checkpoint_every=2)
    config.data = DataConfig(train=str(tmp_path / "train.jsonl"), row_length=64)
    config.model = ModelConfig(init_from=str(tmp_path / "start"))
    config.compilation_cache = ""
    train(config, tmp_path / "run")
    main(["to-hf", f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}"])
    assert "step 2, in float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3"
    old, new = (load_file(folder / "model.safetensors") for folder in (export.folder, tmp_path / "hf"))
    assert {name: weight.shape for name, weight in new.items()} == {name: weight.shape for name, weight in old.items()}
    assert (new["model.layers.1.self_attn.q_norm.weight"] != old["model.layers.1.self_attn.q_norm.weight"]).any()


def test_a_cut_weight_file_writes_nothing(export: Export, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "cut"))
    (folder / "files.json").unlink()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    sentence = fails(capsys, "to-orbax", f"--model={folder}", f"--out={tmp_path / 'start'}")
    assert f"{folder}/model.safetensors: damaged or cut off" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_another_architecture_is_refused(export: Export, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "other"))
    fields = json.loads((folder / "config.json").read_text())
    for change in ({"model_type": "gpt2"}, {"attention_bias": True}, {"rope_parameters": {"rope_type": "yarn"}}):
        (folder / "config.json").write_text(json.dumps(fields | change))
        sentence = fails(capsys, "to-orbax", f"--model={folder}", f"--out={tmp_path / 'start'}")
        assert f"{folder}/config.json: " in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_mistakes_in_the_arguments_are_one_sentence_before_anything_is_written(
    export: Export, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easylm_like.convert.export.TARGETS", {})  # whoever comes to the writing falls over this
    out = f"--out={tmp_path / 'out'}"
    run, folder = f"--model={export.run}", f"--model={export.folder}"
    assert "none: no such file or folder" in fails(capsys, "to-hf", f"--model={tmp_path / 'none'}", out)
    assert f"{tmp_path}: expected a run's work directory" in fails(capsys, "to-hf", f"--model={tmp_path}", out)
    assert "no checkpoint of step 5; there are [0]" in fails(capsys, "to-hf", run, out, "--step=5")
    assert "unknown template 'alpaka'" in fails(capsys, "to-orbax", folder, out, "--template=alpaka")
    assert "unknown GGUF type" in fails(capsys, "to-gguf", folder, out, "--type=Q3_K_M")
    assert "tokenizer: no tokenizer.json or tokenizer.model there" in fails(
        capsys, "to-hf", folder, out, f"--tokenizer={tmp_path / 'tokenizer'}"
    )
    assert "a vocabulary must have at least as many; got 100" in fails(capsys, "to-hf", folder, out, "--vocab_size=100")
    for flag in ("evaluation", "dialogues"):
        assert "nowhere" in fails(capsys, "to-hf", folder, out, f"--{flag}={tmp_path / 'nowhere'}")
    assert "a text without a token" in fails(capsys, "to-hf", folder, out, "--prompt=")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["to-hf", "to-gguf", "to-orbax"])
def test_a_full_disk_leaves_nothing(
    export: Export, tmp_path: Path, capsys: Capture, limit_files: Callable[[int], None], target: str
) -> None:
    model = export.folder if target == "to-orbax" else export.run
    limit_files(10_000)
    sentence = fails(capsys, target, f"--model={model}", f"--out={tmp_path / 'out'}")
    assert "File too large" in sentence
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_in_the_run_is_refused(new_run: NewRun, tmp_path: Path, capsys: Capture) -> None:
    run = new_run(tmp_path / "run", SHAPES["tied"])
    content = (run / "tokenizer" / "tokenizer.json").read_text()
    (run / "tokenizer" / "tokenizer.json").write_text(content.replace('"version"', ' "version"', 1))
    sentence = fails(capsys, "to-hf", f"--model={run}", f"--out={tmp_path / 'out'}")
    assert "run/tokenizer is not the one that trained this checkpoint" in sentence


@pytest.mark.parametrize("command", ["to-hf", "to-orbax", "to-gguf"])
def test_a_folder_of_somebody_else_is_not_replaced(
    export: Export, tmp_path: Path, capsys: Capture, command: str
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    sentence = fails(capsys, command, f"--model={export.folder}", f"--out={tmp_path}")
    assert "exists and is not replaced" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_does_not_replace_a_run(export: Export, new_run: NewRun, tmp_path: Path, capsys: Capture) -> None:
    run = new_run(tmp_path / "run", SHAPES["tied"], seed=3)
    before = listing(run)
    fails(capsys, "to-orbax", f"--model={export.folder}", f"--out={run}")
    assert listing(run) == before


def test_the_users_own_prompts_dialogues_and_evaluation_are_in_the_proof_and_the_card(
    export: Export, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "What is 3 and 4?"}, {"role": "assistant", "content": "3 and 4 make 7"}]
    lines = [json.dumps({"id": f"c{i}", "source": "sums", "messages": chat}) + "\n" for i in range(5)]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    (tmp_path / "report.json").write_text('{"heldout_loss": {"all": 1.25}, "heldout_tokens": {"all": 12}}')
    flags = [
        f"--dialogues={tmp_path / 'own.jsonl'}",
        f"--evaluation={tmp_path / 'report.json'}",
        "--licence=apache-2.0",
    ]
    counts = {}
    for name, more in {"plain": [], "own": [*flags, "--prompt=3 and 4 make", "--prompt=7"]}.items():
        convert("to-hf", export.run, tmp_path / name, *more)
        record = json.loads((tmp_path / name / "conversion.json").read_text())
        counts[name] = record["tokenizer"]["conversations_and_prompts"], record["proof"]["logits"]["positions"]
    assert counts["own"][0] == counts["plain"][0] + 5 * 3  # each as a whole, and its prompt under two markers
    assert 2 < counts["own"][1] < counts["plain"][1]
    assert list(record["options"]) == ["prompts", "dialogues", "evaluation", "licence"]
    card = (tmp_path / "own" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert "1.25" in card
    assert "1.25" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_runs_weights_become_a_start_of_half_the_size(new_run: NewRun, tmp_path: Path, capsys: Capture) -> None:
    run = new_run(tmp_path / "run", SHAPES["mistral"])
    convert("to-orbax", run, tmp_path / "half", "--dtype=bfloat16")
    assert "after rounding" in capsys.readouterr().out
    old, new = (load_params(folder / "checkpoints", 0) for folder in (run, tmp_path / "half"))
    assert {path.name for path in (tmp_path / "half" / "checkpoints" / "0").iterdir()} == {
        "params",
        "run.json",
        "files.json",
    }
    for name, weight in old.items():
        assert new[name].tobytes() == weight.astype(ml_dtypes.bfloat16).tobytes(), name
    convert("to-orbax", tmp_path / "half", tmp_path / "whole", "--dtype=float32")
    assert "after rounding" not in capsys.readouterr().out, "every value of bfloat16 is one of float32"


def test_a_published_model_goes_through_every_format_and_comes_back(
    shared_data: Path, tmp_path: Path, capsys: Capture
) -> None:
    models = shared_data / "models"
    convert("to-gguf", models / "stories260K" / "stories260K.bin", tmp_path / "gguf", "--type=F32")
    convert("to-orbax", tmp_path / "gguf" / "gguf-f32.gguf", tmp_path / "run", "--template=koala")
    convert("to-hf", tmp_path / "run", tmp_path / "hf")
    said = capsys.readouterr().out
    for kind in ("llama2.c file", "GGUF file", "checkpoint, step 0,"):
        assert f"{kind} in" in said
    wanted, got = (load_file(f / "model.safetensors") for f in (models / "stories260K-hf", tmp_path / "hf"))
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].tobytes() == array.tobytes(), name


def test_a_tokenizer_that_the_format_cannot_hold_is_refused(shared_data: Path, tmp_path: Path, capsys: Capture) -> None:
    model = shared_data / "models" / "stories260K-hf"  # its dummy space stands at the beginning of the text alone
    sentence = fails(capsys, "to-gguf", f"--model={model}", f"--out={tmp_path / 'gguf'}")
    assert "the tokenizer in this format reads" in sentence
    assert list(tmp_path.iterdir()) == []
    convert("to-gguf", model, tmp_path / "gguf", f"--tokenizer={model / 'tokenizer.model'}")


def test_a_larger_vocabulary_has_the_mean_of_the_old_rows(export: Export, tmp_path: Path) -> None:
    convert("to-hf", export.run, tmp_path / "hf", "--vocab_size=512")
    rows = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    old = export.params["embed"][: export.shape.vocab_size]
    assert len(rows) == 512
    np.testing.assert_array_equal(rows[: len(old)], old)
    np.testing.assert_allclose(rows[len(old) :], np.tile(old.mean(axis=0), (512 - len(old), 1)), rtol=1e-5, atol=1e-7)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 512


def test_what_a_folder_from_elsewhere_says_about_its_chats_is_kept(export: Export, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(export.folder, tmp_path / "theirs"))
    for name in ("conversion.json", "files.json", "chat_template.jinja"):
        (folder / name).unlink()
    jinja = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": jinja}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    convert("to-hf", folder, tmp_path / "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == jinja
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    assert json.loads((tmp_path / "hf" / "conversion.json").read_text())["template"] is None
