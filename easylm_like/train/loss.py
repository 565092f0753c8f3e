"""Next-token loss, as sums: what is divided by what is decided once, over the global batch.

Logits are made for a chunk of tokens at a time, never as a whole, and only where there is something to learn: tokens
of weight 0 get none at all. The gradients of x and of the head are computed together with the loss, while a chunk's
logits are there, so that the backward pass has no matmul left and chunking costs none (the idea of Liger Kernel's
fused linear cross entropy, arXiv 2410.10989).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from easylm_like.model.partition import on_cpu, partition_spec

Residuals = tuple[jax.Array, jax.Array]  # gradients of x and of the head

# Tokens whose logits exist at a time, as two fp32 arrays [C, V]. Every chunk reads and writes the head's fp32 gradient
# once, which at 8B would take half as long as the matmuls with 256 tokens; a CPU has not the memory to spare.
CHUNK = 256
CHUNK_ON_ACCELERATOR = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """nll = -log p(target) over the first `vocab_size` logits, and `z_loss` * logsumexp^2 (PaLM, arXiv 2204.02311)."""

    vocab_size: int
    z_loss: float = 0.0


def weighted_loss(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, terms: LossTerms
) -> tuple[jax.Array, jax.Array]:
    """Return fp32 scalars: sum(weights * (nll + z-loss)), to be differentiated, and sum(weights * nll), to be shown."""
    loss, nll = _loss(terms, x_BTD, head_VD, targets_BT, weights_BT)
    return loss, jax.lax.stop_gradient(nll)


def token_nll(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, vocab_size: int
) -> jax.Array:
    """Return -log p(target) as fp32 [B, T], 0 where the weight is 0; not to be differentiated."""
    terms = LossTerms(vocab_size=vocab_size)
    return _over_mesh(terms, x_BTD, head_VD, targets_BT, weights_BT, gradients=False)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(
    terms: LossTerms, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    nll_BT, z_BT = _over_mesh(terms, x_BTD, head_VD, targets_BT, weights_BT, gradients=False)
    return _sums(terms, nll_BT, z_BT, weights_BT)


def _loss_forward(
    terms: LossTerms, x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    nll_BT, z_BT, dx_BTD, dhead_VD = _over_mesh(terms, x_BTD, head_VD, targets_BT, weights_BT, gradients=True)
    return _sums(terms, nll_BT, z_BT, weights_BT), (dx_BTD, dhead_VD.astype(head_VD.dtype))


def _loss_backward(
    terms: LossTerms, residuals: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BTD, dhead_VD = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in residuals)
    return dx_BTD, dhead_VD, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _sums(terms: LossTerms, nll_BT: jax.Array, z_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    nll = jnp.sum(weights_BT * nll_BT)
    return nll + terms.z_loss * jnp.sum(weights_BT * z_BT) if terms.z_loss else nll, nll


def _over_mesh(
    terms: LossTerms,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    gradients: bool,
) -> tuple[jax.Array, ...]:
    """Run `_on_device` where the tokens lie: every device picks its own loss-bearing ones, in its own number of chunks.

    The head is gathered over fsdp once, in the dtype of x, and its gradient goes back the same way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _on_device(terms, x_BTD, head_VD, targets_BT, weights_BT, gradients=gradients, vocab_axis=None)

    def run(
        x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
    ) -> tuple[jax.Array, ...]:
        head_VD = jax.lax.all_gather(head_VD.astype(x_BTD.dtype), "fsdp", axis=1, tiled=True)
        nll_BT, z_BT, *rest = _on_device(
            terms, x_BTD, head_VD, targets_BT, weights_BT, gradients=gradients, vocab_axis="tensor"
        )
        if not rest:
            return nll_BT, z_BT
        dhead_VD = jax.lax.psum(rest[1], ("replica", "sequence"))
        return nll_BT, z_BT, rest[0], jax.lax.psum_scatter(dhead_VD, "fsdp", scatter_dimension=1, tiled=True)

    rows, x, head = (
        partition_spec(axes) for axes in (("batch", "length"), ("batch", "length", "hidden"), ("vocab", "embed"))
    )
    out = (rows, rows, x, head) if gradients else (rows, rows)
    # check_vma=False: the collectives are written out above, and what they give is the same on the devices of an axis.
    sharded = jax.shard_map(run, in_specs=(x, head, rows, rows), out_specs=out, check_vma=False)
    return sharded(x_BTD, head_VD, targets_BT, weights_BT)


def _on_device(
    terms: LossTerms,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    gradients: bool,
    vocab_axis: str | None,
) -> tuple[jax.Array, ...]:
    """Return nll and logsumexp^2, fp32 [B, T], and with `gradients` d(sum)/dx in its dtype and d(sum)/dhead in fp32.

    `head_VD` is this device's part of the vocabulary along `vocab_axis`.
    """
    B, T, D = x_BTD.shape
    n = B * T
    size = min(CHUNK if on_cpu() else CHUNK_ON_ACCELERATOR, n)
    x_nD, targets_n, weights_n = x_BTD.reshape(n, D), targets_BT.reshape(n), weights_BT.reshape(n)
    # Loss-bearing tokens first; places n.. are nobody's: gathers there give 0 and scatters nothing.
    count = jnp.sum(weights_n != 0)
    order = jnp.pad(jnp.argsort(weights_n == 0, stable=True), (0, -n % size))
    at = jnp.arange(order.size)
    order = jnp.where(at < count, order, n + at)
    chunks = -(-count // size)
    head_VD = head_VD.astype(x_BTD.dtype)

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        x_CD, weights_C = (
            x_nD.at[places].get(mode="fill", fill_value=0),
            weights_n.at[places].get(mode="fill", fill_value=0),
        )
        targets_C = targets_n.at[places].get(mode="fill", fill_value=0)
        nll_C, z_C, dlogits_CV = _chunk(terms, x_CD, head_VD, targets_C, weights_C, vocab_axis)
        put = partial(_put, places)
        if not gradients:
            return put(carry[0], nll_C), put(carry[1], z_C)
        dlogits_CV = dlogits_CV.astype(x_CD.dtype)
        dx_CD = jnp.einsum("CV,VD->CD", dlogits_CV, head_VD, preferred_element_type=jnp.float32)
        dx_CD = _over_vocab(jax.lax.psum, dx_CD, vocab_axis)
        dhead_VD = jnp.einsum("CV,CD->VD", dlogits_CV, x_CD, preferred_element_type=jnp.float32)
        return put(carry[0], nll_C), put(carry[1], z_C), put(carry[2], dx_CD), carry[3] + dhead_VD

    zeros_n = jnp.zeros(n, jnp.float32)
    start: tuple[jax.Array, ...] = (zeros_n, zeros_n)
    if gradients:
        start += (jnp.zeros((n, D), x_BTD.dtype), jnp.zeros(head_VD.shape, jnp.float32))
    nll_n, z_n, *rest = jax.lax.fori_loop(0, chunks, body, start)
    if rest:
        rest[0] = rest[0].reshape(B, T, D)
    return nll_n.reshape(B, T), z_n.reshape(B, T), *rest


def _chunk(
    terms: LossTerms,
    x_CD: jax.Array,
    head_VD: jax.Array,
    targets_C: jax.Array,
    weights_C: jax.Array,
    vocab_axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return nll and logsumexp^2, fp32 [C], and the gradient of the weighted sum, fp32 [C, V], of C tokens."""
    V = head_VD.shape[0]
    first = 0 if vocab_axis is None else V * jax.lax.axis_index(vocab_axis)
    ids_V = first + jnp.arange(V)
    logits_CV = jnp.einsum("CD,VD->CV", x_CD, head_VD, preferred_element_type=jnp.float32)
    if terms.vocab_size < V * (1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)):  # the last rows are padding
        logits_CV = jnp.where(ids_V < terms.vocab_size, logits_CV, -jnp.inf)
    most_C = _over_vocab(jax.lax.pmax, jnp.max(logits_CV, axis=-1), vocab_axis)
    total_C = _over_vocab(jax.lax.psum, jnp.sum(jnp.exp(logits_CV - most_C[:, None]), axis=-1), vocab_axis)
    lse_C = most_C + jnp.log(total_C)
    hit_CV = ids_V == targets_C[:, None]
    target_C = _over_vocab(jax.lax.psum, jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1), vocab_axis)
    slope_C = weights_C * (1 + 2 * terms.z_loss * lse_C)
    dlogits_CV = slope_C[:, None] * jnp.exp(logits_CV - lse_C[:, None]) - jnp.where(hit_CV, weights_C[:, None], 0.0)
    return lse_C - target_C, lse_C**2, dlogits_CV


def _over_vocab(collective: Callable[[jax.Array, str], jax.Array], part: jax.Array, axis: str | None) -> jax.Array:
    return part if axis is None else collective(part, axis)


def _put(places_C: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
    return whole.at[places_C].set(part.astype(whole.dtype), mode="drop", unique_indices=True)
