"""The LLaMA family in Flax NNX: RMSNorm, RoPE, grouped-query attention, SwiGLU (arXiv 2302.13971).

Layers are stacked on axis L. A model is split once into (graphdef, params); params is a flat dict of some dozen arrays,
and every step is a plain jax.jit over it:

    graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
    x_BTD, _ = nnx.merge(graphdef, nnx.to_pure_dict(params))(tokens_BT, places)

Letters: B batch, T length, S cache length, D model, F feed-forward, N query heads, K key/value heads, H head size,
V vocabulary (padded, see LlamaConfig.padded_vocab), L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from easylm_like.model.attention import Places, attend
from easylm_like.model.config import Attention, LlamaConfig, Remat
from easylm_like.model.partition import constrain, weight_sharding
from easylm_like.model.rope import rope_angles, rotate

Params = dict[str, jax.Array]
GraphDef = nnx.GraphDef["Llama"]
KeysValues = tuple[jax.Array, jax.Array]
LayerInput = tuple[Params, KeysValues | None, jax.Array]  # weights, cache, number of one layer
Layer = Callable[[jax.Array, LayerInput], tuple[jax.Array, KeysValues | None]]

SAVED = {  # by remat policy, the names given to results here and in attention*.py; see config.Remat
    Remat.MATMULS: ("qkv", "attention", "attention_out", "mlp_in"),
    Remat.ATTENTION: ("attention",),
    Remat.INPUTS: (),
}


@partial(jax.tree_util.register_dataclass, data_fields=["k_LBSKH", "v_LBSKH", "places", "used"], meta_fields=[])
@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of decoding; `places` [B, S] twice says whose slot it is (segment 0 = empty), `used` how many."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    places: Places
    used: jax.Array


def empty_cache(config: LlamaConfig, batch: int, slots: int) -> Cache:
    """Return a cache without entries for `batch` sequences of at most `slots` tokens."""
    shape = (config.n_layers, batch, slots, config.n_kv_heads, config.head_dim)
    zeros = jnp.zeros((batch, slots), jnp.int32)
    dtype = config.compute.dtype
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), (zeros, zeros), jnp.zeros((), jnp.int32))


class Llama(nnx.Module):
    """The weights, each declared once with shape (from its logical axes), initial spread and dtype; and the forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        config.check()
        self.config = config
        weight = partial(_weight, config, rngs)
        D, F, narrow = config.d_model, config.d_ff, (2 * config.n_layers) ** -0.5
        self.embed = weight("vocab", "embed", stddev=D**-0.5)
        self.attention_norm = weight("layers", "embed")
        self.q = weight("layers", "embed", "heads", "head", stddev=D**-0.5)
        self.k = weight("layers", "embed", "kv_heads", "head", stddev=D**-0.5)
        self.v = weight("layers", "embed", "kv_heads", "head", stddev=D**-0.5)
        self.o = weight("layers", "heads", "head", "embed", stddev=D**-0.5 * narrow)
        if config.qkv_bias:
            self.q_bias = weight("layers", "heads", "head", stddev=0.0)
            self.k_bias = weight("layers", "kv_heads", "head", stddev=0.0)
            self.v_bias = weight("layers", "kv_heads", "head", stddev=0.0)
        if config.qk_norm:
            self.q_norm = weight("layers", "head")
            self.k_norm = weight("layers", "head")
        self.mlp_norm = weight("layers", "embed")
        self.gate = weight("layers", "embed", "mlp", stddev=D**-0.5)
        self.up = weight("layers", "embed", "mlp", stddev=D**-0.5)
        self.down = weight("layers", "mlp", "embed", stddev=F**-0.5 * narrow)
        self.final_norm = weight("embed")
        self.head = None if config.tie_embeddings else weight("vocab", "embed", stddev=D**-0.5)

    def __call__(
        self,
        tokens_BT: jax.Array,
        places: Places,
        cache: Cache | None = None,
        *,
        noise_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Return (x [B, T, D] after the last norm, the cache with these T tokens added).

        `places` are (segments, positions) of the tokens, int32 [B, T] each, as in the Batch contract. With a cache the
        tokens take its next T slots; the caller sees to it that they fit. `noise_B` has a PRNG key for every row, for
        dropout and forgetful masking; without it there is neither.
        """
        config = self.config
        seen = places
        if cache is not None:
            seen = _write(cache.places[0], places[0], cache.used), _write(cache.places[1], places[1], cache.used)
        elif noise_B is not None and config.compute.forget:
            seen = _forget(config, places, noise_B), places[1]
        noise = _Noise(config.compute.dropout, noise_B)
        angles_BTh = rope_angles(config, places[1])
        layer: Layer = partial(_layer, config, angles_BTh, (places, seen), None if cache is None else cache.used, noise)
        if config.compute.remat != Remat.ALL:
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED[config.compute.remat])
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=not config.compute.scan_layers)
        x_BTD = noise.drop(self.embed[...][tokens_BT].astype(config.compute.dtype), 0)
        x_BTD = constrain(x_BTD, "batch", "length", "hidden")
        old = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
        x_BTD, new = _over_layers(layer, x_BTD, (self._stacked(), old, jnp.arange(config.n_layers)), config)
        x_BTD = rms_norm(x_BTD, self.final_norm[...], config.norm_eps)
        if cache is None or new is None:
            return x_BTD, None
        return x_BTD, Cache(*new, seen, cache.used + tokens_BT.shape[1])

    def head_VD(self) -> jax.Array:
        """Return the output matrix [V, D]: the embedding again if the model ties them."""
        return (self.embed if self.head is None else self.head)[...]

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return fp32 logits [B, T, vocab_size], without those of the padded vocabulary."""
        head_VD = self.head_VD()[: self.config.vocab_size].astype(x_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)

    def _stacked(self) -> Params:
        whole = ("embed", "final_norm", "head")
        return {name: weight[...] for name, weight in vars(self).items() if _is_weight(weight) and name not in whole}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in fp32 (arXiv 1910.07467); returns the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def apply_layer(config: LlamaConfig, weights: Params, x_BTD: jax.Array, places: Places) -> jax.Array:
    """Return the stream [B, T, D] after one layer; its `weights` have no L axis. For models larger than the memory."""
    layer = partial(_layer, config, rope_angles(config, places[1]), (places, places), None, _Noise(0.0, None))
    return layer(x_BTD, (weights, None, jnp.zeros((), jnp.int32)))[0]


def abstract_model(config: LlamaConfig) -> tuple[GraphDef, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str, ...]]]:
    """Return (graphdef, shapes and dtypes, logical axes) of a model that takes no memory."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    axes = {str(path[0]): variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(state)}
    return graphdef, nnx.to_pure_dict(state), axes


def param_shardings(config: LlamaConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Return where each weight lies on `mesh`; a UserError names a weight that does not divide."""
    _, shapes, axes = abstract_model(config)
    return {name: weight_sharding(mesh, name, shapes[name].shape, axes[name]) for name in shapes}


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Return random weights; pure, so that the caller can jit it straight into shardings."""
    return nnx.to_pure_dict(nnx.split(Llama(config, rngs=nnx.Rngs(key)))[1])


def _weight(config: LlamaConfig, rngs: nnx.Rngs, *axes: str, stddev: float | None = None) -> nnx.Param[jax.Array]:
    """Declare one weight: normal with `stddev`, or ones (the scale of a norm)."""
    shape, dtype = [config.sizes()[axis] for axis in axes], config.compute.param_dtype
    if stddev is None:
        return nnx.Param(jnp.ones(shape, dtype), axes=axes)
    return nnx.Param((stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype), axes=axes)


def _is_weight(value: object) -> bool:
    return isinstance(value, nnx.Param)


def _over_layers(
    layer: Layer, x_BTD: jax.Array, stacked: LayerInput, config: LlamaConfig
) -> tuple[jax.Array, KeysValues | None]:
    """Apply `layer` L times: one compiled body (scan), or written out, which compiles longer and runs faster."""
    if config.compute.scan_layers:
        return jax.lax.scan(layer, x_BTD, stacked)
    outputs = []
    # Split once: the gradient of split is one concatenation, that of L slices is L arrays of the stack's whole size.
    leaves, tree = jax.tree.flatten(stacked)
    parts = [jax.lax.split(leaf, [1] * config.n_layers) for leaf in leaves]
    for i in range(config.n_layers):
        x_BTD, output = layer(x_BTD, jax.tree.unflatten(tree, [part[i][0] for part in parts]))
        outputs.append(output)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _layer(
    config: LlamaConfig,
    angles_BTh: jax.Array,
    places: tuple[Places, Places],
    used: jax.Array | None,
    noise: "_Noise",
    x_BTD: jax.Array,
    inputs: LayerInput,
) -> tuple[jax.Array, KeysValues | None]:
    """One decoder layer in scan's form: (x, its weights, cache, number) -> (x, its new cache)."""
    weights, cache, number = inputs  # the scales of norms are used as they are, the rest in the compute dtype
    w = {name: weight.astype(config.compute.dtype) for name, weight in weights.items()}
    h_BTD = rms_norm(x_BTD, weights["attention_norm"], config.norm_eps)
    q_BTNH, k_BSKH, v_BSKH = _queries_keys_values(config, weights, h_BTD, angles_BTh)
    backend = config.compute.attention
    if cache is not None and used is not None:
        k_BSKH, v_BSKH = cache = _write(cache[0], k_BSKH, used), _write(cache[1], v_BSKH, used)
        backend = Attention.XLA
    a_BTNH = attend(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        places,
        window=config.sliding_window,
        backend=backend,
        max_segments=config.compute.max_segments,
    )
    a_BTD = jnp.einsum("BTNH,NHD->BTD", a_BTNH, w["o"])
    x_BTD = x_BTD + noise.drop(checkpoint_name(a_BTD, "attention_out"), 2 * number + 1)
    x_BTD = constrain(x_BTD, "batch", "length", "hidden")
    h_BTD = rms_norm(x_BTD, weights["mlp_norm"], config.norm_eps)
    gate_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", h_BTD, w["gate"]), "mlp_in")
    up_BTF = checkpoint_name(jnp.einsum("BTD,DF->BTF", h_BTD, w["up"]), "mlp_in")
    x_BTD = x_BTD + noise.drop(jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, w["down"]), 2 * number + 2)
    return constrain(x_BTD, "batch", "length", "hidden"), cache


def _queries_keys_values(
    config: LlamaConfig, weights: Params, h_BTD: jax.Array, angles_BTh: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q [B, T, N, H], k and v [B, T, K, H]: projected, with Qwen2's bias and Qwen3's norm, q and k turned."""
    w = {name: weight.astype(h_BTD.dtype) for name, weight in weights.items()}
    q_BTNH = checkpoint_name(jnp.einsum("BTD,DNH->BTNH", h_BTD, w["q"]), "qkv")
    k_BTKH = checkpoint_name(jnp.einsum("BTD,DKH->BTKH", h_BTD, w["k"]), "qkv")
    v_BTKH = checkpoint_name(jnp.einsum("BTD,DKH->BTKH", h_BTD, w["v"]), "qkv")
    if config.qkv_bias:
        q_BTNH, k_BTKH, v_BTKH = q_BTNH + w["q_bias"], k_BTKH + w["k_bias"], v_BTKH + w["v_bias"]
    if config.qk_norm:
        q_BTNH = rms_norm(q_BTNH, weights["q_norm"], config.norm_eps)
        k_BTKH = rms_norm(k_BTKH, weights["k_norm"], config.norm_eps)
    return rotate(q_BTNH, angles_BTh), rotate(k_BTKH, angles_BTh), v_BTKH


@dataclass(frozen=True, slots=True)
class _Noise:
    """Dropout (arXiv 1207.0580) of [B, T, D] at numbered places, drawn for every row from the row's own key."""

    rate: float
    keys_B: jax.Array | None

    def drop(self, x_BTD: jax.Array, place: int | jax.Array) -> jax.Array:
        if self.keys_B is None or not self.rate:
            return x_BTD
        keys_B = jax.vmap(partial(jax.random.fold_in, data=place))(self.keys_B)
        kept_BTD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x_BTD.shape[1:]))(keys_B)
        return jnp.where(kept_BTD, x_BTD / (1 - self.rate), 0).astype(x_BTD.dtype)


def _forget(config: LlamaConfig, places: Places, keys_B: jax.Array) -> jax.Array:
    """Return the segments of the keys, -1 where a token is hidden from all queries.

    Each row draws its rate from 0 to `forget` and hides that share of its tokens in every layer alike, as EasyLM does.
    A record's first token is never hidden, nor one in every sliding window: each query must see something.
    """
    segments_BT, positions_BT = places
    kept_BT = positions_BT % (config.sliding_window or config.max_length) == 0

    def hidden(key: jax.Array) -> jax.Array:
        rate_key, token_key = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
        rate = jax.random.uniform(rate_key, maxval=config.compute.forget)
        return jax.random.bernoulli(token_key, rate, segments_BT.shape[1:])

    return jnp.where(jax.vmap(hidden)(keys_B) & ~kept_BT, -1, segments_BT)


def _write(slots: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Return `slots` [B, S, ...] with `new` [B, T, ...] in the T slots from `at` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new, at, axis=1)
