"""Loss and gradients are those of torch's cross entropy, at the price that train/loss.py promises, on any mesh."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train import loss
from easylm_like.train.loss import LossTerms, token_nll, weighted_loss

VOCAB, V, D, CHUNK = 11, 16, 8, 4  # words and rows of the head: five rows are padding


@dataclass(frozen=True)
class Case:
    """Arguments of the loss, and what torch makes of them in float64."""

    x_BTD: np.ndarray
    head_VD: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    terms: LossTerms

    def total(self, x_BTD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weighted_loss(x_BTD, head_VD, jnp.array(self.targets_BT), jnp.array(self.weights_BT), self.terms)

    def ours(self, scale: float = 1.0) -> tuple[np.ndarray, ...]:
        """Return loss, nll, d(scale * loss)/dx and d(scale * loss)/dhead, compiled."""

        def scaled(x_BTD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            summed, nll = self.total(x_BTD, head_VD)
            return scale * summed, (summed, nll)

        grad = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True))
        (dx_BTD, dhead_VD), sums = grad(self.x_BTD, self.head_VD)
        assert (dx_BTD.dtype, dhead_VD.dtype) == (self.x_BTD.dtype, self.head_VD.dtype)
        return tuple(np.asarray(array, np.float32) for array in (*sums, dx_BTD, dhead_VD))

    def torchs(self) -> tuple[np.ndarray, ...]:
        x, head = (torch.tensor(a.astype(np.float64), requires_grad=True) for a in (self.x_BTD, self.head_VD))
        logits = (x @ head[: self.terms.vocab_size].T).flatten(0, 1)
        targets, weights = torch.tensor(self.targets_BT).flatten().long(), torch.tensor(self.weights_BT).flatten()
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        summed = (weights * (nll + self.terms.z_loss * torch.logsumexp(logits, -1) ** 2)).sum()
        summed.backward()
        return tuple(a.detach().numpy() for a in (summed, (weights * nll).sum(), x.grad, head.grad))


def drawn(
    shape: tuple[int, int], *, trained: float = 0.6, scale: float = 1.0, z_loss: float = 0.0, dtype: str = "float32"
) -> Case:
    """Return a case whose loss-bearing tokens, about `trained` of all, weigh between 0.5 and 2."""
    random = np.random.default_rng(shape)
    weights_BT = random.uniform(0.5, 2, shape) * (random.random(shape) < trained)
    return Case(
        np.array(jnp.asarray(scale * random.normal(size=(*shape, D)), dtype)),
        random.normal(size=(V, D)).astype(np.float32),
        random.integers(0, VOCAB, shape, np.int32),
        weights_BT.astype(np.float32),
        LossTerms(vocab_size=VOCAB, z_loss=z_loss),
    )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", CHUNK)


def assert_close(got: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...], rtol: float) -> None:
    """Compare each array with a tolerance relative to the largest number in it."""
    for name, ours, other in zip(("loss", "nll", "dx", "dhead"), got, wanted, strict=True):
        np.testing.assert_allclose(ours, other, rtol=rtol, atol=rtol * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(drawn((2, 7)), id="three chunks, the last not full"),
        pytest.param(drawn((3, 7), z_loss=0.1), id="z-loss"),
        pytest.param(drawn((2, 8), trained=1.0, z_loss=0.1), id="every token, whole chunks"),
        pytest.param(drawn((1, 3), trained=1.0), id="fewer tokens than a chunk"),
        pytest.param(drawn((2, 9), trained=0.1), id="one trained token"),
        pytest.param(drawn((2, 10), scale=100.0), id="large logits"),
    ],
)
def test_loss_and_gradients_are_those_of_torch(case: Case) -> None:
    count = np.count_nonzero(case.weights_BT)
    assert count > 0
    got = case.ours()
    assert_close(got, case.torchs(), 1e-5)
    assert not got[2][case.weights_BT == 0].any(), "a masked token has a gradient"
    assert not got[3][VOCAB:].any(), "a row of padding has a gradient"


def test_gradients_of_a_multiple_are_the_multiple_of_the_gradients() -> None:
    case = drawn((2, 7), z_loss=0.1)
    loss, nll, dx, dhead = case.torchs()
    assert_close(case.ours(scale=3.0), (loss, nll, 3 * dx, 3 * dhead), 1e-5)


def test_nothing_to_learn_is_nothing() -> None:
    assert not any(array.any() for array in drawn((2, 7), trained=0.0, z_loss=0.1).ours())


def test_padding_rows_are_never_seen_however_large_their_logits() -> None:
    case = drawn((2, 7), z_loss=0.1)
    wanted = case.ours()
    case.head_VD[VOCAB:] = 1e4
    for got, before in zip(case.ours(), wanted, strict=True):
        np.testing.assert_array_equal(got, before)


def test_what_stands_at_masked_tokens_reaches_nothing() -> None:
    """NaN there: 0 * NaN would show wherever a masked token takes part at all."""
    case = drawn((2, 9), z_loss=0.1)
    masked = case.weights_BT == 0
    assert np.count_nonzero(~masked) % CHUNK, "the last chunk is full: nothing could slip into it"
    wanted = case.ours()
    case.x_BTD[masked] = np.nan
    case.targets_BT[masked] = -1
    for got, before in zip(case.ours(), wanted, strict=True):
        np.testing.assert_array_equal(got, before)


def test_bfloat16_activations_lose_nothing_in_the_softmax() -> None:
    case = drawn((2, 7), z_loss=0.01, dtype="bfloat16")
    halves = np.asarray(case.head_VD.astype(jnp.bfloat16), np.float32)  # what the matmul sees
    case.head_VD[:] = halves
    got, wanted = case.ours(), case.torchs()
    np.testing.assert_allclose(got[:2], wanted[:2], rtol=1e-5)
    assert_close(got, wanted, 0.01)  # a gradient is rounded to 8 bits


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nll_is_torchs_cross_entropy_and_0_at_masked_tokens(scale: float) -> None:
    case = drawn((2, 7), scale=scale)
    logits = torch.tensor(case.x_BTD, dtype=torch.float64) @ torch.tensor(case.head_VD[:VOCAB].T, dtype=torch.float64)
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(case.targets_BT).flatten().long(), reduction="none"
    )
    got = jax.jit(token_nll, static_argnums=4)(case.x_BTD, case.head_VD, case.targets_BT, case.weights_BT, VOCAB)
    assert got.dtype == jnp.float32
    wanted_BT = np.where(case.weights_BT == 0, 0, wanted.reshape(2, 7))
    np.testing.assert_allclose(got, wanted_BT, rtol=1e-5, atol=1e-5 * scale)


# The price.


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda value: isinstance(value, Jaxpr | ClosedJaxpr)):
            if isinstance(leaf, Jaxpr | ClosedJaxpr):
                yield from equations(leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf)


def matmuls(jaxpr: Jaxpr) -> int:
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


def test_logits_are_made_for_a_chunk_at_a_time_and_the_backward_pass_has_no_matmul() -> None:
    case, n = drawn((4, 16)), 64

    def total(x_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
        return case.total(x_BTD, head_VD)[0]

    forward = jax.make_jaxpr(total)(case.x_BTD, case.head_VD).jaxpr
    both = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(case.x_BTD, case.head_VD).jaxpr
    _, pull = jax.vjp(jax.jit(total), case.x_BTD, case.head_VD)
    backward = jax.make_jaxpr(pull)(jnp.float32(1)).jaxpr
    # The logits; with their gradients dx and dhead: as many as the plain loss takes.
    assert [matmuls(jaxpr) for jaxpr in (forward, both, backward)] == [1, 3, 0]
    largest = max(getattr(v.aval, "size", 0) for equation in equations(both) for v in equation.outvars)
    assert largest == n * D, "nothing is larger than x"
    assert largest < n * V


def test_a_chunk_is_computed_only_where_there_is_something_to_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, whole = [], loss._chunk

    def counted(*args: object) -> tuple[jax.Array, jax.Array, jax.Array]:
        jax.debug.callback(lambda: computed.append(1))
        return whole(*args)

    monkeypatch.setattr(loss, "_chunk", counted)
    for tokens, trained in [((4, 16), 0.3), ((4, 17), 1.0)]:
        computed.clear()
        case = drawn(tokens, trained=trained)
        case.ours()
        jax.effects_barrier()
        assert len(computed) == -(-np.count_nonzero(case.weights_BT) // CHUNK)


# Meshes.

MESHES = {
    "fsdp-8": (MeshConfig(fsdp=8), VOCAB),
    "fsdp-4-tensor-2": (MeshConfig(fsdp=4, tensor=2), V),
    "replica-2-fsdp-2-tensor-2": (MeshConfig(replica=2, fsdp=2, tensor=2), VOCAB),
    "fsdp-4-sequence-2": (MeshConfig(fsdp=4, sequence=2), VOCAB),
    "sequence-2-tensor-4, one device all padding": (MeshConfig(fsdp=1, sequence=2, tensor=4), 12),
}


@pytest.fixture(scope="module")
def uneven() -> Case:
    """Return 8 rows of 6: all of row 0, none of rows 1 and 2, and the first half of the others bear loss."""
    case = drawn((8, 6), trained=1.0, z_loss=0.1)
    case.weights_BT[1:3] = 0
    case.weights_BT[3:, 3:] = 0
    return case


@pytest.mark.parametrize(("mesh", "vocab_size"), MESHES.values(), ids=MESHES)
def test_every_mesh_computes_what_torch_computes(uneven: Case, mesh: MeshConfig, vocab_size: int) -> None:
    case = replace(uneven, terms=LossTerms(vocab_size=vocab_size, z_loss=0.1))
    with jax.set_mesh(make_mesh(mesh)):
        got = case.ours()
    assert_close(got, case.torchs(), 2e-6)
    assert not got[2][case.weights_BT == 0].any()
    assert not got[3][vocab_size:].any()
