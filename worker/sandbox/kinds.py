"""The two kinds of users API that are in use, and what tells them apart."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """How a server answers.

    `cap` is the largest limit it takes; a list `inclusive` of the cursor's user names the first
    user of the next page as `next_cursor`, the other one the last user of this page.
    `orders` are the values of `order_by`; `most_unlimited` is how many users come without a limit.
    """

    cap: int | None
    inclusive: bool
    orders: tuple[str, ...]
    most_unlimited: int | None
    known_error_headers: tuple[str, ...]
    header_prefixes: tuple[str, ...]
    gzip: bool
    redirects: bool
    knows_include_anonymous: bool = True


# Stack Auth 2.8.86; self-hosted servers that were not updated since.
APRIL = Kind(
    cap=None,
    inclusive=True,
    orders=("signed_up_at",),
    most_unlimited=None,
    known_error_headers=("x-stack-known-error",),
    header_prefixes=("x-stack-",),
    gzip=False,
    redirects=False,
)

# Hexclave from about August 2026; hosted. Of two request headers the newer name wins.
TODAY = Kind(
    cap=1_000,
    inclusive=False,
    orders=("signed_up_at", "last_active_at"),
    most_unlimited=1_000,
    known_error_headers=("x-stack-known-error", "x-hexclave-known-error"),
    header_prefixes=("x-hexclave-", "x-stack-"),
    gzip=True,
    redirects=True,
)
