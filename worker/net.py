"""Does in a thread of its own what nothing can interrupt, so that it may be left behind."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Protocol, TypeVar

T = TypeVar("T")


class Closable(Protocol):
    """What is opened aside."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


def run_abandonable(work: Callable[[], T]) -> Future[T]:
    """Begin with `work`; the process does not wait for its end."""
    outcome: Future[T] = Future()
    Thread(target=_settle, args=(outcome, work), name="aside", daemon=True).start()
    return outcome


def close_when_opened(opening: Future[C]) -> None:
    """Close what was opened as soon as it is open: no thread waits for it any more."""
    opening.add_done_callback(_close_late)


def _close_late(opening: Future[C]) -> None:
    if opening.exception() is None:
        opening.result().close()


def _settle(outcome: Future[T], work: Callable[[], T]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
        outcome.set_exception(error)
