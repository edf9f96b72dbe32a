"""What both sides need of a network: loopback addresses, and calls that can be abandoned."""

from collections.abc import Callable
from concurrent.futures import Future
from ipaddress import ip_address
from threading import Thread
from typing import Protocol, TypeVar

T = TypeVar("T")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, so that nothing on the way can read along.

    Names below `localhost` are not: which address they have is up to the resolver.
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
