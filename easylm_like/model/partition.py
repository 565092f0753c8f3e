"""The mesh, and the one table that says which mesh axis a logical axis is spread over."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easylm_like.errors import UserError

MESH_AXES = ("replica", "fsdp", "sequence", "tensor")

# Weights are cut by fsdp along D and by tensor along heads, F and V; activations by batch and length.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "batch": ("replica", "fsdp"),
    "length": "sequence",
    "hidden": None,
}


@dataclass(slots=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis; one of them may be -1: all that are left."""

    replica: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over all devices (or the given ones).

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.replica, config.fsdp, config.sequence, config.tensor]
    wanted = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh ({wanted}): sizes must be at least 1, and one of them may be -1")
    known = math.prod(size for size in sizes if size != -1)
    number = f"a multiple of {known}" if -1 in sizes else f"exactly {known}"
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise UserError(f"mesh ({wanted}) needs {number} devices, there are {len(devices)}")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """Return the mesh axes of an array with these logical axes, by RULES."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def batch_part(mesh: Mesh, batch_size: int) -> range:
    """Return the rows of a global batch that the devices of this host hold; hosts that share rows get the same.

    Raises:
        UserError: they are not one piece of the batch.
    """
    sharding = NamedSharding(mesh, partition_spec(("batch",)))
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    pieces = {place[0].indices(batch_size)[:2] for place in places if place is not None}
    first, last = min(start for start, _ in pieces), max(stop for _, stop in pieces)
    if sum(stop - start for start, stop in pieces) != last - first:
        raise UserError(f"mesh {dict(mesh.shape)}: the devices of one host hold rows here and there; swap its axes")
    return range(first, last)


def weight_sharding(mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding:
    """Return where a weight lies.

    Raises:
        UserError: a dimension does not divide by its mesh axis; says which, and which sizes would.
    """
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES[axis]
        if isinstance(rule, str) and size % mesh.shape[rule]:
            fits = [n for n in range(1, size + 1) if size % n == 0 and n <= mesh.size]
            raise UserError(
                f"weight {name}: its {axis} axis of {size} does not divide by mesh axis {rule}={mesh.shape[rule]}; "
                f"{rule} could be {', '.join(map(str, fits))}"
            )
    return NamedSharding(mesh, partition_spec(axes))


def on_cpu() -> bool:
    """Return whether the devices of the mesh in use, which need not be here, are CPUs; without a mesh, jax's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.device_kind) == "cpu"


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Ask the compiler to lay an activation out by its logical axes; nothing to ask outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, partition_spec(axes))
