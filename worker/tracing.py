"""Stretches of work, told to a tracer, if `tracing` names one.

As the log is, the tracer is the process's own: nothing that is traced has to be handed one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Note(Protocol):
    """Takes figures and words about a stretch; none may hold a secret, a name or an email."""

    def __call__(self, **what: str | float) -> None: ...


Tracer = Callable[[str], AbstractContextManager[Note]]
"""Follows one stretch of work, by its name, from when it is entered until it is left."""


_UNTRACED: AbstractContextManager[Note] = nullcontext(lambda **_what: None)
_tracers: list[Tracer] = []


def traced(name: str) -> AbstractContextManager[Note]:
    """Trace what happens inside: a `sweep`, a `page` or a `transaction`; gives what notes it."""
    return _tracers[-1](name) if _tracers else _UNTRACED


@contextmanager
def tracing(tracer: Tracer) -> Iterator[None]:
    """Let this tracer follow what the process does inside, in all of its threads."""
    _tracers.append(tracer)
    try:
        yield
    finally:
        _tracers.remove(tracer)
