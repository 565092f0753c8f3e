"""Loss on held-out conversations, per token, by source and marker: "hh/bad" is HH's answers that are marked bad."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from easylm_like.data.conversation import Quality
from easylm_like.data.loader import Batch, Loader
from easylm_like.errors import UserError
from easylm_like.model.llama import Params
from easylm_like.train.step import to_devices

GroupLoss = Callable[[Params, Batch, np.ndarray], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean negative log-likelihood in nats over `tokens` trained tokens."""

    loss: float
    tokens: int


def group_names(loader: Loader) -> list[str]:
    """Return the names of the groups of a data set, in the order of their numbers."""
    sources = sorted(set(loader.dataset.sources))
    return [f"{source}/{quality}" for source in sources for quality in (Quality.GOOD, Quality.BAD)]


def heldout_losses(group_loss: GroupLoss, params: Params, loader: Loader, mesh: Mesh) -> dict[str, Loss]:
    """Return the loss of every group that has tokens, and "all"; `group_loss` is step.group_loss, compiled.

    Raises:
        UserError: a loss is not a number.
    """
    names = group_names(loader)
    nll, tokens = np.zeros(len(names)), np.zeros(len(names))
    for step in range(loader.steps_per_epoch):
        batch = to_devices(mesh, loader.batch(step), loader.batch_size)
        groups = to_devices(mesh, token_groups(loader, step), loader.batch_size)
        step_nll, step_tokens = group_loss(params, batch, groups)
        nll += np.asarray(step_nll, np.float64)
        tokens += np.asarray(step_tokens, np.float64)
    if wrong := [name for name, total in zip(names, nll, strict=True) if not math.isfinite(total)]:
        raise UserError(f"the held-out loss of {', '.join(wrong)} is not a number: the weights are broken")
    losses = {name: Loss(float(n / t), int(t)) for name, n, t in zip(names, nll, tokens, strict=True) if t}
    return {"all": Loss(float(nll.sum() / max(tokens.sum(), 1)), int(tokens.sum()))} | losses


def token_groups(loader: Loader, step: int) -> np.ndarray:
    """Return int32 [rows of the loader's part, T]: the group of every target token of a batch."""
    sources = {source: 2 * i for i, source in enumerate(sorted(set(loader.dataset.sources)))}
    groups = np.zeros((len(loader.part), loader.row_length), np.int32)
    for b, where, _, record in loader.places(step):
        bad = loader.dataset.bad[loader.dataset.offsets[record] + 1 : loader.dataset.offsets[record + 1]]
        groups[b, where] = sources[loader.dataset.sources[record]] + bad
    return groups
