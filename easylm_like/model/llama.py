"""LLaMA in Flax NNX: RMSNorm, RoPE, grouped-query attention, SwiGLU (arXiv 2302.13971), layers stacked on axis L.

A model is split once into (graphdef, params); params is a flat dict of a dozen arrays, and every step is a plain
jax.jit over it:

    graphdef, params = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
    x_BTD, _ = nnx.merge(graphdef, nnx.to_pure_dict(params))(tokens_BT, places)

Letters: B batch, T length, S cache length, D model, F feed-forward, N query heads, K key/value heads, H head size,
V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from easylm_like.model.attention import attend
from easylm_like.model.config import LlamaConfig, Remat
from easylm_like.model.partition import constrain, weight_sharding
from easylm_like.model.rope import rope_angles, rotate

Params = dict[str, jax.Array]
GraphDef = nnx.GraphDef["Llama"]
Places = tuple[jax.Array, jax.Array]  # (segments, positions), see attention.attend
KeysValues = tuple[jax.Array, jax.Array]
LayerInput = tuple[Params, KeysValues | None]
Layer = Callable[[jax.Array, LayerInput], tuple[jax.Array, KeysValues | None]]


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
    dtype = config.compute_dtype
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
        self.mlp_norm = weight("layers", "embed")
        self.gate = weight("layers", "embed", "mlp", stddev=D**-0.5)
        self.up = weight("layers", "embed", "mlp", stddev=D**-0.5)
        self.down = weight("layers", "mlp", "embed", stddev=F**-0.5 * narrow)
        self.final_norm = weight("embed")
        self.head = None if config.tie_embeddings else weight("vocab", "embed", stddev=D**-0.5)

    def __call__(
        self, tokens_BT: jax.Array, places: Places, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Return (x [B, T, D] after the last norm, the cache with these T tokens added).

        `places` are (segments, positions) of the tokens, int32 [B, T] each, as in the Batch contract. With a cache the
        tokens take its next T slots; the caller sees to it that they fit.
        """
        config = self.config
        seen = places
        if cache is not None:
            seen = _write(cache.places[0], places[0], cache.used), _write(cache.places[1], places[1], cache.used)
        angles_BTh = rope_angles(config, places[1])
        layer: Layer = partial(_layer, config, angles_BTh, (places, seen), None if cache is None else cache.used)
        if config.remat == Remat.FULL:
            layer = jax.checkpoint(layer)
        x_BTD = constrain(self.embed[...][tokens_BT].astype(config.compute_dtype), "batch", "length", "hidden")
        old = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
        x_BTD, new = _over_layers(layer, x_BTD, (self._stacked(), old), config)
        x_BTD = rms_norm(x_BTD, self.final_norm[...], config.norm_eps)
        if cache is None or new is None:
            return x_BTD, None
        return x_BTD, Cache(*new, seen, cache.used + tokens_BT.shape[1])

    def head_VD(self) -> jax.Array:
        """Return the output matrix [V, D]: the embedding again if the model ties them."""
        return (self.embed if self.head is None else self.head)[...]

    def _stacked(self) -> Params:
        names = ("attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
        return {name: getattr(self, name)[...] for name in names}


def logits_of(x_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Return fp32 logits [B, T, V]."""
    return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale, the mean in fp32 (arXiv 1910.07467)."""
    x32_BTD = x_BTD.astype(jnp.float32)
    normed_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD**2, axis=-1, keepdims=True) + eps)
    return (normed_BTD * scale_D.astype(jnp.float32)).astype(x_BTD.dtype)


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
    shape, dtype = [config.sizes()[axis] for axis in axes], config.param_dtype
    if stddev is None:
        return nnx.Param(jnp.ones(shape, dtype), axes=axes)
    return nnx.Param((stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype), axes=axes)


def _over_layers(
    layer: Layer, x_BTD: jax.Array, stacked: LayerInput, config: LlamaConfig
) -> tuple[jax.Array, KeysValues | None]:
    """Apply `layer` L times: one compiled body (scan), or written out, which compiles longer and runs faster."""
    if config.scan_layers:
        return jax.lax.scan(layer, x_BTD, stacked)
    outputs = []
    for i in range(config.n_layers):
        x_BTD, output = layer(x_BTD, jax.tree.map(itemgetter(i), stacked))
        outputs.append(output)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _layer(
    config: LlamaConfig,
    angles_BTh: jax.Array,
    places: tuple[Places, Places],
    used: jax.Array | None,
    x_BTD: jax.Array,
    weights_and_cache: LayerInput,
) -> tuple[jax.Array, KeysValues | None]:
    """One decoder layer in scan's form: (x, its weights and cache) -> (x, its new cache). `places`: queries', keys'."""
    weights, cache = weights_and_cache
    w = {name: weight.astype(config.compute_dtype) for name, weight in weights.items()}
    h_BTD = rms_norm(x_BTD, weights["attention_norm"], config.norm_eps)
    q_BTNH = rotate(jnp.einsum("BTD,DNH->BTNH", h_BTD, w["q"]), angles_BTh)
    k_BSKH = rotate(jnp.einsum("BTD,DKH->BTKH", h_BTD, w["k"]), angles_BTh)
    v_BSKH = jnp.einsum("BTD,DKH->BTKH", h_BTD, w["v"])
    if cache is not None and used is not None:
        k_BSKH, v_BSKH = cache = _write(cache[0], k_BSKH, used), _write(cache[1], v_BSKH, used)
    a_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, q_places=places[0], k_places=places[1])
    x_BTD = constrain(x_BTD + jnp.einsum("BTNH,NHD->BTD", a_BTNH, w["o"]), "batch", "length", "hidden")
    h_BTD = rms_norm(x_BTD, weights["mlp_norm"], config.norm_eps)
    f_BTF = jax.nn.silu(jnp.einsum("BTD,DF->BTF", h_BTD, w["gate"])) * jnp.einsum("BTD,DF->BTF", h_BTD, w["up"])
    x_BTD = constrain(x_BTD + jnp.einsum("BTF,FD->BTD", f_BTF, w["down"]), "batch", "length", "hidden")
    return x_BTD, cache


def _write(slots: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Return `slots` [B, S, ...] with `new` [B, T, ...] in the T slots from `at` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new, at, axis=1)
