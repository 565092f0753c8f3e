"""The mesh and the table: every weight has a place, and what does not fit is named before anything is allocated."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from easylm_like.errors import UserError
from easylm_like.model.llama import abstract_model, param_shardings
from easylm_like.model.partition import MESH_AXES, MeshConfig, batch_part, constrain, make_mesh, partition_spec
from easylm_like.model.presets import get_preset

from .conftest import GQA


def test_one_size_may_be_all_that_are_left() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == {"replica": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert tuple(make_mesh(MeshConfig(replica=2, tensor=2)).shape.values()) == (2, 2, 1, 2)
    assert tuple(make_mesh(MeshConfig(fsdp=2, sequence=-1, tensor=2)).shape.values()) == (1, 2, 2, 2)
    assert tuple(make_mesh(MeshConfig(), jax.devices()[:3]).shape.values()) == (1, 3, 1, 1)
    mesh = make_mesh(MeshConfig(tensor=4))
    assert mesh.axis_names == MESH_AXES
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MeshConfig(fsdp=-1, tensor=3), r"mesh \(replica 1, fsdp -1, sequence 1, tensor 3\) needs .* there are 8"),
        (MeshConfig(fsdp=16), r"fsdp 16.* there are 8"),
        (MeshConfig(fsdp=4), r"fsdp 4.* there are 8"),
        (MeshConfig(fsdp=-1, tensor=16), "tensor 16.* there are 8"),
        (MeshConfig(fsdp=-1, tensor=-1), "sizes must be at least 1, and one of them may be -1"),
        (MeshConfig(fsdp=0), "sizes must be at least 1"),
        (MeshConfig(replica=-2), "sizes must be at least 1"),
    ],
)
def test_a_mesh_that_is_not_the_devices_is_an_error(config: MeshConfig, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_mesh(config)


@pytest.mark.parametrize("name", ["llama_7b", "llama2_70b", "llama32_1b", "mistral_7b", "qwen25_0_5b", "qwen3_8b"])
def test_every_weight_has_a_place_and_big_ones_are_cut(name: str) -> None:
    config, mesh = get_preset(name), make_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings, shapes = param_shardings(config, mesh), abstract_model(config)[1]
    assert shardings.keys() == shapes.keys()
    small = dict.fromkeys(("attention_norm", "mlp_norm", "final_norm"), 1 / 4)
    small |= dict.fromkeys(("q_bias", "k_bias", "v_bias"), 1 / 2) | dict.fromkeys(("q_norm", "k_norm"), 1)
    for weight, sharding in shardings.items():
        part = np.prod(sharding.shard_shape(shapes[weight].shape)) / np.prod(shapes[weight].shape)
        assert part == small.get(weight, 1 / 8), weight


def test_layers_are_never_cut() -> None:
    for weight, sharding in param_shardings(GQA, make_mesh(MeshConfig(fsdp=4, tensor=2))).items():
        shape = abstract_model(GQA)[1][weight].shape
        if weight not in ("embed", "head", "final_norm"):
            assert sharding.shard_shape(shape)[0] == GQA.n_layers, weight


@pytest.mark.parametrize(
    ("change", "sizes", "sentence"),
    [
        ({}, {"tensor": 4}, r"weight k: its kv_heads axis of 2 .* mesh axis tensor=4; tensor could be 1, 2$"),
        (
            {"d_model": 36},
            {},
            r"its embed axis of 36 does not divide by mesh axis fsdp=8; fsdp could be 1, 2, 3, 4, 6$",
        ),
        ({"d_ff": 50}, {"tensor": 4, "n": 4}, r"its mlp axis of 50 .* tensor=4; tensor could be 1, 2, 5$"),
    ],
    ids=["kv_heads", "embed", "mlp"],
)
def test_a_weight_that_does_not_divide_is_named_with_what_would(
    change: dict[str, int], sizes: dict[str, int], sentence: str
) -> None:
    sizes = dict(sizes)
    config = replace(GQA, **change)
    if sizes.pop("n", None):
        config = replace(config, n_heads=4, n_kv_heads=4)
    with pytest.raises(UserError, match=sentence):
        param_shardings(config, make_mesh(MeshConfig(**sizes)))


@pytest.mark.parametrize("vocab", [97, 128, 32001])
def test_every_vocabulary_divides(vocab: int) -> None:
    config = replace(GQA, vocab_size=vocab, n_heads=8, n_kv_heads=8)
    shardings = param_shardings(config, make_mesh(MeshConfig(tensor=8)))
    for name in ("embed", "head"):
        rows, _ = shardings[name].shard_shape(abstract_model(config)[1][name].shape)
        assert rows % 16 == 0
        assert vocab <= rows * 8 < vocab + 128


def test_activations_are_cut_by_batch_and_length() -> None:
    assert partition_spec(("batch", "length", "hidden")) == PartitionSpec(("replica", "fsdp"), "sequence", None)
    x = jax.numpy.zeros((8, 4, 2))
    with jax.set_mesh(make_mesh(MeshConfig(replica=2, fsdp=2, sequence=2))):
        laid_out = jax.jit(lambda x: constrain(x, "batch", "length", "hidden") + 1)(x)
    assert {shard.data.shape for shard in laid_out.addressable_shards} == {(2, 2, 2)}
    assert constrain(x, "batch", "length", "hidden") is x  # outside of a mesh


@dataclass(frozen=True)
class Host:
    number: int

    def process_index(self) -> int:
        return self.number


@dataclass(frozen=True)
class Device:
    """What jax asks of a device to tell which host holds it; `client` is the host that asks."""

    id: int
    process_index: int
    client: Host
    platform: str = "cpu"
    device_kind: str = "cpu"


def seen_from(host: int, order: list[int], per_host: int = 4) -> list[jax.Device]:
    return [Device(number, number // per_host, Host(host)) for number in order]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sizes", "shared"),
    [
        ((1, 8, 1, 1), False),
        ((2, 4, 1, 1), False),
        ((1, 4, 1, 2), False),
        ((2, 1, 2, 2), False),
        ((1, 2, 4, 1), False),
        ((1, 1, 8, 1), True),
        ((1, 1, 4, 2), True),
        ((1, 1, 1, 8), True),
    ],
)
def test_a_host_makes_the_rows_that_its_devices_hold(sizes: tuple[int, ...], shared: bool) -> None:
    config = MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))
    parts = [batch_part(make_mesh(config, seen_from(host, [*range(8)])), 16) for host in range(2)]
    assert parts == ([range(16), range(16)] if shared else [range(8), range(8, 16)])


def test_hosts_may_share_some_of_their_rows() -> None:
    """Three hosts of two devices, each row on three of them: the host in the middle has some of both others'."""
    meshes = [make_mesh(MeshConfig(sequence=3), seen_from(host, [*range(6)], per_host=2)) for host in range(3)]
    assert [batch_part(mesh, 4) for mesh in meshes] == [range(2), range(4), range(2, 4)]


def test_rows_here_and_there_are_refused() -> None:
    turns = [0, 4, 1, 5, 2, 6, 3, 7]  # of the two hosts
    with pytest.raises(UserError, match=r"mesh .*'fsdp': 8.* hold rows here and there"):
        batch_part(make_mesh(MeshConfig(), seen_from(1, turns)), 16)
    assert batch_part(make_mesh(MeshConfig(sequence=2), seen_from(1, turns)), 16) == range(16)
