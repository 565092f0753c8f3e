"""The loss of a token is torch's cross entropy, at any scale of the logits and in any dtype of the activations."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easylm_like.train.loss import token_nll


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nll_is_torchs_cross_entropy(scale: float) -> None:
    random = np.random.default_rng(0)
    x_BTD = (scale * random.normal(size=(2, 5, 8))).astype(np.float32)
    head_VD, targets_BT = random.normal(size=(11, 8)).astype(np.float32), random.integers(0, 11, (2, 5))
    logits = torch.tensor(x_BTD, dtype=torch.float64) @ torch.tensor(head_VD, dtype=torch.float64).T
    want = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 11), torch.tensor(targets_BT).flatten(), reduction="none"
    )
    got = token_nll(jnp.asarray(x_BTD), jnp.asarray(head_VD), jnp.asarray(targets_BT), jnp.ones((2, 5)), 11)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-5, atol=1e-5 * scale)


def test_bfloat16_activations_lose_nothing_in_the_softmax() -> None:
    random = np.random.default_rng(1)
    x_BTD = jnp.asarray(random.normal(size=(1, 7, 16)), jnp.bfloat16)
    head_VD = jnp.asarray(random.normal(size=(300, 16)), jnp.bfloat16).astype(jnp.float32)
    targets_BT = jnp.asarray(random.integers(0, 300, (1, 7)))
    exact = token_nll(x_BTD.astype(jnp.float32), head_VD, targets_BT, jnp.ones((1, 7)), 300)
    np.testing.assert_allclose(token_nll(x_BTD, head_VD, targets_BT, jnp.ones((1, 7)), 300), exact, rtol=1e-5)
