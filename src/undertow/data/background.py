"""Long work in compiled code, done in a thread, so that Ctrl-C and SIGTERM are heard while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_STEP = 0.1  # seconds of waiting at once: on Windows a wait without end hears no signal


class Left(Exception):
    """Nobody waits for the work any more."""


def heard(work: Callable[[threading.Event], T]) -> T:
    """The result of `work`, run in a thread of its own; what it raises is raised here.

    Python runs the handlers of signals in its main thread, between two steps of Python: inside a long call they would
    wait for its end. Where a handler raises, the work is left: it ends with the process, or sooner where it looks at
    the event that it is given (see `while_wanted`).
    """
    if threading.current_thread() is not threading.main_thread():
        return work(threading.Event())  # signals come to another thread
    left, outcome = threading.Event(), Future[T]()

    def run() -> None:
        try:
            outcome.set_result(work(left))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()  # inside: a handler may raise as soon as it runs
        while thread.is_alive():
            thread.join(_STEP)
    except BaseException:
        left.set()
        thread.join(1.0)  # what ends by itself is not cut off by the end of the process
        raise
    return outcome.result()


def while_wanted(items: Iterable[T], left: threading.Event) -> Iterator[T]:
    """The items; raises `Left` at the next one once the event is set."""
    for item in items:
        if left.is_set():
            raise Left
        yield item
