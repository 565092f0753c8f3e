"""PyTorch's files are read as torch.save wrote them, and never run."""

import argparse
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from easylm_like.errors import UserError
from easylm_like.hf.index import read_index
from easylm_like.hf.tensors import read_at
from easylm_like.hf.torch_files import open_torch, open_torch_folder

Edit = Callable[[dict[str, bytes]], None]


def save(path: Path, value: object, protocol: int = 2) -> Path:
    torch.save(value, path, pickle_protocol=protocol)
    return path


def bits(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(
        torch.uint8
    ).numpy().tobytes()


def assert_same(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    opened = open_torch(path)
    assert list(opened) == list(wanted)
    for name, tensor in wanted.items():
        array = opened[name].read()
        assert str(opened[name].dtype) == str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert (array.shape, array.tobytes()) == bits(tensor), name
        assert opened[name].shape == array.shape


def rewritten(path: Path, edit: Edit, compression: int = zipfile.ZIP_STORED) -> Path:
    """Return a copy of a file of torch.save's with the members that `edit` makes of its own; checksums are right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    other = path.with_suffix(".edited")
    with zipfile.ZipFile(other, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return other


def pickled(path: Path, content: bytes) -> Path:
    """Return a file of torch.save's with another data.pkl."""
    root = zipfile.ZipFile(path).namelist()[0].split("/")[0]
    return rewritten(path, lambda members: members.update({f"{root}/data.pkl": content}))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a file with one linear layer: a weight of shape (4, 3) and a bias."""
    return save(tmp_path / "small.bin", torch.nn.Linear(3, 4).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_weights_of_a_module_are_torchs_to_the_bit(tmp_path: Path, dtype: torch.dtype, protocol: int) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 5), torch.nn.LayerNorm(5)).to(dtype)
    state = module.state_dict()
    assert_same(save(tmp_path / "state.pth", state, protocol), state)
    assert_same(save(tmp_path / "parameters.pth", dict(module.named_parameters()), protocol), state)


def test_any_view_is_read_right_and_storages_may_be_shared(tmp_path: Path) -> None:
    draw = random.Random(0)
    base = torch.arange(2 * 5 * 7 * 4, dtype=torch.float32).reshape(2, 5, 7, 4)
    views = {"t": base[0, 0].T, "scalar": base[1, 2, 3, 1], "none": base[:, :0], "row": base[1, 3]}
    views |= {"repeated": base[0, 0, 0].expand(6, 4), "half": base.half()[..., 1::2], "one": torch.tensor(3.0)}
    for number in range(150):
        view = base
        for axis in range(4):
            start = draw.randrange(base.shape[axis])
            view = view.narrow(axis, start, draw.randint(0, base.shape[axis] - start))
        view = view[tuple(slice(None, None, draw.choice((1, 1, 2, 3))) for _ in range(4))]
        views[f"view{number}"] = view.permute(draw.sample(range(4), 4))
    assert_same(save(tmp_path / "views.pth", views), views)


def test_no_more_than_the_view_is_read_and_nothing_before_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = torch.randn(64, 1000)
    path = save(tmp_path / "w.pth", {"columns": base[:, 10:30], "rows": base[7:9], "turned": base[20:30].T})
    asked: list[int] = []

    def counting(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = read_at(path, offset, shape, dtype)
        asked.append(array.nbytes)
        return array

    monkeypatch.setattr("easylm_like.hf.torch_files.read_at", counting)
    for tensor in open_torch(path).values():
        assert not asked
        assert tensor.read().nbytes == tensor.nbytes == sum(asked)
        asked.clear()


def test_threads_can_read_at_once_and_again(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(40, 50) for i in range(30)}
    opened = open_torch(save(tmp_path / "w.pth", state))
    with ThreadPoolExecutor(4) as threads:
        arrays = list(threads.map(lambda name: opened[name].read(), [*state, *state]))
    for name, array in zip([*state, *state], arrays, strict=True):
        np.testing.assert_array_equal(array, state[name].numpy())


class Runs:
    """What unpickling would turn into a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_would_run_a_command_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    evil = save(tmp_path / "evil.pth", {"w": torch.ones(2), "x": Runs(os.system, f"touch {trace}")}, protocol)
    with pytest.raises(UserError, match=r"evil\.pth: would run or import posix\.system.*must not run code"):
        open_torch(evil)
    assert not trace.exists()
    with pytest.raises(UserError, match="would run or import"):  # torch's own names are no better
        open_torch(save(tmp_path / "hub.pth", {"x": Runs(torch.hub.load, "a/b", "c")}, protocol))
    torch.load(evil, weights_only=False)
    assert trace.exists(), "the pickle of this test does nothing"


@pytest.mark.parametrize(
    "content",
    [
        b"(S'touch trace'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch trace'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch trace\x85R.",
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1, a name from a registry
        b"\x80\x02cthis\ns\n.",  # importing alone may run code
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    ],
)
def test_no_opcode_of_pickle_runs_anything(
    small: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"would run or import|which no tensor needs"):
        open_torch(pickled(small, content))
    assert not (tmp_path / "trace").exists()
    assert "this" not in sys.modules


def test_a_damaged_pickle_gives_a_sentence_or_a_tensor_and_nothing_else(small: Path) -> None:
    draw = random.Random(0)
    root = zipfile.ZipFile(small).namelist()[0].split("/")[0]
    good = zipfile.ZipFile(small).read(f"{root}/data.pkl")
    refused = 0
    for _ in range(400):
        content = bytearray(good[: draw.choice((len(good), draw.randrange(len(good))))])
        for _ in range(draw.randint(0, 3) if content else 0):
            content[draw.randrange(len(content))] = draw.choice(good + bytes(range(256)))
        try:
            open_torch(pickled(small, bytes(content)))
        except UserError:
            refused += 1
    assert 200 < refused < 400


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "w.pth", {"w": torch.ones(100), "b": torch.ones(3)}).read_bytes()
    cut = tmp_path / "cut.pth"
    for length in range(0, len(whole), 41):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pth: (damaged or cut off|no file of PyTorch's)"):
            open_torch(cut)
    directory = whole[whole.rindex(b"PK\x06\x06") :]  # the end alone, which still points at a list of members
    cut.write_bytes(whole[:200] + directory)
    with pytest.raises(UserError, match="damaged or cut off"):
        open_torch(cut)
    opened = open_torch(save(tmp_path / "later.pth", {"w": torch.ones(1000)}))
    os.truncate(tmp_path / "later.pth", 600)
    with pytest.raises(UserError, match="cut off while it was read"):
        opened["w"].read()


def test_a_changed_byte_anywhere_gives_a_sentence_or_the_same_names(small: Path) -> None:
    whole, changed, refused = small.read_bytes(), small.with_name("changed.pth"), 0
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] = 0xFF if content[place] != 0xFF else 0
        changed.write_bytes(content)
        try:
            opened = open_torch(changed)
        except UserError:
            refused += 1
        else:
            assert {name: tensor.read().shape for name, tensor in opened.items()} == {"weight": (4, 3), "bias": (4,)}
    assert refused > 30


def remove_storage(members: dict[str, bytes]) -> None:
    del members["small/data/0"]


def shorten_storage(members: dict[str, bytes]) -> None:
    members["small/data/0"] = members["small/data/0"][:-1]


def lengthen_view(members: dict[str, bytes]) -> None:
    assert b"K\x04K\x03\x86" in members["small/data.pkl"]
    members["small/data.pkl"] = members["small/data.pkl"].replace(b"K\x04K\x03\x86", b"K\x05K\x03\x86")


def turn_bytes(members: dict[str, bytes]) -> None:
    members["small/byteorder"] = b"big"


def remove_pickle(members: dict[str, bytes]) -> None:
    del members["small/data.pkl"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (remove_storage, "weight: data/0 is missing"),
        (shorten_storage, "weight: data/0 has 47 bytes instead of 48"),
        (lengthen_view, "weight: reaches beyond the 12 numbers"),
        (turn_bytes, "big byte order"),
        (remove_pickle, r"a zip, but not torch\.save's"),
    ],
)
def test_members_that_do_not_fit_are_named(small: Path, edit: Edit, sentence: str) -> None:
    with pytest.raises(UserError, match=f"small.edited: .*{sentence}"):
        open_torch(rewritten(small, edit))


def test_what_torch_save_never_writes_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compressed"):
        open_torch(rewritten(small, lambda members: None, zipfile.ZIP_DEFLATED))
    torch.save({"w": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.bin: in PyTorch's format from before 1\.6"):
        open_torch(tmp_path / "old.bin")
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="begins with b'version '"):
        open_torch(tmp_path / "pointer.bin")
    with pytest.raises(UserError, match=r"none\.bin: No such file"):
        open_torch(tmp_path / "none.bin")
    damaged = bytearray(small.read_bytes())
    damaged[damaged.index(b"_rebuild_tensor") + 3] ^= 1
    small.write_bytes(damaged)
    with pytest.raises(UserError, match="Bad CRC-32"):
        open_torch(small)


def test_integers_are_refused_by_name_but_for_buffers_that_nobody_uses(tmp_path: Path) -> None:
    state = {"model.position_ids": torch.arange(5), "w": torch.ones(2)}
    assert list(open_torch(save(tmp_path / "w.pth", state))) == ["w"]
    with pytest.raises(UserError, match=r"ids is int64; mask is bool; d is float64"):
        open_torch(
            save(
                tmp_path / "i.pth",
                state | {"ids": torch.arange(3), "mask": torch.ones(1) > 0, "d": torch.ones(1, dtype=torch.float64)},
            )
        )


@pytest.mark.filterwarnings("ignore")  # torch's, about its quantized and sparse tensors
def test_tensors_of_other_kinds_are_refused_by_their_kind(tmp_path: Path) -> None:
    with_attribute = torch.ones(2)
    with_attribute.model_parallel = True  # type: ignore[attr-defined]
    kinds = {
        "a quantized tensor": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "a sparse tensor": torch.eye(3).to_sparse(),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "attributes of its own": with_attribute,
    }
    for kind, tensor in kinds.items():
        with pytest.raises(UserError, match=kind):
            open_torch(save(tmp_path / "odd.pth", {"w": tensor}))


def test_what_is_no_mapping_of_names_to_tensors_is_described(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    run = {"state_dict": state, "optimizer": {"state": {}, "lr": 0.1}, "epoch": 3}
    for value, sentence in {
        "run": (run, r"'state_dict' is a dict of 2, 'optimizer' is a dict of 2, 'epoch' is 3; .*\['state_dict'\]"),
        "list": ([torch.ones(2)], "holds a list of 1"),
        "tensor": (torch.ones(2), r"holds a tensor \(2,\)"),
        "numbers": ({7: torch.ones(2)}, r"7 is a tensor"),
        "namespace": ({"args": argparse.Namespace(a=1)}, r"argparse\.Namespace"),
        "module": (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    }.values():
        with pytest.raises(UserError, match=sentence):
            open_torch(save(tmp_path / "x.pth", value))


def write_folder(folder: Path, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, state in files.items():
        save(folder / file, state)
    text = index if isinstance(index, str) else json.dumps({"metadata": {}, "weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    return folder


A, B = {"a": torch.zeros(1), "b": torch.ones(2)}, {"c": torch.ones(3)}
PLACES = {"a": "1.bin", "b": "1.bin", "c": "2.bin"}


def test_a_folder_has_one_file_or_those_of_its_index(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cut", {"1.bin": A, "2.bin": B}, PLACES)
    assert {name: tensor.read().tolist() for name, tensor in open_torch_folder(folder).items()} == {
        "a": [0],
        "b": [1, 1],
        "c": [1, 1, 1],
    }
    assert read_index(folder / "pytorch_model.bin.index.json") == {"1.bin": ["a", "b"], "2.bin": ["c"]}
    save(folder / "pytorch_model.bin", A)
    with pytest.raises(UserError, match="has both"):
        open_torch_folder(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    assert list(open_torch_folder(folder)) == ["a", "b"]
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has neither"):
        open_torch_folder(folder)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "1.bin", "c": "2.bin", "a": "2.bin"}}', "a is named twice"),
        (PLACES | {"d": "3.bin", "e": "4.bin"}, r"3\.bin is missing; 4\.bin is missing"),
        (PLACES | {"c": "../out.bin", "d": "/etc/passwd"}, r"'\.\./out\.bin' is not .* '/etc/passwd' is not"),
        (PLACES | {"c": "linked/out.bin", "d": "link.bin"}, r"'link\.bin' is not .* 'linked/out\.bin' is not"),
        (PLACES | {"c": "loop.bin"}, r"'loop\.bin' is not a file inside"),
        (PLACES | {"c": "."}, r"\. is missing"),
        ({"a": "2.bin", "b": "1.bin", "c": "1.bin"}, r"c is not in 1\.bin; a is not in 2\.bin"),
        (PLACES | {"d": "double.bin"}, r"d is not in double\.bin; c is in 2\.bin and in double\.bin"),
    ],
)
def test_a_wrong_index_is_refused_with_all_that_is_wrong(
    tmp_path: Path, index: dict[str, str] | str, sentence: str
) -> None:
    folder = write_folder(tmp_path / "model", {"1.bin": A, "2.bin": B, "double.bin": B}, index)
    save(tmp_path / "out.bin", B)
    (folder / "link.bin").symlink_to(tmp_path / "out.bin")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    with pytest.raises(UserError, match=sentence):
        open_torch_folder(folder)


def test_the_links_of_hugging_faces_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    write_folder(snapshot, {}, PLACES)
    blobs.mkdir()
    for file, state in {"1.bin": A, "2.bin": B}.items():
        save(blobs / f"hash{file[0]}", state)
        (snapshot / file).symlink_to(f"../../blobs/hash{file[0]}")
    assert list(open_torch_folder(snapshot)) == ["a", "b", "c"]
