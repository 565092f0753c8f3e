"""The training step compiled for a TPU slice and for a node of GPUs, neither of which is here: what lies where.

Skipped where the library that compiles for the target is not installed; `make ahead-tpu` and `make ahead-cuda` install
it and run these tests.
"""

import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import pytest

from easylm_like.model.config import LlamaConfig
from easylm_like.model.partition import MeshConfig

pytestmark = pytest.mark.slow

# As sets of dimensions, no activation is like a weight, and no weight like a stack of others.
SHAPE = LlamaConfig(
    vocab_size=4096, d_model=1024, d_ff=2816, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=128, max_length=512
)
STACKED = ("q", "k", "v", "o", "gate", "up", "down")
MATRICES = (*STACKED, "embed", "head")

SPLASH = r"%splash_mha_([a-z]+)_\S* = .* custom-call\("
CUDNN = r'custom_call_target="__cudnn\$fmhaSoftmax(\w*)"'
LIBRARY = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}
if not any(map(find_spec, LIBRARY.values())):
    pytest.skip("no library that compiles for devices: run make ahead-tpu or make ahead-cuda", allow_module_level=True)

# In a process of its own: that of the tests has eight pretended CPU devices, and flags for XLA that fit nothing else.
COMPILE = """
import pickle, sys
from dataclasses import replace
import jax
from easylm_like.model.attention import choose_attention
from easylm_like.model.config import Attention, Compute, Remat
from easylm_like.model.partition import make_mesh
from easylm_like.train.ahead import compile_step, target_devices
from easylm_like.train.config import OptimConfig

shape, target, mesh = pickle.load(sys.stdin.buffer)
mesh = make_mesh(mesh, target_devices(target))
shape = replace(shape, compute=Compute(dtype="bfloat16", remat=Remat.ATTENTION, max_segments=16))
attention = choose_attention(Attention.AUTO, shape, mesh, shape.max_length)
shape = replace(shape, compute=replace(shape.compute, attention=attention))
compiled = compile_step(shape, OptimConfig(), mesh, mesh.shape["fsdp"], shape.max_length)

memory, shardings = compiled.memory_analysis(), jax.tree.leaves(compiled.input_shardings[0][0])
state = jax.tree_util.tree_leaves_with_path(compiled.in_avals[0][0])
with open(sys.argv[1], "wb") as file:
    pickle.dump(
        {
            "mesh": dict(mesh.shape),
            "attention": attention.value,
            "hlo": compiled.as_text(),
            "state": [(getattr(path[-1], "key", ""), leaf.shape, sharding.shard_shape(leaf.shape))
                      for (path, leaf), sharding in zip(state, shardings, strict=True)],
            "arguments": memory.argument_size_in_bytes,
            "new": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        },
        file,
    )
"""


@dataclass(frozen=True)
class Case:
    """A target, a mesh on it, and what attention comes to: a pattern of custom calls and what it captures."""

    library: str
    target: str
    mesh: MeshConfig
    attention: str
    pattern: str
    kernels: set[str]


CASES = {
    "tpu": Case("tpu", "v5e:2x2", MeshConfig(), "splash", SPLASH, {"fwd", "dq", "dkv"}),
    "tpu-tensor": Case("tpu", "v5e:2x2", MeshConfig(tensor=2), "splash", SPLASH, {"fwd", "dq", "dkv"}),
    "tpu-sequence": Case("tpu", "v5e:2x2", MeshConfig(sequence=2), "chunked", SPLASH, set()),
    "cuda": Case("cuda", "h200:1x1x8", MeshConfig(), "cudnn", CUDNN, {"", "Backward"}),
    "cuda-tensor": Case("cuda", "h200:1x1x8", MeshConfig(tensor=2), "cudnn", CUDNN, {"", "Backward"}),
    "cuda-sequence": Case("cuda", "h200:1x1x8", MeshConfig(sequence=2), "chunked", CUDNN, set()),
}


@dataclass(frozen=True)
class Step:
    """A compiled step. `state` is (name, whole shape, shape on a device) of every array; bytes are a device's."""

    case: Case
    mesh: dict[str, int]
    attention: str
    hlo: str
    state: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    arguments: int
    new: int  # of the outputs, what does not take the place of an argument

    def gathered(self, *names: str) -> list[tuple[int, ...]]:
        """Return the shapes that these weights have where their parts along fsdp, which cuts D, are put together."""
        D = SHAPE.d_model
        cut = [(whole, part) for name, whole, part in self.state if name in names]
        return [tuple(w if w == D else p for w, p in zip(whole, part, strict=True)) for whole, part in cut]


@pytest.fixture(scope="module", params=CASES)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    case = CASES[request.param]
    if find_spec(library := LIBRARY[case.library]) is None:
        pytest.skip(f"{library}, which compiles for {case.target}, is not installed: run make ahead-{case.library}")
    path = tmp_path_factory.mktemp("compiled") / "step"
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE, str(path)], input=pickle.dumps((SHAPE, case.target, case.mesh)),
        env=environment, capture_output=True, timeout=900,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr.decode()
    return Step(case, **pickle.loads(path.read_bytes()))


def test_attention_is_the_fastest_that_the_mesh_allows(step: Step) -> None:
    assert step.attention == step.case.attention
    assert set(re.findall(step.case.pattern, step.hlo)) == step.case.kernels


def test_every_matrix_and_both_its_moments_lie_in_equal_parts(step: Step) -> None:
    parts = step.mesh["fsdp"] * step.mesh["tensor"]
    held = [(name, math.prod(whole) / math.prod(part)) for name, whole, part in step.state if name in MATRICES]
    assert sorted(held) == sorted((name, parts) for name in MATRICES for _ in ("weight", "mean", "variance"))
    whole = 4 * sum(math.prod(whole) for _, whole, _ in step.state)
    assert whole / parts <= step.arguments < 1.01 * whole / parts


def test_the_next_state_takes_the_place_of_the_old_one(step: Step) -> None:
    assert step.new < 10_000  # the metrics


def test_a_stack_of_layers_is_never_whole(step: Step) -> None:
    made = {_dims(dims) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", step.hlo)}
    stacks = [(whole, part) for name, whole, part in step.state if name in STACKED]
    assert {_dims(part) for _, part in stacks} <= made
    assert not made & {_dims(dims) for dims in [*step.gathered(*STACKED), *(whole for whole, _ in stacks)]}


def test_a_layers_weights_are_gathered_in_the_loop_over_layers_and_in_bfloat16(step: Step) -> None:
    layer = {_dims(shape[1:]) for shape in step.gathered(*STACKED)}
    looped, before = ({(g.dtype, g.dims) for g in gathers(step.hlo) if g.looped is where} for where in (True, False))
    assert {gather for gather in looped if gather[1] in layer} == {("bf16", dims) for dims in layer}
    assert not {dims for _, dims in before} & layer


def test_of_embedding_and_head_only_the_head_is_gathered_and_once(step: Step) -> None:
    tables = {_dims(shape) for shape in step.gathered("embed", "head")}
    found = {gather for gather in gathers(step.hlo) if gather.dims in tables}
    assert [(gather.dtype, gather.looped) for gather in found] == [("bf16", False)]


def test_pieces_of_a_row_exchange_keys_and_values_and_no_activations(step: Step) -> None:
    activation = _dims((SHAPE.max_length, SHAPE.d_model))
    assert activation not in {gather.dims for gather in gathers(step.hlo) if gather.looped}


@dataclass(frozen=True)
class Gather:
    """One array that an all-gather makes. The stages of an asynchronous one share a channel, and so are one."""

    channel: str
    dtype: str
    dims: tuple[int, ...]
    looped: bool  # done anew in every turn of a loop


def gathers(hlo: str) -> set[Gather]:
    """Return what is gathered in a program: also in fusions, several arrays at a time, and asynchronously."""
    computations = dict(re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}(?!\})", hlo, re.MULTILINE | re.DOTALL))
    once, found = _called_once(hlo, computations), set[Gather]()
    for name, text in computations.items():
        for result, start, rest in re.findall(r" = (.*?) all-gather(-start)?\((.*)", text):
            arrays = re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", result)
            arrays = arrays[len(arrays) // 2 :] if start else arrays  # the operands come first
            channel = re.findall(r"channel_id=(\d+)", rest)[0]
            found |= {Gather(channel, dtype, _dims(dims), name not in once) for dtype, dims in arrays}
    return found


def _called_once(hlo: str, computations: dict[str, str]) -> set[str]:
    """Return the computations that the program gets to without going through the body of a loop."""
    reached, todo = set[str](), re.findall(r"^ENTRY %(\S+)", hlo, re.MULTILINE)
    while todo:
        if (name := todo.pop()) not in reached:
            reached.add(name)
            called = re.findall(r"(?<!body)=\{?(%[^\s,})]+(?:, ?%[^\s,})]+)*)", computations[name])
            todo += [callee.strip(" %") for callees in called for callee in callees.split(",")]
    return reached


def _dims(shape: str | Sequence[int]) -> tuple[int, ...]:
    """Return the dimensions without 1s and in order of size: a transposed array is the same array."""
    sizes = map(int, filter(None, shape.split(","))) if isinstance(shape, str) else shape
    return tuple(sorted(size for size in sizes if size > 1))
