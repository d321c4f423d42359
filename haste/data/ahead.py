"""Work done by threads ahead of its use, in order."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def made_ahead(
    make: Callable[[Given], Made], given: Iterable[Given], *, threads: int, depth: int, name: str
) -> Iterator[Made]:
    """What `make` makes of each, in order, `depth` of them ahead of use; what nobody asks for any more is dropped.

    Raises:
        Whatever `make` raises, where its result would have come.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        waiting: collections.deque[Future[Made]] = collections.deque()
        try:
            for one in given:
                waiting.append(pool.submit(make, one))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
