"""A server's prompt is the training record's beginning, and what transformers makes of the same messages."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from easylm_like.convert.folder import chat_template
from easylm_like.data.conversation import Conversation, Message, Quality, Role
from easylm_like.data.encode import Encoded, encode
from easylm_like.data.template import TEMPLATES, Template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.serve.chat import Fields, PromptError, can_chat, chat_prompt, markers, text_prompt


@dataclass
class Model:
    """What a prompt needs of a model."""

    tokenizer: Tokenizer
    template: Template | None = None
    chat_template: str | None = None


TALK: list[Fields] = [
    {"role": "user", "content": "What is 3 and 4?\nSay it  twice."},
    {"role": "assistant", "content": "It is 7. 你好 🦙"},
    {"role": "user", "content": " Who asked? "},
]
SYSTEM: Fields = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for document in documents or [] %}"
    "[{{ document['title'] }}]{% endfor %}{% for message in messages %}{{ message['role'] }}: "
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['arguments'] | tojson }}{% endfor %}"
    "{{ message['content'] or '' }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2(shared_data: Path) -> Path:
    return shared_data / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session", params=["stories260K", "smollm2"])
def some_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer, smollm2: Path) -> Tokenizer:
    """Return a SentencePiece-like tokenizer, and one over bytes."""
    return tokenizer if request.param == "stories260K" else load_tokenizer(smollm2)


def saved(tokenizer: Tokenizer, folder: Path, chat_template: str) -> PreTrainedTokenizerBase:
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(chat_template)
    return AutoTokenizer.from_pretrained(folder)


def theirs(tokenizer: PreTrainedTokenizerBase, messages: list[Fields], **fields: object) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **fields)["input_ids"]


@pytest.mark.parametrize(("name", "quality"), [(name, q) for name, t in TEMPLATES.items() for q in t.qualities])
def test_the_prompt_is_the_beginning_of_the_training_record(
    some_tokenizer: Tokenizer, tmp_path: Path, name: str, quality: Quality
) -> None:
    template = TEMPLATES[name]
    messages = TALK[:1] if template.single_turn else TALK
    answer = Message(Role.ASSISTANT, "Nobody did.", quality)
    whole = (*(Message(Role(m["role"]), m["content"]) for m in messages), answer)
    (record,) = encode([Conversation("1", "test", whole)], template, some_tokenizer)
    assert isinstance(record, Encoded)
    ids = chat_prompt(Model(some_tokenizer, template), messages, marker=str(quality)).ids.tolist()
    last = max(i for i, span in enumerate(record.spans) if span.weight == 0)
    assert ids == record.ids[record.span_of <= last].tolist()
    jinja = saved(some_tokenizer, tmp_path, template.jinja())
    assert ids == theirs(jinja, messages, quality=str(quality))


def test_the_marker_changes_the_prompt_and_good_is_the_default(tokenizer: Tokenizer) -> None:
    model = Model(tokenizer, TEMPLATES["koala"])
    texts = [tokenizer.decode(chat_prompt(model, TALK, marker=marker).ids.tolist()) for marker in (None, "good", "bad")]
    assert texts[0] == texts[1]
    assert texts[1].endswith("GPT:")
    assert texts[2].endswith("An Unhelpful Answer:")
    assert markers(model) == ("good", "bad")


def test_an_answer_of_the_history_keeps_its_marker(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [TALK[0], {**TALK[1], "quality": "bad"}, TALK[2]]
    ids = chat_prompt(Model(tokenizer, TEMPLATES["koala"]), messages).ids.tolist()
    assert ids == theirs(saved(tokenizer, tmp_path, TEMPLATES["koala"].jinja()), messages)
    assert ids != chat_prompt(Model(tokenizer, TEMPLATES["koala"]), TALK).ids.tolist()


def test_a_wording_is_chosen(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, jinja = Model(tokenizer, TEMPLATES["coh"]), saved(tokenizer, tmp_path, TEMPLATES["coh"].jinja())
    for wording in (0, 1, 24):
        ids = chat_prompt(model, TALK, marker="bad", wording=wording).ids.tolist()
        assert ids == theirs(jinja, TALK, quality="bad", wording=wording)


def test_what_ends_an_answer(tokenizer: Tokenizer) -> None:
    prompt = chat_prompt(Model(tokenizer, TEMPLATES["koala"]), TALK)
    assert (prompt.stop, prompt.gap) == (("USER:",), " ")  # and the EOS id, which the engine knows
    alpaca = chat_prompt(Model(tokenizer, TEMPLATES["alpaca"]), TALK[:1])
    assert (alpaca.stop, alpaca.gap) == (("### Instruction:",), "")


@pytest.mark.parametrize(
    "messages", [TALK, [SYSTEM, *TALK], TALK[:1], TALK[:2], [{**SYSTEM, "role": "developer"}, *TALK]]
)
def test_a_model_with_a_template_of_its_own_gets_what_transformers_gives(smollm2: Path, messages: list[Fields]) -> None:
    model = Model(load_tokenizer(smollm2), None, chat_template(smollm2))
    wanted = [{**message, "role": message["role"].replace("developer", "system")} for message in messages]
    assert chat_prompt(model, messages).ids.tolist() == theirs(AutoTokenizer.from_pretrained(smollm2), wanted)


def test_tools_calls_and_documents_go_through_a_template_that_has_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 3}}}
    messages = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    documents = [{"title": "Sums", "text": "3 and 4 are 7"}]
    prompt = chat_prompt(Model(tokenizer, None, TOOLS_TEMPLATE), messages, tools=[TOOL], documents=documents)
    jinja = saved(tokenizer, tmp_path, TOOLS_TEMPLATE)
    assert prompt.ids.tolist() == theirs(jinja, messages, tools=[TOOL], documents=documents)
    assert '"name": "add"' in tokenizer.decode(prompt.ids.tolist())


@pytest.mark.parametrize(
    ("template", "messages", "settings", "sentence"),
    [
        ("koala", [*TALK, TALK[1], {**TALK[0], "content": "a </s> b"}], {}, "special token '</s>'"),
        ("koala", [TALK[0], TALK[0]], {}, "user and assistant in turns"),
        ("koala", [SYSTEM, *TALK], {}, "got system, user"),
        ("koala", [{"role": "assistant", "content": "x"}], {}, "user and assistant in turns"),
        ("koala", [{"role": "tool", "content": "x"}], {}, "messages[0].role must be one of system, user, assistant"),
        ("koala", [TALK[0], {"role": "assistant", "content": None}], {}, "messages[1].content must be text"),
        ("koala", TALK, {"tools": [TOOL]}, "the koala template has no place for tools"),
        ("koala", TALK, {"wording": 1}, "no wording 1"),
        ("alpaca", TALK[:1], {"marker": "bad"}, "the alpaca template cannot ask for a bad answer"),
        ("plain", TALK, {}, "the plain template has no turns"),
        (None, TALK, {}, "no chat template: start the server with --template=, or use /v1/completions"),
    ],
)
def test_messages_that_a_template_cannot_hold(
    tokenizer: Tokenizer, template: str | None, messages: list[Fields], settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(PromptError, match=re.escape(sentence)):
        chat_prompt(Model(tokenizer, TEMPLATES[template] if template else None), messages, **settings)


@pytest.mark.parametrize(
    ("template", "settings", "sentence"),
    [
        ("{{ messages[0]['content'] }}", {"marker": "good"}, "not trained with markers: leave marker out"),
        ("{{ messages[0]['content'] }}", {"tools": [TOOL]}, "no place for tools"),
        ("{{ messages[0]['content'] }}", {"documents": [{"title": "a"}]}, "no place for documents"),
        ("{{ raise_exception('only one message') }}", {}, "only one message"),
        ("{{ messages[9]['content'] }}", {}, "has no element 9"),
        ("{{ 1 / 0 }}", {}, "division by zero"),
        ("{% if %}", {}, "Expected an expression"),
    ],
)
def test_messages_that_a_models_own_template_refuses(
    tokenizer: Tokenizer, template: str, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(PromptError, match=sentence):
        chat_prompt(Model(tokenizer, None, template), TALK, **settings)


def test_who_can_chat(tokenizer: Tokenizer) -> None:
    templates = [TEMPLATES["koala"], TEMPLATES["plain"], None]
    able = [can_chat(Model(tokenizer, one, jinja)) for one, jinja in itertools.product(templates, ["{{ 1 }}", None])]
    assert able == [True, True, False, False, True, False]


@pytest.mark.parametrize("text", ["Once upon a time", "", " two  spaces", "你好\n🦙"])
def test_plain_text_gets_the_ids_of_transformers(shared_data: Path, text: str) -> None:
    for name in ("models/stories260K-hf", "models/smollm2-135m-instruct", "tokenizers/hf_llama"):
        model = Model(load_tokenizer(shared_data / name))
        reference = PreTrainedTokenizerFast(tokenizer_file=str(shared_data / name / "tokenizer.json"))
        assert text_prompt(model, text).tolist() == reference(text)["input_ids"]
        bare = reference(text, add_special_tokens=False)["input_ids"]
        assert text_prompt(model, text, add_special_tokens=False).tolist() == bare


def test_text_that_begins_with_bos_gets_no_other(tokenizer: Tokenizer) -> None:
    assert text_prompt(Model(tokenizer), "<s>Once").tolist() == tokenizer.encode(["<s>Once"])[0][0].tolist()
    assert text_prompt(Model(tokenizer), "Once").tolist().count(tokenizer.bos_id) == 1


def test_plain_text_begins_as_the_documents_of_our_training_do(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    document = Conversation("1", "test", (Message(Role.ASSISTANT, "Once upon a time"),))
    (record,) = encode([document], TEMPLATES["plain"], tokenizer)
    assert isinstance(record, Encoded)
    assert text_prompt(Model(tokenizer, TEMPLATES["plain"]), "Once upon a time").tolist() == record.ids[:-1].tolist()


def test_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    assert text_prompt(Model(tokenizer), [5, 1, 511]).tolist() == [5, 1, 511]
    for wrong in (-1, 512, 10**30):
        with pytest.raises(PromptError, match=f"ids from 0 to 511, got {wrong}"):
            text_prompt(Model(tokenizer), [5, wrong])
