"""A difference gives back every bit with its base and nothing with another; those of others are added as they add."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from easylm_like.convert.difference import (
    RECORD,
    check_result,
    checksum,
    make_difference,
    read_record,
    recover,
    recover_numbers,
    sum_of_weights,
    write_record,
)
from easylm_like.convert.easylm import open_easylm
from easylm_like.convert.source import Hints, Source
from easylm_like.errors import UserError
from easylm_like.hf.tensors import Tensor, Tensors, as_tensor
from easylm_like.model.config import LlamaConfig

SHAPE = LlamaConfig(vocab_size=40, d_model=8, d_ff=12, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=4)
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
BITS = {2: np.uint16, 4: np.uint32}
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def no_logits(ids: np.ndarray) -> np.ndarray:
    raise AssertionError("a difference needs no logits")


def as_source(arrays: Mapping[str, np.ndarray], path: str = "model") -> Source:
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    config = dataclasses.replace(SHAPE, vocab_size=len(arrays[EMBED]))
    return Source(path=Path(path), format="test", config=config, tensors=tensors, logits=no_logits)


def draw(seed: int, dtype: np.dtype, rows: int = 40) -> dict[str, np.ndarray]:
    """Return arrays of any bits but those of numbers that are none: subnormal, infinite, -0.0."""
    random, arrays = np.random.default_rng(seed), {}
    for name, shape in {
        EMBED: (rows, 8),
        HEAD: (rows, 8),
        NORM: (8,),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
    }.items():
        bits = random.integers(0, 2 ** (8 * dtype.itemsize), shape, np.uint64).astype(BITS[dtype.itemsize])
        array = bits.view(dtype)
        array[np.isnan(array.astype(np.float32))] = -0.0
        array[..., :3] = np.array([-0.0, 0.0, 1e-7 if dtype == np.float16 else 1e-40]).astype(dtype)
        arrays[name] = array
    return arrays


def through_a_file(tensors: Tensors, path: Path) -> dict[str, np.ndarray]:
    save_file({name: tensor.read() for name, tensor in tensors.items()}, path)
    return load_file(path)


def recovered_bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [40, 43, 37])
def test_every_bit_comes_back_whatever_the_dtype_and_the_number_of_ids(
    tmp_path: Path, dtype: np.dtype, rows: int
) -> None:
    tuned, base = draw(1, dtype, rows), as_source(draw(2, dtype))
    difference, record = make_difference(as_source(tuned), base)
    write_record(tmp_path, record)
    stored = through_a_file(difference, tmp_path / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(BITS[dtype.itemsize])}
    assert stored[EMBED][40:].tobytes() == tuned[EMBED][40:].tobytes()
    read = read_record(tmp_path)
    assert read == record
    assert read is not None
    result = recover({name: as_tensor(array) for name, array in stored.items()}, read, base)
    assert recovered_bits(result) == {name: array.tobytes() for name, array in tuned.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in result.items()} == {
        name: (array.dtype, array.shape) for name, array in tuned.items()
    }
    check_result(result, read, "result")


@pytest.mark.parametrize(
    ("tuned_dtype", "base_dtype"),
    [(DTYPES[0], DTYPES[1]), (DTYPES[1], DTYPES[0]), (DTYPES[2], DTYPES[1])],
    ids=["bfloat16 to float32", "float32 to bfloat16", "bfloat16 to float16"],
)
def test_a_base_of_another_dtype_gives_every_bit_back_too(tuned_dtype: np.dtype, base_dtype: np.dtype) -> None:
    tuned, base = draw(1, tuned_dtype), draw(2, base_dtype)
    difference, record = make_difference(as_source(tuned), as_source(base))
    result = recover(difference, record, as_source(base))
    assert recovered_bits(result) == {name: array.tobytes() for name, array in tuned.items()}
    if base_dtype.itemsize < tuned_dtype.itemsize:  # a copy of it in the larger dtype is the same base
        copy = {name: array.astype(tuned_dtype) for name, array in base.items()}
        assert recovered_bits(recover(difference, record, as_source(copy))) == recovered_bits(result)


def test_another_base_is_refused_before_the_difference_is_read() -> None:
    def read() -> np.ndarray:
        raise AssertionError

    base = draw(2, DTYPES[1])
    difference, record = make_difference(as_source(draw(1, DTYPES[1])), as_source(base))
    unread = {name: Tensor(tensor.shape, tensor.dtype, read) for name, tensor in difference.items()}
    wrong = {name: array.copy() for name, array in base.items()}
    wrong[NORM].view(np.uint16)[3] ^= 1
    with pytest.raises(UserError, match=rf"^other is not the base .* expected {record.base}$"):
        recover(unread, record, as_source(wrong, "other"))
    wrong = base | {NORM: np.zeros(9, DTYPES[1]), "extra": np.zeros(3, DTYPES[1])}
    del wrong[HEAD]
    with pytest.raises(UserError) as raised:
        recover(unread, record, as_source(wrong, "other"))
    for part in (f"{HEAD} is missing", "extra is unknown", f"{NORM} is (9,) instead of (8,)"):
        assert part in str(raised.value)


def test_a_flipped_bit_in_the_difference_is_found(tmp_path: Path) -> None:
    base = as_source(draw(2, DTYPES[2]))
    difference, record = make_difference(as_source(draw(1, DTYPES[2])), base)
    stored = through_a_file(difference, tmp_path / "model.safetensors")
    stored[EMBED] = stored[EMBED].copy()
    stored[EMBED][5, 5] ^= 1 << 9
    result = recover({name: as_tensor(array) for name, array in stored.items()}, record, base)
    with pytest.raises(UserError, match=rf"^out: .* expected {record.result}\); its files are damaged"):
        check_result(result, record, "out")
    other = {name: tensor for name, tensor in difference.items() if name != NORM}
    other[EMBED] = as_tensor(np.zeros((40, 8), np.float32))
    with pytest.raises(UserError, match=rf"{NORM} is missing; {EMBED} is float32\(40, 8\) instead of uint16\(40, 8\)"):
        recover(other, record, base)


def test_a_difference_of_bits_is_not_added_as_numbers() -> None:
    base = as_source(draw(2, DTYPES[1]))
    difference, _ = make_difference(as_source(draw(1, DTYPES[1])), base)
    with pytest.raises(UserError, match=r"its difference\.json is missing"):
        recover_numbers(difference, base)


def test_models_of_other_shapes_have_no_difference() -> None:
    tuned = draw(1, DTYPES[0]) | {NORM: np.zeros(9, np.float32)}
    del tuned[HEAD]
    with pytest.raises(UserError) as raised:
        make_difference(as_source(tuned), as_source(draw(2, DTYPES[0])))
    assert f"{HEAD} is missing" in str(raised.value)
    assert f"{NORM} is (9,) instead of (8,)" in str(raised.value)


def test_the_checksum_is_what_it_says_it_is() -> None:
    arrays = draw(1, DTYPES[1])
    rows = [[n, "bfloat16", list(a.shape), hashlib.sha256(a.tobytes()).hexdigest()] for n, a in sorted(arrays.items())]
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    wanted = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert checksum(tensors) == checksum(dict(reversed(tensors.items()))) == wanted
    others = [
        tensors | {NORM: as_tensor(arrays[NORM].view(np.float16))},
        tensors | {NORM: as_tensor(arrays[NORM].reshape(2, 4))},
        {name.replace("lm_head", "head"): tensor for name, tensor in tensors.items()},
    ]
    assert len({checksum(other) for other in others} | {wanted}) == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [('"result"', '"other"'), ('"float32"', '"int8"'), ("]", ""), ("lm_head.weight", "other"), ('"checksum"', '"sum"')],
)
def test_a_damaged_record_is_a_sentence(tmp_path: Path, old: str, new: str) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, make_difference(as_source(draw(1, DTYPES[0])), as_source(draw(2, DTYPES[0])))[1])
    (tmp_path / RECORD).write_text((tmp_path / RECORD).read_text().replace(old, new, 1))
    with pytest.raises(UserError, match="damaged, or not one of this library's"):
        read_record(tmp_path)


def new_model(seed: int, vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocab_size, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    model = LlamaForCausalLM(TheirConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1)
    return model


def state(model: LlamaForCausalLM, dtype: np.dtype) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy().astype(dtype) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpacas_difference_is_recovered_as_weight_diff_does(dtype: np.dtype) -> None:
    tuned, raw, own = new_model(1, 41), new_model(2, 40), new_model(2, 40)
    base = as_source(state(own, np.dtype(np.float16)))
    raw.load_state_dict(
        {name: torch.tensor(weight.astype(np.float32)) for name, weight in state(own, np.dtype(np.float16)).items()}
    )
    raw.resize_token_embeddings(41, mean_resizing=False)
    for rows in (raw.get_input_embeddings().weight.data, raw.get_output_embeddings().weight.data):
        rows[-1:] = rows[:-1].mean(dim=0, keepdim=True)  # smart_tokenizer_and_embedding_resize
    raw_state = raw.state_dict()
    change = {name: (weight - raw_state[name]).numpy().astype(dtype) for name, weight in tuned.state_dict().items()}
    wanted = {name: torch.tensor(array.astype(np.float32)).add_(raw_state[name]) for name, array in change.items()}
    difference = {name: as_tensor(array) for name, array in change.items()}
    whole = recover_numbers(difference, base, "float32")
    for name, tensor in whole.items():
        old = tensor.read()[:40] if name in (EMBED, HEAD) else tensor.read()
        np.testing.assert_array_equal(old, wanted[name].numpy()[: len(old)])
        np.testing.assert_allclose(tensor.read(), wanted[name].numpy(), rtol=1e-6, atol=1e-7)  # torch's mean is rounded
    kept = recover_numbers(difference, base)
    assert {tensor.dtype for tensor in kept.values()} == {dtype}
    up = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(kept[up].read(), wanted[up].numpy().astype(dtype))
    total, with_frequencies = sum_of_weights(whole, SHAPE)
    assert total == pytest.approx(float(sum(weight.sum() for weight in wanted.values())), abs=1e-3)
    assert with_frequencies - total == pytest.approx(float(raw.model.rotary_emb.inv_freq.sum()), abs=1e-6)


def test_koalas_difference_is_a_stream_of_easylm(tmp_path: Path) -> None:
    tuned, base, hints = new_model(1, 40), new_model(2, 40), Hints(shape=str(tmp_path))
    tuned.config.save_pretrained(tmp_path)

    def kernels(model: LlamaForCausalLM) -> dict[tuple[str, ...], np.ndarray]:
        weights, layer, found = state(model, DTYPES[0]), "model.layers.0", {}
        for one in "qk":
            pairs = (
                weights[f"{layer}.self_attn.{one}_proj.weight"].reshape(2, 2, 2, 8).transpose(0, 2, 1, 3).reshape(8, 8)
            )
            found["transformer", "h", "0", "attention", f"w{one}", "kernel"] = pairs.T
        for name, their in {
            "wv": "self_attn.v",
            "wo": "self_attn.o",
            "w1": "mlp.gate",
            "w2": "mlp.down",
            "w3": "mlp.up",
        }.items():
            part = "attention" if "self" in their else "feed_forward"
            found["transformer", "h", "0", part, name, "kernel"] = weights[f"{layer}.{their}_proj.weight"].T
        found["transformer", "h", "0", "attention_norm", "kernel"] = weights[f"{layer}.input_layernorm.weight"]
        found["transformer", "h", "0", "ffn_norm", "kernel"] = weights[f"{layer}.post_attention_layernorm.weight"]
        found["transformer", "wte", "embedding"] = weights[EMBED]
        found["transformer", "ln_f", "kernel"] = weights[NORM]
        found["lm_head", "kernel"] = weights[HEAD].T
        return found

    old = kernels(base)
    change = {key: array - old[key] for key, array in kernels(tuned).items()}  # diff_checkpoint.py
    packed = [msgpack.packb((key, flax.serialization.to_bytes(array))) for key, array in change.items()]
    (tmp_path / "diff").write_bytes(b"".join(packed))
    recovered = recover_numbers(open_easylm(tmp_path / "diff", hints).tensors, as_source(state(base, DTYPES[0])))
    theirs, bases = state(tuned, DTYPES[0]), state(base, DTYPES[0])
    assert set(recovered) == set(theirs)
    for name, tensor in recovered.items():
        np.testing.assert_array_equal(tensor.read(), bases[name] + (theirs[name] - bases[name]))
    less = {name: tensor for name, tensor in recovered.items() if name != HEAD}
    with pytest.raises(UserError, match=r"is not the base of this difference: lm_head\.weight is unknown"):
        recover_numbers(recovered, as_source({name: bases[name] for name in less}))
