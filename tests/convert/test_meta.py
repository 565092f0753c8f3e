"""Meta's checkpoints, cut as Meta's parallel layers cut them, are the models of transformers that they came from."""

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from easylm_like.convert.meta import open_meta
from easylm_like.convert.source import Hints
from easylm_like.data.tokenizer import Tokenizer
from easylm_like.errors import UserError
from easylm_like.hf.tensors import read_at

State = dict[str, torch.Tensor]
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}
NEVER = 9  # no axis is cut here
# Where fairscale's layers cut: ColumnParallelLinear rows, RowParallelLinear columns, the norms not at all.
CUTS = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


@dataclass(frozen=True)
class Case:
    """A checkpoint to write: how many shards, which axis of the embedding they cut, and what params.json says."""

    shards: int
    dtype: torch.dtype
    heads: int
    kv_heads: int
    embedding_cut: int
    params: dict[str, object]
    rope: dict[str, object]
    norm_eps: float = 1e-5
    tied: bool = False


CASES = {
    "llama1-one-shard": Case(1, torch.float32, 4, 4, 1, {"vocab_size": -1}, {}, norm_eps=1e-3),
    "llama2-two-shards": Case(2, torch.float16, 4, 2, 1, {"n_kv_heads": 2, "vocab_size": -1}, {}),
    "llama3-four-shards": Case(
        4,
        torch.bfloat16,
        8,
        4,
        0,
        {"n_kv_heads": 4, "vocab_size": 100, "rope_theta": 14_000.0, "use_scaled_rope": True},
        {"rope_theta": 14_000.0, **LLAMA31},  # the longest wavelength is one that Llama 3.1 stretches
    ),
    "tied-two-shards": Case(2, torch.float32, 4, 2, 0, {"n_kv_heads": 2}, {}, tied=True),
}


def write_params(folder: Path, params: dict[str, object]) -> None:
    (folder / "params.json").write_text(json.dumps(params))


def interleaved(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return rows of Hugging Face's q or k with row i of a head at 2i, and row i + size / 2 at 2i + 1."""
    order = [place // 2 + place % 2 * (size // 2) for place in range(size)]
    return torch.cat([head[order] for head in rows.split(size)])


def cut(state: State, case: Case, shard: int) -> State:
    """Return what one GPU of Meta's has of the model with Hugging Face's `state`."""
    part: State = {}
    for theirs, weight in state.items():
        layer = theirs.split(".")[2] if theirs.startswith("model.layers") else None
        stem = theirs.removesuffix(".weight").removeprefix(f"model.layers.{layer}.")
        (name,) = [meta for meta, hugging in NAMES.items() if hugging == stem]
        if name in ("attention.wq", "attention.wk"):
            weight = interleaved(weight, 64 // case.heads)
        axis = case.embedding_cut if name == "tok_embeddings" else CUTS.get(name.split(".")[-1], NEVER)
        mine = weight if axis == NEVER else weight.chunk(case.shards, axis)[shard]
        part[f"layers.{layer}.{name}.weight" if layer else f"{name}.weight"] = mine.clone() if axis == 0 else mine
    if case.embedding_cut == 1:
        part["rope.freqs"] = torch.ones(4)
    return part


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Meta's format and the model of transformers that it was made of."""

    case: Case
    folder: Path
    model: LlamaForCausalLM


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    made = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=192,  # of 4 * 64, two thirds, rounded up to a multiple of 32
            num_hidden_layers=2,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            rms_norm_eps=case.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0} | case.rope,
            tie_word_embeddings=case.tied,
            max_position_embeddings=131072,
        )
        model = LlamaForCausalLM(config)
        torch.nn.Module.to(model, case.dtype)
        for key, weight in model.named_parameters():
            torch.nn.init.normal_(weight, mean=float("norm" in key), std=0.3)
        state = {key: weight for key, weight in model.state_dict().items() if not (case.tied and key.startswith("lm"))}
        folder = tmp_path_factory.mktemp(name)
        for shard in range(case.shards):
            torch.save(cut(state, case, shard), folder / f"consolidated.{shard:02}.pth")
        params = {
            "dim": 64,
            "n_layers": 2,
            "n_heads": case.heads,
            "multiple_of": 32,
            "norm_eps": case.norm_eps,
            **case.params,
        }
        write_params(folder, params)
        made[name] = Checkpoint(case, folder, model)
    return made


@pytest.fixture
def two(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> Path:
    """Return a copy of the LLaMA 2 in two shards, to be broken."""
    return Path(shutil.copytree(checkpoints["llama2-two-shards"].folder, tmp_path / "two"))


def change(path: Path, edit: Callable[[State], object]) -> None:
    state = torch.load(path)
    edit(state)
    torch.save(state, path)


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_transformers_to_the_bit(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    made = checkpoints[name]
    source = open_meta(made.folder, Hints())
    wanted = {
        key: weight for key, weight in made.model.state_dict().items() if key != "lm_head.weight" or not made.case.tied
    }
    assert set(source.tensors) == set(wanted)
    for key, weight in wanted.items():
        array = source.tensors[key].read()
        assert array.shape == source.tensors[key].shape == tuple(weight.shape), key
        assert str(array.dtype) == str(source.tensors[key].dtype) == str(made.case.dtype).removeprefix("torch.")
        assert array.tobytes() == weight.contiguous().view(torch.uint8).numpy().tobytes(), key


@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_transformers(name: str, checkpoints: dict[str, Checkpoint]) -> None:
    made = checkpoints[name]
    ids = np.random.default_rng(0).integers(0, 100, 300)
    with torch.no_grad():
        exact = LlamaForCausalLM(made.model.config).float()
        exact.load_state_dict(made.model.state_dict())
        wanted = exact(torch.tensor(ids)[None]).logits[0].numpy()
    source = open_meta(made.folder, Hints())
    np.testing.assert_allclose(source.logits(ids), wanted, atol=2e-4 * wanted.std())
    config, theirs = source.config, made.model.config
    assert config.n_kv_heads == theirs.num_key_value_heads
    assert (config.vocab_size, config.d_ff, config.norm_eps) == (100, 192, theirs.rms_norm_eps)
    assert config.tie_embeddings == made.case.tied


def test_one_array_is_read_from_its_own_parts_alone(
    checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_meta(checkpoints["llama2-two-shards"].folder, Hints())
    asked: list[int] = []

    def counting(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = read_at(path, offset, shape, dtype)
        asked.append(array.nbytes)
        return array

    monkeypatch.setattr("easylm_like.hf.torch_files.read_at", counting)
    for name, tensor in source.tensors.items():
        tensor.read()
        assert sum(asked) == tensor.nbytes * (2 if "norm" in name else 1), name
        asked.clear()


@pytest.mark.parametrize(
    ("params", "length", "factor"),
    [
        ({"norm_eps": 1e-6}, 2048, None),
        ({}, 4096, None),
        ({"rope_theta": 1e6}, 16384, None),
        ({"rope_theta": 5e5}, 8192, None),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072, 8),
        ({"use_scaled_rope": True, "rope_scale_factor": 32, "max_seq_len": 4000}, 4000, 32),
    ],
)
def test_what_an_unknown_size_leaves_open_is_assumed_and_told(
    two: Path, params: dict[str, object], length: int, factor: float | None
) -> None:
    write_params(two, json.loads((two / "params.json").read_text()) | params)
    source = open_meta(two, Hints())
    assert source.config.max_length == length
    assert (source.config.rope_scaling.factor if source.config.rope_scaling else None) == factor
    told = source.origin["assumed"]
    assert isinstance(told, list)
    assert len(told) == ("max_seq_len" not in params) + (factor is not None and "rope_scale_factor" not in params)


def test_a_hinted_shape_says_what_params_json_cannot(two: Path, checkpoints: dict[str, Checkpoint]) -> None:
    made = checkpoints["llama2-two-shards"]
    config = made.model.config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    (two / "config.json").write_text(json.dumps(config))
    source = open_meta(two, Hints(shape=str(two / "config.json")))
    assert (source.config.rope_theta, source.config.max_length, source.origin["assumed"]) == (77.0, 131072, [])
    changed = LlamaForCausalLM(LlamaConfig(**config)).float()
    changed.load_state_dict(made.model.state_dict())
    ids = np.arange(40)
    with torch.no_grad():
        wanted = changed(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(source.logits(ids), wanted, atol=2e-4 * wanted.std())
    with pytest.raises(UserError, match=r"norm\.weight is \(64,\) in each of 2 shards, which does not make \(192,\)"):
        open_meta(two, Hints(shape="tiny"))
    with pytest.raises(UserError, match=r"qwen3_8b: has qkv_bias or qk_norm"):
        open_meta(two, Hints(shape="qwen3_8b"))
    (two / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"ties the head to the embedding, but output\.weight is not"):
        open_meta(two, Hints(shape=str(two / "config.json")))


def test_missing_shards_are_named(checkpoints: dict[str, Checkpoint], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["llama3-four-shards"].folder, tmp_path / "four"))
    shutil.move(folder / "consolidated.03.pth", tmp_path)
    with pytest.raises(UserError, match=r"3 of 4 shards are there .*copy the missing ones"):
        open_meta(folder, Hints())
    shutil.move(tmp_path / "consolidated.03.pth", folder)
    for number in (0, 2):
        (folder / f"consolidated.{number:02}.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated\.00\.pth, consolidated\.02\.pth missing"):
        open_meta(folder, Hints())


def test_shards_that_differ_are_refused_with_all_differences(two: Path) -> None:
    def edit(state: State) -> None:
        state["layers.0.attention.wk.weight"] = state["layers.0.attention.wk.weight"][:-1]
        state["layers.1.ffn_norm.weight"] = state["layers.1.ffn_norm.weight"].float()
        state["extra"] = state.pop("norm.weight")

    change(two / "consolidated.01.pth", edit)
    with pytest.raises(UserError) as error:
        open_meta(two, Hints())
    for part in (
        "norm.weight is not in consolidated.01.pth",
        "extra is in consolidated.01.pth alone",
        "layers.0.attention.wk.weight is float16 (15, 64) in consolidated.01.pth, float16 (16, 64)",
        "layers.1.ffn_norm.weight is float32 (64,) in consolidated.01.pth, float16",
    ):
        assert part in str(error.value)


def test_weights_of_another_model_are_refused_with_all_that_is_wrong(two: Path) -> None:
    def edit(state: State) -> None:
        del state["layers.1.attention.wo.weight"]
        state["layers.0.attention.wv.weight"] = state["layers.0.attention.wv.weight"][:-1].clone()
        state["layers.2.ffn_norm.weight"] = torch.ones(64)

    for shard in range(2):
        change(two / f"consolidated.{shard:02}.pth", edit)
    with pytest.raises(UserError) as error:
        open_meta(two, Hints())
    for part in (
        "layers.1.attention.wo.weight is missing",
        "layers.0.attention.wv.weight is (15, 64) in each of 2 shards, which does not make (32, 64)",
        "layers.2.ffn_norm.weight is unknown",
    ):
        assert part in str(error.value)


def test_a_norm_that_is_not_the_same_in_all_shards_is_refused_when_it_is_read(two: Path) -> None:
    change(two / "consolidated.01.pth", lambda state: state["layers.1.ffn_norm.weight"].mul_(1.5))
    source = open_meta(two, Hints())
    with pytest.raises(UserError, match=r"consolidated\.01\.pth: layers\.1\.ffn_norm\.weight is not that of"):
        source.tensors["model.layers.1.post_attention_layernorm.weight"].read()


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"vision_chunk_size": 448, "moe_args": {}}, "no LLaMA from 1 to 3.3 has moe_args, vision_chunk_size"),
        (
            {"n_layers": None, "norm_eps": "small", "dim": 64.5, "multiple_of": 0, "use_scaled_rope": 1},
            "got dim 64.5, n_layers None, multiple_of 0, norm_eps 'small', use_scaled_rope 1",
        ),
        ({"n_heads": 5}, "dim 64 must be a multiple of n_heads 5"),
        ({"n_kv_heads": 3}, "must be a multiple of n_kv_heads 3"),
        ({"multiple_of": 256}, "make a feed-forward size of 256, the arrays have 192"),
        ({"n_kv_heads": 4}, r"wk\.weight is \(16, 64\) in each of 2 shards, which does not make \(64, 64\)"),
        ({"vocab_size": 101}, r"output\.weight is \(50, 64\) in each of 2 shards"),
    ],
)
def test_params_json_of_another_model_is_refused(two: Path, params: dict[str, object], sentence: str) -> None:
    write_params(two, json.loads((two / "params.json").read_text()) | params)
    with pytest.raises(UserError, match=sentence):
        open_meta(two, Hints())


def test_the_tokenizer_is_hinted_or_beside_the_shards_or_one_folder_up(two: Path, tokenizer: Tokenizer) -> None:
    assert open_meta(two, Hints()).tokenizer is None
    (two.parent / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    found = open_meta(two, Hints()).tokenizer
    assert found
    assert found.digest == tokenizer.digest
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]  # Llama 3's tokenizer.model
    (two / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"two/tokenizer\.model: Llama 3's tokenizer .*--tokenizer=DIR"):
        open_meta(two, Hints())
    given = two.parent / "given"
    given.mkdir()
    tokenizer.save(given)
    hinted = open_meta(two, Hints(tokenizer=given, template="vicuna"))
    assert hinted.tokenizer
    assert hinted.tokenizer.digest == tokenizer.digest
    assert hinted.template
    assert hinted.template.name == "vicuna"


def test_missing_params_json_is_named(two: Path) -> None:
    (two / "params.json").unlink()
    with pytest.raises(UserError, match=r"params\.json: No such file"):
        open_meta(two, Hints())
