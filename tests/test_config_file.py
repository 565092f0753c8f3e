"""Config file and flags: what is set arrives with its type, and every mistake is one sentence that says where."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from easylm_like.command import run_command
from easylm_like.config_file import read_flags
from easylm_like.errors import UserError

# ml_collections 1.1 imports a config file in a way that Python wants to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(slots=True, kw_only=True)
class Inner:
    rate: float = 0.1
    colour: Colour = Colour.RED


@dataclass(slots=True, kw_only=True)
class Run:
    steps: int = 1
    name: str = ""
    resume: bool = False
    inner: Inner = field(default_factory=Inner)


FILE = """from {module} import Inner, Run

def get_config(variant=""):
    config = Run(name=variant)
    {line}
    return config
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that writes a config file with one line of its own (line 5)."""
    monkeypatch.setitem(sys.modules, "shapes_of_this_test", sys.modules[__name__])

    def write(line: str = "") -> Path:
        path = tmp_path / "experiment.py"
        path.write_text(FILE.format(module="shapes_of_this_test", line=line or "pass"))
        return path

    return write


def read(*argv: object) -> tuple[Run, dict[str, str]]:
    return read_flags([str(argument) for argument in argv], Run, {"workdir": "where the run is written"})


def test_values_of_file_variant_and_flags(file: Callable[..., Path]) -> None:
    path = file("config.steps = 7")
    config, others = read(f"--config={path}", "--workdir=runs/a")
    assert (config, others) == (Run(steps=7), {"workdir": "runs/a"})
    config, others = read(
        "--workdir=runs/b",
        f"--config={path}:debug",
        "--config.steps=9",
        "--config.inner.rate=1",
        "--config.inner.colour=blue",
        "--config.resume",
    )
    assert config == Run(steps=9, name="debug", resume=True, inner=Inner(rate=1.0, colour=Colour.BLUE))
    assert others == {"workdir": "runs/b"}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("config.stepz = 3", "'Run' object has no attribute 'stepz'"),
        ("config.inner.colour.hue", "'Colour' object has no attribute 'hue'"),
        ("config.inner = Inner(ratee=3)", ".*unexpected keyword argument 'ratee'"),
        ("len(3)", "TypeError: object of type 'int' has no len()"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_line(file: Callable[..., Path], line: str, sentence: str) -> None:
    path = file(line)
    with pytest.raises(UserError, match=f"^{path}:5: {sentence}".replace("()", r"\(\)")):
        read(f"--config={path}", "--workdir=w")


def test_a_user_error_of_the_file_passes_through(file: Callable[..., Path]) -> None:
    path = file("from easylm_like.errors import UserError; raise UserError('no variant ' + variant)")
    with pytest.raises(UserError, match="no variant dbug"):
        read(f"--config={path}:dbug", "--workdir=w")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config.stepz=3", "stepz"),
        ("--config.inner.ratee=3", "ratee"),
        ("--config.steps=many", "config.steps=many"),
        ("--config.steps=1.5", "config.steps=1.5"),
        ("--config.inner.rate=fast", "config.inner.rate=fast"),
        ("--config.inner.colour=green", r"config.inner.colour=green: value should be one of <red\|blue>"),
        ("--config.resume=perhaps", "config.resume=perhaps"),
        ("--wrokdir=w", "wrokdir"),
        ("stray", "unexpected argument 'stray'; expected --config=FILE.py"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_flag(file: Callable[..., Path], flag: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read(f"--config={file()}", "--workdir=w", flag)


OPTIONAL: dict[str, tuple[str | bool | int, str]] = {
    "fast": (False, "a switch"),
    "count": (3, "a whole number"),
    "place": ("here", "some text"),
}


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ([], ("False", "3", "here")),
        (["--fast", "--count=-7", "--place=HOST:80"], ("True", "-7", "HOST:80")),
        (["--fast=true", "--count", "12", "--place="], ("True", "12", "")),
        (["--nofast"], ("False", "3", "here")),
    ],
)
def test_a_flag_that_may_be_left_out_has_its_default(
    file: Callable[..., Path], argv: list[str], values: tuple[str, str, str]
) -> None:
    config, others = read_flags([f"--config={file()}", "--workdir=w", *argv], Run, {"workdir": ""}, OPTIONAL)
    assert config == Run()
    assert others == {"workdir": "w"} | dict(zip(OPTIONAL, values, strict=True))


@pytest.mark.parametrize("flag", ["--count=two", "--count=1.5", "--count=", "--fast=perhaps", "--pace=here"])
def test_a_wrong_value_of_such_a_flag_is_named(file: Callable[..., Path], flag: str) -> None:
    with pytest.raises(UserError, match=flag.removeprefix("--").split("=")[0]):
        read_flags([f"--config={file()}", "--workdir=w", flag], Run, {"workdir": ""}, OPTIONAL)


def test_a_missing_file_or_flag_is_named(file: Callable[..., Path], tmp_path: Path) -> None:
    usage = r"expected --config=FILE.py\[:variant\] --workdir=..."
    for argv, sentence in (
        ((f"--config={tmp_path}/none.py:debug", "--workdir=w"), f"^{tmp_path}/none.py: no such config file; {usage}"),
        ((f"--config={tmp_path}", "--workdir=w"), f"^{tmp_path}: no such config file"),
        (("--workdir=w",), f"^--config is missing; {usage}"),
        ((f"--config={file()}",), f"^--workdir is missing; {usage}"),
        ((), "^--config is missing"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(*argv)


@pytest.mark.parametrize(("line", "got"), [("return {'steps': 3}", "dict"), ("return Inner()", "Inner")])
def test_get_config_must_return_the_right_kind(file: Callable[..., Path], line: str, got: str) -> None:
    path = file(line)
    with pytest.raises(UserError, match=f"^{path}: get_config must return a Run, got {got}"):
        read(f"--config={path}", "--workdir=w")


def test_a_command_ends_with_one_sentence_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(argv: list[str]) -> None:
        raise UserError(f"no such file {argv[0]}")

    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    def ours(argv: list[str]) -> None:
        raise ZeroDivisionError

    for main, status, text in ((wrong, 1, "error: no such file a\n"), (interrupted, 130, "interrupted\n")):
        with pytest.raises(SystemExit) as caught:
            run_command(main, ["a"])
        assert caught.value.code == status
        assert capsys.readouterr().err == text
    with pytest.raises(ZeroDivisionError):  # a defect of ours stays a traceback
        run_command(ours, ["a"])
    run_command(lambda argv: None, [])
