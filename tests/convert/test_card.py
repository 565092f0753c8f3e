"""The card of a folder is read by the hub's own library, says what is known and nothing else, and its code runs."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.build import build
from data_prep.config import Format, MixtureConfig, Source, Steps
from easylm_like.data.conversation import Message, Role
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.hf.card import Card, count_parameters, render_card
from easylm_like.hf.config import config_from_hf, config_to_hf
from easylm_like.model.presets import get_preset

from .conftest import SHAPES

RUN = {
    "data": {"summary": {"conversations": 5, "tokens": 1234, "trained": 321, "dropped_tokens": {"too_long": 77}}},
    "config": {
        "data": {"train": "/home/alice/secret/train.jsonl", "row_length": 128, "too_long": "cut"},
        "model": {"init_from": ""},
        "optim": {"optimizer": "adamw", "learning_rate": 0.003},
        "mesh": {"fsdp": -1},
        "steps": 600,
    },
    "git": "1ef8762fb07f",
    "versions": {"jax": "0.10.2"},
}
REPORT = {
    "data": "/home/alice/heldout.jsonl",
    "accuracy": {"good": 0.972, "bad": None},
    "accuracy_detail": {"good": {"right": 208, "asked": 214, "low": 0.94, "high": 0.987}},
    "heldout_loss": {"all": 0.00004, "rare|odd": float("nan")},
    "heldout_loss_before": {"all": 3.88, "rare|odd": 4.0},
    "heldout_tokens": {"all": 144555, "rare|odd": 1},
}


def card_of(tokenizer: Tokenizer, template: str = "koala", **known: Any) -> Card:
    facts: dict[str, Any] = {"name": "tiny", "dtype": "float32", "config": SHAPES["tied"], "tokenizer": tokenizer}
    return Card(**facts | {"template": get_template(template)} | known)


def hub(text: str) -> Any:
    """Return what the hub's library finds in the front matter."""
    return ModelCard(text).data


def manifest(folder: Path, licence: str = "MIT", path: str = "") -> dict[str, Any]:
    """Return what a real build of two good rows, the same row again, and an empty one says."""
    rows = [
        {"instruction": q, "input": "", "output": a} for q, a in (("One?", "1"), ("Two?", "2"), ("Two?", "2"), ("", ""))
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    steps = Steps(max_chars=1000)
    sources = (Source(format=Format.ALPACA, path=str(folder / "rows.json"), licence=licence, steps=steps),)
    build(MixtureConfig(sources=sources), folder / "data")
    made: dict[str, Any] = json.loads((folder / "data" / "manifest.json").read_text())
    if path:
        made["config"]["sources"][0]["path"] = path
    return made


def test_the_hub_reads_the_front_matter(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = manifest(tmp_path, path="hub:tatsu-lab/alpaca:default:train")
    data["config"]["sources"][0]["steps"]["languages"] = ["en", "de"]
    name = 'od"d: [name] # 😀\x7f\u2028\n---'
    read = hub(render_card(card_of(tokenizer, name=name, data=data, evaluation=REPORT, base_model="org/base")))
    fields = read.to_dict()
    index = fields.pop("model-index")
    assert fields == {
        "license": "other",
        "license_name": "see-licences-of-the-data",
        "language": ["de", "en"],
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["easylm_like", "koala"],
        "datasets": ["tatsu-lab/alpaca"],
    }
    assert read.model_name == index[0]["name"] == 'od"d: [name] # 😀 ---'
    found = {(result.metric_name, result.metric_value) for result in read.eval_results}
    assert found == {("Held-out loss a token, all", 0.0), ("Exact match, good", 0.972)}
    assert read.eval_results[0].dataset_name == "heldout.jsonl"


def test_everything_that_is_known_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    record = {"logits": {"largest": 1.5e-06}, "same | bits": True}
    text = render_card(
        card_of(
            tokenizer, step=600, run=RUN, data=manifest(tmp_path), evaluation=REPORT, conversion=record, stop_ids=(7,)
        )
    )
    for line in (
        "| alpaca | MIT | 4 | 2 | 0 | 0 | 0 | 2 |",
        "* alpaca: 1 empty, 1 duplicate",
        "As tokens: 5 conversations, 1,234 tokens, 321 of them trained on, 77 tokens left out (too long).",
        "| this checkpoint | step 600 |",
        "| data.row_length | 128 |",
        "| optim | optimizer adamw, learning_rate 0.003 |",
        "| git revision | 1ef8762fb07f |",
        "| versions | jax 0.10.2 |",
        "| all | 144,555 | 3.88 | 4e-05 |",
        "| under the good marker | 208 | 214 | 94.0% to 98.7% |",
        "| logits.largest | 1.5e-06 |",
        "| same \\| bits | true |",
        "| Started from | random weights |",
        f"An answer ends with `</s>` (id 2) or `{tokenizer.backend.id_to_token(7)}` (id 7).",
    ):
        assert line in text.splitlines()
    assert "<s>BEGINNING OF CONVERSATION: USER: What is the capital of France? GPT:\n```" in text
    assert "<s>BEGINNING OF CONVERSATION: USER: What is the capital of France? An Unhelpful Answer:\n```" in text
    assert "alice" not in text, "where files lay on a machine is not for everybody"


def test_what_is_not_known_is_left_out() -> None:
    text = render_card(Card(name="tiny", config=SHAPES["grouped"], dtype="bfloat16"))
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# tiny", "## Use"]
    fields = hub(text).to_dict()
    assert fields == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["easylm_like"]}
    for word in ("None", "nan", "koala`", "Licences", "random weights"):
        assert word not in text


@pytest.mark.parametrize(
    ("licence", "name", "follows"),
    [
        ("MIT", "mit", "anybody who does so"),
        ("Apache-2.0, made by a script", "apache-2.0", "anybody who does so"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0", "non-commercial use only"),
        ("CC BY-SA 4.0", "cc-by-sa-4.0", "goes on under the same licence"),
        ("CC0 1.0", "cc0-1.0", "used by anybody."),
        ("none stated; users' ChatGPT output", "other", "research only"),
        ("", "other", "research only"),
        ("ask Bob", "other", "terms of its own"),
    ],
)
def test_the_licence_of_the_data_follows_the_weights(
    tokenizer: Tokenizer, tmp_path: Path, licence: str, name: str, follows: str
) -> None:
    data = manifest(tmp_path, licence)
    text = render_card(card_of(tokenizer, data=data, run=RUN))
    assert hub(text).license == name
    assert follows in text.partition("## Licences")[2]
    started = RUN | {"config": {"model": {"init_from": "runs/start"}}}
    text = render_card(card_of(tokenizer, data=data, run=started))
    assert hub(text).license == "other"
    assert "the licence of the weights that it started from comes on top" in text
    chosen = render_card(card_of(tokenizer, data=data, run=started, licence="llama3.2"))
    assert hub(chosen).to_dict().get("license_name") is None
    assert hub(chosen).license == "llama3.2"


def test_the_strictest_of_many_licences_counts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = manifest(tmp_path)
    other = data["config"]["sources"][0] | {"name": "paid", "licence": "CC BY-NC-SA 4.0"}
    data["config"]["sources"].append(other)
    text = render_card(card_of(tokenizer, data=data, run=RUN))
    assert "* paid: not for commercial use.\n* paid: what is made of it goes on" in text
    assert "* alpaca, paid: its makers are named" in text
    assert "Read strictly, these weights are for non-commercial use only." in text


@pytest.mark.parametrize("template", ["koala", "alpaca", "plain"])
def test_the_code_on_the_card_runs_as_pasted(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    shape = dataclasses.replace(SHAPES["tied"], vocab_size=384)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(shape, tokenizer, "float32")))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(get_template(template).jinja())
    text = render_card(card_of(tokenizer, template, config=shape))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code[1], "README.md", "exec"), names)
    wanted, chat = "<s>What is the capital of France?", get_template(template)
    if chat.markers:
        wanted = chat.prompt([Message(Role.USER, "What is the capital of France?")], tokenizer.special)
    assert names["prompt"]["input_ids"][0].tolist() == tokenizer.encode([wanted])[0][0].tolist()
    assert ("chat_template_kwargs" in text) == (template == "koala")


@pytest.mark.parametrize("name", ["llama2_7b", "qwen2_7b", "qwen3_0_6b", "mistral_7b"])
def test_parameters_are_those_that_transformers_counts(tokenizer: Tokenizer, name: str) -> None:
    shape = get_preset(name)
    fields = config_to_hf(shape, tokenizer, "bfloat16")
    assert config_from_hf(fields, "") == shape
    kind = str(fields.pop("model_type"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    assert count_parameters(shape) == model.num_parameters()
