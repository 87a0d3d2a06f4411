"""SIGTERM and Ctrl-C: a training step in progress ends and is saved before the process leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Stopped(BaseException):
    """A signal asked this process to leave. No error: no handler of errors should see it.

    Args:
        number: the signal's.
        said: where it stopped, and how to go on (None: whoever catches it may know).
    """

    def __init__(self, number: int, said: str | None = None):
        super().__init__(f"stopped by {signal.Signals(number).name}" + (f"; {said}" if said else ""))
        self.number, self.said = number, said
        self.status = 128 + number  # as shells have it


@contextmanager
def stopped_with(said: str) -> Iterator[None]:
    """A signal that comes within ends it as `Stopped` with these words, unless the work had words of its own."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, said) from None
    except Stopped as stop:
        raise Stopped(stop.number, stop.said or said) from None


@dataclass
class Asked:
    """Whether a signal came, and which."""

    number: int | None = None


def _raise(number, frame):
    raise Stopped(number)


@contextmanager
def raised() -> Iterator[None]:
    """SIGTERM raises `Stopped`, as Ctrl-C raises KeyboardInterrupt; other handlers than the default one stay."""
    before = _set((signal.SIGTERM,), _raise)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def held() -> Iterator[Asked]:
    """SIGTERM and Ctrl-C are noted in what this yields, and do nothing else. A second one acts as before, at once."""
    asked = Asked()

    def note(number, frame):
        asked.number = number
        _restore(before)

    before = _set((signal.SIGINT, signal.SIGTERM), note)
    try:
        yield asked
    finally:
        _restore(before)


def _set(numbers, handler) -> dict:
    """Set a handler where nobody else has set one (a cluster's launcher may); returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python allows it nowhere else
    ours = (signal.SIG_DFL, signal.default_int_handler, _raise)
    before = {number: found for number in numbers if (found := signal.getsignal(number)) in ours}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(before) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
