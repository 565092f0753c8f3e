"""Models released as what training changed: `difference make` and `difference recover`.

DIR/difference.safetensors (or shards), difference.json (checksums), model.json (shape, template, stop ids)
    tokenizer/, chat_template.jinja, files.json
"""

from functools import partial
from pathlib import Path

from easylm_like.atomic import atomic_folder
from easylm_like.convert import difference as bits
from easylm_like.convert.export import Options, run_job
from easylm_like.convert.open import open_source
from easylm_like.convert.reference import reference_logits
from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.digests import write_digests
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.folder import SHARD_BYTES, open_files, path_digest, read_json, write_json
from easylm_like.hf.safetensors_files import write_safetensors
from easylm_like.hf.tensors import Tensors
from easylm_like.progress import Progress
from easylm_like.train.checkpoint import shape_from_json, shape_to_json

STEM, MODEL, TOKENIZER, JINJA = "difference", "model.json", "tokenizer", "chat_template.jinja"


def make(model: Path, base: Path, out: Path, hints: Hints) -> None:
    """Write what has to be added to `base` to have `model`, and prove that it gives every bit back.

    Raises:
        UserError: one of them cannot be read, they are of different shapes, or what was written gives another model.
    """
    tuned, old = open_source(model, hints), open_source(base, Hints())
    if tuned.tokenizer is None:
        raise UserError(f"{model}: no tokenizer there; name its folder with --tokenizer=")
    with atomic_folder(out, mark=bits.RECORD) as folder:
        tensors, record = bits.make_difference(tuned, old)
        progress = Progress(sum(tensor.nbytes for tensor in tensors.values()), None, unit="arrays")
        say = partial(progress.advance, records=1)
        write_safetensors(folder, tensors, stem=STEM, shard_bytes=SHARD_BYTES, say=say)
        bits.write_record(folder, record)
        fields = {
            "shape": shape_to_json(tuned.config),
            "template": tuned.template.name if tuned.template else None,
            "stop_ids": tuned.stop_ids,
        }
        write_json(folder / MODEL, fields)
        (folder / TOKENIZER).mkdir()
        tuned.tokenizer.save(folder / TOKENIZER)
        if tuned.chat_template is not None:
            (folder / JINJA).write_text(tuned.chat_template)
        progress.stage("written; recovering the model from it")
        bits.check_result(bits.recover(open_files(folder, STEM), record, old), record, str(folder))
        write_digests(folder)
    print(
        f"{out}: the difference of {model} from {base}; {len(tensors)} arrays recovered to the bit\n"
        f"base   {record.base}\nresult {record.result}"
    )


def recover(difference: Path, base: Path, out: Path, hints: Hints, options: Options) -> None:
    """Write the model that `difference` makes of `base` as a Hugging Face folder.

    Raises:
        UserError: `base` is not the one that the difference was made from, or something is missing or damaged.
    """
    record = bits.read_record(difference)
    old = open_source(base, Hints(shape=hints.shape))
    if record is None:
        source = _from_numbers(difference, old, hints)
    else:
        tensors = bits.recover(open_files(difference, STEM), record, old)
        bits.check_result(tensors, record, str(difference))
        source = _from_bits(difference, tensors, hints)
    run_job(source, "hf", out, options)


def _from_bits(folder: Path, tensors: Tensors, hints: Hints) -> Source:
    fields = read_json(folder / MODEL)
    config = shape_from_json(fields["shape"])
    template = hints.template or fields["template"]
    ends = fields["stop_ids"]
    return Source(
        path=folder,
        format="difference",
        config=config,
        tensors=tensors,
        logits=partial(reference_logits, shape_to_hf(config), tensors),
        tokenizer=load_tokenizer(hints.tokenizer or folder / TOKENIZER),
        template=get_template(template) if isinstance(template, str) else None,
        chat_template=(folder / JINJA).read_text() if (folder / JINJA).is_file() else None,
        stop_ids=tuple(ends) if isinstance(ends, list) else (),
        origin={"path": str(folder), "digest": path_digest(folder)},
    )


def _from_numbers(path: Path, base: Source, hints: Hints) -> Source:
    """Return base + difference of somebody else's, whose sum is all that there is to compare it with."""
    change = open_source(path, hints)
    exact = bits.recover_numbers(change.tensors, base, "float32")
    plain, with_frequencies = bits.sum_of_weights(exact, change.config)
    print(
        f"{path}: no checksums in it, so nothing proves that {base.path} is its base. The sum of the weights is "
        f"{plain:.4f}, with RoPE's frequencies {with_frequencies:.4f} (Alpaca-7B: 50637.1836)"
    )
    tensors = bits.recover_numbers(change.tensors, base)
    return Source(
        path=path,
        format="difference",
        config=change.config,
        tensors=tensors,
        logits=partial(reference_logits, shape_to_hf(change.config), tensors),
        tokenizer=change.tokenizer,
        template=change.template,
        chat_template=change.chat_template,
        stop_ids=change.stop_ids,
        origin={**change.origin, "base": {name: base.origin.get(name) for name in ("path", "digest")}},
    )
