"""Waits for what another thread or process does, within a bound."""

import time
from collections.abc import Callable

# Much longer than anything takes that does not hang.
PATIENCE_SECONDS = 60.0


def until(
    what: str,
    holds: Callable[[], object],
    patience_seconds: float = PATIENCE_SECONDS,
    look_seconds: float = 0.01,
) -> None:
    """Wait until something holds. Raises TimeoutError, which says what was awaited."""
    deadline = time.monotonic() + patience_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain until {what}")
        time.sleep(look_seconds)
