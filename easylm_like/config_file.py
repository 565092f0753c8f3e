"""Read `--config=FILE.py[:variant] --config.field=value --flag=value` as ml_collections does, with clear errors."""

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from absl import flags
from ml_collections import config_flags

from easylm_like.errors import UserError

Config = TypeVar("Config")

# What a mistake in a config file raises when Python runs it
MISTAKES = (SyntaxError, NameError, ImportError, LookupError, AttributeError, TypeError, ValueError)


def read_flags(
    argv: Sequence[str],
    kind: type[Config],
    others: Mapping[str, str],
    optional: Mapping[str, tuple[str | bool | int, str]] = MappingProxyType({}),
) -> tuple[Config, dict[str, str]]:
    """Return the config that FILE.py's get_config(variant) made, overrides applied, and the values of the other flags.

    Args:
        argv: the arguments after the program's name.
        kind: what get_config must return.
        others: required string flags beside --config, with their help.
        optional: more flags, each with its default and its help. A switch (default False) comes back as "True" or
            "False", a whole number (default an int) as what int() reads.

    Raises:
        UserError: a flag, a field or a value is wrong; for a mistake in the file it names file and line.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "the experiment: FILE.py or FILE.py:variant", flag_values=values, sys_argv=["", *argv]
    )
    for name, text in others.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, (default, text) in optional.items():
        if isinstance(default, bool):
            flags.DEFINE_boolean(name, default, text, flag_values=values)
        elif isinstance(default, int):
            flags.DEFINE_integer(name, default, text, flag_values=values)
        else:
            flags.DEFINE_string(name, default, text, flag_values=values)
    usage = "expected --config=FILE.py[:variant] " + " ".join(f"--{name}=..." for name in others)
    path = _config_path(argv)
    if path is not None and not Path(path).is_file():
        raise UserError(f"{path}: no such config file; {usage}")
    try:
        rest = values(["", *argv])
    except (flags.Error, *MISTAKES) as error:
        place = _place_in(path, error)
        what = "KeyError: " if place and isinstance(error, KeyError) else ""  # its message is the key alone
        raise UserError(place + what + _last_line(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; {usage}")
    if missing := [name for name in ("config", *others) if values[name].value is None]:
        raise UserError(f"--{missing[0]} is missing; {usage}")
    if not isinstance(values.config, kind):
        raise UserError(f"{path}: get_config must return a {kind.__name__}, got {type(values.config).__name__}")
    return values.config, {name: str(values[name].value) for name in (*others, *optional)}


def _config_path(argv: Sequence[str]) -> str | None:
    """Return the file of --config=FILE:variant or --config FILE:variant."""
    for argument, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return (value if equals else following).split(":")[0]
    return None


def _place_in(path: str | None, error: BaseException | None) -> str:
    """Return "file:line: " if the error, or one that it hides, came out of the config file."""
    while path is not None and error is not None:
        if isinstance(error, SyntaxError) and error.lineno is not None:
            return f"{error.filename}:{error.lineno}: "
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(path).resolve()]
        if lines:
            return f"{path}:{lines[-1]}: "
        error = error.__context__
    return ""


def _last_line(error: BaseException) -> str:
    """Return the last line of the message: ml_collections puts a whole traceback before the cause."""
    lines = str(error.args[0] if error.args else "").strip().splitlines() or [type(error).__name__]
    return lines[-1]
