"""Fingerprints are kept between runs, so that they are the same for ever."""

import json
from typing import Any

import msgspec
import pytest

from tests.support.places import SAMPLES
from worker.stack_auth.fingerprint import FINGERPRINT_VERSION, KNOWN, read_columns

USER: dict[str, Any] = {
    "id": "2b30909a-3cd4-4f9b-bff8-6f8b87b595f0",
    "signed_up_at_millis": 5,
    "display_name": "Ada é",
    "last_active_at_millis": 7,
}
IGNORED = ("last_active_at_millis",)


def fingerprint_of(record: dict[str, Any], ignored: tuple[str, ...] = IGNORED) -> bytes:
    [fingerprint] = read_columns([msgspec.Raw(json.dumps(record).encode())], ignored)[2]
    return fingerprint


def test_fingerprint_of_this_version_is_the_same_in_every_process() -> None:
    """Whoever changes how a fingerprint is made gives it another version."""
    made = fingerprint_of(USER).hex(), fingerprint_of(USER | {"later": 1}).hex()
    assert (FINGERPRINT_VERSION, *made) == (2, "db2ffa11fe5f46a7", "56e35092df064ac0")


@pytest.mark.parametrize("others", [{}, {"later": 1, "added": {"b": 1}}], ids=["known", "others"])
def test_order_of_fields_makes_no_difference(others: dict[str, Any]) -> None:
    record = USER | others
    turned = dict(reversed(record.items()))
    assert fingerprint_of(turned) == fingerprint_of(record)


@pytest.mark.parametrize(
    "changed",
    [
        {"display_name": None},
        {"primary_email": None},
        {"later": None},
        {"later": 1},
        {"LATER": None},
        {"display_name": "", "primary_email": "Ada é"},
    ],
)
def test_record_that_differs_in_any_field_has_another_fingerprint(changed: dict[str, Any]) -> None:
    assert fingerprint_of(USER | changed) != fingerprint_of(USER)


def test_fields_of_two_kinds_are_not_mixed_up() -> None:
    """The last of the fields that are known stands before all others."""
    assert fingerprint_of(USER | {"risk_scores": {"later": 1}}) != fingerprint_of(
        USER | {"later": 1}
    )


def test_field_that_vanishes_gives_another_fingerprint() -> None:
    for name in ("display_name", "later"):
        record = USER | {"later": None}
        assert fingerprint_of({n: v for n, v in record.items() if n != name}) != fingerprint_of(
            record
        )


@pytest.mark.parametrize("name", ["last_active_at_millis", "later"])
def test_ignored_field_makes_no_difference_known_or_not(name: str) -> None:
    ignored = (*IGNORED, "later")
    without = {n: v for n, v in USER.items() if n != name}
    assert fingerprint_of(without | {name: 8}, ignored) == fingerprint_of(without, ignored)


def test_every_field_of_the_recorded_answers_is_known() -> None:
    """Else each of their users would be read the slow way."""
    for sample in ("list-everything", "today-list-first-page-limit-3", "user-rich"):
        answer = json.loads((SAMPLES / f"{sample}.http").read_bytes().partition(b"\n\n")[2])
        for record in answer.get("items", [answer]):
            assert record.keys() == KNOWN, sample
