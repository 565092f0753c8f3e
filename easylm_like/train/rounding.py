"""Stochastic rounding: how weights and moments are kept in bfloat16 without losing small updates.

bfloat16 has 8 bits of precision, so rounding to nearest throws away every change below 2^-9 of a value. A weight moves
less than that per step at usual learning rates, and a second moment with beta2 0.999 always does. Rounded up or down at
random, with the odds that make the mean exact, they move as they would in float32 on average (arXiv 1502.02551).
"""

import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from easylm_like.errors import UserError

Tree = TypeVar("Tree")


class NarrowState(NamedTuple):
    """The state of `keep_narrow`: `inner` is the optimizer's own, its moments in fewer bits; `steps` counts updates."""

    steps: jax.Array
    inner: optax.OptState


def round_stochastically(x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Return float32 `x` in `dtype`: float32 as it is, bfloat16 rounded up or down with the mean `x`.

    Random bits are added below bfloat16's last one, and what is below is cut off: a value that bfloat16 has stays, and
    so do infinities and NaN; what lies beyond the largest finite bfloat16 becomes that one. The result depends on the
    key and the shape, not on where the array lies.

    Raises:
        UserError: another dtype.
    """
    if dtype == jnp.float32:
        return x
    if dtype != jnp.bfloat16:
        raise UserError(f"weights and moments can be kept in float32 or bfloat16, not in {jnp.dtype(dtype).name}")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    finite_above = (bits & 0x7FFF0000) < 0x7F7F0000  # else the next bfloat16 is infinity, or this is infinity or NaN
    bits += jnp.where(finite_above, random_bits(key, x.shape) >> 16, 0)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)


def round_like(tree: Tree, like: Tree, key: jax.Array) -> Tree:
    """Return `tree` with each leaf in the dtype of `like`'s, rounded with a key of its own; equal dtypes: untouched."""
    leaves, structure = jax.tree.flatten(tree)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    rounded = [
        leaf if leaf.dtype == dtype else round_stochastically(leaf, dtype, jax.random.fold_in(key, index))
        for index, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def keep_narrow(optimizer: optax.GradientTransformation, dtype: str, seed: int) -> optax.GradientTransformation:
    """Return `optimizer` with its float32 arrays kept in `dtype` between updates; it computes in float32 as before.

    Counts and scalars stay what they are. The noise derives from `seed` and the number of updates.
    """

    def narrow(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if leaf.dtype == jnp.float32 and leaf.ndim else leaf

    def init(params: optax.Params) -> NarrowState:
        return NarrowState(jnp.zeros((), jnp.int32), jax.tree.map(narrow, optimizer.init(params)))

    def update(
        updates: optax.Updates, state: NarrowState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NarrowState]:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == dtype else leaf, state.inner)
        updates, inner = optimizer.update(updates, wide, params)
        key = jax.random.fold_in(jax.random.key(seed), state.steps)
        return updates, NarrowState(optax.safe_increment(state.steps), round_like(inner, state.inner, key))

    return optax.GradientTransformation(init, update)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 of `shape`, uniform, a pure function of the key and each element's index.

    Not jax.random.bits: threefry is a loop over whole arrays on CPUs and a kernel of its own on GPUs, so its numbers
    have to lie in memory, while these are made where they are added. Each index goes twice through the finaliser
    lowbias32 (Chris Wellons, hash-prospector) with 64 bits of the key; good for rounding, not for cryptography.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    along = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
    strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    index = sum((position * jnp.uint32(stride) for position, stride in zip(along, strides, strict=True)), jnp.uint32(0))
    # The index starts anew every 2^32 elements; what a second hash adds differs then, for the first position does.
    return _mix(_mix(index ^ first) ^ (second + along[0] if along else second))


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)
    return bits ^ bits >> 16
