"""Where a result came from: the git revision and the library versions that made it."""

import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import easylm_like


def git_revision() -> str | None:
    """Return the commit of the checkout this code runs from, "+changes" if it has any; None outside of one."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return {package: version} of what is installed, with our own; a package that is missing is left out."""
    found = {"easylm_like": easylm_like.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
