from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from attar.data.prefetch import prefetch


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "attar-prefetch"]


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(prefetch(iter(range(50)))) == list(range(50))
    assert prefetchers() == []


def test_none_is_an_item_like_any_other() -> None:
    assert list(prefetch(iter([None, 1, None]))) == [None, 1, None]


def test_breaking_out_ends_the_thread() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            made.append(number)
            yield number

    for item in prefetch(items(), depth=2):
        if item == 3:
            break
    assert prefetchers() == []
    assert len(made) <= 3 + 2 + 3  # never far ahead of the consumer


def test_never_started_iterator_starts_no_thread() -> None:
    iterator = prefetch(iter(range(3)))
    assert prefetchers() == []
    del iterator


def test_exception_comes_after_the_good_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    iterator = prefetch(items())
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        next(iterator)
    assert prefetchers() == []


def test_it_works_ahead() -> None:
    made = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(3):
            made.release()
            yield number

    iterator = prefetch(items(), depth=2)
    assert next(iterator) == 0
    assert all(made.acquire(timeout=10) for _ in range(3)), "the next items were not prepared in the background"
    assert list(iterator) == [1, 2]


def test_thread_uses_one_torch_thread_and_leaves_the_others_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def items() -> Iterator[int]:
            for _ in range(2):
                torch.ones(100_000).exp()
                yield torch.get_num_threads()

        assert list(prefetch(items())) == [1, 1]
        assert torch.get_num_threads() == 3
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_slow_consumer_does_not_hold_up_closing() -> None:
    iterator = prefetch(iter(range(1000)), depth=1)
    next(iterator)
    time.sleep(0.05)  # long enough for the thread to block on the full queue
    iterator.close()  # type: ignore[attr-defined]
    assert prefetchers() == []
