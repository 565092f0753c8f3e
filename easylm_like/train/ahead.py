"""Compile the training step for devices that are not here: does it compile, how much memory, what is sent around.

    mesh = make_mesh(MeshConfig(tensor=2), target_devices("v5e:2x2"))
    compiled = compile_step(config, OptimConfig(), mesh, batch_size=2, row_length=2048)
    compiled.memory_analysis(), compiled.as_text()

Needs the library that compiles for the target and no device: libtpu for a TPU (the extra `tpu`), jax's CUDA plugin for
NVIDIA (the extra `cuda`). Nothing is run.
"""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from easylm_like.data.loader import Batch
from easylm_like.errors import UserError
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import abstract_model
from easylm_like.model.partition import partition_spec
from easylm_like.train.config import OptimConfig
from easylm_like.train.optim import make_optimizer, make_schedule
from easylm_like.train.state import abstract_state
from easylm_like.train.step import train_step

# What XLA asks of a GPU that is not there: NVIDIA's data sheet of the H200 and Hopper's limits (CUDA C++ guide, 9.0).
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 150754820096
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"
"""
GPUS = {"h200": H200}
# libtpu looks for a TPU when it is loaded; these say that there is none, and that others may load it beside us.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def target_devices(target: str) -> list[jax.Device]:
    """Return the devices of a target NAME:SHAPE: a TPU slice (v5e:2x2, v5p:4x4x4) or h200:NODESxHOSTSxGPUS (1x1x8).

    They can be put into a mesh and compiled for, and hold nothing.

    Raises:
        UserError: the target is not known, or the library that compiles for it is not installed.
    """
    name, _, shape = target.partition(":")
    wanted: dict[str, Any] = {"platform": "tpu", "topology_name": target}
    if name in GPUS:
        wanted = {"platform": "cuda", "topology_name": name, "target_config": GPUS[name], "topology": shape}
    else:
        for key, value in NO_TPU.items():
            os.environ.setdefault(key, value)
    try:
        return list(topologies.get_topology_desc(**wanted).devices)
    except (RuntimeError, ValueError, KeyError) as error:  # each plugin has its own
        extra = "cuda" if name in GPUS else "tpu"
        raise UserError(
            f"cannot compile for {target}: {error}; a target is a TPU slice such as v5e:2x2 or one of "
            f"{', '.join(GPUS)} such as h200:1x1x8, and needs the extra [{extra}]"
        ) from error


def compile_step(
    config: LlamaConfig, optim: OptimConfig, mesh: Mesh, batch_size: int, row_length: int, micro_batches: int = 1
) -> jax.stages.Compiled:
    """Return the step that training runs on `mesh`: (state, batch) -> (state, metrics), the old state given away.

    `batch_size` counts rows over all devices; `config.compute.attention` is resolved, see `choose_attention`.
    """
    optimizer = make_optimizer(optim, make_schedule(optim, steps=1000))  # of the steps only a constant depends on it
    step = partial(
        train_step,
        graphdef=abstract_model(config)[0],
        optimizer=optimizer,
        micro_batches=micro_batches,
        z_loss=optim.z_loss,
    )
    with jax.set_mesh(mesh):  # not `with mesh`: kernels that ask for the TPU's data would find none
        state = abstract_state(config, optimizer, mesh)
        batch = _abstract_batch(mesh, batch_size, row_length)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch).compile()


def _abstract_batch(mesh: Mesh, batch_size: int, row_length: int) -> Batch:
    place = NamedSharding(mesh, partition_spec(("batch", "length")))
    ids: Any = jax.ShapeDtypeStruct((batch_size, row_length), jnp.int32, sharding=place)
    weights: Any = jax.ShapeDtypeStruct((batch_size, row_length), jnp.float32, sharding=place)
    return Batch(tokens=ids, targets=ids, weights=weights, segments=ids, positions=ids)
