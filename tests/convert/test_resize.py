"""A vocabulary of another size is Alpaca's: the same model, and rows that are the mean of the old ones."""

import dataclasses
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from easylm_like.convert.reference import reference_logits
from easylm_like.convert.resize import resize_vocabulary
from easylm_like.convert.shape import read_hinted_shape
from easylm_like.convert.source import Source
from easylm_like.data.tokenizer import train_sentencepiece
from easylm_like.errors import UserError
from easylm_like.hf.config import shape_to_hf
from easylm_like.hf.tensors import Tensor, as_tensor

IDS = np.random.default_rng(0).integers(0, 390, 40)


def new_model(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 390, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = TheirConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        # a mean far from 0: rounding it to bfloat16 shows
        torch.nn.init.normal_(weight, mean=float("norm" in name or "embed" in name or "head" in name), std=0.4)
    return model


def as_source(model: LlamaForCausalLM, dtype: np.dtype, folder: Path) -> Source:
    model.config.save_pretrained(folder)
    weights = {name: weight.detach().numpy().astype(dtype) for name, weight in model.named_parameters()}
    config, tensors = read_hinted_shape(str(folder)), {name: as_tensor(array) for name, array in weights.items()}
    logits = partial(reference_logits, shape_to_hf(config), tensors)
    return Source(path=folder, format="test", config=config, tensors=tensors, logits=logits)


def resize_as_alpaca(model: LlamaForCausalLM, added: int) -> None:
    """Do what `smart_tokenizer_and_embedding_resize` of stanford_alpaca's train.py does, the mean in float64."""
    model.resize_token_embeddings(model.config.vocab_size + added, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = embeddings.weight.data
        if not (rows[-1] == rows[-added - 1]).all():
            rows[-added:] = rows[:-added].double().mean(dim=0, keepdim=True).float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)], ids=str)
def test_added_rows_and_their_logits_are_alpacas(tmp_path: Path, tied: bool, dtype: np.dtype) -> None:
    model = new_model(tied=tied)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.tensor(weight.numpy().astype(dtype).astype(np.float32)))
    source = resize_vocabulary(as_source(model, dtype, tmp_path), 393)
    resize_as_alpaca(model, 3)
    assert source.config.vocab_size == 393
    assert source.origin["vocab_size_before"] == 390
    theirs = dict(model.named_parameters())
    assert set(source.tensors) == set(theirs)
    for name, tensor in source.tensors.items():
        wanted = theirs[name].detach().numpy().astype(dtype)
        assert (tensor.shape, tensor.dtype) == (wanted.shape, dtype)
        np.testing.assert_array_equal(tensor.read(), wanted)
    with torch.no_grad():
        for weight in model.parameters():  # the mean rows too
            weight.copy_(torch.tensor(weight.numpy().astype(dtype).astype(np.float32)))
        wanted = model(torch.tensor(IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(source.logits(IDS), wanted, atol=1e-4 * wanted.std())


def test_the_old_ids_logits_come_from_the_formats_own_arrays(tmp_path: Path) -> None:
    source = as_source(new_model(tied=False), np.dtype(np.float32), tmp_path)
    own = np.random.default_rng(1).normal(size=(40, 390)).astype(np.float32)
    source = dataclasses.replace(source, logits=lambda ids: own)
    np.testing.assert_array_equal(resize_vocabulary(source, 400).logits(IDS)[:, :390], own)
    np.testing.assert_array_equal(resize_vocabulary(source, 385).logits(IDS), own[:, :385])


def test_a_smaller_vocabulary_is_cut_off_and_keeps_the_rest(tmp_path: Path) -> None:
    source = as_source(new_model(tied=False), np.dtype(np.float32), tmp_path)
    smaller = resize_vocabulary(source, 385)
    for name, tensor in smaller.tensors.items():
        rows = 385 if "embed" in name or "head" in name else None
        np.testing.assert_array_equal(tensor.read(), source.tensors[name].read()[:rows])
        assert tensor.shape == tensor.read().shape
    assert resize_vocabulary(source, 390) is source


def test_ids_of_the_tokenizer_are_not_cut_off(tmp_path: Path) -> None:
    texts = [f"{a} and {b} make {a + b}" for a in range(9) for b in range(9)]
    source = as_source(new_model(tied=False), np.dtype(np.float32), tmp_path)
    source = dataclasses.replace(source, tokenizer=train_sentencepiece(texts, 290))
    assert resize_vocabulary(source, 290).config.vocab_size == 290
    with pytest.raises(UserError, match="its tokenizer has 290 ids, a vocabulary must have at least as many; got 289"):
        resize_vocabulary(source, 289)
    with pytest.raises(UserError, match="at least one id, got 0"):
        resize_vocabulary(source, 0)


def test_nothing_is_read_before_it_is_wanted(tmp_path: Path) -> None:
    def read() -> np.ndarray:
        raise AssertionError

    source = as_source(new_model(tied=False), np.dtype(np.float32), tmp_path)
    unread = {name: Tensor(tensor.shape, tensor.dtype, read) for name, tensor in source.tensors.items()}
    resize_vocabulary(dataclasses.replace(source, tensors=unread), 500)
