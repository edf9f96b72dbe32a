"""What is told of troubles: each service that began has its end."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.worker_samples import Ticks, sample_vitals
from worker.service.metrics import Metrics
from worker.service.outages import Troubles

Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def logs() -> Iterator[Logs]:
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def troubles() -> Troubles:
    health = sample_vitals(Ticks())
    return Troubles(health, Metrics(health.snapshot))


def told(logs: Logs) -> list[tuple[str, str]]:
    return [(line["event"].removeprefix("trouble."), line["service"]) for line in logs]


def test_end_names_the_service_that_the_beginning_named(troubles: Troubles, logs: Logs) -> None:
    troubles.began("the database", "gone")
    troubles.began("sweep", "failed")
    troubles.ended("the database")
    troubles.ended("sweep")
    assert told(logs) == [("began", "the database"), ("ended", "the database")]


def test_service_that_was_told_of_again_as_fatal_ends_as_well(
    troubles: Troubles, logs: Logs
) -> None:
    troubles.began("Stack Auth", "gone")
    troubles.began("sweep", "wrong key", fatal=True)
    troubles.ended("Stack Auth")
    troubles.ended("sweep")
    began, ended = (
        {name for event, name in told(logs) if event == wanted} for wanted in ("began", "ended")
    )
    assert began == ended == {"Stack Auth", "sweep"}


def test_next_trouble_begins_with_nothing_of_the_last(troubles: Troubles, logs: Logs) -> None:
    for service in ("Stack Auth", "the database"):
        troubles.began(service, "gone")
        troubles.ended(service)
        troubles.ended(service)
    assert told(logs) == [
        ("began", "Stack Auth"),
        ("ended", "Stack Auth"),
        ("began", "the database"),
        ("ended", "the database"),
    ]
