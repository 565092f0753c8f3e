"""Orbax checkpoints: WORKDIR/checkpoints/STEP/{params, optimizer, run}.

`run` is JSON: model shape, template, tokenizer digest, data state (the step and the data set's digest), resolved
config, git revision, versions. Everything restores onto another mesh; params restore alone.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig, RopeScaling
from easylm_like.model.llama import Params
from easylm_like.train.state import TrainState

RunInfo = Mapping[str, object]


def open_checkpoints(
    folder: str | os.PathLike[str], *, keep: int | None = None, create: bool = False
) -> ocp.CheckpointManager:
    """Return Orbax's manager of a folder of checkpoints."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, enable_async_checkpointing=True)
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(),
        "optimizer": ocp.PyTreeCheckpointHandler(),
        "run": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(Path(folder).absolute(), options=options, item_handlers=handlers)


def save_checkpoint(manager: ocp.CheckpointManager, state: TrainState, run: RunInfo) -> None:
    """Begin to save the state under its step number; `manager.wait_until_finished()` waits for the disk."""
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(state.params),
        optimizer=ocp.args.PyTreeSave(state.opt_state),
        run=ocp.args.JsonSave(dict(run)),
    )
    manager.save(int(state.step), args=items)


def save_params(folder: str | os.PathLike[str], params: Mapping[str, np.ndarray], run: RunInfo) -> None:
    """Write weights alone as checkpoint 0 of a new folder, for runs that start from them."""
    with open_checkpoints(folder, create=True) as manager:
        manager.save(
            0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(dict(params)), run=ocp.args.JsonSave(dict(run)))
        )


def restore_checkpoint(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Return the state saved at `step`, laid out as `like` (shapes with shardings) says, on whatever mesh that is."""
    items = ocp.args.Composite(params=_restore_as(like.params), optimizer=_restore_as(like.opt_state))
    restored = manager.restore(step, args=items)
    position = jax.device_put(np.asarray(step, np.int32), like.step.sharding)
    return TrainState(position, restored["params"], restored["optimizer"])


def restore_params(folder: str | os.PathLike[str], step: int, like: Params) -> Params:
    """Return only the weights of a checkpoint, in the dtypes and shardings of `like`."""
    with open_checkpoints(folder) as manager:
        return dict(manager.restore(step, args=ocp.args.Composite(params=_restore_as(like)))["params"])


def _restore_as(like: object) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))


def read_run_info(folder: str | os.PathLike[str], step: int | None = None) -> tuple[int, RunInfo]:
    """Return (step, its `run` JSON) of a checkpoint folder; the latest step unless one is given.

    Raises:
        UserError: there is no committed checkpoint there, or not that one.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; expected a run's checkpoints (WORKDIR/checkpoints)")
    with open_checkpoints(folder) as manager:
        steps = manager.all_steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"{folder}: no checkpoint of step {'any' if step is None else step}; there are {list(steps)}"
            )
        step = max(steps) if step is None else step
        return step, manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]


def load_params(folder: str | os.PathLike[str], step: int) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint as NumPy arrays, without a mesh and without the optimizer."""
    with open_checkpoints(folder) as manager:
        shapes = manager.item_metadata(step)["params"].tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return dict(manager.restore(step, args=ocp.args.Composite(params=args))["params"])


def saved_digest(folder: str | os.PathLike[str], step: int) -> str:
    """Return a digest that changes whenever `step` is saved anew (Orbax writes down when it saved)."""
    return hashlib.sha256((Path(folder) / str(step) / "_CHECKPOINT_METADATA").read_bytes()).hexdigest()


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
