"""The list of a folder's files: what is lost, cut, changed or cannot be read is named, and nothing else."""

import os
from pathlib import Path

import pytest

from easylm_like.digests import DIGESTS, find_damage, write_digests

CHANGED = "its content is not what was written"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with three files, one of them empty, and their list."""
    (tmp_path / "params" / "d").mkdir(parents=True)
    (tmp_path / "params" / "d" / "array").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "params" / "empty").touch()
    (tmp_path / "run.json").write_text("{}")
    write_digests(tmp_path)
    return tmp_path


def test_a_folder_as_it_was_written_has_no_damage(folder: Path) -> None:
    assert find_damage(folder) == find_damage(folder, "params/") == find_damage(folder, "run.json") == []
    listed = (folder / DIGESTS).read_bytes()
    write_digests(folder)
    assert (folder / DIGESTS).read_bytes() == listed, "the list is not about itself, and has one order"


def test_all_that_is_damaged_is_named_by_what_is_wrong_with_it(folder: Path) -> None:
    array, empty, run = folder / "params" / "d" / "array", folder / "params" / "empty", folder / "run.json"
    array.write_bytes(array.read_bytes()[:-1])
    empty.write_bytes(b"x")
    run.write_text("[]")
    assert find_damage(folder) == [
        f"{array} has 2559 bytes and had 2560",
        f"{empty} has 1 bytes and had 0",
        f"{run} is damaged: {CHANGED}",
    ]
    assert find_damage(folder, "run.json") == [f"{run} is damaged: {CHANGED}"]
    run.unlink()
    array.unlink()
    array.mkdir()  # a disk that cannot read a file raises what a folder in its place does: an OSError
    empty.unlink()
    (folder / "params" / "d").rename(folder / "d")
    (folder / "params").rmdir()
    (folder / "params").touch()
    assert find_damage(folder) == [
        f"{array} is damaged: Not a directory",
        f"{empty} is damaged: Not a directory",
        f"{run} is missing",
    ]


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"\xff", b"{}", b'{"files.json": 3}', b'{"run.json": [2, "a"]}'])
def test_a_list_that_is_none_is_damaged(folder: Path, content: bytes) -> None:
    (folder / DIGESTS).write_bytes(content)
    assert find_damage(folder) == [f"{folder / DIGESTS} is damaged: {CHANGED}"]
    (folder / DIGESTS).unlink()
    assert find_damage(folder) == [f"{folder / DIGESTS} is missing"]


def test_a_comparison_of_nothing_is_damage(folder: Path) -> None:
    assert find_damage(folder, "optimizer/") == [f"{folder / DIGESTS} names no file optimizer/..."]


def test_everything_is_on_the_disk_when_the_list_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without power nobody can test it, so the calls must do: the files, then their list, then the folders with names.
    flushed = list[str]()
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.readlink(f"/proc/self/fd/{file}")))
    write_digests(folder)
    names = [str(Path(path).relative_to(folder)) for path in flushed]
    assert set(names[:3]) == {"params/d/array", "params/empty", "run.json"}
    assert names[3] == DIGESTS
    assert set(names[4:]) == {".", "params", "params/d"}
