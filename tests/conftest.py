"""What every test shares: eight pretended devices, no network, and the real data that lies beside the checkout.

The settings are made while pytest reads this file, in every worker process, before a test module imports jax.
"""

import os
import sys
from pathlib import Path

import pytest

# Meshes are tested on eight pretended CPU devices. They take turns on the few real cores, so a device may wait for
# the others far longer than the 40 seconds after which XLA takes them for dead and ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
    "--xla_backend_optimization_level=0",  # most of a test's time is compiling: this halves it
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also on a machine with a GPU: the meshes need the eight devices
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file is an error at once, not a look-up on the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the forks of some tests

ROOT = Path(__file__).resolve().parents[1]


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    """Raise when Python code connects to anything but this machine; an audit hook sees every library's sockets."""
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for the network: {address}")


sys.addaudithook(_refuse_network)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the folder that holds tests/ and configs/: the checkout, or its stand-in when the wheel is tested."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets; without it a test is skipped, in CI it fails."""
    folder = Path(os.environ.get("EASYLM_LIKE_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        sentence = f"no test data in {folder}; set EASYLM_LIKE_TEST_DATA to the folder that holds it"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    return folder.resolve()
