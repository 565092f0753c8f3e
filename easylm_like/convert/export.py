"""The three things that a model becomes: a Hugging Face folder, a GGUF file, a checkpoint to train from.

Each is written beside its place, opened again, proven equal to what it was made of, and only then moved into place.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np

from easylm_like.atomic import atomic_folder
from easylm_like.convert.gguf.blocks import FLOATS
from easylm_like.convert.gguf.write import About, GgufType, rounded, write_gguf
from easylm_like.convert.open import open_source
from easylm_like.convert.resize import resize_vocabulary
from easylm_like.convert.source import Hints, Source
from easylm_like.convert.verify import Proof, probe_prompts, prove, verify_same_tokenizer, verify_tokenizer
from easylm_like.data.conversation import Message, read_conversations
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.digests import flush, write_digests
from easylm_like.errors import UserError
from easylm_like.hf.card import Card, render_card
from easylm_like.hf.folder import ORIGIN_FILE, SHARD_BYTES, path_digest, read_json, write_folder, write_json
from easylm_like.hf.keys import to_ours
from easylm_like.hf.safetensors_files import write_safetensors
from easylm_like.hf.tensors import DTYPES, Tensor, Tensors
from easylm_like.progress import Progress
from easylm_like.provenance import versions
from easylm_like.train.checkpoint import save_params, shape_to_json

PROMPT_TOKENS = 128
DIALOGUES = 200  # of the user's own, whose ids are compared
Record = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a conversion changes and what it is proven with; None keeps what the model has."""

    dtype: str | None = None
    gguf_type: GgufType = GgufType.F16
    vocab_size: int | None = None
    shard_bytes: int = SHARD_BYTES
    prompts: tuple[str, ...] = ()
    dialogues: Path | None = None
    evaluation: Path | None = None  # report.json, for the model card
    base_model: str | None = None
    licence: str | None = None

    def to_json(self) -> Record:
        """Return what differs from the defaults; of files also their digests."""
        default, found = Options(), {}
        for name in ("shard_bytes", "prompts", "dialogues", "evaluation", "base_model", "licence"):
            if (value := getattr(self, name)) != getattr(default, name):
                found[name] = [str(value), path_digest(value)] if isinstance(value, Path) else value
        return found


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion: `written` are the arrays that go to a writer, `wanted` what is to be read back, bit for bit."""

    source: Source
    written: Tensors
    wanted: Tensors
    tokenizer: Tokenizer
    options: Options
    out: Path
    rounded: bool  # the two differ
    chats: tuple[tuple[Message, ...], ...]  # real conversations, whose ids are compared
    evaluation: Record  # for the model card

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: those of the model's own folder, the tokenizer's EOS among them."""
        found = self.source.stop_ids
        return found if self.tokenizer.eos_id in found else (self.tokenizer.eos_id, *found)

    @property
    def chat_template(self) -> str | None:
        """The Jinja of our template, or what came with the model."""
        return self.source.template.jinja() if self.source.template else self.source.chat_template


@dataclass(frozen=True, slots=True)
class Target:
    """A format: how it is written, and what beside the weights is checked, and finished, in the written folder."""

    write: Callable[[Job, Progress, Path], None]
    check: Callable[[Job, Path, Source, Record], None]


def export(target: str, model: Path, out: Path, hints: Hints, options: Options) -> None:
    """Write the model at `model` as one of TARGETS, prove it, and move it to `out`.

    Raises:
        UserError: it cannot be read, lacks something that `target` needs, or what was written is not the same model.
    """
    run_job(open_source(model, hints), target, out, options)


def run_job(source: Source, target: str, out: Path, options: Options) -> None:
    """Do what `export` does with a model that is open."""
    model = source.path
    if options.vocab_size is not None:
        source = resize_vocabulary(source, options.vocab_size)
    if source.tokenizer is None:
        raise UserError(f"{model}: no tokenizer there; name its folder with --tokenizer=")
    if source.tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{model}: {source.config.vocab_size} rows in the vocabulary and {source.tokenizer.vocab_size} ids in the "
            f"tokenizer; give --vocab_size={source.tokenizer.vocab_size} to add rows, or its own tokenizer"
        )
    if target == "orbax" and source.template is None:
        raise UserError(f"{model}: nothing there says which template it is for; name it with --template=")
    if target == "gguf":
        written, dtype = source.tensors, FLOATS.get(options.gguf_type.name)
        wanted = {name: rounded(name, tensor, options.gguf_type) for name, tensor in written.items()}
    else:
        dtype = None if options.dtype is None else DTYPES[options.dtype]
        written = wanted = {name: t if dtype is None else t.astype(dtype) for name, t in source.tensors.items()}
    exact = (target != "gguf") if dtype is None else all(_holds(dtype, t.dtype) for t in source.tensors.values())
    job = Job(
        source,
        written,
        wanted,
        source.tokenizer,
        options,
        out,
        rounded=not exact,
        chats=_chats(source, options),
        evaluation=read_json(options.evaluation) if options.evaluation else {},
    )
    _run(job, target)


def _chats(source: Source, options: Options) -> tuple[tuple[Message, ...], ...]:
    """Return the conversations that the user names, or of the data that trained, if it is still there."""
    path = options.dialogues or _training_data(source)
    if path is None:
        return ()
    return tuple(conversation.messages for conversation in islice(read_conversations(path), DIALOGUES))


def _holds(dtype: np.dtype, other: np.dtype) -> bool:
    """Return whether every value of `other` is one of `dtype`."""
    return dtype in (other, DTYPES["float32"])


def _run(job: Job, target: str) -> None:
    record, prompts = _begin(job, target), _prompts(job)
    if (job.out / ORIGIN_FILE).is_file() and _same(read_json(job.out / ORIGIN_FILE), record):
        print(f"{job.out}: already holds {job.source.path}{_what(record)}")
        return
    progress = Progress(sum(tensor.nbytes for tensor in job.written.values()), None, unit="arrays")
    workdir = target == "orbax"  # may hold a run by now, and its checkpoint has digests of its own
    with atomic_folder(job.out, mark=None if workdir else ORIGIN_FILE) as folder:
        started = time.monotonic()
        TARGETS[target].write(job, progress, folder)
        middle = time.monotonic()
        progress.stage("written; comparing arrays and logits")
        written = open_source(folder, Hints(template=job.source.template.name if job.source.template else None))
        record["proof"] = proof = prove(job.source, written, job.wanted, prompts, rounded=job.rounded)
        TARGETS[target].check(job, folder, written, record)
        record["versions"] = versions(("jax", "orbax-checkpoint", "safetensors", "gguf", "numpy"))
        if not workdir:
            write_digests(folder)
        record["seconds"] = {"write": round(middle - started, 2), "proof": round(time.monotonic() - middle, 2)}
        write_json(folder / ORIGIN_FILE, record)
        flush(folder / ORIGIN_FILE)
    print(f"{job.out}: {job.source.format}{_what(record)}; {_proven(proof)}")


def _count_reads(tensors: Tensors, progress: Progress) -> dict[str, Tensor]:
    """Return the same arrays; each that is read is a part of the work that is done."""
    lock = Lock()

    def count(array: np.ndarray) -> np.ndarray:
        with lock:
            progress.advance(array.nbytes, 1)
        return array

    return {name: tensor.then(count) for name, tensor in tensors.items()}


def _begin(job: Job, target: str) -> Record:
    """Return what is to be done, in the form in which it is written down and compared with what was done before."""
    source, changed = job.source, job.options.gguf_type.value if target == "gguf" else _dtype(job.wanted)
    record: Record = {
        "template": source.template.name if source.template else None,
        "from": {"format": source.format} | {name: value for name, value in source.origin.items() if name != "run"},
        "to": {"format": target, "dtype": changed, "vocab_size": source.config.vocab_size},
        "tokenizer_digest": job.tokenizer.digest,
        "options": job.options.to_json(),
    }
    return record | ({"run": source.origin["run"]} if "run" in source.origin else {})


def _write_hf(job: Job, progress: Progress, folder: Path) -> None:
    source, dtype = job.source, _dtype(job.wanted)
    # First what may refuse, then what takes long.
    write_folder(
        folder, source.config, job.tokenizer, dtype=dtype, stop_ids=job.stop_ids, chat_template=job.chat_template
    )
    say = partial(progress.advance, records=1)
    write_safetensors(folder, job.written, shard_bytes=job.options.shard_bytes, say=say)


def _check_hf(job: Job, folder: Path, written: Source, record: Record) -> None:
    record["tokenizer"] = verify_tokenizer(folder, job.tokenizer, job.source.template, job.chats)
    (folder / "README.md").write_text(render_card(_card(job, record)))


def _write_orbax(job: Job, progress: Progress, folder: Path) -> None:
    assert job.source.template is not None
    info = {
        "shape": shape_to_json(job.source.config),
        "template": job.source.template.name,
        "tokenizer": job.tokenizer.digest,
        "source": {name: value for name, value in job.source.origin.items() if name != "run"},
    }
    save_params(
        folder / "checkpoints",
        to_ours(_count_reads(job.written, progress), job.source.config, str(job.source.path)),
        info,
    )
    (folder / "tokenizer").mkdir()
    job.tokenizer.save(folder / "tokenizer")


def _write_gguf(job: Job, progress: Progress, folder: Path) -> None:
    name, kind = job.out.resolve().name, job.options.gguf_type
    ends = [stop for stop in job.stop_ids if stop != job.tokenizer.eos_id]
    about = About(name, job.chat_template, ends)
    path = folder / f"{name}-{kind.value}.gguf"
    tensors = _count_reads(job.written, progress)
    write_gguf(path, job.source.config, tensors, job.tokenizer, kind=kind, about=about)


def _check_ids(job: Job, folder: Path, written: Source, record: Record) -> None:
    record["tokenizer"] = verify_same_tokenizer(written, job.tokenizer, job.source.template, job.chats)


TARGETS = {
    "hf": Target(_write_hf, _check_hf),
    "orbax": Target(_write_orbax, _check_ids),
    "gguf": Target(_write_gguf, _check_ids),
}


def _card(job: Job, record: Record) -> Card:
    source, data = job.source, _training_data(job.source)
    manifest = data.parent / "manifest.json" if data else None
    step = source.origin.get("step")
    return Card(
        name=job.out.resolve().name,
        config=source.config,
        dtype=_dtype(job.wanted),
        tokenizer=job.tokenizer,
        template=source.template,
        has_chat_template=job.chat_template is not None,
        stop_ids=job.stop_ids,
        step=step if isinstance(step, int) else None,
        run=_object(source.origin, "run"),
        data=read_json(manifest) if manifest and manifest.is_file() else {},
        evaluation=job.evaluation,
        conversion={name: value for name, value in record.items() if name != "run"},
        base_model=job.options.base_model,
        licence=job.options.licence,
    )


def _training_data(source: Source) -> Path | None:
    """Return the conversations that a run was trained on, if they are where they were."""
    path = _object(_object(_object(source.origin, "run"), "config"), "data").get("train")
    return Path(path) if isinstance(path, str) and Path(path).is_file() else None


def _object(fields: object, name: str) -> dict[str, object]:
    found = fields.get(name) if isinstance(fields, dict) else None
    return found if isinstance(found, dict) else {}


def _prompts(job: Job) -> list[np.ndarray]:
    if job.options.prompts:
        prompts = [ids[:PROMPT_TOKENS] for ids, _ in job.tokenizer.encode(job.options.prompts)]
        if not all(map(len, prompts)):
            raise UserError("--prompt: a text without a token has no logits to compare; give another")
        return prompts
    return probe_prompts(job.tokenizer, job.source.template, PROMPT_TOKENS)


def _dtype(tensors: Tensors) -> str:
    return str(tensors["model.embed_tokens.weight"].dtype)


def _same(old: Record, new: Record) -> bool:
    return {name: old.get(name) for name in new} == json.loads(json.dumps(new))


def _what(record: Record) -> str:
    step = _object(record, "from").get("step")
    return f"{'' if step is None else f', step {step},'} in {_object(record, 'to')['dtype']}"


def _proven(proof: Proof) -> str:
    logits, arrays = proof["logits"], proof["arrays"]
    text = f"{arrays['compared']:.0f} arrays equal to the bit{' after rounding' if arrays['rounded_before'] else ''}"
    if arrays["rounded_before"]:
        change = (
            f"a KL of {logits['mean_kl_nats']:.1e} nats and {1 - logits['greedy_agreement']:.1%} of the greedy choices"
        )
        return f"{text}, which changes logits by {change} at {logits['positions']:.0f} positions, ids equal"
    share = f"{logits['share_of_spread']:.1e}"
    return f"{text}, logits at {logits['positions']:.0f} positions equal to {share} of their spread, ids equal"
