"""AdamW with warm-up, decay and clipping, out of optax's parts."""

import jax
import jax.numpy as jnp
import optax

from easylm_like.errors import UserError
from easylm_like.model.llama import Params
from easylm_like.train.config import OptimConfig, Schedule


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear from 0 over warmup_steps, then to final_learning_rate at `steps`.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    if not 0 <= config.warmup_steps <= steps:
        raise UserError(f"optim.warmup_steps {config.warmup_steps} must lie between 0 and the run's {steps} steps")
    peak, final, rest = config.learning_rate, config.final_learning_rate, max(steps - config.warmup_steps, 1)
    decays = {
        Schedule.CONSTANT: optax.constant_schedule(peak),
        Schedule.LINEAR: optax.linear_schedule(peak, final, rest),
        Schedule.COSINE: optax.cosine_decay_schedule(peak, rest, final / peak if peak else 0.0),
    }
    # Step 0 already learns: the warm-up's first value is peak / warmup_steps, not 0.
    warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, decays[config.schedule]], [config.warmup_steps])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return clip by global norm, then AdamW; norm scales are not decayed."""
    adamw = optax.adamw(
        schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=_decayed
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def _decayed(params: dict[str, jax.Array]) -> dict[str, bool]:
    return {name: not name.endswith("norm") for name in params}


def update_params(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    opt_state: optax.OptState,
    params: Params,
    key: jax.Array,
) -> tuple[Params, optax.OptState]:
    """Return the next weights and state; computed in fp32, weights of fewer bits rounded stochastically with `key`."""
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    updates, opt_state = optimizer.update(gradient, opt_state, wide)
    new = optax.apply_updates(wide, updates)
    return jax.tree.map(lambda n, p: n.astype(p.dtype), new, params), opt_state
