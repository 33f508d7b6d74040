import itertools
import threading
import time

import pytest

from pippin.train.input.prefetch import Prefetch


def test_items_come_in_order_and_end() -> None:
    prefetch = Prefetch(iter(range(10)), 3)
    assert list(prefetch) == list(range(10))
    with pytest.raises(StopIteration):
        next(prefetch)


def test_only_so_many_are_made_ahead() -> None:
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    prefetch = Prefetch(items(), 3)
    assert next(prefetch) == 0
    time.sleep(0.3)
    assert len(made) == 5  # one taken, three ready, one in hand
    prefetch.close()


def test_an_error_comes_after_the_items_before_it_and_stays() -> None:
    def items():
        yield 1
        raise ValueError("no more")

    prefetch = Prefetch(items(), 2)
    assert next(prefetch) == 1
    for _ in range(3):
        with pytest.raises(ValueError, match="no more"):
            next(prefetch)


def test_closing_ends_the_thread() -> None:
    prefetch = Prefetch(itertools.count(), 2)
    next(prefetch)
    prefetch.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch" and t.is_alive()]
