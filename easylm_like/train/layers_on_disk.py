"""params/ of a checkpoint, read and written a layer at a time, without a mesh: for conversions.

Orbax stores each weight as a zarr array, cut into chunks, in one OCDBT key-value store (orbax.readthedocs.io,
"Checkpoint format"). Checkpoints of this library have chunks of at most one layer, so that a layer is read alone.
"""

import logging
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from easylm_like.hf.keys import Stack, Stacks
from easylm_like.hf.tensors import THREADS

CHUNK_BYTES = 1 << 20  # layers of less stay together: a thousand tiny chunks help nobody
CACHE_BYTES = 8 << 30  # for chunks of several layers, of ours only small ones: kept until the other layers are read


def save_args(shapes: Mapping[str, tuple[tuple[int, ...], int]]) -> dict[str, ocp.SaveArgs]:
    """Return how Orbax is to cut weights, of each given (the shape of one device's part, bytes an element)."""
    found = {}
    for name, (shape, itemsize) in shapes.items():
        layer = prod(shape[1:]) * itemsize
        cut = len(shape) > 2 and layer >= CHUNK_BYTES
        found[name] = ocp.SaveArgs(chunk_byte_size=layer, shard_axes=(0,)) if cut else ocp.SaveArgs()
    return found


def open_layers(folder: Path, stacked: Mapping[str, bool]) -> dict[str, Stack]:
    """Return the weights of `folder` (STEP/params), none of them read yet; `stacked` says which have an L axis."""
    kept = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    arrays = {name: _open(folder, name) for name in stacked}
    for name, array in arrays.items():
        if stacked[name] and _layers_in_chunk(array) > 1:
            arrays[name] = _open(folder, name, kept)
    return {
        name: Stack(tuple(array.shape), array.dtype.numpy_dtype, stacked[name], partial(_read, array, stacked[name]))
        for name, array in arrays.items()
    }


def write_layers(folder: Path, stacks: Stacks) -> None:
    """Write weights as Orbax does, with the memory of a few layers."""
    quiet_orbax()
    # Orbax writes the structure, with arrays of one number; tensorstore puts the real ones in their place.
    tiny = {name: np.zeros((1,) * len(stack.shape), stack.dtype) for name, stack in stacks.items()}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(folder, args=ocp.args.PyTreeSave(tiny))
    for name, stack in stacks.items():
        layer = prod(stack.shape[1:]) * stack.dtype.itemsize
        cut = stack.stacked and layer >= CHUNK_BYTES
        array = _create(folder, name, stack, chunk=(1, *stack.shape[1:]) if cut else stack.shape)
        if cut:
            _fill(array, stack)
        else:
            array.write(stack.read()).result()


def quiet_orbax() -> None:
    """Keep Orbax from showing the traceback of an error that it also raises, and Python those of other writes."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_orbax)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname + logging.Formatter().format(record)


def _fill(array: tensorstore.TensorStore, stack: Stack) -> None:
    """Write a stack layer by layer, a few of them at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(lambda layer: array[layer].write(stack.read_layer(layer)).result(), range(stack.shape[0])):
            pass


def _read(array: tensorstore.TensorStore, stacked: bool, layer: int) -> np.ndarray:
    return np.asarray((array[layer] if stacked else array).read().result())


def _open(folder: Path, name: str, context: tensorstore.Context | None = None) -> tensorstore.TensorStore:
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}", "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, context=context).result()


def _create(folder: Path, name: str, stack: Stack, chunk: tuple[int, ...]) -> tensorstore.TensorStore:
    old = _open(folder, name).spec().to_json()
    # Weights are random digits: compressing them saves a quarter of bfloat16, and takes longer than all the rest.
    metadata = old["metadata"] | {"shape": stack.shape, "chunks": chunk, "compressor": None}
    spec = {"driver": "zarr", "kvstore": old["kvstore"], "metadata": metadata}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def _layers_in_chunk(array: tensorstore.TensorStore) -> int:
    shape = array.chunk_layout.read_chunk.shape
    return int(shape[0] or 1) if shape else 1
