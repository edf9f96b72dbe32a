"""Does in a thread of its own what nothing can interrupt, so that it may be left behind."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def aside(work: Callable[[], T]) -> Future[T]:
    """Begin with `work`; the process does not wait for its end."""
    outcome: Future[T] = Future()
    Thread(target=_settle, args=(outcome, work), name="aside", daemon=True).start()
    return outcome


def _settle(outcome: Future[T], work: Callable[[], T]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
        outcome.set_exception(error)
