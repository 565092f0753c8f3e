"""Next-token loss, as sums: what is divided by what is decided once, over the global batch."""

import jax
import jax.numpy as jnp

from easylm_like.model.llama import logits_of


def token_nll(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return -log p(target) as fp32 [B, T]; softmax and logarithm in fp32."""
    logits_BTV = logits_of(x_BTD, head_VD)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
