"""Where a worker works, and how: a database, a project's API, a clock, and its settings."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from threading import Event
from typing import Any

from tests.support.sweep_world import API_URL
from worker.sandbox.api import FakeStackApi
from worker.settings.settings import Settings

# A worker that gives up at the first failure, and one that tries again.
AT_ONCE, LATER = 1e-9, 5


class Manner(Enum):
    """How a worker works: `--once`, with and without patience, or until it is stopped."""

    HASTY = "once, hasty"
    ONCE = "once"
    LONG = "long-running"
    QUIET = "quiet"

    @property
    def lasts(self) -> bool:
        return self in {Manner.LONG, Manner.QUIET}


@dataclass(frozen=True)
class Site:
    """Where a worker works: a database, a project's API, a clock; `options` are settings."""

    url: str
    api: FakeStackApi
    monotonic: Callable[[], float]
    options: dict[str, Any]

    def settings(self, manner: Manner) -> Settings:
        patience = {"retry_minutes": AT_ONCE if manner is Manner.HASTY else LATER}
        sections: dict[str, dict[str, Any]] = {
            "stack": {
                "api_url": API_URL,
                "project_id": self.api.project.project_id,
                "secret_server_key": self.api.project.secret_server_key,
                **patience,
            },
            "database": {"quiet": manner is Manner.QUIET, **patience},
        }
        for section, values in self.options.items():
            sections[section] = {**sections.get(section, {}), **values}
        return Settings.model_validate(sections)


class Impatient(Event):
    """A stop for whose sake nobody pauses: what is to be tried again is tried at once."""

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        return super().wait(0)


class Silent:
    """Watches nothing."""

    def failed(self, service: str, error: str) -> None: ...

    def succeeded(self, service: str) -> None: ...

    def answered(self, status: str, seconds: float) -> None: ...

    def took(self, service: str, seconds: float) -> None: ...

    def moved(self) -> None: ...

    def stalled(self) -> bool:
        return False
