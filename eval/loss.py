"""Loss per token on held-out conversations, by source and marker."""

import tempfile
from functools import partial
from pathlib import Path

import jax

from easylm_like.convert.load import LoadedModel
from easylm_like.data.dataset import TooLong, load_or_tokenize
from easylm_like.data.loader import make_loader
from easylm_like.model.llama import abstract_model
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.train.heldout import Loss, group_names, heldout_losses
from easylm_like.train.step import group_loss


def conversation_loss(model: LoadedModel, data: Path, *, row_length: int, batch_size: int) -> dict[str, Loss]:
    """Return {"all": ..., "hh/good": ..., ...}: nats per trained token, packed rows of `row_length`, in fp32.

    Raises:
        UserError: the file is missing, malformed, or nothing in it has a trained token.
    """
    mesh = make_mesh(MeshConfig())
    rows = -(-batch_size // mesh.size) * mesh.size
    row_length = min(row_length, model.config.max_length)
    exact = jax.default_matmul_precision("highest")  # accelerators round the factors of fp32 products otherwise
    with tempfile.TemporaryDirectory() as cache, jax.set_mesh(mesh), exact:
        dataset = load_or_tokenize(
            str(data), model.template, model.tokenizer, row_length=row_length, too_long=TooLong.CUT, cache=Path(cache)
        )
        loader = make_loader(dataset, row_length, rows, seed=0, shuffle=False)
        loss = partial(group_loss, graphdef=abstract_model(model.config)[0], n_groups=len(group_names(loader)))
        return heldout_losses(jax.jit(loss), model.params, loader, mesh)
