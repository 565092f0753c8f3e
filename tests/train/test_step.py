"""One update, against transformers and torch: loss, gradient, AdamW, and micro-batches that change nothing."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from easylm_like.data.loader import Batch
from easylm_like.model.config import Compute, LlamaConfig
from easylm_like.model.llama import Params, abstract_model
from easylm_like.train.config import OptimConfig, Schedule
from easylm_like.train.optim import make_optimizer, make_schedule
from easylm_like.train.state import TrainState
from easylm_like.train.step import Metrics, group_loss, train_step

from .conftest import Twin

PLAIN = optax.sgd(1.0)  # the weights before minus the weights after are the gradient itself
CONSTANT = optax.constant_schedule(1.0)


def step_from(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@partial(jax.jit, static_argnames=("shape", "micro_batches", "z_loss"))
def plain_step(
    shape: LlamaConfig, state: TrainState, batch: Batch, seed: int = 0, *, micro_batches: int = 1, z_loss: float = 0.0
) -> tuple[TrainState, Metrics]:
    graphdef, settings = abstract_model(shape)[0], {"micro_batches": micro_batches, "z_loss": z_loss}
    return train_step(state, batch, graphdef=graphdef, optimizer=PLAIN, seed=seed, **settings)


def gradient(
    shape: LlamaConfig, params: Params, batch: Batch, number: int = 0, seed: int = 0, **settings: Any
) -> tuple[dict[str, np.ndarray], Metrics]:
    """Return the gradient and the metrics of step `number`."""
    state = replace(step_from(params, PLAIN), step=jnp.int32(number))
    state, metrics = plain_step(shape, state, batch, seed, **settings)
    return {name: np.asarray(params[name] - state.params[name]) for name in params}, metrics


@pytest.fixture(scope="module")
def noisy(shape: LlamaConfig) -> LlamaConfig:
    return replace(shape, compute=Compute(dropout=0.2, forget=0.5))


def test_loss_and_gradient_of_packed_rows_are_those_of_transformers_on_each_record_alone(
    twin: Twin, shape: LlamaConfig, params: Params, batch: Batch
) -> None:
    model = twin.model(params)
    loss = twin.loss(model, batch)
    loss.backward()
    got, metrics = gradient(shape, params, batch)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    for name, array in twin.names(got).items():
        np.testing.assert_allclose(array, wanted[name], atol=2e-6, rtol=1e-4, err_msg=name)
    assert max(np.abs(array).max() for array in wanted.values()) > 0.01


def test_updates_are_those_of_torchs_adamw_with_clipping_and_undecayed_norms(
    twin: Twin, shape: LlamaConfig, params: Params, batch: Batch
) -> None:
    config = OptimConfig(
        learning_rate=0.01,
        schedule=Schedule.LINEAR,
        warmup_steps=2,
        beta2=0.9,
        eps=1e-6,
        weight_decay=0.3,
        clip_norm=0.2,
    )
    schedule = make_schedule(config, 4)
    optimizer = make_optimizer(config, schedule)
    model = twin.model(params)
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    others = [weight for name, weight in model.named_parameters() if "norm" not in name]
    theirs = torch.optim.AdamW(
        [{"params": others}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.9), eps=1e-6, weight_decay=0.3
    )
    step = partial(train_step, graphdef=abstract_model(shape)[0], optimizer=optimizer)
    ours, step = step_from(params, optimizer), jax.jit(step)
    batch = Batch(*(array[:2] for array in batch))
    for number, rate in enumerate((0.005, 0.01, 0.01, 0.005)):  # two steps of warm-up, then from the peak down to 0
        loss = twin.loss(model, batch)
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        ours, metrics = step(ours, batch)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-3)
        assert norm > 0.2
        assert int(ours.step) == number + 1
    for name, weight in twin.names(ours.params).items():
        wanted = model.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(weight, wanted, atol=1e-4, err_msg=name)


def test_micro_batches_change_nothing(noisy: LlamaConfig, params: Params, batch: Batch) -> None:
    """Nor do they change what is dropped and forgotten: noise belongs to the row."""
    trained = batch.weights.reshape(-1, 4, 32).sum((0, 2))
    assert trained.max() > 1.2 * trained.min(), "a mean of means would be the mean"
    whole, wanted = gradient(noisy, params, batch)
    parts, metrics = gradient(noisy, params, batch, micro_batches=4)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-6, err_msg=name)
    assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, wanted), rel=1e-5)


def test_noise_is_that_of_the_seed_and_the_step(
    shape: LlamaConfig, noisy: LlamaConfig, params: Params, batch: Batch
) -> None:
    def loss(shape: LlamaConfig, number: int, seed: int) -> float:
        return float(gradient(shape, params, batch, number, seed)[1]["loss"])

    draws = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    losses = [loss(noisy, *draw) for draw in draws]
    assert len({*losses, loss(shape, 0, 0)}) == 6
    assert [loss(noisy, *draw) for draw in draws] == losses
    assert loss(shape, 0, 0) == loss(shape, 1, 1)


def test_every_row_has_noise_of_its_own(noisy: LlamaConfig, params: Params, batch: Batch) -> None:
    """Eight times the same row, of which one bears loss."""
    alike = Batch(*(array[:1].repeat(8, axis=0) for array in batch))
    only = [alike._replace(weights=alike.weights * (np.arange(8) == row)[:, None]) for row in range(8)]
    losses = [float(gradient(noisy, params, one)[1]["loss"]) for one in only]
    assert len({round(loss, 4) for loss in losses}) == 8


def test_z_loss_moves_the_weights_and_is_not_shown(
    twin: Twin, shape: LlamaConfig, params: Params, batch: Batch
) -> None:
    plain, wanted = gradient(shape, params, batch)
    got, metrics = gradient(shape, params, batch, z_loss=0.05)
    assert float(metrics["loss"]) == float(wanted["loss"])
    model = twin.model(params)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits[0]))
    nll = twin.nll(model, batch)
    weights = torch.cat(  # in the order in which the twin was shown the records
        [
            torch.tensor(batch.weights[row, segments == segment])
            for row, segments in enumerate(batch.segments)
            for segment in range(1, segments.max() + 1)
        ]
    )
    squares = weights @ torch.logsumexp(torch.cat(seen), -1) ** 2
    loss = ((torch.tensor(batch.weights) * nll).sum() + 0.05 * squares) / batch.weights.sum()
    loss.backward()
    for name, array in twin.names(got).items():
        np.testing.assert_allclose(array, model.get_parameter(name).grad, atol=5e-6, rtol=1e-4, err_msg=name)
    assert np.abs(got["head"] - plain["head"]).max() > 0.01


def test_rows_beyond_the_vocabulary_are_never_moved(shape: LlamaConfig, params: Params, batch: Batch) -> None:
    small = replace(shape, vocab_size=300)
    assert small.padded_vocab == shape.padded_vocab == 384
    batch = batch._replace(tokens=np.minimum(batch.tokens, 299), targets=np.minimum(batch.targets, 299))
    other = params | {name: params[name].at[300:].set(50.0) for name in ("embed", "head")}
    for weights in (params, other):
        got, metrics = gradient(small, weights, batch)
        assert not got["head"][300:].any()
        assert not got["embed"][300:].any()
        assert got["head"][:300].any(axis=1).all()
    assert float(metrics["loss"]) == float(gradient(small, params, batch)[1]["loss"])


def test_metrics_count_trained_and_real_tokens(shape: LlamaConfig, params: Params, batch: Batch) -> None:
    got, metrics = gradient(shape, params, batch)
    assert float(metrics["trained_tokens"]) == batch.weights.sum()
    assert float(metrics["tokens"]) == (batch.segments > 0).sum()
    norm = np.sqrt(sum(np.sum(array.astype(np.float64) ** 2) for array in got.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_a_batch_without_trained_tokens_changes_nothing(shape: LlamaConfig, params: Params, batch: Batch) -> None:
    got, metrics = gradient(shape, params, batch._replace(weights=np.zeros_like(batch.weights)))
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), float(metrics["trained_tokens"])) == (0, 0, 0)
    assert not any(array.any() for array in got.values())


def test_bfloat16_weights_stay_bfloat16_and_compute_nearly_the_same(
    shape: LlamaConfig, params: Params, batch: Batch
) -> None:
    _, wanted = gradient(shape, params, batch)
    halves = {name: weight.astype(jnp.bfloat16) for name, weight in params.items()}
    small = replace(shape, compute=Compute(dtype="bfloat16"))
    state, metrics = plain_step(small, step_from(halves, PLAIN), batch, 0, micro_batches=2)
    assert {str(weight.dtype) for weight in state.params.values()} == {"bfloat16"}
    assert metrics["loss"].dtype == jnp.float32
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), rel=0.01)


def test_group_loss_sums_every_group_apart_and_without_noise(
    twin: Twin, noisy: LlamaConfig, params: Params, batch: Batch
) -> None:
    groups = np.random.default_rng(2).integers(0, 3, batch.tokens.shape, np.int32)
    losses = jax.jit(partial(group_loss, graphdef=abstract_model(noisy)[0], n_groups=4))
    nll, weights = losses(params, batch, groups)
    with torch.no_grad():
        weighted = twin.nll(twin.model(params), batch).numpy() * batch.weights
    for group in range(4):
        assert float(nll[group]) == pytest.approx(weighted[groups == group].sum(), rel=1e-4)
        assert float(weights[group]) == batch.weights[groups == group].sum()
