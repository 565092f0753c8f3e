"""Where a run begins: at its own newest checkpoint, else with the weights of model.init_from, else with random ones.

`init_from` may be a run's work directory (its newest checkpoint), one of its checkpoints, or a Hugging Face folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from easylm_like.errors import UserError
from easylm_like.hf.folder import open_params, read_shape
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.train.checkpoint import (
    RUN,
    newest_step,
    read_run_info,
    restore_params,
    saved_steps,
    set_aside,
    shape_from_json,
    step_damage,
)
from easylm_like.train.config import Damaged


@dataclass(frozen=True, slots=True)
class Start:
    """Weights to begin with: `step` of the folder of checkpoints `path`, or, without a step, a Hugging Face folder."""

    path: Path
    step: int | None
    shape: LlamaConfig
    tokenizer: Path

    def params(self, like: Params) -> Params:
        """Return them in the dtypes and shardings of `like`.

        Raises:
            UserError: they are damaged, or not those of the shape.
        """
        if self.step is not None:
            return restore_params(self.path, self.step, like)
        found = open_params(self.path, self.shape)
        return {name: _place(found[name].read(), wanted) for name, wanted in like.items()}  # one is in memory


def find_start(init_from: str) -> Start:
    """Return what `init_from` names.

    Raises:
        UserError: it is none of the three, or damaged.
    """
    path = Path(init_from).absolute()  # the current folder has a name too
    if path.name.isdigit() and any((path / name).exists() for name in (RUN, "params")):
        return _checkpoint(path.parent, int(path.name), path.parent.parent / "tokenizer")
    if (path / "checkpoints").is_dir():
        return _checkpoint(path / "checkpoints", newest_step(path / "checkpoints"), path / "tokenizer")
    if (path / "config.json").is_file():
        return Start(path, None, read_shape(path), path)
    raise UserError(
        f"model.init_from {init_from}: expected a run's work directory (with checkpoints/), one of its checkpoints "
        "(WORKDIR/checkpoints/STEP) or a Hugging Face folder (with config.json)"
    )


def step_to_resume(folder: Path, last: int, damaged: Damaged, say: Callable[[str], None]) -> int | None:
    """Return the newest step whose checkpoint is whole, None if there is none.

    Every file is read and compared, unless it is that of step `last`, which nothing follows.

    Raises:
        UserError: a file is missing, cut or changed, and `damaged` does not say to go back to the one before.
    """
    for step in reversed(saved_steps(folder)):
        damage = step_damage(folder, step, RUN if step == last else "")
        if not damage:
            return step
        before = [earlier for earlier in saved_steps(folder) if earlier < step]
        if damaged == Damaged.STOP:
            back = f"go back to step {before[-1]}" if before else "begin anew"
            raise UserError(f"{'; '.join(damage)}. Copy it again, or {back} with --config.damaged=previous")
        set_aside(folder, step)
        say(f"{'; '.join(damage)}: step {step} is set aside as {folder}/{step}.damaged")
    return None


def _checkpoint(folder: Path, step: int, tokenizer: Path) -> Start:
    step, run = read_run_info(folder, step)
    return Start(folder, step, shape_from_json(run["shape"]), tokenizer)


def _place(array: np.ndarray, like: jax.Array) -> jax.Array:
    wanted = np.asarray(array, like.dtype)
    return jax.make_array_from_callback(wanted.shape, like.sharding, lambda index: wanted[index])
