"""The training loop: from the first step, or the last checkpoint, to the end.

WORKDIR/config.json        the resolved config, git revision and versions, written before step 0
        tokenizer/         the tokenizer that trains, to be served with the model
        tokens/            tokenised data sets, with rejects.jsonl and the counts that add up
        train.log          what was printed;  metrics.jsonl: the numbers of it;  samples.jsonl: the answers
        tensorboard/, wandb/, profile/  if asked for, see train/track.py
        checkpoints/STEP/  see train/checkpoint.py
        .lock              held by the process that trains there
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from easylm_like.compiled import keep_compiled
from easylm_like.data.conversation import Message, Role
from easylm_like.data.loader import Batch, Loader
from easylm_like.data.template import get_template
from easylm_like.errors import UserError
from easylm_like.model.attention import why_not
from easylm_like.model.attention_cudnn import cudnn_scratch
from easylm_like.model.config import Attention
from easylm_like.model.llama import abstract_model
from easylm_like.train.checkpoint import RUN, read_run_info, restore_state, saved_steps, step_damage
from easylm_like.train.config import RunConfig
from easylm_like.train.feed import prefetch
from easylm_like.train.flops import Work, palm_flops, peak_tflops, strict_flops, visible_pairs
from easylm_like.train.heldout import group_names, heldout_losses
from easylm_like.train.hosts import on_every_host, on_first_host
from easylm_like.train.prepare import Prepared, check_continues, fit_rows, prepare, write_workdir
from easylm_like.train.runlog import RunLog, Stopwatch, memory, step_line
from easylm_like.train.samples import answer_texts
from easylm_like.train.saver import Saver
from easylm_like.train.start import step_to_resume
from easylm_like.train.state import TrainState, abstract_state, init_state
from easylm_like.train.step import Metrics, group_loss, to_devices, train_step
from easylm_like.train.stop import StopRequest, sole_run
from easylm_like.train.track import Profiler, open_trackers


@dataclass(slots=True)
class _SinceLine:
    """What has happened since the last line of the log."""

    metrics: list[Metrics] = field(default_factory=list)
    pairs: int = 0
    waited: float = 0.0  # seconds


def train(config: RunConfig, workdir: Path) -> bool:
    """Run `config` in `workdir`: an interrupted run goes on where it was, a finished one is left as it is.

    Returns whether it is finished; if not, SIGTERM ended it and its state is saved.

    Raises:
        UserError: config, data or checkpoints do not fit together, another process trains there, the disk is full, or
            the loss is no longer a number.
    """
    run = prepare(config, workdir)
    keep_compiled(config.compilation_cache, run.mesh.devices.flat[0].platform)
    folder, main, notes = workdir / "checkpoints", jax.process_index() == 0, list[str]()
    with ExitStack() as held, jax.set_mesh(run.mesh):
        on_first_host(lambda: held.enter_context(sole_run(workdir)))
        done = on_first_host(lambda: _step_to_resume(run, workdir, notes.append))
        write_workdir(run, workdir)  # not before it is sure whose work directory it is
        with RunLog(workdir, active=main, resume_at=-1 if done is None else done) as log:
            for note in notes:
                log.line(note)
            if done == config.steps:
                log.line(f"already trained: step {done} of {config.steps} is in {folder}")
                return True
            if main:
                log.track(open_trackers(config.log, workdir, run.info, log.history()))
            log.line(_describe(run))
            log.line(_describe_attention(run))
            state = on_every_host(lambda: _first_state(run, folder, done))
            log.line(f"start at step {int(state.step)} of {config.steps}")
            with Saver(folder, config, run.info) as saver, StopRequest() as stop:
                return _run_steps(run, state, saver, stop, log)


def _step_to_resume(run: Prepared, workdir: Path, say: Callable[[str], None]) -> int | None:
    """Return the step to go on from; before a damaged one is set aside, it must be sure that this is the same run."""
    folder = workdir / "checkpoints"
    for step in reversed(saved_steps(folder)):
        if not step_damage(folder, step, RUN):
            check_continues(read_run_info(folder, step)[1], run.info, workdir)
            break
    return step_to_resume(folder, run.config.steps, run.config.damaged, say)


def _first_state(run: Prepared, folder: Path, done: int | None) -> TrainState:
    like = abstract_state(run.shape, run.optimizer, run.mesh)
    if done is not None:
        return restore_state(folder, done, like)
    params = None if run.start is None else run.start.params(like.params)
    return init_state(run.shape, run.optimizer, run.mesh, run.config.seed, params)


def _run_steps(run: Prepared, state: TrainState, saver: Saver, stop: StopRequest, log: RunLog) -> bool:
    """Take the steps that are left; return whether all were taken."""
    config, look = run.config, _watch(run, log)
    first = int(state.step)
    if first == 0:
        look(state)
    feed = prefetch(_loading(run), range(first, config.steps))
    with closing(feed), Profiler(log.folder / "profile", config.profile.steps, log.line) as profiler:
        step, watch, since = None, Stopwatch(), _SinceLine()
        for done, ((batch, pairs), waited) in enumerate(feed, start=first + 1):
            if step is None:
                step = _compile(run, state, batch, log)
                watch, waited = Stopwatch(), 0.0
            profiler.before(done)
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, metrics = step(state, batch)
            since.metrics.append(metrics)
            since.pairs, since.waited = since.pairs + pairs, since.waited + waited
            # The devices always have one step more to do. If the loop ran further ahead, it would wait for data that
            # nobody misses yet, and many batches would lie in memory.
            jax.block_until_ready(since.metrics[-2:-1])
            watch.exclude(profiler.after(done, state))
            saver.check()
            due = _due(config, done, stopping=stop.asked(done))
            if due.line or done == first + 1:
                _log_steps(run, log, watch, since, done)
                since = _SinceLine()
            began = time.perf_counter()
            loss = look(state) if due.look else None
            if due.save:
                saver.save(state, loss)
            watch.exclude(time.perf_counter() - began)
            if due.end:
                saver.wait()
                log.line(f"stopped by SIGTERM; step {done} of {config.steps} is saved, start it again to go on")
                return False
    saver.wait()
    return True


class _Due(NamedTuple):
    """What comes after a step."""

    line: bool
    look: bool
    save: bool
    end: bool


def _due(config: RunConfig, done: int, *, stopping: bool) -> _Due:
    last = done == config.steps
    end = stopping and not last  # there is little time: nothing is measured
    save = end or last or bool(config.checkpoint_every and done % config.checkpoint_every == 0)
    look = last or bool(config.heldout_every and done % config.heldout_every == 0) or bool(save and config.keep_best)
    return _Due(save or done % config.log_every == 0, look and not end, save, end)


def _loading(run: Prepared) -> Callable[[int], tuple[Batch, int]]:
    """Return a function from the number of a step to its batch, on the devices, and its (query, key) pairs."""
    whole = run.loader.whole()  # the pairs are those of all hosts
    of_record = visible_pairs(whole.dataset.lengths(), run.shape.sliding_window)
    of_row = np.array([of_record[row].sum() for row in whole.rows])

    def load(step: int) -> tuple[Batch, int]:
        batch = to_devices(run.mesh, run.loader.batch(step), run.config.batch_size)
        return batch, int(of_row[whole.row_numbers(step)].sum())

    return load


def _compile(run: Prepared, state: TrainState, batch: Batch, log: RunLog) -> Compiled:
    """Compile the step ahead of its first call, so that the time of the steps is theirs alone."""
    step = partial(
        train_step,
        graphdef=abstract_model(fit_rows(run.shape, run.loader))[0],
        optimizer=run.optimizer,
        micro_batches=run.config.micro_batches,
        z_loss=run.config.optim.z_loss,
        seed=run.config.seed,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)  # the next state lies as this one does
    watch = Stopwatch()
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch).compile()
    log.line(f"compiled the step in {watch.lap():.1f} s")
    return compiled


def _watch(run: Prepared, log: RunLog) -> Callable[[TrainState], float | None]:
    """Return a function that logs the held-out losses and the samples of a state and returns the loss of all."""
    answers = _answers(run, log)
    loader = run.heldout
    if loader is None:
        return lambda state: answers(state)
    graphdef, _, _ = abstract_model(fit_rows(run.shape, loader))
    loss = jax.jit(
        partial(group_loss, graphdef=graphdef, n_groups=len(group_names(loader))),
        out_shardings=NamedSharding(run.mesh, PartitionSpec()),  # so that every host can read it
    )

    def look(state: TrainState) -> float:
        number = int(state.step)
        losses = heldout_losses(loss, state.params, loader, run.mesh)
        log.line(f"step {number:6}  held-out loss  " + "  ".join(f"{n} {v.loss:.3f}" for n, v in losses.items()))
        log.metrics(number, "heldout", {name: value.loss for name, value in losses.items()})
        answers(state)
        return losses["all"].loss

    return look


def _answers(run: Prepared, log: RunLog) -> Callable[[TrainState], None]:
    """Return a function that logs what a state answers to the fixed prompts, under each of the template's markers."""
    template, wanted = get_template(run.config.data.template), run.config.samples
    chats = [(Message(Role.USER, prompt),) for prompt in wanted.prompts]

    def answer(state: TrainState) -> None:
        for quality in template.qualities if chats else ():
            model, spoken = (run.shape, state.params), (template, run.tokenizer)
            texts = answer_texts(model, spoken, chats, quality, max_new=wanted.max_new)
            for prompt, text in zip(wanted.prompts, texts, strict=True):
                log.sample(int(state.step), {"prompt": prompt, "marker": quality.value, "answer": text})
                log.line(f"step {int(state.step):6}  {quality.value} answer to {prompt[:40]!r}: {text[:80]!r}")

    return answer


def _log_steps(run: Prepared, log: RunLog, watch: Stopwatch, since: _SinceLine, done: int) -> None:
    """Log the steps since the last line as one: the loss is the mean over all their trained tokens."""
    values = jax.device_get(since.metrics)
    for number, metrics in enumerate(values, start=done - len(values) + 1):
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            ids = record_ids(run.loader, number)
            log.line(f"step {number}: the batch of {len(ids)} records: {' '.join(ids)}")
            raise UserError(
                f"step {number}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; nothing was saved "
                f"since. Its batch: {', '.join(ids[:5])}{', ... (all in train.log)' * (len(ids) > 5)}. Look at it with "
                f"python -m easylm_like.train at-step {number}, or lower --config.optim.learning_rate"
            )
    seconds, steps = watch.lap(), run.config.steps
    tokens, trained = (sum(float(m[name]) for m in values) for name in ("tokens", "trained_tokens"))
    positions = len(values) * run.loader.batch_size * run.loader.row_length
    numbers = {
        "loss": sum(float(m["loss"]) * float(m["trained_tokens"]) for m in values) / max(trained, 1.0),
        "grad_norm": float(values[-1]["grad_norm"]),
        "learning_rate": float(run.schedule(done - 1)),
        "trained_tokens": trained,
        "tokens_per_second": tokens / seconds,
        "trained_tokens_per_second": trained / seconds,
        **_speed(run, Work(positions, int(tokens), int(trained), since.pairs), seconds),
        **memory(),
        "data_share": since.waited / seconds,
    }
    if "skipped" in values[-1]:
        numbers["skipped_steps"] = float(values[-1]["skipped"])
    log.metrics(done, "train", numbers)
    log.line(step_line(done, steps, numbers, left=seconds / len(values) * (steps - done)))


def record_ids(loader: Loader, number: int) -> list[str]:
    """Return the ids of the records of step `number` (from 1 on, as the log counts), of all hosts, row by row."""
    return [loader.dataset.record_ids[record] for _, _, _, record in loader.whole().places(number - 1)]


def _speed(run: Prepared, work: Work, seconds: float) -> dict[str, float]:
    """Return tflops_per_device (10^12 FLOP/s) and, where the devices' peak is known, what share of it that is."""
    rate = 1e-12 / seconds / run.mesh.size
    strict = strict_flops(run.shape, work) * rate
    peak = run.config.log.peak_tflops or peak_tflops(run.mesh.devices.flat[0].device_kind)
    if not peak:
        return {"tflops_per_device": strict}
    palm = palm_flops(run.shape, work, run.loader.row_length) * rate
    return {"tflops_per_device": strict, "mfu": strict / peak, "mfu_palm": palm / peak}


def _describe_attention(run: Prepared) -> str:
    """Return which backend it is, why none of the faster ones, and what cuDNN takes that no other memory shows."""
    shape, mesh = fit_rows(run.shape, run.loader), run.mesh.shape
    chosen, most = shape.compute.attention, shape.compute.max_segments
    if chosen == Attention.CUDNN:
        rows = run.config.batch_size // run.config.micro_batches // (mesh["replica"] * mesh["fsdp"])
        size = cudnn_scratch(shape, rows, run.loader.row_length) / mesh["tensor"] / 2**30
        return f"attention cudnn: {size:.1f} GiB for up to {most} records in a row (data.max_records bounds them)"
    reasons = why_not(shape, run.mesh, run.loader.row_length)
    faster = list(reasons)[: list(reasons).index(chosen)] if chosen in reasons else list(reasons)
    told = "".join(f"; not {other.value}: {reasons[other]}" for other in faster if reasons[other])
    return f"attention {chosen.value}{told}"


def _describe(run: Prepared) -> str:
    dataset, loader = run.loader.dataset, run.loader
    fill = int(dataset.lengths().sum()) / (len(loader.rows) * loader.row_length)
    counts, epochs = dataset.summary, run.config.steps / loader.steps_per_epoch
    return (
        f"{len(dataset)} conversations, {counts['tokens']} tokens ({counts['trained']} trained, {counts['masked']} "
        f"masked, dropped {counts['dropped_tokens'] or 'none'}) in {len(loader.rows)} rows of {loader.row_length}, "
        f"{fill:.1%} full; {run.config.steps} steps are {epochs:.1f} epochs; mesh {dict(run.mesh.shape)}"
    )
