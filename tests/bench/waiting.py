"""Waits, but not for ever: a measurement that hangs tells nothing."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0


def until(
    what: str,
    holds: Callable[[], bool],
    patience_seconds: float = PATIENCE_SECONDS,
    look_seconds: float = 0.01,
) -> None:
    """Wait until something holds. Raises TimeoutError, which says what was awaited."""
    deadline = time.monotonic() + patience_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"in vain waited until {what}")
        time.sleep(look_seconds)
