"""The training loop: from the first step, or the last checkpoint, to the end.

WORKDIR/config.json        the resolved config, git revision and versions, written before step 0
        tokenizer/         the tokenizer that trains, to be served with the model
        tokens/            tokenised data sets, with rejects.jsonl and the counts that add up
        train.log          what was printed;  metrics.jsonl: the numbers of it
        checkpoints/STEP/  see train/checkpoint.py
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from easylm_like.data.loader import Batch
from easylm_like.errors import UserError
from easylm_like.model.llama import abstract_model
from easylm_like.train.checkpoint import (
    open_checkpoints,
    read_run_info,
    restore_checkpoint,
    restore_params,
    save_checkpoint,
)
from easylm_like.train.config import RunConfig
from easylm_like.train.heldout import group_names, heldout_losses
from easylm_like.train.prepare import Prepared, check_continues, prepare, write_workdir
from easylm_like.train.runlog import Rate, RunLog
from easylm_like.train.state import TrainState, abstract_state, init_state
from easylm_like.train.step import Metrics, group_loss, to_devices, train_step

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train(config: RunConfig, workdir: Path) -> None:
    """Run `config` in `workdir`: an interrupted run goes on where it was, a finished one is left as it is.

    Raises:
        UserError: config, data or checkpoints do not fit together, or the loss is no longer a number.
    """
    run = prepare(config, workdir)
    folder = workdir / "checkpoints"
    with open_checkpoints(folder, keep=config.keep_checkpoints, create=True) as manager, jax.set_mesh(run.mesh):
        done = manager.latest_step()
        if done is not None:
            check_continues(read_run_info(folder, done)[1], run.info, workdir)
        write_workdir(run, workdir)  # not before it is sure whose work directory it is
        log = RunLog(workdir, active=jax.process_index() == 0, resume_at=done or 0)
        if done == config.steps:
            log.line(f"already trained: step {done} of {config.steps} is in {folder}")
            return
        log.line(_describe(run))
        state = _first_state(run, manager, done)
        log.line(f"start at step {int(state.step)} of {config.steps}")
        _run_steps(run, state, manager, log)


def _first_state(run: Prepared, manager: ocp.CheckpointManager, done: int | None) -> TrainState:
    like = abstract_state(run.shape, run.optimizer, run.mesh)
    if done is not None:
        return restore_checkpoint(manager, done, like)
    params = None if run.start is None else restore_params(*run.start, like.params)
    return init_state(run.shape, run.optimizer, run.mesh, run.config.seed, params)


def _run_steps(run: Prepared, state: TrainState, manager: ocp.CheckpointManager, log: RunLog) -> None:
    config, step = run.config, _compile_later(run)
    look = _heldout_watch(run, log)
    first, rate, pending = int(state.step), Rate(), []
    if first == 0:
        rate.exclude(look(state))
    for number in range(first, config.steps):
        batch = to_devices(run.mesh, run.loader.batch(number))
        state, metrics = step(state, batch)
        pending.append(metrics)
        done = number + 1
        last = done == config.steps
        checkpoint = last or (config.checkpoint_every and done % config.checkpoint_every == 0)
        if done == first + 1 or done % config.log_every == 0 or checkpoint:
            _log_steps(log, rate, pending, done, config.steps, float(run.schedule(done - 1)))
            pending = []
        if last or (config.heldout_every and done % config.heldout_every == 0):
            rate.exclude(look(state))
        if checkpoint:
            save_checkpoint(manager, state, run.info)
    manager.wait_until_finished()


def _compile_later(run: Prepared) -> Step:
    step = partial(
        train_step,
        graphdef=abstract_model(run.shape)[0],
        optimizer=run.optimizer,
        micro_batches=run.config.micro_batches,
        z_loss=run.config.optim.z_loss,
        seed=run.config.seed,
    )
    return jax.jit(step, donate_argnums=0)


def _heldout_watch(run: Prepared, log: RunLog) -> Callable[[TrainState], float]:
    """Return a function that logs the held-out loss of a state and returns the seconds it took."""
    loader = run.heldout
    if loader is None:
        return lambda state: 0.0
    loss = jax.jit(partial(group_loss, graphdef=abstract_model(run.shape)[0], n_groups=len(group_names(loader))))

    def look(state: TrainState) -> float:
        began, number = time.perf_counter(), int(state.step)
        losses = heldout_losses(loss, state.params, loader, run.mesh)
        log.line(f"step {number:6}  held-out loss  " + "  ".join(f"{n} {v.loss:.3f}" for n, v in losses.items()))
        log.metrics(number, "heldout", {name: value.loss for name, value in losses.items()})
        return time.perf_counter() - began

    return look


def _log_steps(log: RunLog, rate: Rate, pending: list[Metrics], done: int, steps: int, learning_rate: float) -> None:
    """Log the steps since the last line as one: the loss is the mean over all their trained tokens."""
    values = jax.device_get(pending)  # the one place of the loop that waits for the devices
    for number, metrics in enumerate(values, start=done - len(values) + 1):
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise UserError(
                f"step {number}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; nothing was saved "
                "since. Lower --config.optim.learning_rate or look at the data of that step"
            )
    trained = sum(float(m["trained_tokens"]) for m in values)
    tokens = sum(float(m["tokens"]) for m in values)
    loss = sum(float(m["loss"]) * float(m["trained_tokens"]) for m in values) / max(trained, 1.0)
    speed, left = rate.ask(tokens, len(values), steps - done)
    last = {"grad_norm": float(values[-1]["grad_norm"]), "learning_rate": learning_rate}
    log.line(
        f"step {done:6}/{steps}  loss {loss:.4f}  lr {last['learning_rate']:.2e}  grad {last['grad_norm']:.2f}  "
        f"{speed:,.0f} tokens/s ({speed * trained / max(tokens, 1.0):,.0f} trained)  {left} left"
    )
    log.metrics(done, "train", {"loss": loss, "tokens_per_second": speed, "trained_tokens": trained} | last)


def _describe(run: Prepared) -> str:
    dataset, loader = run.loader.dataset, run.loader
    fill = int(dataset.lengths().sum()) / (len(loader.rows) * loader.row_length)
    counts, epochs = dataset.summary, run.config.steps / loader.steps_per_epoch
    return (
        f"{len(dataset)} conversations, {counts['tokens']} tokens ({counts['trained']} trained, {counts['masked']} "
        f"masked, dropped {counts['dropped_tokens'] or 'none'}) in {len(loader.rows)} rows of {loader.row_length}, "
        f"{fill:.1%} full; {run.config.steps} steps are {epochs:.1f} epochs; mesh {dict(run.mesh.shape)}"
    )
