"""What a run is at its newest checkpoint, as digests: two runs with equal ones go on alike, bit by bit."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from easylm_like.provenance import versions
from easylm_like.train.checkpoint import load_arrays, newest_step
from easylm_like.train.config import RunConfig
from easylm_like.train.prepare import prepare

BATCHES = 100


def fingerprint(config: RunConfig, workdir: Path) -> dict[str, object]:
    """Return SHA-256 digests of the weights, the optimizer's arrays, the next step's PRNG key, and the next batches.

    Raises:
        UserError: there is no checkpoint, or config and data do not fit.
    """
    run = prepare(config, workdir)
    step = newest_step(workdir / "checkpoints")
    folder = (workdir / "checkpoints" / str(step)).absolute()
    batches = hashlib.sha256()
    for number in range(step, step + BATCHES):
        for array in run.loader.batch(number):
            batches.update(array.tobytes())
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), step))
    with (workdir / "metrics.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    return {
        "step": step,
        "params": _digests(load_arrays(folder / "params")),
        "optimizer": _digests(load_arrays(folder / "optimizer")),
        "rng": hashlib.sha256(np.asarray(key).tobytes()).hexdigest(),
        f"next {BATCHES} batches": batches.hexdigest(),
        "losses": {f"{row['kind']} {row['step']}": row.get("loss", row.get("all")) for row in rows},
        "device": run.mesh.devices.flat[0].device_kind,
        "mesh": dict(run.mesh.shape),
        "versions": versions(("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")),
    }


def _digests(arrays: object) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): hashlib.sha256(_content(leaf)).hexdigest() for path, leaf in leaves}


def _content(leaf: object) -> bytes:
    array = np.asarray(leaf)
    return f"{array.dtype} {array.shape} ".encode() + array.tobytes()
