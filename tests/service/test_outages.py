"""What is told of troubles: each service that began has its end."""

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.worker_samples import Ticks, sample_vitals
from worker.service.metrics import Metrics
from worker.service.outages import Outages

Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def logs() -> Iterator[Logs]:
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def outages() -> Outages:
    health = sample_vitals(Ticks())
    return Outages(health, Metrics(health.read))


def told(logs: Logs) -> list[tuple[str, str]]:
    return [(line["event"].removeprefix("trouble."), line["service"]) for line in logs]


def test_end_names_the_service_that_the_beginning_named(outages: Outages, logs: Logs) -> None:
    outages.began("the database", "gone")
    outages.began("sweep", "failed")
    outages.ended("the database")
    outages.ended("sweep")
    assert told(logs) == [("began", "the database"), ("ended", "the database")]


def test_service_that_was_told_of_again_as_fatal_ends_as_well(outages: Outages, logs: Logs) -> None:
    outages.began("Stack Auth", "gone")
    outages.began("sweep", "wrong key", fatal=True)
    outages.ended("Stack Auth")
    outages.ended("sweep")
    began, ended = (
        {name for event, name in told(logs) if event == wanted} for wanted in ("began", "ended")
    )
    assert began == ended == {"Stack Auth", "sweep"}


def test_next_trouble_begins_with_nothing_of_the_last(outages: Outages, logs: Logs) -> None:
    for service in ("Stack Auth", "the database"):
        outages.began(service, "gone")
        outages.ended(service)
        outages.ended(service)
    assert told(logs) == [
        ("began", "Stack Auth"),
        ("ended", "Stack Auth"),
        ("began", "the database"),
        ("ended", "the database"),
    ]
