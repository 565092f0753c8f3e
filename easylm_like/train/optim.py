"""What becomes of a gradient: clipping, one of four optimizers with its schedule, and weights of 32 or 16 bits.

Every optimizer uses the one learning rate of the schedule and multiplies its weight decay by it (decoupled decay, arXiv
1711.05101); norm scales and biases are never decayed. Everything is computed in float32. The optimizers that look at
matrices, Adafactor and Muon, see each layer's own, [D, N * H] for q, although the layers lie stacked in one array.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from easylm_like.errors import UserError
from easylm_like.model.llama import Params
from easylm_like.train.config import OptimConfig, Optimizer, Schedule
from easylm_like.train.rounding import keep_narrow, round_like
from easylm_like.train.spikes import skip_spikes

# The matrices of a layer, and how many axes behind the layers' are a matrix's input; the others are its output.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}

MUON_MOMENTUM = 0.95  # Nesterov's; kellerjordan.github.io/posts/muon
MUON_RMS = 0.2  # of Muon's update, as AdamW's usually is: arXiv 2502.16982, section 2.2
ADAFACTOR_CLIP = 1.0  # the largest RMS of Adafactor's update of one matrix; arXiv 1804.04235, section 6
ADAFACTOR_DECAY = 0.8  # beta2 at update t is 1 - t^-0.8; section 7.2
MOMENT_SEED = 0x9E3779B9  # of the noise that rounds moments; any number that is nobody's run seed


class FactoredState(NamedTuple):
    """Adafactor's means of squared gradients: over each matrix's columns and rows, and of what is no matrix whole."""

    steps: jax.Array
    rows: Params
    columns: Params
    whole: Params


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate: linear from 0 over warmup_steps, then to final_learning_rate at `steps`.

    WSD stays at the peak in between and goes down, linearly, over the last decay_steps.

    Raises:
        UserError: warm-up and decay do not fit into the run, or decay_steps is not for this schedule.
    """
    warmup, decay, wsd = config.warmup_steps, config.decay_steps, config.schedule == Schedule.WSD
    if not 0 <= warmup <= steps:
        raise UserError(f"optim.warmup_steps {warmup} must lie between 0 and the run's {steps} steps")
    if wsd and decay < 1:
        raise UserError(f"optim.schedule wsd needs optim.decay_steps of at least 1, got {decay}; try {steps // 5 or 1}")
    if not wsd and decay:
        raise UserError(f"optim.decay_steps {decay} is for optim.schedule wsd, got {config.schedule.value}; leave it 0")
    if warmup + decay > steps:
        raise UserError(
            f"optim.warmup_steps {warmup} and optim.decay_steps {decay} do not fit into the run's {steps} steps"
        )
    peak, final, rest = config.learning_rate, config.final_learning_rate, max(steps - warmup, 1)
    decays = {
        Schedule.CONSTANT: optax.constant_schedule(peak),
        Schedule.LINEAR: optax.linear_schedule(peak, final, rest),
        Schedule.COSINE: optax.cosine_decay_schedule(peak, rest, final / peak if peak else 0.0),
        Schedule.WSD: optax.linear_schedule(peak, final, max(decay, 1), steps - warmup - decay),
    }
    # Step 0 already learns: the warm-up's first value is peak / warmup_steps, not 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decays[config.schedule]], [warmup])


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return clip by global norm, then the config's optimizer; its moments are float32 or as `moment_dtype` says.

    With `skip_spikes` all of it is wrapped in spikes.skip_spikes.

    AdamW and Lion use beta1 and beta2 (Lion's paper: 0.9 and 0.99, a rate 3 to 10 times as small as AdamW's, and as
    much more decay). Adafactor is as the Trainer of transformers has it: factored, no momentum, no scaling by the
    weights' size, so that AdamW's rate is of the right size; it uses none of beta1, beta2 and eps. Muon is for the
    layers' matrices and gives its updates AdamW's size, so that one rate and decay serve both; all other weights get
    AdamW, and beta1, beta2 and eps are AdamW's.

    Raises:
        UserError: moment_dtype is neither float32 nor bfloat16.
    """
    make = {
        Optimizer.ADAMW: _adamw,
        Optimizer.ADAFACTOR: _adafactor,
        Optimizer.LION: _lion,
        Optimizer.MUON: _muon,
    }[config.optimizer]
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), make(config, schedule))

    def init(params: optax.Params) -> optax.OptState:
        return clipped.init(optax.tree.cast(params, jnp.float32))

    optimizer = optax.GradientTransformation(init, clipped.update)
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise UserError(f"optim.moment_dtype must be float32 or bfloat16, got {config.moment_dtype}")
    if config.moment_dtype != "float32":
        optimizer = keep_narrow(optimizer, config.moment_dtype, MOMENT_SEED)
    return skip_spikes(optimizer, config.skip_spikes) if config.skip_spikes else optimizer


def update_params(
    optimizer: optax.GradientTransformation,
    gradient: Params,
    opt_state: optax.OptState,
    params: Params,
    key: jax.Array,
    loss: jax.Array | None = None,
) -> tuple[Params, optax.OptState]:
    """Return the next weights and state; computed in float32, bfloat16 weights rounded stochastically with `key`.

    `loss` is that of the gradient; only an optimizer that skips spikes looks at it.

    Raises:
        UserError: a weight is neither float32 nor bfloat16.
    """
    wide = optax.tree.cast(params, jnp.float32)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(gradient, opt_state, wide, loss=loss)
    return round_like(optax.apply_updates(wide, updates), params, key), opt_state


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=_decayed
    )


def _lion(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=_decayed)


def _adafactor(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        _scale_by_factored_moment(),
        optax.add_decayed_weights(config.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    muon = optax.chain(
        optax.trace(MUON_MOMENTUM, nesterov=True),
        optax.stateless(_orthogonalize),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition(
        {"muon": muon, "adamw": _adamw(config, schedule)},
        lambda params: {name: "muon" if name in INPUT_AXES else "adamw" for name in params},
    )


def _decayed(params: Params) -> dict[str, bool]:
    return {name: not name.endswith(("norm", "_bias")) for name in params}


def _orthogonalize(updates: Params, _: Params | None) -> Params:
    """Return every layer's matrix with its singular values made about 1, times what gives it an RMS of MUON_RMS."""

    def each_layer(name: str, update: jax.Array) -> jax.Array:
        matrices = _blocks(name, update)
        scale = MUON_RMS * math.sqrt(max(matrices.shape[1:]))
        # One layer after the other: the iteration's temporary matrices are one layer's, not L layers'.
        return scale * jax.lax.map(_newton_schulz, matrices).reshape(update.shape)

    # Under optax.partition the weights that are not Muon's are placeholders.
    return {name: each_layer(name, u) if isinstance(u, jax.Array) else u for name, u in updates.items()}


def _newton_schulz(x: jax.Array) -> jax.Array:
    """Return about U V^T of x = U S V^T (singular values from 0.7 to 1.2); kellerjordan.github.io/posts/muon."""
    if x.shape[0] > x.shape[1]:
        return _newton_schulz(x.T).T
    x /= jnp.linalg.norm(x) + 1e-7
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def _scale_by_factored_moment() -> optax.GradientTransformation:
    """Divide gradients by the root of Adafactor's second moment, then clip each matrix's or vector's RMS.

    As transformers' Adafactor does for one layer's weight. optax.scale_by_factored_rms on our stacked weights would
    choose the two largest axes of [L, D, N, H], store q whole if H is below 128, and clip over all layers at once.
    """

    def init(params: Params) -> FactoredState:
        blocks = {name: jax.eval_shape(lambda p, name=name: _blocks(name, p), p).shape for name, p in params.items()}
        rows = {name: jnp.zeros(shape[:2]) for name, shape in blocks.items() if len(shape) == 3}
        columns = {name: jnp.zeros(shape[::2]) for name, shape in blocks.items() if len(shape) == 3}
        whole = {name: jnp.zeros(params[name].shape) for name, shape in blocks.items() if len(shape) == 2}
        return FactoredState(jnp.zeros((), jnp.int32), rows, columns, whole)

    def update(gradient: Params, state: FactoredState, _: Params | None = None) -> tuple[Params, FactoredState]:
        steps = optax.safe_increment(state.steps)
        fresh = steps.astype(jnp.float32) ** -ADAFACTOR_DECAY
        rows, columns, whole, updates = {}, {}, {}, {}
        for name, g in gradient.items():
            block = _blocks(name, g)
            square = jnp.square(block) + 1e-30
            if name in state.rows:
                rows[name] = state.rows[name] + fresh * (square.mean(2) - state.rows[name])
                columns[name] = state.columns[name] + fresh * (square.mean(1) - state.columns[name])
                share = rows[name] / rows[name].mean(1, keepdims=True)
                scaled = block * jax.lax.rsqrt(share)[:, :, None] * jax.lax.rsqrt(columns[name])[:, None, :]
            else:
                moment = state.whole[name].reshape(block.shape)
                moment += fresh * (square - moment)
                whole[name] = moment.reshape(g.shape)
                scaled = block * jax.lax.rsqrt(moment)
            rms = jnp.sqrt(jnp.square(scaled).mean(range(1, block.ndim), keepdims=True))
            updates[name] = (scaled / jnp.maximum(rms / ADAFACTOR_CLIP, 1)).reshape(g.shape)
        return updates, FactoredState(steps, rows, columns, whole)

    return optax.GradientTransformation(init, update)


def _blocks(name: str, weight: jax.Array) -> jax.Array:
    """Return [layers, input, output] of matrices and [layers, size] of vectors; what is not in layers has one."""
    if name in INPUT_AXES:
        inputs = math.prod(weight.shape[1 : 1 + INPUT_AXES[name]])
        return weight.reshape(weight.shape[0], inputs, -1)
    if name in ("embed", "head") or weight.ndim == 1:
        return weight[None]
    return weight.reshape(weight.shape[0], -1)
