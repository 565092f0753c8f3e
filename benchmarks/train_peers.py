"""The peers of benchmarks/train.py: HF transformers + torch, EasyLM and Tunix, each with its own model, loss and step.

PYTHON -m benchmarks.train_peers CASE torch|easylm|tunix

Imports nothing at the top that a peer's own interpreter might lack. EasyLM and Tunix come from a checkout, whose folder
is in the case's options.
"""

import dataclasses
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.train_case import (
    BETA1,
    BETA2,
    CLIP_NORM,
    EPS,
    MIB,
    Case,
    Contestant,
    SkippedError,
    load_case,
    process_mib,
    run,
)

SLOW_BFLOAT16 = 8  # times as slow as float32 in a matmul: not worth measuring


def main() -> None:
    """Run the case of the command line."""
    peers: dict[str, Callable[[Case], Contestant]] = {"torch": torch_peer, "easylm": easylm_peer, "tunix": tunix_peer}
    run(load_case(sys.argv[1]), peers[sys.argv[2]])


def torch_peer(case: Case) -> Contestant:
    """LlamaForCausalLM with SDPA, fused AdamW and clipping; bfloat16 through autocast, weights in --param_dtype.

    On a GPU the model is compiled. With --remat other than "all" it checkpoints its layers.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.dtype == "bfloat16" and device == "cpu" and (times := _bfloat16_slowness()) > SLOW_BFLOAT16:
        raise SkippedError(f"torch's bfloat16 matmul is {times:.0f} times as slow as its float32 one on this processor")
    model, imported = torch_model(case, device)
    wanted = case.options["torch_compile"]  # "None": where it pays
    train: Any = torch.compile(model) if wanted == "True" or (wanted == "None" and device == "cuda") else model
    optimizer = torch_optimizer(case, model)

    def step(ids_BT: np.ndarray) -> float:
        ids = torch.from_numpy(ids_BT).long().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = train(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return float(loss.item())

    if device == "cpu":
        return Contestant(step=step, imported_mib=imported)
    name = torch.cuda.get_device_name()
    return Contestant(
        step=step, imported_mib=imported, device=name, device_mib=lambda: torch.cuda.max_memory_allocated() / MIB
    )


def torch_model(case: Case, device: str) -> tuple[Any, float]:
    """Return the model on `device` and the memory before it was made; random weights are made where they will lie."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    imported = process_mib()
    dtype = torch.bfloat16 if case.options["param_dtype"] == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**_hugging_face(case)))
    model = model.to(dtype).train()
    if case.given_weights:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in _weights(case).items():
                named.pop(name).copy_(torch.from_numpy(weight))
        assert not named, f"no weights for {sorted(named)}"
    if case.options["remat"] != "all":
        model.gradient_checkpointing_enable()
    return model, imported


def torch_optimizer(case: Case, model: Any) -> Any:
    """Return AdamW over all weights; torch's fused one is its fastest."""
    import torch

    betas = (BETA1, BETA2)
    return torch.optim.AdamW(model.parameters(), case.learning_rate, betas, EPS, weight_decay=0.0, fused=True)


def easylm_peer(case: Case) -> Contestant:
    """EasyLM's module, loss and optimizer in the step of its train script; no layer is computed twice.

    Needs `pip install jax flax optax "transformers<5" einops mlxu safetensors` and one shim for a jax newer than it: an
    argument of jnp.clip has another name now. Its head is never tied: with a tied model it begins with a copy, and only
    the first loss is the same. Its RoPE turns neighbouring pairs, so queries and keys are put in that order.
    """
    sys.path.insert(0, _checkout(case, "easylm"))
    _only_plain_shapes(case, rope_theta=10_000.0)  # its attention never passes on rope_theta
    import jax
    import jax.numpy as jnp

    clip: Any = jnp.clip
    vars(jnp)["clip"] = lambda *x, a_min=None, **rest: clip(*x, **(rest if a_min is None else rest | {"min": a_min}))
    from flax.training.train_state import TrainState

    llama = importlib.import_module("EasyLM.models.llama.llama_model")
    optimizers, theirs = importlib.import_module("EasyLM.optimizers"), importlib.import_module("EasyLM.jax_utils")
    imported = process_mib()
    names = llama.LLaMAConfigurator.rng_keys()
    fields = _hugging_face(case) | {"base_model": "debug", "remat_policy": ""}
    known = llama.LLaMAConfigurator.get_default_config()
    config = llama.LLaMAConfigurator.finalize_config(
        llama.mlxu.config_dict(**{name: value for name, value in fields.items() if name in known})
    )
    dtype = theirs.get_float_dtype_by_name(case.dtype)
    model = llama.FlaxLLaMAForCausalLMModule(config, dtype=dtype, param_dtype=jnp.float32)
    optimizer, info = optimizers.OptimizerFactory.get_optimizer({"adamw_optimizer": _easylm_adamw(case)})
    state = TrainState.create(params=_easylm_weights(case), tx=optimizer, apply_fn=lambda: None)

    def train_step(state: Any, rng: Any, batch: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        generator = theirs.JaxRNG(rng)
        batch = theirs.with_sharding_constraint(batch, jax.sharding.PartitionSpec(("dp", "fsdp")))

        def loss_of(params: Any) -> Any:
            output = model.apply(params, batch["ids"], deterministic=False, rngs=generator(names))
            return theirs.cross_entropy_loss_and_accuracy(output.logits, batch["targets"], batch["masks"])

        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        state = state.apply_gradients(grads=gradient)
        metrics = {"loss": loss, "accuracy": accuracy, "rate": info["learning_rate_schedule"](state.step)}
        metrics |= {"gradient": theirs.global_norm(gradient), "params": theirs.global_norm(state.params)}
        return state, generator(), metrics

    compiled = jax.jit(train_step, donate_argnums=(0, 1))
    rng = jax.random.PRNGKey(0)
    masks = np.ones((case.batch, case.length), np.float32)
    masks[:, -1] = 0

    def step(ids_BT: np.ndarray) -> float:
        nonlocal state, rng
        batch = {"ids": ids_BT, "targets": np.roll(ids_BT, -1, axis=1), "masks": masks}
        with llama.LLaMAConfigurator.get_jax_mesh("1,-1,1"):
            state, rng, metrics = compiled(state, rng, batch)
        return float(metrics["loss"])

    return _jax_contestant(step, imported)


def tunix_peer(case: Case) -> Contestant:
    """Tunix's SFT trainer (PeftTrainer, all weights) on its Llama3, read by its own loader.

    Needs `pip install google-tunix`, or its requirements (jax without [tpu]) and a checkout. It computes in the dtype
    of its weights. Its attention does not pass on rope_theta, so the default of `apply_rope` is set to the config's.
    """
    sys.path.insert(0, _checkout(case, "tunix"))
    _only_plain_shapes(case, rope_theta=case.shape.rope_theta)
    import jax
    import jax.numpy as jnp
    import optax

    llama = importlib.import_module("tunix.models.llama3.model")
    loader, sft = importlib.import_module("tunix.models.llama3.params"), importlib.import_module("tunix.sft.utils")
    trainers = importlib.import_module("tunix.sft.peft_trainer")
    imported = process_mib()
    llama.apply_rope.__defaults__ = (case.shape.rope_theta,)
    shape = case.shape
    config = llama.ModelConfig(
        num_layers=shape.n_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.d_model,
        hidden_dim=shape.d_ff,
        num_heads=shape.n_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.n_kv_heads,
        rope_theta=int(shape.rope_theta),
        norm_eps=shape.norm_eps,
        weight_tying=shape.tie_embeddings,
    )
    model = loader.create_model_from_safe_tensors(str(case.folder), config, dtype=jnp.dtype(case.dtype))
    adamw = optax.adamw(case.learning_rate, BETA1, BETA2, EPS, weight_decay=0.0)
    trainer = trainers.PeftTrainer(
        model,
        optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw),
        trainers.TrainingConfig(eval_every_n_steps=1_000_000, max_steps=case.steps),
    )

    def model_input(rows: Any) -> dict[str, Any]:
        valid = rows.input_mask != 0
        positions, mask = sft.build_positions_from_mask(valid), sft.make_causal_attn_mask(valid)
        tokens = {"input_tokens": rows.input_tokens, "input_mask": rows.input_mask}
        return tokens | {"positions": positions, "attention_mask": mask}

    train_step, _ = trainer.with_gen_model_input_fn(model_input).jit_train_and_eval_step(cache_nnx_graph=True)

    def step(ids_BT: np.ndarray) -> float:
        rows = trainers.TrainingInput(input_tokens=jnp.asarray(ids_BT), input_mask=jnp.ones(ids_BT.shape, jnp.int32))
        loss, *_ = jax.block_until_ready(train_step(rows, is_update_step=jnp.array(True)))
        return float(loss)

    return _jax_contestant(step, imported)


def _bfloat16_slowness() -> float:
    import torch

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return seconds[1] / seconds[0]


def _checkout(case: Case, name: str) -> str:
    """Return the folder that a peer is imported from; "" is the peer's own site-packages."""
    folder = case.options[name]
    if not folder and importlib.util.find_spec(name) is None:
        raise SkippedError(f"not installed in {sys.executable}; give --{name}=DIR, a checkout")
    return folder


def _only_plain_shapes(case: Case, rope_theta: float) -> None:
    shape = case.shape
    if not case.given_weights or shape.rope_scaling or shape.rope_theta != rope_theta:
        raise SkippedError(f"its RoPE knows neither llama3's scaling nor another theta than {rope_theta:g}")


def _hugging_face(case: Case) -> dict[str, Any]:
    """Return the shape in the words of transformers' LlamaConfig."""
    shape = case.shape
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling is not None:
        scaling = dataclasses.asdict(shape.rope_scaling)
        rope = {
            "rope_type": "llama3",
            "rope_theta": shape.rope_theta,
            "factor": scaling["factor"],
            "low_freq_factor": scaling["low_frequency_factor"],
            "high_freq_factor": scaling["high_frequency_factor"],
            "original_max_position_embeddings": scaling["original_length"],
        }
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_length,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": shape.tie_embeddings,
        "use_cache": False,
    }


def _weights(case: Case) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(case.folder / "model.safetensors")


def _easylm_adamw(case: Case) -> dict[str, float]:
    """Return the settings of a constant rate: the warm-up and the cosine go from it to it."""
    rate = case.learning_rate
    rates = {"init_lr": rate, "lr": rate, "end_lr": rate, "lr_warmup_steps": 1, "lr_decay_steps": 1_000_000}
    return rates | {"b1": BETA1, "b2": BETA2, "clip_gradient": CLIP_NORM, "weight_decay": 0.0}


def _easylm_weights(case: Case) -> dict[str, Any]:
    theirs = _weights(case)
    places = {"q": "attention/wq", "k": "attention/wk", "v": "attention/wv", "o": "attention/wo"}
    places |= {"gate": "feed_forward/w1", "down": "feed_forward/w2", "up": "feed_forward/w3"}
    params: dict[str, Any] = {"lm_head": {}, "transformer": {"wte": {}, "ln_f": {}, "h": {}}}
    params["transformer"]["wte"]["embedding"] = theirs["model.embed_tokens.weight"]
    params["transformer"]["ln_f"]["kernel"] = theirs["model.norm.weight"]
    head = theirs.get("lm_head.weight", theirs["model.embed_tokens.weight"])
    params["lm_head"]["kernel"] = head.T.copy()
    for i in range(case.shape.n_layers):
        layer: dict[str, Any] = {"attention": {}, "feed_forward": {}}
        for ours, place in places.items():
            block, name = place.split("/")
            block_there = "self_attn" if block == "attention" else "mlp"
            matrix = theirs[f"model.layers.{i}.{block_there}.{ours}_proj.weight"]
            if ours in ("q", "k"):
                halves = matrix.reshape(-1, 2, case.shape.head_dim // 2, matrix.shape[1])
                matrix = halves.swapaxes(1, 2).reshape(matrix.shape)
            layer[block][name] = {"kernel": matrix.T.copy()}
        layer["attention_norm"] = {"kernel": theirs[f"model.layers.{i}.input_layernorm.weight"]}
        layer["ffn_norm"] = {"kernel": theirs[f"model.layers.{i}.post_attention_layernorm.weight"]}
        params["transformer"]["h"][str(i)] = layer
    return {"params": params}


def _jax_contestant(step: Callable[[np.ndarray], float], imported: float) -> Contestant:
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return Contestant(step=step, imported_mib=imported)

    def peak() -> float:
        return float((device.memory_stats() or {})["peak_bytes_in_use"]) / MIB

    return Contestant(step=step, imported_mib=imported, device=device.device_kind, device_mib=peak)


if __name__ == "__main__":
    main()
