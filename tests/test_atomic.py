"""Files and folders appear whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from easylm_like.atomic import atomic_file, atomic_folder
from easylm_like.errors import UserError


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """Return an empty folder that must hold no leftovers of writing when the test ends."""
    yield tmp_path
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_file_takes_its_place_when_it_is_whole(here: Path) -> None:
    path = here / "deep" / "a.txt"
    for text in ("first", "second"):
        with atomic_file(path) as partial:
            partial.write_text(text)
            assert partial.parent == path.parent  # the same file system, or the last step would be a copy
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("written", ["", "half of it"])
def test_an_error_leaves_the_old_file(here: Path, error: type[BaseException], written: str) -> None:
    (here / "a.txt").write_text("old")
    with pytest.raises(error), atomic_file(here / "a.txt") as partial:  # noqa: PT012
        partial.write_text(written)
        raise error
    assert (here / "a.txt").read_text() == "old"
    with pytest.raises(error), atomic_file(here / "new.txt") as partial:
        raise error
    assert [path.name for path in here.iterdir()] == ["a.txt"]


def test_two_writers_of_one_file_do_not_meet(here: Path) -> None:
    with atomic_file(here / "a.txt") as one, atomic_file(here / "a.txt") as two:
        one.write_text("one")
        two.write_text("two")
    assert (here / "a.txt").read_text() == "one"  # the last to end


def test_a_folder_takes_its_place_when_it_is_whole(here: Path) -> None:
    path = here / "deep" / "out"
    with atomic_folder(path, mark="made.json") as partial:
        (partial / "made.json").write_text("1")
        assert not path.exists()
    with atomic_folder(path, mark="made.json") as partial:
        (partial / "other").write_text("2")
        assert (path / "made.json").read_text() == "1"
    assert [file.name for file in path.iterdir()] == ["other"]  # replaced as a whole, not merged


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder(here: Path, error: type[BaseException]) -> None:
    (here / "out" / "inner").mkdir(parents=True)
    (here / "out" / "inner" / "mark").write_text("old")
    for name in ("out", "new"):
        with pytest.raises(error), atomic_folder(here / name, mark="inner") as partial:  # noqa: PT012
            (partial / "sub").mkdir()
            (partial / "sub" / "half").write_text("half")
            raise error
    assert [str(path.relative_to(here)) for path in here.rglob("*")] == ["out", "out/inner", "out/inner/mark"]
    assert (here / "out" / "inner" / "mark").read_text() == "old"


def test_an_empty_folder_may_be_filled(here: Path) -> None:
    (here / "out").mkdir()
    with atomic_folder(here / "out") as partial:
        (partial / "a").write_text("a")
    assert (here / "out" / "a").read_text() == "a"


@pytest.mark.parametrize(
    ("mark", "wanted"),
    [
        (None, "expected an empty folder or a new one"),
        ("made.json", "expected a folder with made.json in it, or a new"),
    ],
)
def test_what_is_somebodys_is_not_replaced(here: Path, mark: str | None, wanted: str) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("years of work")
    (here / "file").write_text("a file")
    for name in ("out", "file"):
        sentence = f"{here / name} exists and is not replaced: {wanted}"
        with pytest.raises(UserError, match=sentence), atomic_folder(here / name, mark=mark):
            pytest.fail("the block began")
    assert (here / "out" / "thesis.tex").read_text() == "years of work"
    assert (here / "file").read_text() == "a file"
