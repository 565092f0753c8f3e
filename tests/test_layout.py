"""The rules of CONTRIBUTING.md that a machine can check; setup.cfg and the lock name what the code needs."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.checkout

ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    "data": 0,
    "model": 0,
    "hf": 1,
    "train": 2,
    "convert": 3,
    "serve": 4,
    "launch": 3,
}  # easylm_like's own modules: -1
TOP = {"data_prep", "eval"}  # beside the library here, inside it in a wheel
SHIPPED = {"easylm_like", *TOP}
NEVER_SHIPPED = {"benchmarks", "configs", "tests"}
VAGUE_NAMES = {"base", "common", "factory", "helper", "helpers", "manager", "misc", "util", "utils"}
NOT_LOCKED = {"cuda", "tpu"}  # extras that a plain machine has no use for


@dataclass(frozen=True)
class Source:
    """A Python file: its path in the repository, its text and its syntax tree."""

    path: PurePosixPath
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.path.parts[0]


Breaches = Iterator[tuple[int, str]]  # line, what is wrong with it


def _source(path: str, text: str) -> Source:
    return Source(PurePosixPath(path), text, ast.parse(text, path))


@cache
def _sources() -> list[Source]:
    """Return every Python file of the checkout that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = sorted(path for path in set(listed.split("\0")) if path and (ROOT / path).is_file())
    return [_source(path, (ROOT / path).read_text("utf-8")) for path in paths]


def _imports(source: Source) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, dotted name, relative?) of each imported name: `from .a import b` in data_prep is data_prep.a.b."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = source.path.parent.parts
            start = [*folders[: len(folders) + 1 - node.level]] if node.level else []
            start += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*start, alias.name]), bool(node.level)) for alias in node.names)


def _part(dotted: str) -> tuple[str, int]:
    """Return the part of easylm_like that a module belongs to and its level."""
    name = dotted.split(".")[1]
    return (name, LEVELS[name]) if name in LEVELS else ("easylm_like", -1)


def imports_go_one_way(source: Source) -> Breaches:
    importer = ".".join(source.path.with_suffix("").parts)
    for line, imported, relative in _imports(source):
        target = imported.split(".")[0]
        if ".".join(imported.split(".")[:2]) in {f"easylm_like.{name}" for name in TOP}:
            yield line, f"{imported} exists in a wheel only; import {imported.removeprefix('easylm_like.')}"
        elif source.folder in SHIPPED and target in (TOP | NEVER_SHIPPED) - {source.folder}:
            yield line, f"{source.folder} must not import {target}"
        elif source.folder in TOP and target == source.folder and not relative:
            yield line, f"inside {target} write the import of {imported} relatively: a wheel has it under another name"
        elif source.folder == target == "configs":
            yield line, "a config file must not import another one"
        elif source.folder == target == "easylm_like" and "." in imported:
            (ours, our_level), (theirs, their_level) = _part(importer), _part(imported)
            if ours != theirs and their_level >= our_level:
                yield line, f"{ours} (level {our_level}) must not import {theirs} (level {their_level})"


def files_have_one_subject(source: Source) -> Breaches:
    lines = len(source.text.splitlines())
    if lines > 400:
        yield 400, f"the file has {lines} lines, at most 400"
    if vague := VAGUE_NAMES & set("_".join(source.path.with_suffix("").parts).split("_")):
        yield 1, f"{' and '.join(sorted(vague))} in the path says nothing; name the file after its subject"


def functions_are_short(source: Source) -> Breaches:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > 60:
                yield node.lineno, f"{node.name} has {lines} lines, at most 60"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            if len(names) > 7:
                yield node.lineno, f"{node.name} has {len(names)} parameters, at most 7"


def blind_excepts_have_a_reason(source: Source) -> Breaches:
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {""}
            if caught & {"", "Exception", "BaseException"} and "#" not in lines[node.lineno - 1]:
                yield node.lineno, "catches everything; name the exception, or say in a comment here why it cannot be"


def configs_explain_themselves(source: Source) -> Breaches:
    if source.folder == "configs":
        if not ast.get_docstring(source.tree):
            yield 1, "needs a docstring: command, hardware, hours, expected result"
        if not any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in source.tree.body):
            yield 1, "needs a function get_config"


RULES: tuple[Callable[[Source], Breaches], ...] = (
    imports_go_one_way,
    files_have_one_subject,
    functions_are_short,
    blind_excepts_have_a_reason,
    configs_explain_themselves,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Callable[[Source], Breaches]) -> None:
    breaches = [f"{source.path}:{line}: {what}" for source in _sources() for line, what in rule(source)]
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (imports_go_one_way, "easylm_like/data/a.py", "from easylm_like.model import llama"),
        (imports_go_one_way, "easylm_like/train/a.py", "def f():\n    import easylm_like.convert.hf"),
        (imports_go_one_way, "easylm_like/train/a.py", "from ..serve import engine"),
        (imports_go_one_way, "easylm_like/atomic.py", "from easylm_like.data.pack import rows"),
        (imports_go_one_way, "easylm_like/train/a.py", "import data_prep"),
        (imports_go_one_way, "data_prep/a.py", "from eval import judge"),
        (imports_go_one_way, "data_prep/a.py", "from data_prep.clean import b"),
        (imports_go_one_way, "eval/a.py", "from tests import conftest"),
        (imports_go_one_way, "tests/test_a.py", "from easylm_like import eval"),
        (imports_go_one_way, "tests/test_a.py", "import easylm_like.data_prep.clean"),
        (imports_go_one_way, "configs/a.py", "from configs.b import get_config"),
        (files_have_one_subject, "eval/a.py", "\n" * 401),
        (files_have_one_subject, "eval/http_utils.py", ""),
        (files_have_one_subject, "eval/common/a.py", ""),
        (functions_are_short, "eval/a.py", "def f():\n" + "    1\n" * 60),
        (functions_are_short, "eval/a.py", "def f(self, a, b, c, d, e, f, *, g, h): ..."),
        (blind_excepts_have_a_reason, "eval/a.py", "try: f()\nexcept Exception: g()"),
        (blind_excepts_have_a_reason, "eval/a.py", "try: f()\nexcept (OSError, BaseException) as e: g()"),
        (blind_excepts_have_a_reason, "eval/a.py", "try: f()\nexcept: g()"),
        (configs_explain_themselves, "configs/a.py", "def get_config(): ..."),
        (configs_explain_themselves, "configs/data/a.py", "'''Explain.'''\ndef config(): ..."),
    ],
)
def test_a_rule_finds_a_breach(rule: Callable[[Source], Breaches], path: str, text: str) -> None:
    assert len(list(rule(_source(path, text)))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("easylm_like/train/a.py", "from easylm_like.data import pack\nfrom easylm_like.errors import UserError"),
        ("easylm_like/data/a.py", "import easylm_like\nfrom easylm_like.data.pack import rows\nfrom . import pack"),
        ("data_prep/sources/a.py", "from ..clean import b\nfrom easylm_like.data import pack\nfrom . import hh"),
        ("eval/a.py", "def f(self, a, b, c, d, e, f, *, g):\n" + "    1\n" * 59),
        ("eval/a.py", "try: f()\nexcept Exception: g()  # the library raises nothing better"),
        ("tests/test_a.py", "import data_prep.clean\nfrom eval import judge\nfrom configs.data import b"),
    ],
)
def test_the_rules_allow_what_is_right(path: str, text: str) -> None:
    assert [breach for rule in RULES for breach in rule(_source(path, text))] == []


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg")
    return parser


def _requirements() -> dict[str, list[Requirement]]:
    """Return what setup.cfg asks for: by the name of the extra, and under "" for everyone."""
    setup = _setup()
    texts = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line.strip()] for extra, text in texts.items()}


def test_setup_cfg_lists_every_package_of_the_tree() -> None:
    folders = {source.path.parent for source in _sources() if source.folder in SHIPPED}
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []
    inside = {("easylm_like" if folder.parts[0] in TOP else "", *folder.parts) for folder in folders}
    assert {".".join(parts).strip(".") for parts in inside} == set(_setup()["options"]["packages"].split())
    parts = {folder.parts[1] for folder in folders if folder.parts[0] == "easylm_like" and len(folder.parts) > 1}
    assert parts <= set(LEVELS), "give the new part of easylm_like a level"


def test_setup_cfg_asks_for_every_library_that_is_imported() -> None:
    declared = {
        canonicalize_name(need.name) for extra, needs in _requirements().items() if extra != "dev" for need in needs
    }
    distributions = packages_distributions()
    undeclared = [
        f"{source.path}:{line}: {imported}"
        for source in _sources()
        if source.folder in SHIPPED
        for line, imported, _ in _imports(source)
        if (top := imported.split(".")[0]) not in sys.stdlib_module_names | SHIPPED
        and declared.isdisjoint(map(canonicalize_name, distributions.get(top, [top])))
    ]
    assert not undeclared, "not in setup.cfg:\n" + "\n".join(undeclared)


def _locked(python: str) -> dict[str, str]:
    """Return name -> version of what the lock installs with this Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    lines = re.findall(r"^([a-z0-9][^ ]*==[^\\\n]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    pins = [Requirement(line) for line in lines]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(environment)
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_what_setup_cfg_asks_for(python: str) -> None:
    locked = _locked(python)
    wanted = [need for extra, needs in _requirements().items() if extra not in NOT_LOCKED for need in needs]
    missing = [
        str(need)
        for need in wanted
        if need.name != "torch" and not need.specifier.contains(locked.get(canonicalize_name(need.name), "0"))
    ]
    assert not missing, f"run `make lock` (a new extra must be named there): {missing}"


def test_the_lock_names_no_place_and_no_torch() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert re.findall(r"^.*(?:://|--index|--find-links| @ ).*$", lock, re.MULTILINE) == []
    assert [name for name in _locked("3.11") if name == "torch" or name.startswith("nvidia")] == []
