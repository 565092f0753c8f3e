"""The learning rate at the corners of a run, and every optimizer against torch or transformers, layer by layer."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule
from transformers.optimization import Adafactor

from easylm_like.errors import UserError
from easylm_like.model.llama import Params
from easylm_like.train.config import OptimConfig, Optimizer, Schedule
from easylm_like.train.optim import make_optimizer, make_schedule, update_params


def rates(config: OptimConfig, steps: int) -> list[float]:
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_the_first_step_learns_and_the_warm_up_ends_at_the_peak() -> None:
    got = rates(OptimConfig(learning_rate=0.8, warmup_steps=4, schedule=Schedule.CONSTANT), 10)
    assert got == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 8)


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("schedule", Schedule)
def test_without_a_warm_up_the_first_step_has_the_peak(schedule: Schedule, warmup: int) -> None:
    decay = 4 if schedule is Schedule.WSD else 0
    config = OptimConfig(learning_rate=0.8, warmup_steps=warmup, schedule=schedule, decay_steps=decay)
    assert rates(config, 10)[0] == pytest.approx(0.8)


def test_linear_and_cosine_go_from_the_peak_to_the_final_rate() -> None:
    config = OptimConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=2, schedule=Schedule.LINEAR)
    assert rates(config, 10)[1:] == pytest.approx([1.0, *(1.0 - 0.1 * i for i in range(9))])
    config.schedule = Schedule.COSINE
    assert rates(config, 10)[2:] == pytest.approx([0.6 + 0.4 * math.cos(math.pi * i / 8) for i in range(9)])


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        (Schedule.LINEAR, get_linear_schedule_with_warmup),
        (Schedule.COSINE, get_cosine_schedule_with_warmup),
        (Schedule.WSD, partial(get_wsd_schedule, num_decay_steps=4, decay_type="linear")),
    ],
)
def test_the_rates_are_those_of_transformers_but_for_its_idle_first_step(
    schedule: Schedule, published: Callable[..., LRScheduler]
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, theirs = published(optimizer, num_warmup_steps=3, num_training_steps=12), []
    for _ in range(12):
        theirs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert theirs[0] == 0.0
    decay = 4 if schedule is Schedule.WSD else 0
    ours = rates(OptimConfig(learning_rate=0.5, warmup_steps=3, schedule=schedule, decay_steps=decay), 12)
    assert ours[:3] == pytest.approx(theirs[1:4])
    assert ours[3:12] == pytest.approx(theirs[3:])


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_must_fit_the_run(warmup: int) -> None:
    with pytest.raises(UserError, match=rf"warmup_steps {warmup} must lie between 0 and the run's 10 steps"):
        make_schedule(OptimConfig(warmup_steps=warmup), 10)


def test_a_warm_up_may_be_the_whole_run() -> None:
    assert rates(OptimConfig(learning_rate=1.0, warmup_steps=4), 4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_wsd_ends_at_the_final_rate() -> None:
    config = OptimConfig(
        learning_rate=1.0, final_learning_rate=0.2, warmup_steps=2, decay_steps=4, schedule=Schedule.WSD
    )
    assert rates(config, 10) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "sentence"),
    [
        (Schedule.WSD, 0, 0, r"wsd needs optim.decay_steps of at least 1, got 0; try 2"),
        (Schedule.WSD, 7, 4, r"warmup_steps 7 and optim.decay_steps 4 do not fit into the run's 10 steps"),
        (Schedule.COSINE, 0, 4, r"decay_steps 4 is for optim.schedule wsd, got cosine; leave it 0"),
    ],
)
def test_decay_steps_are_for_wsd_and_must_fit(schedule: Schedule, warmup: int, decay: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_schedule(OptimConfig(schedule=schedule, warmup_steps=warmup, decay_steps=decay), 10)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_a_rate_of_zero_changes_nothing(optimizer: Optimizer) -> None:
    config = OptimConfig(optimizer=optimizer, learning_rate=0.0, weight_decay=0.5)
    made = make_optimizer(config, make_schedule(config, 5))
    weights = {"attention_norm": jnp.ones(3), "gate": jnp.ones((1, 2, 3))}
    updates, _ = jax.jit(made.update)(weights, made.init(weights), weights)
    for update in updates.values():
        np.testing.assert_array_equal(update, np.zeros(update.shape))


# The weights of three layers, and each layer's as transformers has it; 3 heads of 4 are not the width, 8.
L, D, N, K, H, F = 3, 8, 3, 1, 4, 10
SHAPES = {
    "embed": (16, D), "attention_norm": (L, D), "q": (L, D, N, H), "k": (L, D, K, H), "o": (L, N, H, D),
    "q_bias": (L, N, H), "q_norm": (L, H), "gate": (L, D, F), "down": (L, F, D), "final_norm": (D,), "head": (16, D),
}  # fmt: skip
MATRICES = {"q": (D, N * H), "k": (D, K * H), "o": (N * H, D), "gate": (D, F), "down": (F, D)}
RATES = (0.02, 0.01, 0.03)


def draw(seed: int) -> Params:
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(0, 0.3, shape), jnp.float32) for name, shape in SHAPES.items()}


def layer_by_layer(weights: Params) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    whole = {name: arrays.pop(name) for name in ("embed", "final_norm", "head")}
    return whole | {
        f"{name}.{i}": array[i].reshape(MATRICES.get(name, -1)) for name, array in arrays.items() for i in range(L)
    }


def train(config: OptimConfig, weights: Params, gradients: list[Params]) -> Params:
    optimizer = make_optimizer(config, lambda step: jnp.asarray(RATES)[step])
    step = jax.jit(partial(update_params, optimizer))
    state = jax.jit(optimizer.init)(weights)
    for gradient in gradients:
        weights, state = step(gradient, state, weights, jax.random.key(0))
    return weights


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                m = self.state[weight].setdefault("m", torch.zeros_like(weight))
                c = 0.8 * m + 0.2 * weight.grad
                weight.data -= group["lr"] * (c.sign() + group["weight_decay"] * weight.data)
                self.state[weight]["m"] = 0.95 * m + 0.05 * weight.grad


def published(optimizer: Optimizer, weights: dict[str, torch.Tensor]) -> list[torch.optim.Optimizer]:
    """Return torch's, transformers' or the paper's optimizer of these weights, with decay 0.3 but not for vectors."""
    plain = [weight for name, weight in weights.items() if "norm" in name or "bias" in name]
    matrices = [weight for name, weight in weights.items() if name.split(".")[0] in MATRICES]
    tables = [weights["embed"], weights["head"]]
    groups = [{"params": matrices + tables, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}]
    if optimizer is Optimizer.LION:
        return [Lion(groups, {})]
    if optimizer is Optimizer.ADAFACTOR:
        return [Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)]
    if optimizer is Optimizer.MUON:
        groups[0]["params"] = tables
    theirs: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)]
    if optimizer is Optimizer.MUON:
        theirs += [torch.optim.Muon(matrices, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")]
    return theirs


@pytest.mark.parametrize("optimizer", Optimizer)
def test_three_updates_are_the_published_optimizers_on_each_layer_alone(
    optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon would round its matrices
    weights, gradients = draw(0), [draw(seed) for seed in (1, 2, 3)]
    # The layers' gradients differ in size, as a model's do; what looks at several layers at once would see it.
    gradients = [
        {name: g * jnp.asarray([1.0, 0.1, 3.0]).reshape(-1, *[1] * (g.ndim - 1)) if g.shape[0] == L else g
         for name, g in gradient.items()} for gradient in gradients
    ]  # fmt: skip
    config = OptimConfig(optimizer=optimizer, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3, clip_norm=2.0)
    ours = layer_by_layer(train(config, weights, gradients))
    wanted = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in layer_by_layer(weights).items()}
    theirs = published(optimizer, wanted)
    for rate, gradient in zip(RATES, gradients, strict=True):
        for name, array in layer_by_layer(gradient).items():
            wanted[name].grad = torch.tensor(array)
        assert torch.nn.utils.clip_grad_norm_(wanted.values(), 2.0) > 2.0
        for their in theirs:
            for group in their.param_groups:
                group["lr"] = rate
            their.step()
    assert ours.keys() == wanted.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, wanted[name].detach().numpy(), atol=3e-5, err_msg=name)


def test_muon_orthogonalises_each_layers_matrix_with_its_heads_side_by_side() -> None:
    config = OptimConfig(optimizer=Optimizer.MUON, clip_norm=1e9)
    weights, gradient = draw(0), draw(1)
    new = layer_by_layer(train(config, weights, [gradient]))
    old = layer_by_layer(weights)
    for name, (rows, columns) in MATRICES.items():
        for i in range(L):
            update = (old[f"{name}.{i}"] - new[f"{name}.{i}"]) / RATES[0]
            values = np.linalg.svd(update, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
            assert 0.6 < values.min() <= values.max() < 1.3, (name, i, values)
    louder = gradient | {name: gradient[name].at[1].multiply(1000) for name in MATRICES}
    again = layer_by_layer(train(config, weights, [louder]))
    for name in MATRICES:
        np.testing.assert_allclose(again[f"{name}.0"], new[f"{name}.0"], atol=1e-6)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", Optimizer)
def test_moments_have_their_dtype_whatever_the_weights_have(optimizer: Optimizer, moments: str) -> None:
    made = make_optimizer(OptimConfig(optimizer=optimizer, moment_dtype=moments), optax.constant_schedule(0.1))
    gradient = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in SHAPES.items()}
    before = jax.eval_shape(made.init, weights)
    for leaf in jax.tree.leaves(before):
        assert leaf.dtype == (moments if leaf.ndim else jnp.int32)
    after = jax.eval_shape(partial(update_params, made), gradient, before, weights, jax.random.key(0))
    assert after == (weights, before)


def test_adafactor_keeps_rows_and_columns_of_every_matrix() -> None:
    made = make_optimizer(OptimConfig(optimizer=Optimizer.ADAFACTOR), optax.constant_schedule(0.1))
    state = jax.eval_shape(made.init, draw(0))
    matrices = [L * (rows + columns) for rows, columns in MATRICES.values()] + 2 * [16 + D]
    vectors = [L * D, L * N * H, L * H, D]
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == sum(matrices) + sum(vectors)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UserError, match="moment_dtype must be float32 or bfloat16, got float16"):
        make_optimizer(OptimConfig(moment_dtype="float16"), optax.constant_schedule(0.1))
    halves = {"gate": jnp.ones((1, 2, 2), jnp.float16)}
    with pytest.raises(UserError, match="not in float16"):
        update_params(optax.sgd(1.0), halves, optax.sgd(1.0).init(halves), halves, jax.random.key(0))


def test_float32_weights_get_the_update_and_no_noise() -> None:
    plain = optax.sgd(0.5)
    weights, gradient = draw(0), draw(1)
    step = jax.jit(partial(update_params, plain))
    got, _ = step(gradient, plain.init(weights), weights, jax.random.key(0))
    for name in weights:
        np.testing.assert_array_equal(got[name], weights[name] - 0.5 * gradient[name])


def test_bfloat16_weights_learn_at_a_rate_that_nearest_rounding_loses() -> None:
    """AdamW from 1 towards 0.9 at 1e-4 a step: a twentieth of what nearest rounding would keep."""
    config = OptimConfig(learning_rate=1e-4, schedule=Schedule.CONSTANT)
    optimizer = make_optimizer(config, make_schedule(config, 1000))

    def step(
        nearest: bool, state: tuple[Params, optax.OptState], key: jax.Array
    ) -> tuple[tuple[Params, optax.OptState], None]:
        params, opt_state = state
        wide = optax.tree.cast(params, jnp.float32)
        gradient = {"gate": wide["gate"] - 0.9}
        new, opt_state = update_params(optimizer, gradient, opt_state, wide if nearest else params, key)
        return (optax.tree.cast(new, params["gate"].dtype), opt_state), None

    def end(dtype: str, nearest: bool) -> float:
        weights = {"gate": jnp.ones((1, 16, 16), dtype)}
        start, keys = (weights, optimizer.init(weights)), jax.random.split(jax.random.key(0), 800)
        (weights, _), _ = jax.jit(partial(jax.lax.scan, partial(step, nearest)))(start, keys)
        return float(weights["gate"].astype(jnp.float32).mean())

    wanted = end("float32", nearest=False)
    assert wanted < 0.94
    assert end("bfloat16", nearest=False) == pytest.approx(wanted, abs=0.003)
    assert end("bfloat16", nearest=True) == 1.0


def test_a_restored_state_goes_on_as_the_unbroken_one() -> None:
    optimizer = make_optimizer(OptimConfig(moment_dtype="bfloat16", learning_rate=0.1), optax.constant_schedule(0.1))
    step = jax.jit(partial(update_params, optimizer))
    weights = optax.tree.cast(draw(0), jnp.bfloat16)
    saved = step(draw(1), jax.jit(optimizer.init)(weights), weights, jax.random.key(1))
    restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, saved))
    unbroken, again = (step(draw(2), state, weights, jax.random.key(2)) for weights, state in (saved, restored))
    jax.tree.map(np.testing.assert_array_equal, unbroken, again)
    later = step(draw(1), saved[1], weights, jax.random.key(1))[1]
    assert int(later.steps) == 2
