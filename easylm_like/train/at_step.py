"""The batch of one step, exactly as the run saw it or will see it, and what the model thinks of it."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from easylm_like.data.dataset import TokenDataset
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.model.llama import Params, abstract_model
from easylm_like.train.checkpoint import read_run_info, restore_params, saved_steps
from easylm_like.train.config import RunConfig
from easylm_like.train.prepare import Prepared, check_continues, fit_rows, prepare
from easylm_like.train.state import abstract_state, init_state
from easylm_like.train.step import group_loss, to_devices

HIGHEST = 5  # records named at the top


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a record of the data set lies in the batch, and its sum of -log p over its trained tokens."""

    number: int
    name: str
    row: int
    where: slice
    nll: float
    trained: int

    @property
    def loss(self) -> float:
        return self.nll / self.trained if self.trained else 0.0


def print_step(config: RunConfig, workdir: Path, number: int) -> None:
    """Print the batch of step `number` and its loss, then every record: place, id, source, loss, and its text.

    A piece of text begins behind "trained |" or "masked |" and goes on behind "|"; what cannot be seen is escaped. The
    losses are those of the newest weights before the step that there are: of a checkpoint, or the first ones. Noise
    (dropout, forgotten tokens) is left out.

    Raises:
        UserError: the run has no such step, or the work directory is another run's.
    """
    if not 1 <= number <= config.steps:
        raise UserError(f"the run has the steps 1 to {config.steps}, not {number}")
    run = prepare(config, workdir)
    _check_workdir(run, workdir)
    with jax.set_mesh(run.mesh):
        weights, params = _weights_before(run, workdir, number)
        records = _records(run, params, number)
    if jax.process_index():
        return
    dataset = run.loader.dataset
    print(_headline(run, number, records))
    print(_losses(records, weights))
    for record in records:
        told = f"loss {record.loss:.4f} over {record.trained} trained tokens" if record.trained else "no trained token"
        span, source = f"{record.where.start} to {record.where.stop - 1}", dataset.sources[record.number]
        print(f"\n== row {record.row}, positions {span}: {record.name} from {source}, {told}")
        for trained, text in pieces(dataset, run.tokenizer, record.number):
            kind = "trained" if trained else "masked"
            for line in text.split("\n"):
                print(f"{kind:>7} |{visible(line)}")
                kind = ""


def pieces(dataset: TokenDataset, tokenizer: Tokenizer, record: int) -> list[tuple[bool, str]]:
    """Return a record's text in pieces that are trained or not; special tokens are shown."""
    span = slice(*(int(offset) for offset in dataset.offsets[record : record + 2]))
    ids, trained = dataset.ids[span].tolist(), np.asarray(dataset.weights[span]) > 0
    borders = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    shown = [tokenizer.decode(ids[:border]) for border in borders]  # whole: a piece alone may lose its first space
    return [
        (bool(trained[first]), after[len(before) :])
        for first, before, after in zip(borders, shown, shown[1:], strict=False)
    ]


def visible(text: str) -> str:
    r"""Return the text with what no terminal shows, such as a tab or a space without width, as \t or \u200b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _check_workdir(run: Prepared, workdir: Path) -> None:
    """A run that went wrong before its first checkpoint left its config.json."""
    folder, written = workdir / "checkpoints", workdir / "config.json"
    if steps := saved_steps(folder):
        check_continues(read_run_info(folder, steps[-1])[1], run.info, workdir)
    elif written.is_file():
        check_continues(json.loads(written.read_text()), run.info, workdir)


def _weights_before(run: Prepared, workdir: Path, number: int) -> tuple[str, Params]:
    folder = workdir / "checkpoints"
    before = [step for step in saved_steps(folder) if step < number]
    like = abstract_state(run.shape, run.optimizer, run.mesh).params
    if before:
        return f"the weights after step {before[-1]}", restore_params(folder, before[-1], like)
    params = None if run.start is None else run.start.params(like)
    return "the first weights", init_state(run.shape, run.optimizer, run.mesh, run.config.seed, params).params


def _records(run: Prepared, params: Params, number: int) -> list[_Record]:
    """Return the records of a batch, of all hosts, in the order of the loader's places."""
    loader, whole, size = run.loader, run.loader.whole(), run.config.batch_size
    places = list(whole.places(number - 1))
    groups = np.zeros((len(loader.part), loader.row_length), np.int32)
    for group, (row, where, _, _) in enumerate(places):
        if row in loader.part:
            groups[row - loader.part.start, where] = group
    loss = jax.jit(
        partial(group_loss, graphdef=abstract_model(fit_rows(run.shape, loader))[0], n_groups=len(places)),
        out_shardings=NamedSharding(run.mesh, PartitionSpec()),  # so that every host can read it
    )
    batch = to_devices(run.mesh, loader.batch(number - 1), size)
    nll, trained = (np.asarray(sums) for sums in loss(params, batch, to_devices(run.mesh, groups, size)))
    return [
        _Record(record, whole.dataset.record_ids[record], row, where, float(nll[group]), int(trained[group]))
        for group, (row, where, _, record) in enumerate(places)
    ]


def _headline(run: Prepared, number: int, records: list[_Record]) -> str:
    tokens, trained = sum(r.where.stop - r.where.start for r in records), sum(r.trained for r in records)
    return (
        f"step {number} of {run.config.steps}: {len(records)} records in {run.config.batch_size} rows of "
        f"{run.loader.row_length}; {tokens} tokens, {trained} trained and {tokens - trained} masked"
    )


def _losses(records: list[_Record], weights: str) -> str:
    """Return the loss of the whole batch, and which records have the highest; what is no number comes first."""
    mean = sum(r.nll for r in records) / max(sum(r.trained for r in records), 1)
    highest = sorted(records, key=lambda r: -math.inf if math.isnan(r.loss) else -r.loss)[:HIGHEST]
    return f"loss {mean:.4f} with {weights}; highest: " + ", ".join(f"{r.name} {r.loss:.4f}" for r in highest)
