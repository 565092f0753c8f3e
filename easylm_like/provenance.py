"""Where a result came from: the git revision and the library versions that made it."""

import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import easylm_like


def git_revision() -> str | None:
    """Return the commit of the checkout this code runs from, "+changes" if it has any; None outside of one."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # not the repository that a virtual environment is in
        return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return {package: version} of what is installed, with our own; a package that is missing is left out."""
    found = {"easylm_like": easylm_like.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
