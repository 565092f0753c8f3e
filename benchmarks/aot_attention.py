"""Compile a whole training step for accelerators that are not here, and say what is in it.

    export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_WORKER_HOSTNAMES=localhost
    python -m benchmarks.aot_attention --target v5e:2x2 --layers 2
    python -m benchmarks.aot_attention --target h200:1x1x8 --layers 8

The first needs `jax[tpu]`, the second `jax[cuda13]`; neither a device. Prints memory per device and every custom call
of the compiled step (in a scanned model a layer's body is there once), asserts nothing. Nothing is run: what comes out
right is another question, see benchmarks/gpu_attention.py.
"""

import argparse
import re
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from easylm_like.data.loader import Batch
from easylm_like.model.attention import choose_attention
from easylm_like.model.config import Attention, Compute, LlamaConfig, Remat
from easylm_like.model.llama import abstract_model
from easylm_like.model.partition import MeshConfig, make_mesh, partition_spec
from easylm_like.model.presets import get_preset
from easylm_like.train.config import OptimConfig
from easylm_like.train.optim import make_optimizer, make_schedule
from easylm_like.train.state import TrainState, abstract_state
from easylm_like.train.step import train_step

GIB = 2**30
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


def main() -> None:
    """Compile the step of the flags and print a line each for its time, its memory and its kernels."""
    flags = _flags()
    mesh = make_mesh(MeshConfig(tensor=flags.tensor), _topology(flags.target))
    config = _config(flags, mesh)
    print(f"{flags.target} {dict(mesh.shape)}: {config}")
    begin = time.perf_counter()
    compiled = _compile(config, mesh, flags.rows, flags.row_length)
    print(f"compiled in {time.perf_counter() - begin:.0f} s")
    _print_memory(compiled)
    for name, count in sorted(_kernels(compiled.as_text() or "").items()):
        print(f"{count:4} x {name}")


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e:2x2", help="name:shape, such as v5e:2x2, v5p:4x4x4 or h200:1x1x8")
    parser.add_argument("--model", default="llama3_8b", help="a preset")
    parser.add_argument("--layers", type=int, default=2, help="layers instead of the preset's; 0 keeps them")
    parser.add_argument("--head-dim", type=int, default=0, help="a head size instead of the preset's")
    parser.add_argument("--window", type=int, default=0, help="tokens that a query sees, 0 for all")
    parser.add_argument("--tensor", type=int, default=1, help="devices along the mesh axis tensor; fsdp has the rest")
    parser.add_argument("--rows", type=int, default=1, help="rows for each device along fsdp")
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--attention", type=Attention, default=Attention.AUTO, help=", ".join(Attention))
    parser.add_argument("--remat", type=Remat, default=Remat.ATTENTION, help=", ".join(Remat))
    parser.add_argument("--unroll", action="store_true", help="write the layers out instead of scanning them")
    parser.add_argument("--max-segments", type=int, default=16, help="records that a row may have")
    return parser.parse_args()


def _topology(target: str) -> list[jax.Device]:
    name, shape = target.split(":")
    if name == "h200":
        wanted = {"platform": "cuda", "topology_name": name, "target_config": H200, "topology": shape}
        return list(topologies.get_topology_desc(**wanted).devices)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)


def _config(flags: argparse.Namespace, mesh: Mesh) -> LlamaConfig:
    shape = get_preset(flags.model)
    config = replace(
        shape,
        n_layers=flags.layers or shape.n_layers,
        head_dim=flags.head_dim or shape.head_dim,
        sliding_window=flags.window or None,
        compute=Compute(
            dtype="bfloat16", remat=flags.remat, scan_layers=not flags.unroll, max_segments=flags.max_segments
        ),
    )
    attention = choose_attention(flags.attention, config, mesh, flags.row_length)
    return replace(config, compute=replace(config.compute, attention=attention))


def _compile(config: LlamaConfig, mesh: Mesh, rows: int, row_length: int) -> jax.stages.Compiled:
    optim = OptimConfig()
    optimizer = make_optimizer(optim, make_schedule(optim, steps=1000))
    step = partial(train_step, graphdef=abstract_model(config)[0], optimizer=optimizer)
    shape = (rows * mesh.shape["replica"] * mesh.shape["fsdp"], row_length)
    place = NamedSharding(mesh, partition_spec(("batch", "length")))
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    batch = Batch(tokens=ids, targets=ids, weights=weights, segments=ids, positions=ids)  # type: ignore[arg-type]
    with jax.set_mesh(mesh):  # not `with mesh`: kernels that ask for the TPU's data would find none
        state: TrainState = abstract_state(config, optimizer, mesh)
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def _print_memory(compiled: jax.stages.Compiled) -> None:
    memory = compiled.memory_analysis()
    assert memory is not None
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs that are no arguments": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    print("GiB on each device: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items()))


def _kernels(hlo: str) -> Counter[str]:
    """Count custom calls by what they call; Pallas kernels by their own names."""
    lines = [line for line in hlo.splitlines() if "custom_call_target=" in line]
    return Counter(_name(line) for line in lines)


def _name(line: str) -> str:
    target = re.findall(r'custom_call_target="([^"]+)"', line)[0]
    return f"{target} {line.split()[0]}" if target == "tpu_custom_call" else target


if __name__ == "__main__":
    main()
