"""What was saved comes back bit for bit, whole or the weights alone, on whatever mesh."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm_like.errors import UserError
from easylm_like.hf.keys import as_stacks
from easylm_like.model.config import Compute, LlamaConfig
from easylm_like.model.llama import Params
from easylm_like.model.partition import MeshConfig, make_mesh
from easylm_like.model.presets import PRESETS
from easylm_like.train.checkpoint import (
    load_params,
    read_run_info,
    remove_unfinished,
    restore_params,
    restore_state,
    save_params,
    saved_digest,
    shape_from_json,
    shape_to_json,
)
from easylm_like.train.config import OptimConfig, RunConfig
from easylm_like.train.optim import make_optimizer
from easylm_like.train.saver import Saver
from easylm_like.train.state import TrainState, abstract_state, init_state

ADAMW = make_optimizer(OptimConfig(), optax.constant_schedule(0.1))


def state_on(mesh: jax.sharding.Mesh, shape: LlamaConfig, params: Params, step: int) -> TrainState:
    """Return a state that is not the first one: every number in it is another."""
    like = abstract_state(shape, ADAMW, mesh)
    placed = {name: jax.device_put(weight, like.params[name].sharding) for name, weight in params.items()}
    state = init_state(shape, ADAMW, mesh, 0, placed)
    random = np.random.default_rng(step)

    def scramble(leaf: jax.Array) -> jax.Array:
        return jax.device_put((random.random(leaf.shape) * 100).astype(leaf.dtype), leaf.sharding)

    opt_state = jax.tree.map(scramble, state.opt_state)
    return TrainState(jax.device_put(jnp.int32(step), state.step.sharding), placed, opt_state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, shape: LlamaConfig, params: Params) -> tuple[Path, TrainState]:
    """Return a folder with the checkpoints of steps 3 and 7, saved on eight devices, and the state of step 7."""
    folder, mesh = tmp_path_factory.mktemp("run") / "checkpoints", make_mesh(MeshConfig(fsdp=4, tensor=2))
    state = state_on(mesh, shape, params, 7)
    for number, info in (
        (1, {"number": 1}),
        (3, {"number": 3}),
        (7, {"number": 7, "nested": {"list": [1, None, "x"]}}),
    ):
        with Saver(folder, RunConfig(keep_checkpoints=2), info) as saver:
            saver.save(dataclasses.replace(state, step=jnp.int32(number)))
    return folder, state


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [(MeshConfig(fsdp=4, tensor=2), 8), (MeshConfig(), 1), (MeshConfig(replica=2, fsdp=2, sequence=2), 8)],
    ids=["the-same-mesh", "one-device", "another-mesh"],
)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(
    saved: tuple[Path, TrainState], shape: LlamaConfig, sizes: MeshConfig, devices: int
) -> None:
    folder, state = saved
    like = abstract_state(shape, ADAMW, make_mesh(sizes, jax.devices()[:devices]))
    restored = restore_state(folder, 7, like)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    lies = jax.tree.map(lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), restored, like)
    assert all(jax.tree.leaves(lies))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(restored)} == {"float32", "int32"}
    assert len(restored.params["q"].sharding.device_set) == devices


def test_weights_come_back_alone(saved: tuple[Path, TrainState], shape: LlamaConfig) -> None:
    folder, state = saved
    arrays = load_params(folder, 7)
    assert {type(array) for array in arrays.values()} == {np.ndarray}
    like = abstract_state(
        dataclasses.replace(shape, compute=Compute(param_dtype="bfloat16")), ADAMW, make_mesh(MeshConfig())
    ).params
    halves = restore_params(folder, 7, like)
    for name, weight in state.params.items():
        np.testing.assert_array_equal(arrays[name], weight)
        np.testing.assert_array_equal(halves[name], weight.astype(jnp.bfloat16))
        assert halves[name].sharding == like[name].sharding


def test_only_the_last_checkpoints_are_kept_and_each_says_what_made_it(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    assert read_run_info(folder) == (7, {"number": 7, "nested": {"list": [1, None, "x"]}})
    assert read_run_info(folder, 3) == (3, {"number": 3})
    with pytest.raises(UserError, match=r"no checkpoint of step 1; there are \[3, 7\]"):
        read_run_info(folder, 1)


def test_a_checkpoint_that_was_not_finished_is_none(saved: tuple[Path, TrainState], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    # What kills leave in the middle of a save, after it, and in the middle of a deletion.
    for name in ("9.partial.orbax-checkpoint-tmp", "8.partial", "2.deleted"):
        (folder / name / "params").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint of step any"):
        read_run_info(folder)
    remove_unfinished(folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(UserError, match=r"none: no such folder; expected a run's checkpoints"):
        read_run_info(tmp_path / "none")


def test_weights_saved_alone_are_a_start(tmp_path: Path, params: Params) -> None:
    arrays = {name: np.asarray(weight) for name, weight in params.items()}
    save_params(tmp_path / "one", as_stacks(arrays), {"a": 1})
    save_params(tmp_path / "two", as_stacks(arrays), {"a": 1})
    assert read_run_info(tmp_path / "one") == (0, {"a": 1})
    loaded = load_params(tmp_path / "one", 0)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert saved_digest(tmp_path / "one", 0) == saved_digest(tmp_path / "one", 0)
    assert saved_digest(tmp_path / "one", 0) != saved_digest(tmp_path / "two", 0)


@pytest.mark.parametrize("name", ["llama_7b", "llama31_8b", "llama32_1b"])
def test_a_shape_survives_json(name: str) -> None:
    shape = dataclasses.replace(PRESETS[name], compute=Compute(dtype="bfloat16", scan_layers=False))
    again = shape_from_json(json.loads(json.dumps(shape_to_json(shape))))
    assert again == PRESETS[name], "how it was computed is not part of a shape"
    assert hash(again) == hash(PRESETS[name])


def test_a_shape_of_another_version_is_refused() -> None:
    fields = shape_to_json(PRESETS["llama_7b"])
    for other in (fields | {"scan_layers": True}, {k: v for k, v in fields.items() if k != "qk_norm"}, None):
        with pytest.raises(UserError, match="other fields than this version of easylm_like"):
            shape_from_json(other)
