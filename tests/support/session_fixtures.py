"""A desk beside a table that a sweep has filled, as a pytest plugin."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Event
from typing import Any

import httpx
import pytest

from tests.support.sweep_world import World, settings
from worker.cli.session import Desk, opened_desk

OpenDesk = Callable[..., Desk]


@pytest.fixture
def open_desk(quick_world: World) -> Iterator[OpenDesk]:
    """Return a function that opens a desk; its options are those of a sweep."""
    with ExitStack() as opened:

        def open_one(**options: Any) -> Desk:
            chosen = settings(quick_world.project, **options)
            transport = httpx.WSGITransport(quick_world.api)
            desk = opened_desk(chosen, quick_world.url, Event(), transport)
            return opened.enter_context(desk)

        yield open_one


@pytest.fixture
def desk(quick_world: World, open_desk: OpenDesk) -> Desk:
    """Return a desk beside a table with ten users."""
    quick_world.project.populate(10)
    quick_world.sweep()
    return open_desk()
