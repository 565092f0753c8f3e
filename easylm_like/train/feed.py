"""Batches for the loop, each made in the background while the step before it runs."""

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(load: Callable[[int], Item], numbers: range) -> Generator[tuple[Item, float], None, None]:
    """Yield (load(number), the seconds that the caller waited for it) for every number; one thread is one item ahead.

    What `load` raises is raised here, when it is the number's turn. Close the iterator to end the thread early.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        coming = [thread.submit(load, number) for number in numbers[:1]]
        for number in numbers:
            began = time.perf_counter()
            item = coming.pop().result()
            waited = time.perf_counter() - began
            coming += [thread.submit(load, following) for following in range(number + 1, min(number + 2, numbers.stop))]
            yield item, waited
