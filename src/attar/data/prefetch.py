"""Prepare the next items in one background thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch

__all__ = ["prefetch"]

Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """Yield `items` in order, prepared up to `depth` ahead; an exception in `items` is raised in its place.

    The thread starts with the first item asked for and has ended when the iterator is exhausted, closed, or dropped
    (a `break` out of a loop over it).
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
    started, stop = threading.Event(), threading.Event()

    def work() -> None:
        # Torch keeps a thread count per thread and a global default for new ones. This thread gets one: otherwise it
        # would take processors from the training step; everybody else keeps the old default, put back below.
        torch.set_num_threads(1)
        torch.get_num_threads()  # settles this thread's count before the default is put back
        started.set()
        try:
            for item in items:
                ready.put((item, None))
                if stop.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=work, name="attar-prefetch", daemon=True)
    threads = torch.get_num_threads()
    thread.start()
    started.wait()
    torch.set_num_threads(threads)
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        while thread.is_alive():  # it may be blocked on a full queue: make room until it sees the stop
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)
        thread.join()
