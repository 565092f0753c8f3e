"""README.md of a Hugging Face folder: what the model is, what it was trained on and how, and how to use it.

The front matter is what the hub reads (huggingface/hub-docs, modelcard.md). Every value is written as JSON, which is
YAML too. What is not known is left out.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from easylm_like.data.conversation import Message, Role
from easylm_like.data.template import Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.model.config import LlamaConfig

Facts = Mapping[str, object]

TRAINING = ("steps", "batch_size", "micro_batches", "data.row_length", "data.too_long", "seed")  # of a run's config
QUESTION = "What is the capital of France?"
# The hub's names of licences (huggingface/hub-docs, repositories-licenses.md) that data sets of dialogues have.
HUB_LICENCES = frozenset(
    "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0".split()
)
# What the licence of a data set may ask for, the strictest first: of its users, and of those who use the weights.
TERMS = {
    "unknown": (
        "no licence is stated, so nobody has granted the right to use it or to pass on what is made of it",
        "these weights are for research only, and not to be passed on without asking",
    ),
    "paid": ("not for commercial use", "these weights are for non-commercial use only"),
    "own": ("terms of its own, which are to be read", "these terms hold for whoever uses the weights"),
    "alike": ("what is made of it goes on under the same licence", "that holds for these weights"),
    "named": ("its makers are named and their notices kept", "these weights may be used by anybody who does so"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of a model. An empty mapping is a part that nobody knows.

    `run` is a checkpoint's run.json, `data` the manifest.json of `data_prep build`, `evaluation` the report.json of
    `eval report`, `conversion` a conversion.json. `licence` (a name of the hub's) and `base_model` (OWNER/NAME there)
    are only what the user says.
    """

    name: str
    config: LlamaConfig
    dtype: str
    tokenizer: Tokenizer | None = None
    template: Template | None = None
    has_chat_template: bool = False  # with a `template` that is none of ours
    stop_ids: tuple[int, ...] = ()  # beside the tokenizer's EOS
    step: int | None = None
    run: Facts = field(default_factory=dict)
    data: Facts = field(default_factory=dict)
    evaluation: Facts = field(default_factory=dict)
    conversion: Facts = field(default_factory=dict)
    base_model: str | None = None
    licence: str | None = None


def render_card(card: Card) -> str:
    """Return the content of README.md: the hub's front matter and what a person wants to know."""
    parts = [
        _front_matter(card),
        f"# {_one_line(card.name)}",
        _what_it_is(card),
        _prompts(card),
        _usage(card),
        _data(card),
        _training(card),
        _evaluation(card.evaluation),
        _licences(card),
        _conversion(card.conversion),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def count_parameters(config: LlamaConfig) -> int:
    """Return the number of weights, those of tied embeddings once and without the padding of the vocabulary."""
    query, value = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = 2 * config.d_model * (query + value) + 3 * config.d_model * config.d_ff + 2 * config.d_model
    layer += (query + 2 * value) * config.qkv_bias + 2 * config.head_dim * config.qk_norm
    matrices = 1 if config.tie_embeddings else 2
    return config.n_layers * layer + matrices * config.vocab_size * config.d_model + config.d_model


def _front_matter(card: Card) -> str:
    datasets = sorted({path.split(":")[1] for s in _sources(card) if (path := str(s.get("path"))).startswith("hub:")})
    chosen = [_get(source, "steps", "languages") for source in _sources(card)]
    languages = [set(kept) if isinstance(kept, list | tuple) else set() for kept in chosen]
    licence = card.licence or _licence(card)
    fields = {
        "license": licence,
        "license_name": "see-licences-of-the-data" if licence == "other" else None,
        "language": sorted(set().union(*languages)) if languages and all(languages) else None,
        "base_model": card.base_model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["easylm_like", *filter(None, [_name(card.template)])],
        "datasets": datasets or None,
        "model-index": _model_index(card),
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _model_index(card: Card) -> list[object] | None:
    """Return the results as the hub lists them; a number there has no exponent, which YAML 1.1 takes for a text."""
    metrics: list[object] = []
    for kind, title, values in (
        ("loss", "Held-out loss a token", _part(card.evaluation, "heldout_loss")),
        ("exact_match", "Exact match", _part(card.evaluation, "accuracy")),
    ):
        metrics += [
            {"type": kind, "name": f"{title}, {_one_line(name)}", "value": round(value, 4)}
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
    if not metrics:
        return None
    held_out = {"type": "conversations", "name": _shown(card.evaluation.get("data", "held-out conversations"))}
    result = {"task": {"type": "text-generation"}, "dataset": held_out, "metrics": metrics}
    return [{"name": _one_line(card.name), "results": [result]}]


def _what_it_is(card: Card) -> str:
    config, scaling = card.config, card.config.rope_scaling
    stretched = f", stretched {scaling.factor:g} times from {scaling.original_length:,} tokens" if scaling else ""
    switches = {"biases of queries, keys and values": config.qkv_bias, "norms of queries and keys": config.qk_norm}
    rows = {
        "Parameters": f"{count_parameters(config):,}, stored in {card.dtype}",
        "Layers": f"{config.n_layers} of width {config.d_model:,}, feed-forward {config.d_ff:,}",
        "Attention": f"{config.n_heads} heads of {config.head_dim}, {config.n_kv_heads} for keys and values",
        "Vocabulary": f"{config.vocab_size:,}, {'one matrix' if config.tie_embeddings else 'two matrices'} in and out",
        "Positions": f"{config.max_length:,}, RoPE of base {config.rope_theta:,.10g}{stretched}",
        "Sliding window": f"{config.sliding_window:,} tokens" if config.sliding_window else None,
        "Also": ", ".join(name for name, on in switches.items() if on),
        "Started from": _start(card),
    }
    return "A decoder of the LLaMA family.\n\n" + _table(("", ""), [(k, v) for k, v in rows.items() if v])


def _start(card: Card) -> str | None:
    """Return what the weights were before, if that is known."""
    start = _get(card.run, "config", "model", "init_from") or _get(card.run, "source", "path")
    known = card.base_model or (_shown(start) if start else None)
    return known or ("random weights" if _get(card.run, "config") else None)


def _prompts(card: Card) -> str:
    """Return the prompt under every marker, and what ends an answer."""
    parts = []
    if card.template and card.tokenizer and card.template.markers:
        chat, special = [Message(Role.USER, QUESTION)], card.tokenizer.special
        parts.append(f"The `{card.template.name}` template, which is also in `chat_template.jinja`:")
        for quality in card.template.qualities:
            wanted = f"For a {quality.value} answer:\n\n" if len(card.template.qualities) > 1 else ""
            parts.append(wanted + _fence(card.template.prompt(chat, special, quality)))
    elif card.template:
        parts.append("It goes on with a text and knows no turns.")
    elif card.has_chat_template:
        parts.append("The prompt is made by `chat_template.jinja`.")
    if card.tokenizer:
        ids = dict.fromkeys((card.tokenizer.eos_id, *card.stop_ids))
        ends = [f"`{card.tokenizer.backend.id_to_token(number)}` (id {number})" for number in ids]
        parts.append(f"An answer ends with {' or '.join(ends)}.")
    return _section("Prompt", *parts)


def _usage(card: Card) -> str:
    chats = bool(card.template.markers) if card.template else card.has_chat_template
    marked = card.template is not None and len(card.template.qualities) > 1
    commands = [
        f"vllm serve . --dtype={card.dtype}",
        f"python -m sglang.launch_server --model-path=. --dtype={card.dtype}",
        "python -m easylm_like.convert to-gguf --model=. --out=../gguf --type=Q8_0",
        f"llama-server --model ../gguf/*.gguf{' --jinja' * chats}",
        f'python -m eval answers --model=. --prompt="{QUESTION}"{" --marker=good --marker=bad" * marked}',
        f"python -m easylm_like.convert to-orbax --model=. --out=../start --template={_name(card.template) or 'koala'}",
    ]
    return _section(
        "Use",
        "With transformers, in this folder:",
        _fence(_transformers_code(card, chats, marked), "python"),
        "With vLLM, with SGLang, with llama.cpp, and with easylm_like to answer and to train on:",
        _fence("\n".join(commands), "sh"),
        'A request asks a server for the marker: `"chat_template_kwargs": {"quality": "bad"}`.' if marked else "",
    )


def _transformers_code(card: Card, chats: bool, marked: bool) -> str:
    bos = card.tokenizer.special.bos or "" if card.template and card.tokenizer else ""  # a text of the plain template
    options = f'add_special_tokens={not bos}, return_token_type_ids=False, return_tensors="pt"'
    prompt = f"prompt = tokenizer({json.dumps(bos + QUESTION)}, {options})"
    if chats:
        prompt = f'''chat = [{{"role": "user", "content": "{QUESTION}"}}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True{', quality="good"' * marked}, return_dict=True, return_tensors="pt"
)'''
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
{prompt}
ids = model.generate(**prompt, max_new_tokens=64)[0]
print(tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _data(card: Card) -> str:
    """Return the sources with their counts, and what was dropped at which place."""
    licences = {name: licence or "none stated" for name, licence in _source_licences(card).items()}
    rows, dropped = [], []
    for name, of in _part(card.data, "sources").items():
        numbers = [_shown(_get(of, key)) for key in ("read", "train", "heldout", "good", "bad")]
        reasons = _part(of, "rejected")
        rejected = sum(number for number in reasons.values() if isinstance(number, int))
        rows.append((_one_line(name), _one_line(licences.get(name, "none stated")), *numbers, f"{rejected:,}"))
        if reasons:
            dropped.append(
                f"* {_one_line(name)}: {', '.join(f'{_shown(n)} {_one_line(why)}' for why, n in reasons.items())}"
            )
    heads = ("source", "licence", "records read", "trained", "held out", "marked good", "marked bad", "dropped")
    whats = ["Dropped before training, by reason:", "\n".join(dropped)] if dropped else []
    return _section("Data", _table(heads, rows, numbers_from=2) if rows else "", *whats, _tokens(card.run))


def _tokens(run: Facts) -> str:
    """Return a sentence on what of the data the run's rows hold."""
    summary = _part(run, "data", "summary")
    if "tokens" not in summary:
        return ""
    names = {"conversations": "conversations", "tokens": "tokens", "trained": "of them trained on"}
    said = [f"{_shown(summary[key])} {name}" for key, name in names.items() if key in summary]
    for why, number in _part(summary, "dropped_tokens").items():
        said.append(f"{_shown(number)} tokens left out ({_one_line(why).replace('_', ' ')})")
    return f"As tokens: {', '.join(said)}."


def _training(card: Card) -> str:
    config = _part(card.run, "config")
    if not config:
        return ""
    flat = {name: _shown(value) for name, value in _flat(config)}
    rows = [("this checkpoint", f"step {card.step:,}")] if card.step is not None else []
    rows += [(name, flat[name]) for name in TRAINING if name in flat]
    for name, part in (("optim", _part(config, "optim")), ("mesh", _part(config, "mesh"))):
        rows.append((name, ", ".join(f"{key} {_shown(value)}" for key, value in part.items())))
    rows.append(("git revision", _shown(card.run.get("git"))))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in _part(card.run, "versions").items())))
    whole = _fence(json.dumps(_without_places(config), indent=2, ensure_ascii=False), "json")
    details = f"<details><summary>The whole configuration</summary>\n\n{whole}\n\n</details>"
    return _section("Training", _table(("", ""), [row for row in rows if row[1]]), details)


def _evaluation(report: Facts) -> str:
    names = ("heldout_loss", "heldout_loss_before", "heldout_tokens", "accuracy_detail")
    after, before, tokens, detail = (_part(report, name) for name in names)
    parts = []
    if after:
        heads = ("held-out loss a token", "tokens", *(("before",) if before else ()), "this model")
        rows = [
            (name, _shown(tokens.get(name)), *((_shown(before.get(name)),) if before else ()), _shown(loss))
            for name, loss in after.items()
        ]
        parts.append(_table(heads, rows, numbers_from=1))
    if detail:
        rows = [
            (f"under the {name} marker", *(_shown(_get(of, key)) for key in ("right", "asked")), _interval(of))
            for name, of in detail.items()
        ]
        parts.append(_table(("answered right", "right", "asked", "95 % interval"), rows, numbers_from=1))
    source = f"On `{_shown(report['data'])}`, with `python -m eval report`." if parts and "data" in report else ""
    return _section("Evaluation", source, *parts)


def _licences(card: Card) -> str:
    """Return what the licences of the data, read strictly, mean for the weights."""
    asked = {name: _terms(licence) for name, licence in _source_licences(card).items()}
    found = [term for term in TERMS if any(term in terms for terms in asked.values())]
    if not asked:
        return ""
    lines = [f"* {', '.join(_one_line(n) for n, terms in asked.items() if t in terms)}: {TERMS[t][0]}." for t in found]
    follows = TERMS[found[0]][1] if found else "these weights may be used by anybody"
    base = "; the licence of the weights that it started from comes on top" if _has_base(card) else ""
    law = "Whether a licence of data binds what was trained on it is not settled in law."
    stated = f"The licence given to these weights: {_one_line(card.licence)}." if card.licence else ""
    return _section("Licences", stated, "\n".join(lines), f"Read strictly, {follows}{base}. {law}")


def _terms(licence: str) -> set[str]:
    """Return the TERMS of a licence as it is written in a data config, "CC BY-NC 4.0"."""

    def says(pattern: str) -> bool:
        return re.search(rf"\b({pattern})\b", licence, re.IGNORECASE) is not None

    if not licence or says("none|unknown|not stated|unstated"):
        return {"unknown"}
    if says("cc0.*|public domain|unlicense"):
        return set()
    known = {"named"} if says("mit|apache.*|bsd.*|cc.by.*|odc.by.*") else {"own"}
    return known | {term for term, pattern in (("paid", "nc|non.?commercial"), ("alike", "sa")) if says(pattern)}


def _licence(card: Card) -> str | None:
    """Return the one licence of all the data, "other" if there is more to heed, None if nothing is known."""
    licences = set(_source_licences(card).values())
    names = {licence.split(",")[0].strip().lower().replace(" ", "-") for licence in licences}
    if len(names) == 1 and names <= HUB_LICENCES and not _has_base(card):
        return names.pop()
    return "other" if licences else None


def _has_base(card: Card) -> bool:
    return bool(card.base_model or _get(card.run, "config", "model", "init_from"))


def _conversion(record: Facts) -> str:
    rows = [(name, _shown(value)) for name, value in _flat(record)]
    return _section("Conversion", "From `conversion.json`:", _table(("", ""), rows)) if rows else ""


def _name(template: Template | None) -> str | None:
    return None if template is None else template.name


def _source_licences(card: Card) -> dict[str, str]:
    return {str(s.get("name") or s.get("format")): str(s.get("licence") or "") for s in _sources(card)}


def _sources(card: Card) -> list[Facts]:
    """Return the sources of the data's config."""
    sources = _get(card.data, "config", "sources")
    return [s for s in sources if isinstance(s, Mapping)] if isinstance(sources, Sequence) else []


def _get(facts: object, *path: str) -> object:
    """Return what is in nested mappings under `path`, None if that is nothing."""
    for name in path:
        facts = facts.get(name) if isinstance(facts, Mapping) else None
    return facts


def _part(facts: object, *path: str) -> Facts:
    """Return the mapping under `path`, an empty one if there is none."""
    found = _get(facts, *path)
    return found if isinstance(found, Mapping) else {}


def _flat(facts: object, prefix: str = "") -> Iterable[tuple[str, object]]:
    if not isinstance(facts, Mapping):
        yield prefix, facts
        return
    for name, value in facts.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _interval(of: object) -> str:
    return " to ".join(f"{end:.1%}" for end in (_get(of, "low"), _get(of, "high")) if isinstance(end, int | float))


def _without_places(value: object) -> object:
    """Return a value of a config with files by their names alone: where they lay on a machine is nobody's business."""
    if isinstance(value, Mapping):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePath(value).name
    return [_without_places(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    value = _without_places(value)
    return _one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _one_line(text: object) -> str:
    return "".join(c for c in " ".join(str(text).split()) if c.isprintable())


def _section(title: str, *parts: str) -> str:
    kept = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *kept]) if kept else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 99) -> str:
    rules = ["---:" if column >= numbers_from else "---" for column in range(len(heads))]
    lines = ([_one_line(cell).replace("|", "\\|") for cell in row] for row in (heads, rules, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fence(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"
