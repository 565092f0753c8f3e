"""Everything a run needs before its first step, checked in the order of what is cheapest to find wrong."""

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from easylm_like.atomic import atomic_file, atomic_folder
from easylm_like.data.dataset import load_or_tokenize
from easylm_like.data.loader import Loader, make_loader
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import Tokenizer, load_tokenizer
from easylm_like.errors import UserError
from easylm_like.model.attention import choose_attention
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import param_shardings
from easylm_like.model.partition import batch_part, make_mesh
from easylm_like.provenance import git_revision, versions
from easylm_like.train.checkpoint import RunInfo, shape_to_json
from easylm_like.train.config import RunConfig, check_batch, check_run
from easylm_like.train.hosts import on_every_host, on_first_host
from easylm_like.train.optim import make_optimizer, make_schedule
from easylm_like.train.saver import HELDOUT
from easylm_like.train.start import Start, find_start
from easylm_like.train.track import check_trackers

# What a continued run may change: none of it changes what is computed, but for rounding.
FREE_TO_CHANGE = (
    "log",
    "profile",
    "compilation_cache",
    "micro_batches",
    "model.attention",
    "model.scan_layers",
    "model.remat",
    "log_every",
    "heldout_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_best",
    "milestone_every",
    "damaged",
    "samples",
    "mesh",
    "data.train",  # the file may move: its content is compared
    "data.heldout",  # is only looked at
    "data.tokenizer",
    "model.init_from",
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run whose parts fit together. Without a `start` it begins with random weights."""

    config: RunConfig
    mesh: Mesh
    shape: LlamaConfig
    tokenizer: Tokenizer
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    loader: Loader
    heldout: Loader | None
    start: Start | None
    info: RunInfo


def prepare(config: RunConfig, workdir: Path) -> Prepared:
    """Check `config` and tokenise its data into WORKDIR/tokens/; nothing else is written yet.

    Raises:
        UserError: something in the config, the data or the start does not fit, on this host or on another.
    """
    check_run(config)
    return on_every_host(partial(_prepare, config, workdir))


def _prepare(config: RunConfig, workdir: Path) -> Prepared:
    check_trackers(config.log)
    mesh = make_mesh(config.mesh)
    check_batch(config, dict(mesh.shape))
    schedule = make_schedule(config.optim, config.steps)
    start = find_start(config.model.init_from) if config.model.init_from else None
    tokenizer = load_tokenizer(config.data.tokenizer or (start and start.tokenizer) or "")
    shape = _shape(config, start, tokenizer)
    attention = choose_attention(config.model.attention, shape, mesh, config.data.row_length)
    param_shardings(shape, mesh)  # a weight that does not divide is told before any data is read
    loader = _loader(config, config.data.train, tokenizer, workdir, mesh)
    heldout = None
    if config.data.heldout:
        heldout = _heldout_loader(config, _loader(config, config.data.heldout, tokenizer, workdir, mesh), mesh)
    shape = dataclasses.replace(shape, compute=dataclasses.replace(shape.compute, attention=attention))
    info: RunInfo = {
        "shape": shape_to_json(shape),
        "template": config.data.template,
        "tokenizer": tokenizer.digest,
        "data": {"seed": config.seed, "digest": loader.dataset.digest, "summary": loader.dataset.summary},
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "git": git_revision(),
        "versions": versions(("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")),
    }
    optimizer = make_optimizer(config.optim, schedule)
    return Prepared(config, mesh, shape, tokenizer, schedule, optimizer, loader, heldout, start, info)


def fit_rows(shape: LlamaConfig, loader: Loader) -> LlamaConfig:
    """Return `shape` as it computes this loader's rows: cuDNN has to know how many records one may hold."""
    compute = dataclasses.replace(shape.compute, max_segments=max(map(len, loader.rows)))
    return dataclasses.replace(shape, compute=compute)


def write_workdir(run: Prepared, workdir: Path) -> None:
    """Write WORKDIR/config.json and WORKDIR/tokenizer/, on one host."""
    if jax.process_index() == 0:
        with atomic_file(workdir / "config.json") as path:
            path.write_text(json.dumps(run.info, indent=2) + "\n")
        with atomic_folder(workdir / "tokenizer", mark="tokenizer.json") as folder:
            run.tokenizer.save(folder)


def check_continues(saved: RunInfo, now: RunInfo, workdir: Path) -> None:
    """Raise a UserError that lists what differs, if `now` is not the run that `saved` was."""
    old, new = _flat(saved), _flat(now)
    free = (*(f"config.{name}" for name in FREE_TO_CHANGE), "git", "versions", "data.summary", HELDOUT)
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds the checkpoints of another run: {'; '.join(changed)}. "
            "Give that value again to go on with it, or another --workdir"
        )


def _shape(config: RunConfig, start: Start | None, tokenizer: Tokenizer) -> LlamaConfig:
    shape = config.model.shape if start is None else start.shape
    assert shape is not None
    shape = dataclasses.replace(shape, compute=config.model.compute())
    shape.check()
    if config.data.row_length > shape.max_length:
        raise UserError(
            f"data.row_length {config.data.row_length} is longer than the model's {shape.max_length} positions; "
            f"try --config.data.row_length={shape.max_length}"
        )
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is {shape.vocab_size}; "
            "they must fit: take the tokenizer that belongs to the model"
        )
    return shape


def _loader(config: RunConfig, path: str, tokenizer: Tokenizer, workdir: Path, mesh: Mesh) -> Loader:
    tokenize = partial(
        load_or_tokenize,
        path,
        get_template(config.data.template),
        tokenizer,
        row_length=config.data.row_length,
        too_long=config.data.too_long,
        cache=workdir / "tokens",
    )
    digest = on_first_host(lambda: tokenize().digest)  # the others find it done
    if not (workdir / "tokens" / digest[:16]).is_dir():
        raise UserError(f"{workdir}: it lacks what the first host wrote there; all hosts must share the work directory")
    dataset = tokenize()
    if dataset.digest != digest:
        raise UserError(f"{path}, the tokenizer or the version of easylm_like is not that of the first host")
    return make_loader(
        dataset,
        config.data.row_length,
        config.batch_size,
        config.seed,
        max_records=config.data.max_records,
        part=batch_part(mesh, config.batch_size),
    )


def _heldout_loader(config: RunConfig, loader: Loader, mesh: Mesh) -> Loader:
    """Return the training loader of other data, that walks through it in order.

    Held-out rows have no micro-batches: as many at a time as one has must fit.
    """
    size = config.batch_size // config.micro_batches
    return dataclasses.replace(loader, batch_size=size, shuffle=False, part=batch_part(mesh, size))


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    inner = (_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items())
    return {key: item for part in inner for key, item in part.items()}
