"""The soak of benchmarks/serve_soak.py, for as long as a test may take."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.checkout
def test_answers_stay_right_and_nothing_leaks_under_clients_that_do_not_behave(folder: Path, root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serve_soak", f"--model={folder}", "--quick"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
