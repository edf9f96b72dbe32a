"""A desk beside a table that a sweep has filled, as a pytest plugin."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Event
from typing import Any

import httpx
import pytest

from tests.support.sweep_world import World, settings
from worker.cli.session import Session, opened_session

OpenSession = Callable[..., Session]


@pytest.fixture
def open_session(quick_world: World) -> Iterator[OpenSession]:
    """Return a function that opens a desk; its options are those of a sweep."""
    with ExitStack() as opened:

        def open_one(**options: Any) -> Session:
            chosen = settings(quick_world.project, **options)
            transport = httpx.WSGITransport(quick_world.api)
            session = opened_session(chosen, quick_world.url, Event(), transport)
            return opened.enter_context(session)

        yield open_one


@pytest.fixture
def session(quick_world: World, open_session: OpenSession) -> Session:
    """Return a desk beside a table with ten users."""
    quick_world.project.populate(10)
    quick_world.sweep()
    return open_session()
