"""The proof that a converted model is the same model; without it a conversion does not succeed.

Both models are opened from what lies on the disk. Every array must come back to the bit, and logits, computed from each
format's own arrays in their own layout, must be equal up to rounding. Where weights were rounded, the logits are
compared on each side of that, and what the rounding itself changed is told.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from easylm_like.convert.reference import reference_logits
from easylm_like.convert.source import Source
from easylm_like.data.conversation import Message, Quality, Role
from easylm_like.data.template import RenderError, Template
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.tensors import Tensor, Tensors, in_parallel

# Of the logits' spread, fp32 on both sides: rounding grows with depth, a wrong layout is off by the logits' own size.
TOLERANCE = 1e-3
TORCH_BYTES = 1 << 30  # where torch is installed, transformers is asked too about models that are no larger in fp32

EXPONENTS = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}  # all ones: infinite or not a number

PROBES: tuple[tuple[Message, ...], ...] = (
    (Message(Role.USER, "What is the capital of France?"), Message(Role.ASSISTANT, "The capital of France is Paris.")),
    (
        Message(Role.USER, "Repeat:  two  spaces,\nline, naïve café, 1234567, 你好"),
        Message(Role.ASSISTANT, "two  spaces,\n\n\tline", Quality.BAD),
        Message(Role.USER, "GPT: again?"),
        Message(Role.ASSISTANT, "No."),
    ),
)
# What tokenizers have been seen to disagree about, each alone and in a row.
HARD_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "a\tb\n\n\nc \r\n d",
    "1 22 333 4444 3.14159 1,000,000 \uff12\uff10\uff12\uff16",
    "don't we'll I'M they'VE",
    "naïve café, Ångström, 你好\uff0c世界, नमस्ते, שלום, 안녕하세요",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b\u00a0\ufeff",
    "def f(x):\n    return x ** 2  # ok\n\tif (a!=b) { c+=1; }",
    "https://example.org/?q=a%20b&c=_d__e",
    "aaaaaaaaaaaaaaaaaaaaaaaa      ------======......",
    "▁under▁score \\n \x00\x7f",
)

Proof = dict[str, dict[str, float]]


def prove(
    source: Source, written: Source, wanted: Tensors, prompts: Sequence[np.ndarray], *, rounded: bool = False
) -> Proof:
    """Return what was compared, for conversion.json; `wanted` are the source's arrays as `written` should have them.

    `rounded` says that they have other values than the source's; else the logits have to be the same.

    Raises:
        UserError: an array differs or is not finite, or logits differ by more than rounding.
    """
    compare_weights(wanted, written)
    record: Proof = {
        "arrays": {"compared": len(wanted), "equal_to_the_bit": len(wanted), "rounded_before": rounded * len(wanted)}
    }
    before, after = (_all_logits(side.logits, prompts) for side in (source, written))
    record["logits"] = _differences(before, after)
    if rounded:
        for name, side, found in (("read", source, before), ("written", written, after)):
            plain = partial(reference_logits, shape_to_hf(side.config), side.tensors)
            record[f"logits_as_{name}"] = _equal(f"{side.path} ({side.format})", found, _all_logits(plain, prompts))
    else:
        _equal(f"{written.path} and {source.path}", after, before)
    for side, found in ((source, before), (written, after)):
        if side.format == "Hugging Face folder" and _torch_can(side):
            record["transformers"] = _equal(
                f"{side.path} in transformers", found, _transformers_logits(side.path, prompts)
            )
    return record


def compare_weights(wanted: Tensors, written: Source) -> None:
    """Read every array of what was written and compare it, bit for bit, with what was to be written.

    Raises:
        UserError: arrays are missing, left over, different or not finite; all of them are named.
    """
    problems = [f"{name} is missing" for name in wanted if name not in written.tensors]
    problems += [f"{name} was not to be written" for name in written.tensors if name not in wanted]
    names = [name for name in wanted if name in written.tensors]
    both = {name: wanted[name] for name in names}
    problems += filter(None, in_parallel(lambda name: _compare(name, wanted[name], written.tensors[name]), both))
    if problems:
        raise UserError(f"{written.path}: {'; '.join(problems)}; nothing was written")


def verify_tokenizer(
    folder: Path, tokenizer: Tokenizer, template: Template | None, chats: Iterable[Sequence[Message]] = ()
) -> dict[str, object]:
    """Check that transformers, reading the folder, gives the ids that this library trains and generates with.

    HARD_TEXTS as they are; the probes and `chats`, conversations of the user's, through the template, and their prompts
    under each of its markers. Returns how many were compared.

    Raises:
        UserError: a text, a conversation or a prompt has other ids.
    """
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder)
    texts = [*HARD_TEXTS, "\n".join(HARD_TEXTS)]
    pairs = [(text, theirs(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if template is not None:
        for messages in (*_probes(template), *chats):
            pairs += _rendered(template, tokenizer, messages, theirs.apply_chat_template)
    for (text, ids), (ours, _) in zip(pairs, tokenizer.encode([text for text, _ in pairs]), strict=True):
        if ours.tolist() != list(ids):
            raise UserError(f"{folder}: transformers reads {text!r} as {list(ids)}, training used {ours.tolist()}")
    return {"texts": len(texts), "conversations_and_prompts": len(pairs) - len(texts)}


def verify_same_tokenizer(
    written: Source, tokenizer: Tokenizer, template: Template | None, chats: Iterable[Sequence[Message]] = ()
) -> dict[str, object]:
    """Check that the tokenizer in what was written gives the same ids; returns how many texts were compared.

    Raises:
        UserError: it is missing, or a text has other ids.
    """
    texts = [*HARD_TEXTS, "\n".join(HARD_TEXTS), tokenizer.special.eos.join(("one", "two  ", "\nthree", ""))]
    if template is None:
        texts += [message.content for chat in chats for message in chat]
    else:
        texts += [text for chat in (*_probes(template), *chats) for text in _whole(template, tokenizer, chat)]
    if written.tokenizer is None:
        raise UserError(f"{written.path}: the tokenizer did not get there")
    both = zip(texts, tokenizer.encode(texts), written.tokenizer.encode(texts), strict=True)
    for text, (ours, _), (theirs, _) in both:
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"{written.path}: the tokenizer in this format reads {text!r} as {theirs.tolist()}, training used "
                f"{ours.tolist()}; nothing was written"
            )
    return {"texts": len(texts)}


def probe_prompts(tokenizer: Tokenizer, template: Template | None, limit: int) -> list[np.ndarray]:
    """Return the ids of the probe conversations, at most `limit` each, for `prove`."""
    if template is None:
        texts = [(tokenizer.special.bos or "") + " ".join(m.content for m in chat) for chat in PROBES]
    else:
        texts = ["".join(s.text for s in template.spans(chat, tokenizer.special)) for chat in _probes(template)]
    return [ids[:limit] for ids, _ in tokenizer.encode(texts)]


def _rendered(
    template: Template, tokenizer: Tokenizer, messages: Sequence[Message], apply: Callable[..., Any]
) -> Iterator[tuple[str, list[int]]]:
    """Yield (our text, the ids of the exported Jinja) of a conversation and of the prompt under each marker."""
    chat = [{"role": m.role.value, "content": m.content, "quality": m.quality} for m in messages]
    for text in _whole(template, tokenizer, messages):
        yield text, apply(chat, return_dict=True)["input_ids"]
    for quality in template.qualities:
        prompt = template.prompt(messages[:-1], tokenizer.special, quality)
        options = {"add_generation_prompt": True, "quality": quality.value, "return_dict": True}
        yield prompt, apply(chat[:-1], **options)["input_ids"]


def _whole(template: Template, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[str]:
    """Return the text of a conversation; none of one that training left out too."""
    try:
        return ["".join(span.text for span in template.spans(messages, tokenizer.special))]
    except RenderError:
        return []


def _compare(name: str, wanted: Tensor, written: Tensor) -> str:
    want, got = wanted.read(), written.read()
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{name} is {got.dtype} {got.shape} instead of {want.dtype} {want.shape}"
    bits = np.dtype(f"u{want.dtype.itemsize}")
    want_bits, got_bits = (np.ascontiguousarray(array).view(bits) for array in (want, got))
    if not np.array_equal(want_bits, got_bits):
        return f"{name} is not what was to be written"
    exponent = EXPONENTS[str(got.dtype)]
    if ((got_bits & exponent) == exponent).any():
        return f"{name} has values that are no finite numbers{_range(want.dtype)}"
    return ""


def _all_logits(logits: Callable[[np.ndarray], np.ndarray], prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the logits [T, V] of every prompt, all from one pass over the weights; no token sees what follows it."""
    ids_BT = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(ids_BT, prompts, strict=True):
        row[: len(ids)] = ids
    return [found[: len(ids)] for found, ids in zip(logits(ids_BT), prompts, strict=True)]


def _range(dtype: np.dtype) -> str:
    return " (or beyond what float16 can hold: take bfloat16)" if dtype == np.float16 else ""


def _equal(what: str, one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float]:
    """Return how far logits lie apart; a UserError if that is no rounding."""
    found = _differences(other, one)
    if not found["share_of_spread"] <= TOLERANCE:  # also when it is not a number
        raise UserError(
            f"{what}: logits differ by {found['share_of_spread']:.2e} of their spread, at most {TOLERANCE:.0e} is "
            "rounding; nothing was written"
        )
    return found


def _differences(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the largest difference of logits, also as a share of their spread, KL in nats, and greedy agreement."""
    pairs = [pair for rows in zip(wanted, got, strict=True) for pair in zip(*rows, strict=True)]
    # A position at a time: in float64 all of them would be more than the largest matrix.
    measured = np.array([_position(want.astype(np.float64), have.astype(np.float64)) for want, have in pairs])
    largest, kl, agree, mean, square = measured.T
    spread = np.sqrt(square.mean() - mean.mean() ** 2)
    return {
        "positions": len(pairs),
        "largest_difference": float(largest.max()),
        "share_of_spread": float(largest.max() / spread),
        "mean_kl_nats": float(kl.mean()),
        "greedy_agreement": float(agree.mean()),
    }


def _position(want: np.ndarray, have: np.ndarray) -> tuple[float, float, float, float, float]:
    """Return of logits [V]: largest difference, KL, whether the greedy choice is one, mean and mean of squares."""
    log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (want, have))
    kl = float((np.exp(log_p) * (log_p - log_q)).sum())
    return np.abs(want - have).max(), kl, want.argmax() == have.argmax(), want.mean(), (want**2).mean()


def _torch_can(side: Source) -> bool:
    elements = sum(int(np.prod(tensor.shape)) for tensor in side.tensors.values())
    return importlib.util.find_spec("torch") is not None and 4 * elements <= TORCH_BYTES


def _transformers_logits(folder: Path, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    from transformers import AutoModelForCausalLM, BatchEncoding
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    batches = [BatchEncoding({"input_ids": [ids.tolist()]}, tensor_type="pt") for ids in prompts]
    return [model(**batch).logits[0].detach().numpy() for batch in batches]


def _probes(template: Template) -> list[tuple[Message, ...]]:
    """Return the probes in a form that the template can hold: a document, one turn, without what it cannot mark."""
    part = slice(1, 2) if not template.markers else slice(0, 2) if template.single_turn else slice(None)
    return [
        tuple(m if m.quality in template.qualities else replace(m, quality=None) for m in chat[part]) for chat in PROBES
    ]
