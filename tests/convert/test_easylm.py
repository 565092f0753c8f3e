"""EasyLM's files, written as EasyLM writes them from transformers' weights, open as the model that transformers has."""

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from easylm_like.convert.easylm import open_easylm
from easylm_like.convert.source import Hints
from easylm_like.errors import UserError
from easylm_like.model.presets import PRESETS

HEADS, KV_HEADS, HEAD = 4, 2, 6
DTYPES = {
    "float32": (torch.float32, np.dtype(np.float32)),
    "bfloat16": (torch.bfloat16, np.dtype(ml_dtypes.bfloat16)),
    "float16": (torch.float16, np.dtype(np.float16)),
}
Key = tuple[str, ...]
Arrays = dict[Key, np.ndarray]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 70, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD}
    rope = {"rope_type": "default", "rope_theta": 100.0}
    model = LlamaForCausalLM(TheirConfig(**sizes, **heads, rms_norm_eps=1e-3, rope_parameters=rope))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.4)
    return model


@pytest.fixture(scope="module")
def hints(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Hints:
    folder = tmp_path_factory.mktemp("shape")
    model.config.save_pretrained(folder)
    return Hints(shape=str(folder / "config.json"))


@pytest.fixture(scope="module")
def arrays(model: LlamaForCausalLM) -> Arrays:
    return to_easylm(model)


def to_easylm(model: LlamaForCausalLM) -> Arrays:
    """Return the weights under EasyLM's keys: [in, out] kernels, and RoPE's pairs side by side in every head."""
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}

    def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
        order = [h * HEAD + i + half * (HEAD // 2) for h in range(heads) for i in range(HEAD // 2) for half in (0, 1)]
        return rows[order]

    found = {
        ("transformer", "wte", "embedding"): weights["model.embed_tokens.weight"],
        ("transformer", "ln_f", "kernel"): weights["model.norm.weight"],
        ("lm_head", "kernel"): weights["lm_head.weight"].T,
    }
    for i in range(2):
        theirs, layer = f"model.layers.{i}", ("transformer", "h", str(i))
        q, k = (weights[f"{theirs}.self_attn.{one}_proj.weight"] for one in "qk")
        found[(*layer, "attention", "wq", "kernel")] = side_by_side(q, HEADS).T
        found[(*layer, "attention", "wk", "kernel")] = side_by_side(k, KV_HEADS).T
        for one in "vo":
            found[(*layer, "attention", f"w{one}", "kernel")] = weights[f"{theirs}.self_attn.{one}_proj.weight"].T
        for ours, one in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            found[(*layer, "feed_forward", ours, "kernel")] = weights[f"{theirs}.mlp.{one}_proj.weight"].T
        found[(*layer, "attention_norm", "kernel")] = weights[f"{theirs}.input_layernorm.weight"]
        found[(*layer, "ffn_norm", "kernel")] = weights[f"{theirs}.post_attention_layernorm.weight"]
    return found


def stream(pairs: Iterable[tuple[Key, object]]) -> bytes:
    """Return what EasyLM's StreamingCheckpointer.save_train_state_to_file writes."""
    packer = msgpack.Packer()
    return b"".join(packer.pack((key, flax.serialization.to_bytes(value))) for key, value in pairs)


def behind(prefix: Key, arrays: Arrays) -> Arrays:
    return {(*prefix, *key): array for key, array in arrays.items()}


def params(arrays: Arrays) -> bytes:
    return stream(arrays.items())


def params_of_march_2023(arrays: Arrays) -> bytes:
    return stream(behind(("params",), arrays).items())


def train_state(arrays: Arrays) -> bytes:
    moments = {key: np.full_like(array, 7) for key, array in behind(("opt_state", "0", "mu", "params"), arrays).items()}
    scalars = {
        ("opt_state", "1", "scale"): np.float32(3),
        ("step",): np.int32(12),
    }  # ext objects of another kind than arrays'
    return stream([*scalars.items(), *moments.items(), *behind(("params", "params"), arrays).items()])


def flax_file(arrays: Arrays) -> bytes:
    return bytes(flax.serialization.msgpack_serialize(unflatten_dict(arrays)))


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        *[(write, "float32") for write in (params, params_of_march_2023, train_state, flax_file)],
        (params, "bfloat16"),
        (train_state, "float16"),
    ],
)
def test_weights_are_transformers_to_the_bit_and_logits_agree(
    model: LlamaForCausalLM,
    arrays: Arrays,
    hints: Hints,
    tmp_path: Path,
    write: Callable[[Arrays], bytes],
    dtype: str,
) -> None:
    torch_dtype, numpy_dtype = DTYPES[dtype]
    (tmp_path / "file").write_bytes(write({key: array.astype(numpy_dtype) for key, array in arrays.items()}))
    source = open_easylm(tmp_path / "file", hints)
    assert (source.config.vocab_size, source.config.rope_theta, source.config.norm_eps) == (70, 100.0, 1e-3)
    theirs = {name: weight.detach().to(torch_dtype) for name, weight in model.state_dict().items()}
    assert set(source.tensors) == set(theirs)
    for name, tensor in source.tensors.items():
        array = tensor.read()
        assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape) == (numpy_dtype, tuple(theirs[name].shape))
        assert array.tobytes() == theirs[name].contiguous().view(torch.uint8).numpy().tobytes(), name
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict({name: weight.float() for name, weight in theirs.items()})
    ids = np.random.default_rng(0).integers(0, 70, 50)
    with torch.no_grad():
        wanted = rounded(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(source.logits(ids), wanted, atol=1e-4)
    assert wanted.std() > 0.5


def test_arrays_are_read_when_they_are_wanted_and_no_sooner(arrays: Arrays, hints: Hints, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(params(arrays))
    source = open_easylm(tmp_path / "file", hints)
    other = {key: array + 1 for key, array in arrays.items()}
    (tmp_path / "file").write_bytes(params(other))
    for _ in range(2):
        embed = source.tensors["model.embed_tokens.weight"].read()
        np.testing.assert_array_equal(embed, other["transformer", "wte", "embedding"])


def test_arrays_that_flax_cut_in_pieces_are_joined(
    arrays: Arrays, hints: Hints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").write_bytes(params(arrays))
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    (tmp_path / "pieces").write_bytes(params(arrays))
    (tmp_path / "state").write_bytes(flax_file(arrays))
    assert (tmp_path / "pieces").read_bytes().count(b"__msgpack_chunked_array__") == 16
    whole = open_easylm(tmp_path / "whole", hints).tensors
    for name in ("pieces", "state"):
        for key, tensor in open_easylm(tmp_path / name, hints).tensors.items():
            np.testing.assert_array_equal(tensor.read(), whole[key].read())


@pytest.mark.parametrize("write", [params, flax_file])
def test_a_file_that_is_cut_off_anywhere_is_refused(
    arrays: Arrays, hints: Hints, tmp_path: Path, write: Callable[[Arrays], bytes]
) -> None:
    content = write(arrays)
    for end in {*range(0, len(content), 397), *range(60), len(content) - 1}:
        (tmp_path / "file").write_bytes(content[:end])
        with pytest.raises(UserError, match=r"cut off after|is missing|expected one array"):
            open_easylm(tmp_path / "file", hints)


def test_a_damaged_byte_raises_nothing_but_a_sentence(arrays: Arrays, hints: Hints, tmp_path: Path) -> None:
    random, content = np.random.default_rng(0), bytearray(params(arrays))
    starts = [at for at in range(len(content)) if content.startswith(b"\x92", at)][::20]
    refused = 0
    for at in [start + int(random.integers(0, 60)) for start in starts] + list(range(70)):
        damaged = bytearray(content)
        damaged[at % len(content)] = int(random.integers(0, 256))
        (tmp_path / "file").write_bytes(damaged)
        try:
            for tensor in open_easylm(tmp_path / "file", hints).tensors.values():
                assert tensor.read().shape == tensor.shape
        except UserError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize(
    "content",
    [
        b"hello world, this is a text",
        pickle.dumps({"a": [1, 2, 3]}),
        b"GGUF" + bytes(64),
        b"\x81\xa1a" * 5000 + b"\x01",
    ],
    ids=["text", "pickle", "gguf", "a state in a state in a state"],
)
def test_a_file_of_another_kind_is_refused(hints: Hints, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="not one of EasyLM's checkpoints"):
        open_easylm(tmp_path / "file", hints)


def test_all_that_is_wrong_is_in_one_sentence(arrays: Arrays, hints: Hints, tmp_path: Path) -> None:
    wrong = dict(arrays)
    del wrong["lm_head", "kernel"]
    wrong["transformer", "h", "2", "attention", "wq", "kernel"] = np.zeros((24, 24), np.float32)
    wrong["transformer", "ln_f", "kernel"] = np.zeros(25, np.float32)
    wrong["transformer", "h", "0", "ffn_norm", "kernel"] = np.zeros(24, np.float64)
    norm = ("transformer", "h", "1", "ffn_norm", "kernel")
    (tmp_path / "file").write_bytes(params(wrong) + stream([(norm, arrays[norm])]))
    with pytest.raises(UserError) as raised:
        open_easylm(tmp_path / "file", hints)
    for part in (
        "lm_head/kernel is missing",
        "transformer/h/2/attention/wq/kernel is unknown",
        "transformer/ln_f/kernel is (25,) instead of (24,)",
        "transformer/h/0/ffn_norm/kernel is float64",
        "transformer/h/1/ffn_norm/kernel is there 2 times",
    ):
        assert part in str(raised.value)


def test_without_a_shape_the_sentence_tells_what_the_arrays_do(tmp_path: Path) -> None:
    tiny = PRESETS["tiny"]
    shapes = {
        ("transformer", "wte", "embedding"): (100, tiny.d_model),
        ("transformer", "h", "3", "attention", "wk", "kernel"): (tiny.d_model, 96),
    }
    shapes |= {("transformer", "h", str(i), "feed_forward", "w1", "kernel"): (tiny.d_model, 512) for i in range(4)}
    (tmp_path / "file").write_bytes(params({key: np.zeros(shape, np.float16) for key, shape in shapes.items()}))
    with pytest.raises(UserError, match=r"--shape .* 4 layers, width 192, .* 512, 100 ids, .*these sizes: tiny$"):
        open_easylm(tmp_path / "file", Hints())


def test_the_vocabulary_is_the_files_own(arrays: Arrays, hints: Hints, tmp_path: Path) -> None:
    enlarged = dict(arrays)  # as EasyLM's llama_train.py does where the tokenizer has more ids than the config
    enlarged["transformer", "wte", "embedding"] = np.pad(arrays["transformer", "wte", "embedding"], ((0, 3), (0, 0)))
    enlarged["lm_head", "kernel"] = np.pad(arrays["lm_head", "kernel"], ((0, 0), (0, 3)))
    (tmp_path / "file").write_bytes(params(enlarged))
    source = open_easylm(tmp_path / "file", hints)
    assert source.config.vocab_size == 73
    assert source.tensors["lm_head.weight"].read().shape == (73, 24)


def test_a_folder_is_asked_for_a_step(arrays: Arrays, hints: Hints, tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"streaming_params_{step}").write_bytes(
            params({key: array + step for key, array in arrays.items()})
        )
    with pytest.raises(UserError, match=r"expected one .* found streaming_params_10, streaming_params_20"):
        open_easylm(tmp_path, hints)
    source = open_easylm(tmp_path, Hints(shape=hints.shape, step=20))
    wanted = arrays["transformer", "ln_f", "kernel"] + 20
    np.testing.assert_array_equal(source.tensors["model.norm.weight"].read(), wanted)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [("qwen2_7b", "biases or norms of heads"), ("nonsense", "no file and no known preset; presets are tiny, llama_7b")],
)
def test_a_shape_that_cannot_be_is_refused(arrays: Arrays, tmp_path: Path, shape: str, sentence: str) -> None:
    (tmp_path / "file").write_bytes(params(arrays))
    with pytest.raises(UserError, match=sentence):
        open_easylm(tmp_path / "file", Hints(shape=shape))


def test_another_model_of_easylm_is_refused(hints: Hints, tmp_path: Path) -> None:
    gptj = flatten_dict(
        {
            "transformer": {
                "wte": {"embedding": np.zeros((9, 4), np.float32)},
                "h": {"0": {"attn": {"q_proj": {"kernel": np.zeros((4, 4), np.float32)}}}},
            }
        }
    )
    (tmp_path / "gptj").write_bytes(params(gptj))
    with pytest.raises(UserError, match="transformer/h/0/attn/q_proj/kernel is unknown"):
        open_easylm(tmp_path / "gptj", hints)
    (tmp_path / "roberta").write_bytes(stream([(("roberta", "embeddings", "kernel"), np.zeros(3, np.float32))]))
    with pytest.raises(UserError, match="expected one array transformer/wte/embedding, but it begins with roberta/"):
        open_easylm(tmp_path / "roberta", hints)
