"""Fingerprints are kept between runs, so that they are the same for ever."""

from worker.stack_auth.fingerprint import FINGERPRINT_VERSION, fingerprint_of_fields

FIELDS = {"id": b'"a"', "signed_up_at_millis": b"5", "display_name": b'"Ada \\u00e9"'}


def test_fingerprint_of_this_version_is_the_same_in_every_process() -> None:
    """Whoever changes how a fingerprint is made gives it another version."""
    made = fingerprint_of_fields(FIELDS).hex()
    assert (FINGERPRINT_VERSION, made) == (1, "8ec7a0012c653a1b")


def test_order_of_fields_makes_no_difference() -> None:
    turned = dict(reversed(FIELDS.items()))
    assert fingerprint_of_fields(turned) == fingerprint_of_fields(FIELDS)
