"""The batch of one step, exactly as the run saw it or will see it, and what the model thinks of it."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from easylm_like.data.loader import Loader
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.model.llama import Params, abstract_model
from easylm_like.train.checkpoint import read_run_info, restore_params, saved_steps
from easylm_like.train.config import RunConfig
from easylm_like.train.prepare import Prepared, check_continues, fit_rows, prepare
from easylm_like.train.state import abstract_state, init_state
from easylm_like.train.step import group_loss, to_devices


def print_step(config: RunConfig, workdir: Path, number: int) -> None:
    """Print every record of the batch of step `number`: place, id, source, loss, and its text by trained or not.

    The losses are those of the newest weights before the step that there are: of a checkpoint, or the first ones. Noise
    (dropout, forgotten tokens) is left out.

    Raises:
        UserError: the run has no such step, or the work directory is another run's.
    """
    run = prepare(config, workdir)
    if not 1 <= number <= config.steps:
        raise UserError(f"the run has the steps 1 to {config.steps}, not {number}")
    with jax.set_mesh(run.mesh):
        weights, params = _weights_before(run, workdir, number)
        losses = _losses(run, params, number)
    if jax.process_index():
        return
    loader = run.loader.whole()
    print(f"step {number} of {config.steps}: {len(losses)} records in {config.batch_size} rows; losses {weights}")
    for (row, where, _, record), (loss, tokens) in zip(loader.places(number - 1), losses, strict=True):
        told = f"loss {loss / tokens:.4f} over {tokens:.0f} trained tokens" if tokens else "no trained token"
        name, source = loader.dataset.record_ids[record], loader.dataset.sources[record]
        print(f"\n== row {row}, positions {where.start} to {where.stop - 1}: {name} from {source}, {told}")
        for trained, text in _pieces(loader, run.tokenizer, record):
            print(f"{'trained' if trained else 'masked'}: {text!r}")


def _weights_before(run: Prepared, workdir: Path, number: int) -> tuple[str, Params]:
    folder = workdir / "checkpoints"
    before = [step for step in saved_steps(folder) if step < number]
    like = abstract_state(run.shape, run.optimizer, run.mesh).params
    if before:
        check_continues(read_run_info(folder, before[-1])[1], run.info, workdir)
        return f"with the weights after step {before[-1]}", restore_params(folder, before[-1], like)
    params = None if run.start is None else run.start.params(like)
    return "with the first weights", init_state(run.shape, run.optimizer, run.mesh, run.config.seed, params).params


def _losses(run: Prepared, params: Params, number: int) -> list[tuple[float, float]]:
    """Return (sum of -log p, trained tokens) of every record, in the order of the loader's places."""
    loader, groups, count = run.loader, np.zeros((len(run.loader.part), run.loader.row_length), np.int32), 0
    for row, where, _, _ in loader.whole().places(number - 1):
        if row in loader.part:
            groups[row - loader.part.start, where] = count
        count += 1
    shape = fit_rows(run.shape, loader)
    loss = jax.jit(partial(group_loss, graphdef=abstract_model(shape)[0], n_groups=count))
    size = run.config.batch_size
    batch = to_devices(run.mesh, loader.batch(number - 1), size)
    nll, tokens = loss(params, batch, to_devices(run.mesh, groups, size))
    return list(zip(np.asarray(nll).tolist(), np.asarray(tokens).tolist(), strict=True))


def _pieces(loader: Loader, tokenizer: Tokenizer, record: int) -> list[tuple[bool, str]]:
    """Return a record's text in pieces of equal weight; special tokens are shown."""
    start, stop = (int(offset) for offset in loader.dataset.offsets[record : record + 2])
    ids, weights = loader.dataset.ids[start:stop].tolist(), np.asarray(loader.dataset.weights[start:stop], np.int8)
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
    shown = [tokenizer.decode(ids[:border]) for border in borders]  # whole: a piece alone may lose its first space
    return [
        (bool(weights[first]), after[len(before) :])
        for first, before, after in zip(borders, shown, shown[1:], strict=False)
    ]
