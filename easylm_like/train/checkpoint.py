"""Checkpoints: WORKDIR/checkpoints/STEP/{params/, optimizer/, run.json, files.json}.

params/ and optimizer/ are Orbax's, so that everything restores onto another mesh and params restore alone. run.json:
model shape, template, tokenizer digest, data state (the step and the data set's digest), resolved config, git revision,
versions. files.json: size and SHA-256 of all the files, compared before an array is used.

A folder of that name is whole: it is written as STEP.partial, renamed when the last byte is on the disk, and renamed
again before it is deleted.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from easylm_like.digests import DIGESTS, find_damage, flush, write_digests
from easylm_like.errors import UserError
from easylm_like.hf.keys import Stack, Stacks
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.llama import Params, abstract_model
from easylm_like.train.layers_on_disk import open_layers, quiet_orbax, save_args, write_layers
from easylm_like.train.state import TrainState

RunInfo = Mapping[str, object]
Folder = str | os.PathLike[str]

PARTIAL, DELETED, DAMAGED = ".partial", ".deleted", ".damaged"  # STEP.partial: not, no longer, no checkpoint
RUN, PARAMS = "run.json", "params"
FULL_DISK = "the disk is full"
# Orbax could make them in the background too; but if that fails, its other threads wait 20 minutes for them, and no
# process ends before its threads.
# 20 minutes are also what it gives a save by default, which is little for a large state on a shared disk.
ASYNC = ocp.options.AsyncOptions(create_directories_asynchronously=False, timeout_secs=4 * 3600)


def saved_steps(folder: Folder) -> list[int]:
    """Return the steps that have a checkpoint, ascending; none if there is no such folder."""
    return sorted(int(path.name) for path in Path(folder).glob("*") if path.name.isdigit())


def newest_step(folder: Folder, step: int | None = None) -> int:
    """Return the newest step that has a checkpoint, or `step` if it has one.

    Raises:
        UserError: there is none, or not that one.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; expected a run's checkpoints (WORKDIR/checkpoints)")
    steps = saved_steps(folder)
    if not steps or (step is not None and step not in steps):
        raise UserError(f"{folder}: no checkpoint of step {'any' if step is None else step}; there are {steps}")
    return steps[-1] if step is None else step


def new_checkpointer() -> ocp.AsyncCheckpointer:
    """Return what writes the arrays of states in the background, one state at a time."""
    quiet_orbax()
    return ocp.AsyncCheckpointer(_arrays_handler(), async_options=ASYNC)


def begin_save(checkpointer: ocp.AsyncCheckpointer, folder: Folder, state: TrainState) -> None:
    """Begin to write the arrays of a state; it may be changed as soon as this returns."""
    parts = {name: (w.sharding.shard_shape(w.shape), w.dtype.itemsize) for name, w in state.params.items()}
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(state.params, save_args=save_args(parts)),
        optimizer=ocp.args.PyTreeSave(state.opt_state),
    )
    checkpointer.save(_partial(folder, int(state.step)), args=items)


def finish_save(folder: Folder, step: int, run: RunInfo) -> None:
    """Make a checkpoint of the arrays that are written; on one host, when all have written theirs."""
    partial = _partial(folder, step)
    (partial / RUN).write_text(json.dumps(run, indent=2) + "\n")
    write_digests(partial)
    partial.replace(_step_folder(folder, step))
    flush(partial.parent)  # before older checkpoints are deleted


def save_params(folder: Folder, params: Stacks, run: RunInfo, step: int = 0) -> None:
    """Write weights alone as a checkpoint, a few layers in memory at a time, for runs that start from them.

    Raises:
        UserError: it could not be written.
    """
    try:
        write_layers(_partial(folder, step) / PARAMS, params)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:  # what a disk makes tensorstore and Orbax raise
        raise UserError(f"{_partial(folder, step)} could not be written: {why_not(error)}") from error
    finish_save(folder, step, run)


def why_not(error: Exception) -> str:
    """Return in a few words what kept a checkpoint from being written."""
    full = any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
    return FULL_DISK if full else str(error).splitlines()[0] if str(error) else type(error).__name__


def open_params(folder: Folder, step: int) -> dict[str, Stack]:
    """Return the weights of a checkpoint, read a layer at a time.

    Raises:
        UserError: they are damaged.
    """
    step, run = read_run_info(folder, step)
    _check(folder, step, "params/")
    axes = abstract_model(shape_from_json(run["shape"]))[2]
    return open_layers(_step_folder(folder, step) / PARAMS, {name: "layers" in axes[name] for name in axes})


def remove_step(folder: Folder, step: int) -> None:
    """Delete a checkpoint; a kill meanwhile leaves nothing that looks like one."""
    deleted = _step_folder(folder, step).with_name(f"{step}{DELETED}")
    _step_folder(folder, step).replace(deleted)
    shutil.rmtree(deleted, ignore_errors=True)  # it is none any more; what cannot be deleted now, the next start tells


def remove_unfinished(folder: Folder) -> bool:
    """Delete what saves and deletions left that did not come to their end, of a folder that nobody writes to.

    Returns whether there was anything.
    """
    found = False
    for path in Path(folder).glob("*"):
        step, _, rest = path.name.partition(".")
        if step.isdigit() and (rest == DELETED[1:] or rest.startswith(PARTIAL[1:])):
            found = True
            shutil.rmtree(path)
    return found


def set_aside(folder: Folder, step: int) -> None:
    """Rename a damaged checkpoint, so that it is none any more and can still be looked at."""
    aside = _step_folder(folder, step).with_name(f"{step}{DAMAGED}")
    shutil.rmtree(aside, ignore_errors=True)
    _step_folder(folder, step).replace(aside)


def step_damage(folder: Folder, step: int, under: str = "") -> list[str]:
    """Return a sentence for every file of a checkpoint that is missing or not what was written."""
    return find_damage(_step_folder(folder, step), under)


def restore_state(folder: Folder, step: int, like: TrainState) -> TrainState:
    """Return the state saved at `step`, laid out as `like` (shapes with shardings) says, on whatever mesh that is.

    Its files are to be compared before (`step_damage`).
    """
    params, opt_state = (
        _restore(_step_folder(folder, step) / name, tree)
        for name, tree in (("params", like.params), ("optimizer", like.opt_state))
    )
    position = jax.make_array_from_callback((), like.step.sharding, lambda _: np.asarray(step, np.int32))
    return TrainState(position, params, opt_state)


def restore_params(folder: Folder, step: int, like: Params) -> Params:
    """Return only the weights of a checkpoint, in the dtypes and shardings of `like`.

    Raises:
        UserError: they are damaged.
    """
    _check(folder, step, "params/")
    return _restore(_step_folder(folder, step) / "params", like)


def load_params(folder: Folder, step: int) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint as NumPy arrays, without a mesh and without the optimizer.

    Raises:
        UserError: they are damaged.
    """
    _check(folder, step, "params/")
    return dict(load_arrays(_step_folder(folder, step) / "params"))


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Return params/ or optimizer/ of a checkpoint as Orbax has them, their arrays as NumPy's."""
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def read_run_info(folder: Folder, step: int | None = None) -> tuple[int, RunInfo]:
    """Return (step, its run.json) of a folder of checkpoints; the latest step unless one is given.

    Raises:
        UserError: there is none, or not that one; or its run.json is damaged.
    """
    step = newest_step(folder, step)
    _check(folder, step, RUN)
    return step, json.loads((_step_folder(folder, step) / RUN).read_text())


def saved_digest(folder: Folder, step: int) -> str:
    """Return a digest that changes whenever `step` is saved anew (Orbax gives its files other names)."""
    return hashlib.sha256((_step_folder(folder, step) / DIGESTS).read_bytes()).hexdigest()


def _arrays_handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=ASYNC))


def _check(folder: Folder, step: int, under: str) -> None:
    if damage := step_damage(folder, step, under):
        old = (_step_folder(folder, step) / "run").is_dir()
        why = "an earlier version of easylm_like wrote it: go on with that one" if old else "copy it again"
        raise UserError(f"{'; '.join(damage)}; {why}, or take another checkpoint of {saved_steps(folder)}")


def _restore(folder: Path, like: object) -> dict[str, jax.Array]:
    args = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder, args=args)


def _step_folder(folder: Folder, step: int) -> Path:
    return Path(folder).absolute() / str(step)


def _partial(folder: Folder, step: int) -> Path:
    return _step_folder(folder, step).with_name(f"{step}{PARTIAL}")


def shape_to_json(config: LlamaConfig) -> dict[str, object]:
    """Return a model's architecture as JSON, without how it is computed; `shape_from_json` is the inverse."""
    fields = dataclasses.asdict(config)
    del fields["compute"]
    return fields


def shape_from_json(fields: object) -> LlamaConfig:
    """Return the LlamaConfig that `shape_to_json` wrote, computed in fp32 as by default.

    Raises:
        UserError: another version of this library wrote other fields.
    """
    known = {field.name for field in dataclasses.fields(LlamaConfig)} - {"compute"}
    if not isinstance(fields, dict) or fields.keys() != known:
        raise UserError(
            f"the checkpoint's shape has other fields than this version of easylm_like ({fields}); go on with the "
            "version that wrote it, or convert its model again"
        )
    scaling = fields["rope_scaling"] and RopeScaling(**fields["rope_scaling"])
    return LlamaConfig(**fields | {"rope_scaling": scaling})
