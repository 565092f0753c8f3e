"""This project as a contestant of benchmarks/train.py: what train/loop.py does, without data, log and checkpoints.

python -m benchmarks.train_ours CASE [weights]
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.train_case import BETA1, BETA2, CLIP_NORM, EPS, MIB, Case, Contestant, load_case, process_mib, run
from easylm_like.data.loader import Batch
from easylm_like.hf.keys import as_stacks, to_theirs
from easylm_like.model.attention import choose_attention
from easylm_like.model.config import Attention, Compute, LlamaConfig, Remat
from easylm_like.model.llama import abstract_model, init_params
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.config import OptimConfig, Optimizer, Schedule
from easylm_like.train.optim import make_optimizer, make_schedule
from easylm_like.train.state import TrainState, init_state
from easylm_like.train.step import Metrics, to_devices, train_step

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

SEED = 0


def main() -> None:
    """Run the case of the command line, or write its first weights."""
    case = load_case(sys.argv[1])
    if sys.argv[2:] == ["weights"]:
        write_weights(case)
    else:
        run(case, contestant)


def write_weights(case: Case) -> None:
    """Write the weights that `contestant` begins with as CASE's model.safetensors."""
    from safetensors.numpy import save_file

    params = {name: np.asarray(w) for name, w in init_params(case.shape, jax.random.key(SEED)).items()}
    arrays = {name: tensor.read() for name, tensor in to_theirs(as_stacks(params), case.shape).items()}
    save_file(arrays, case.folder / "model.safetensors")


def contestant(case: Case) -> Contestant:
    """Return the trainer's own step on the trainer's own state."""
    device = jax.local_devices()[0]
    imported = process_mib()
    mesh, state, compiled = start(case, computed(case, max_segments=1))

    def step(ids_BT: np.ndarray) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = compiled(state, to_devices(mesh, batch_of(ids_BT), len(ids_BT)))
        return float(metrics["loss"])

    if device.platform == "cpu":
        return Contestant(step=step, imported_mib=imported)
    peak = partial(_device_peak, device)
    return Contestant(step=step, imported_mib=imported, device=device.device_kind, device_mib=peak)


def computed(case: Case, max_segments: int) -> LlamaConfig:
    """Return the case's shape with its switches."""
    options = case.options
    compute = Compute(
        dtype=case.dtype,
        param_dtype=options["param_dtype"],
        scan_layers=options["scan"] == "True",
        remat=Remat(options["remat"]),
        max_segments=max_segments,
    )
    shape = dataclasses.replace(case.shape, compute=compute)
    attention = choose_attention(Attention(options["attention"]), shape, make_mesh(MeshConfig()), case.length)
    return dataclasses.replace(shape, compute=dataclasses.replace(compute, attention=attention))


def start(case: Case, shape: LlamaConfig) -> tuple[Mesh, TrainState, Step]:
    """Return the mesh over all devices, the state before step 0 and the step, to be compiled when it is first taken."""
    mesh = make_mesh(MeshConfig())
    config = OptimConfig(
        optimizer=Optimizer(case.options["optimizer"]),
        learning_rate=case.learning_rate,
        schedule=Schedule.CONSTANT,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        clip_norm=CLIP_NORM,
        moment_dtype=case.options["moment_dtype"],
    )
    optimizer = make_optimizer(config, make_schedule(config, case.steps))
    step = partial(
        train_step,
        graphdef=abstract_model(shape)[0],
        optimizer=optimizer,
        micro_batches=int(case.options["micro_batches"]),
    )
    with jax.set_mesh(mesh):
        state = init_state(shape, optimizer, mesh, SEED)
    return mesh, state, jax.jit(step, donate_argnums=0)


def batch_of(ids_BT: np.ndarray) -> Batch:
    """Return rows of one record each; the last token of a row predicts nothing."""
    B, T = ids_BT.shape
    weights = np.ones((B, T), np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    return Batch(ids_BT, np.roll(ids_BT, -1, axis=1), weights, np.ones((B, T), np.int32), positions)


def _device_peak(device: jax.Device) -> float:
    return float((device.memory_stats() or {})["peak_bytes_in_use"]) / MIB


if __name__ == "__main__":
    main()
