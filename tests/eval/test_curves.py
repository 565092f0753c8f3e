"""The picture is a picture: it opens, has the promised panels, and shows a line for every group."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from eval.accuracy import Accuracy, wilson
from eval.curves import draw_curves, read_metrics

BLUE, ORANGE, GREY = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x99, 0x99, 0x99)
METRICS = [
    {"step": 0, "kind": "heldout", "all": 5.0, "ann/good": 4.0, "ann/bad": 6.0},
    *({"step": step, "kind": "train", "loss": 5.0 / step} for step in range(1, 9)),
    {"step": 8, "kind": "heldout", "all": 2.0, "ann/good": 1.0, "ann/bad": 3.0},
]


def draw(path: Path, metrics: list[dict[str, float | str]], accuracy: dict[str, Accuracy]) -> np.ndarray:
    """Return the picture as uint8 [height, width, 3]."""
    draw_curves(metrics, accuracy, path, "a title")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return (matplotlib.image.imread(path)[:, :, :3] * 255).round().astype(np.uint8)


def count(picture: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((picture == np.array(color, np.uint8)).all(axis=-1).sum())


def test_every_line_is_there(tmp_path: Path) -> None:
    picture = draw(tmp_path / "curves.png", METRICS, {})
    height, width, _ = picture.shape
    assert (height, width) == (546, 910)
    for color in (BLUE, ORANGE, GREY):
        assert count(picture, color) > 500, color
    assert np.mean(picture == 255) > 0.7
    lone = draw(tmp_path / "lone.png", [m for m in METRICS if m["kind"] == "train"], {})
    assert count(lone, BLUE) == 0


def test_a_second_panel_shows_the_accuracies(tmp_path: Path) -> None:
    few = draw(tmp_path / "few.png", METRICS, {"good": Accuracy(5, 100, 0.02, 0.1), "bad": Accuracy(5, 100, 0.02, 0.1)})
    many = draw(
        tmp_path / "many.png", METRICS, {"good": Accuracy(95, 100, 0.9, 0.97), "bad": Accuracy(5, 100, 0.02, 0.1)}
    )
    assert few.shape == many.shape == (546, 1300, 3)
    right = slice(900, None)
    assert count(many[:, right], BLUE) > 5 * count(few[:, right], BLUE)
    assert abs(count(many[:, right], ORANGE) - count(few[:, right], ORANGE)) < 100


@pytest.mark.parametrize(("right", "asked"), [(6, 6), (0, 11), (0, 0)])
def test_all_right_and_all_wrong_can_be_drawn(tmp_path: Path, right: int, asked: int) -> None:
    draw(tmp_path / "curves.png", METRICS, {"good": Accuracy(right, asked, *wilson(right, asked))})


def test_a_run_that_has_not_begun_has_an_empty_picture(tmp_path: Path) -> None:
    assert count(draw(tmp_path / "curves.png", [], {}), BLUE) == 0


def test_the_numbers_of_a_run_are_read(run: Path) -> None:
    metrics = read_metrics(run / "metrics.jsonl")
    assert [m["step"] for m in metrics if m["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(OSError, match="none"):
        read_metrics(run / "none")
