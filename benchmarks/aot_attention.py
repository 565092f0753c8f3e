"""Compile a whole training step for accelerators that are not here, and say what is in it.

    JAX_PLATFORMS=cpu python -m benchmarks.aot_attention --target v5e:2x2 --layers 2
    JAX_PLATFORMS=cpu python -m benchmarks.aot_attention --target h200:1x1x8 --layers 8

The first needs `jax[tpu]`, the second `jax[cuda13]`; neither a device. Prints memory per device and every custom call
of the compiled step (in a scanned model a layer's body is there once), asserts nothing. Nothing is run: what comes out
right is another question, see benchmarks/gpu_attention.py.
"""

import argparse
import re
import time
from collections import Counter
from dataclasses import replace

import jax
from jax.sharding import Mesh

from easylm_like.model.attention import choose_attention
from easylm_like.model.config import Attention, Compute, LlamaConfig, Remat
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.model.presets import get_preset
from easylm_like.train.ahead import compile_step, target_devices
from easylm_like.train.config import OptimConfig

GIB = 2**30


def main() -> None:
    """Compile the step of the flags and print a line each for its time, its memory and its kernels."""
    flags = _flags()
    mesh = make_mesh(MeshConfig(tensor=flags.tensor, sequence=flags.sequence), target_devices(flags.target))
    config = _config(flags, mesh)
    print(f"{flags.target} {dict(mesh.shape)}: {config}")
    begin = time.perf_counter()
    rows = flags.rows * mesh.shape["replica"] * mesh.shape["fsdp"]
    compiled = compile_step(config, OptimConfig(), mesh, rows, flags.row_length)
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
    parser.add_argument("--sequence", type=int, default=1, help="devices that share a row")
    parser.add_argument("--rows", type=int, default=1, help="rows for each device along fsdp")
    parser.add_argument("--row-length", type=int, default=4096)
    parser.add_argument("--attention", type=Attention, default=Attention.AUTO, help=", ".join(Attention))
    parser.add_argument("--remat", type=Remat, default=Remat.ATTENTION, help=", ".join(Remat))
    parser.add_argument("--unroll", action="store_true", help="write the layers out instead of scanning them")
    parser.add_argument("--max-segments", type=int, default=16, help="records that a row may have")
    return parser.parse_args()


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
