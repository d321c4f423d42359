"""Work done by threads: ahead of use, in order; or a batch's reads at once."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reading_threads(asked: int | None) -> int:
    """`runtime.loader_threads` of a rank: reads wait for disks, so by default four for each of its cores, 8 to 32."""
    return asked or min(32, max(8, 4 * cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextlib.contextmanager
def spread(threads: int, name: str) -> Iterator[Callable[[Callable[[Given], None], Sequence[Given]], None]]:
    """A function that calls another with each of some items, in so many threads, and returns once all are done. What
    the other raises, it raises."""
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:

        def run(work: Callable[[Given], None], items: Sequence[Given]) -> None:
            def run_part(first: int) -> None:
                for item in items[first::threads]:
                    work(item)

            for _ in pool.map(run_part, range(min(threads, len(items)))):
                pass

        yield run
