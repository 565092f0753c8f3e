"""What the hosts of one run do together. On a single host all of it is nothing.

They talk through the service that jax.distributed starts on the first host and not through a collective of their
devices: that one gives up when a host lets the others wait (30 seconds on CPUs), as one that tokenises does.
"""

import itertools
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from easylm_like.errors import UserError

Json = TypeVar("Json")
Result = TypeVar("Result")

DAY = 24 * 3600 * 1000  # milliseconds; a host that dies ends the others after 100 seconds, however long they would wait

_meetings = itertools.count()  # the number of the next one; every host comes to every meeting


class _ToldError(UserError):
    """A mistake that every host knows of."""


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
    return _meet(answer)[0]["result"]  # type: ignore[return-value]  # as `do` returned it, but for tuples


def on_every_host(do: Callable[[], Result]) -> Result:
    """Return what `do` returns here, when it has returned on every host; it may meet the others with `on_first_host`.

    Raises:
        UserError: `do` raised one, or an OSError, on some host; all hosts raise it.
    """
    if jax.process_count() == 1:
        return do()
    try:
        result = do()
    except _ToldError:
        raise
    except (UserError, OSError) as error:
        _meet({"error": str(error)})
        raise
    _meet({})
    return result


def _meet(mine: dict[str, object]) -> list[dict[str, object]]:
    """Return what every host says, in their order; the first one collects it.

    Raises:
        UserError: one says "error".
    """
    service, host = ocp.multihost.get_jax_distributed_client(), jax.process_index()
    meeting = f"easylm_like/{next(_meetings)}"
    service.key_value_set(f"{meeting}/{host}", json.dumps(mine))
    if host == 0:
        said = [service.blocking_key_value_get(f"{meeting}/{i}", DAY) for i in range(jax.process_count())]
        service.key_value_set(f"{meeting}/all", f"[{', '.join(said)}]")
    answers: list[dict[str, object]] = json.loads(service.blocking_key_value_get(f"{meeting}/all", DAY))
    for i, answer in enumerate(answers):
        if "error" in answer:
            raise _ToldError(f"host {i}: {answer['error']}" if i else str(answer["error"]))
    return answers
