"""What the hosts of one run do together. On a single host all of it is nothing."""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from easylm_like.errors import UserError

Json = TypeVar("Json")


def join_hosts(coordinator: str = "", hosts: int = 0, host: int = -1) -> None:
    """Connect this process with the others of the run, before anything else asks jax for its devices.

    Args:
        coordinator: HOST:PORT of the first host. Empty: what the TPU pod, Slurm, Open MPI or Kubernetes says, or
            JAX_COORDINATOR_ADDRESS.
        hosts: how many processes there are; with `coordinator`.
        host: which of them this is, from 0 on; with `coordinator`.

    Raises:
        UserError: the arguments are incomplete, nothing here says who the others are, or they do not answer.
    """
    if coordinator and not 0 <= host < hosts:
        raise UserError(f"--coordinator={coordinator} needs --hosts=N and --host=0...N-1, got {hosts} and {host}")
    try:
        if coordinator:
            jax.distributed.initialize(coordinator, hosts, host)
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the hosts do not come together: {str(error).splitlines()[0]}; start the same command on every host, or "
            "name them with --coordinator=HOST:PORT --hosts=N --host=I"
        ) from error


def on_first_host(do: Callable[[], Json]) -> Json:
    """Return on every host what `do` returned on the first, where alone it is called; it must be JSON.

    Raises:
        UserError: `do` raised one, or an OSError; all hosts raise it.
    """
    if jax.process_count() == 1:
        return do()
    answer: dict[str, object] = {}
    if jax.process_index() == 0:
        try:
            answer = {"result": do()}
        except (UserError, OSError) as error:
            answer = {"error": str(error)}
    message = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    message = multihost_utils.broadcast_one_to_all(np.resize(message, size))
    answer = json.loads(np.asarray(message, np.uint8).tobytes())
    if "error" in answer:
        raise UserError(str(answer["error"]))
    return answer["result"]  # type: ignore[return-value]  # as `do` returned it, but for tuples
