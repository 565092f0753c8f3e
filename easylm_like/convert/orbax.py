"""Checkpoints of this library as a Source: a run's work directory, or one of its checkpoints."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from easylm_like.convert.source import Hints, Source
from easylm_like.data.template import get_template
from easylm_like.data.tokenizer import load_tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.keys import Stacks, to_theirs
from easylm_like.model.config import LlamaConfig
from easylm_like.model.llama import Params, apply_layer, rms_norm
from easylm_like.train.checkpoint import open_params, read_run_info, saved_digest, shape_from_json

HEAD_ROWS = 16384  # of the vocabulary in fp32 at once


def open_orbax(run: Path, hints: Hints) -> Source:
    """Return the newest checkpoint of a work directory, or the one of `hints.step`.

    Raises:
        UserError: it is missing or damaged, or the tokenizer beside it is not the one that trained it.
    """
    step, info = read_run_info(run / "checkpoints", hints.step)
    config = shape_from_json(info["shape"])
    stacks = open_params(run / "checkpoints", step)
    tokenizer = load_tokenizer(hints.tokenizer or run / "tokenizer")
    if tokenizer.digest != info["tokenizer"] and hints.tokenizer is None:
        raise UserError(f"{run}/tokenizer is not the one that trained this checkpoint; put that one back")
    origin = {"path": str(run), "step": step, "digest": saved_digest(run / "checkpoints", step), "run": info}
    return Source(
        path=run,
        format="checkpoint",
        config=config,
        tensors=to_theirs(stacks, config),
        logits=partial(own_logits, config, stacks),
        tokenizer=tokenizer,
        template=get_template(hints.template or str(info["template"])),
        origin=origin,
    )


def own_logits(config: LlamaConfig, stacks: Stacks, ids: np.ndarray) -> np.ndarray:
    """Return fp32 logits [..., T, V] of `ids` [..., T], by this library's model with one layer in memory at a time."""
    ids_BT = ids.reshape(-1, ids.shape[-1])
    places = jnp.ones(ids_BT.shape, jnp.int32), jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids_BT.shape)
    with jax.default_matmul_precision("highest"):  # accelerators round the factors of fp32 products otherwise
        x_BTD = jnp.asarray(stacks["embed"].read()[ids_BT].astype(np.float32))
        for layer in range(config.n_layers):
            weights = {
                name: jnp.asarray(stack.read_layer(layer).astype(np.float32))
                for name, stack in stacks.items()
                if stack.stacked
            }
            x_BTD = _layer(config, weights, x_BTD, places)
        final_norm = jnp.asarray(stacks["final_norm"].read().astype(np.float32))
        x_BTD = rms_norm(x_BTD, final_norm, config.norm_eps)
        head = stacks["embed" if config.tie_embeddings else "head"].read()[: config.vocab_size]
        rows = range(0, config.vocab_size, HEAD_ROWS)
        parts = [x_BTD @ jnp.asarray(head[row : row + HEAD_ROWS].astype(np.float32)).T for row in rows]
        return np.concatenate([np.asarray(part) for part in parts], axis=-1).reshape(*ids.shape, -1)


@partial(jax.jit, static_argnums=0)
def _layer(config: LlamaConfig, weights: Params, x_BTD: jax.Array, places: tuple[jax.Array, jax.Array]) -> jax.Array:
    return apply_layer(config, weights, x_BTD, places)
