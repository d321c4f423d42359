"""Work done by threads ahead of use, in order."""

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
    """The results of `make` for each item, in order, `depth` of them ahead of use; unused ones are cancelled.

    Raises:
        Whatever `make` raises, at the place of its result.
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
