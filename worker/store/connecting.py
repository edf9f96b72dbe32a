"""Opens connections whose failure tells its SQLSTATE, and says what the failure means."""

import ctypes
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import psycopg
from psycopg import pq
from psycopg.abc import PQGenConn
from psycopg.pq.abc import PGconn
from psycopg.waiting import Wait

from worker.errors import Misconfigured, Transient, UsersSyncError
from worker.settings.names import Names

# A database that sleeps when idle takes some seconds to wake up.
CONNECT_SECONDS = 10

# PQERRORS_DEFAULT and PQERRORS_VERBOSE of libpq-fe.h; the verbose form includes the SQLSTATE.
_DEFAULT, _VERBOSE = 1, 2

# What the server or a pooler said, as libpq quotes it: severity, SQLSTATE, words. The severity and
# the words are in the server's language; libpq's own words are English, for we set no locale.
_SAID_BY_SERVER = re.compile(r"failed: [^:\n]+:  (?:([0-9A-Z]{5}): )?(.*)")

# Invalid authorization, no such database, and what the URL's options may have wrong.
_REFUSED_CLASSES = {"22", "28", "3D", "42"}
# The server has no place, or is starting or stopping.
_BUSY_CLASSES = {"53", "57"}

# Poolers give SQLSTATEs that say little, such as 08P01 and XX000. They and old servers' words:
_REFUSED_BEGINNINGS = (
    "no pg_hba.conf entry",
    "pg_hba.conf rejects",
    "permission denied for database",
    "role ",
    "database ",
    # PgBouncer
    "no such database",
    "no such user",
    "unsupported startup parameter",
    "SSL required",
    "TLS required",
    # Supavisor
    "Tenant or user not found",
    "There is no user ",
    "SSL connection is required",
    "no tenant identifier provided",
    # Neon
    "Endpoint ID is not specified",
    "Malformed endpoint ID",
    "Inconsistent project name",
    "The requested endpoint could not be found",
    "connection is insecure",
    # Amazon RDS
    "This RDS proxy has no credentials",
    "This RDS Proxy requires TLS",
)
_REFUSED_ANYWHERE = ("authentication failed", "(ENOTFOUND)")
# PgBouncer passes on what its own connection to the server met.
_PASSED_ON = re.compile(r"server login (?:failed: \w+ |has been failing, cached error: )")
# `alter database … allow_connections false`, as for a restore or an upgrade.
_CLOSED_FOR_NOW = "is not currently accepting connections"

_REFUSED_BY_LIBPQ = (
    "certificate",
    "private key file",
    "no password supplied",
    "but SSL was required",
    "authentication method requirement",
    "channel binding required",
    "connection is bad: invalid",
    "definition of service",
    "service file",
    "could not parse network address",
    "could not match",
)


@dataclass(frozen=True, slots=True)
class _Said:
    """What the server said instead of letting us in; no SQLSTATE if libpq does not give it."""

    state: str
    words: str

    @property
    def refuses(self) -> bool:
        """Whether a person must act, rather than the server come back."""
        words = _PASSED_ON.sub("", self.words, count=1)
        if words.endswith(_CLOSED_FOR_NOW):
            return False
        return (
            self.state[:2] in _REFUSED_CLASSES
            or words.startswith(_REFUSED_BEGINNINGS)
            or any(text in words for text in _REFUSED_ANYWHERE)
        )

    def __str__(self) -> str:
        return f"{self.words} ({self.state})" if self.state else self.words


def not_connected(error: psycopg.Error, names: Names) -> UsersSyncError:
    """Say what an error without an SQLSTATE of its own means for the caller."""
    lines = str(error).strip().splitlines()
    reason = lines[0].strip() if lines else type(error).__name__
    said = [_Said(state or "", words) for state, words in _SAID_BY_SERVER.findall(str(error))]
    refusals = [str(each) for each in said if each.refuses]
    if refusals or any(text in reason for text in _REFUSED_BY_LIBPQ):
        return Misconfigured(
            f"{names.database} does not let us in: {refusals[0] if refusals else reason};"
            f" see {names.database_url}"
        )
    if any(each.state and each.state[:2] not in _BUSY_CLASSES for each in said):
        reason += f"; if it keeps saying so, see {names.database_url}"
    return Transient(f"no connection to {names.database}: {reason}")


def opening(conninfo: str) -> PQGenConn[PGconn]:
    """Connect as psycopg does, with the SQLSTATE in the text of a failure."""
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    if pgconn.status == pq.ConnStatus.BAD:
        raise _failure("connection is bad", pgconn)
    _set_verbosity(pgconn, _VERBOSE)
    ends_at = time.monotonic() + CONNECT_SECONDS
    while (status := pgconn.connect_poll()) != pq.PollingStatus.OK:
        if status == pq.PollingStatus.FAILED:
            raise _failure("connection failed", pgconn)
        wait = Wait.R if status == pq.PollingStatus.READING else Wait.W
        # Nothing is sent when psycopg's look at the socket, ten times a second, found nothing.
        while not (yield pgconn.socket, wait):
            if time.monotonic() > ends_at:
                raise psycopg.errors.ConnectionTimeout("connection timeout expired")
    _set_verbosity(pgconn, _DEFAULT)
    pgconn.nonblocking = 1
    return pgconn


def _failure(what: str, pgconn: PGconn) -> psycopg.OperationalError:
    error = psycopg.OperationalError(f"{what}: {pgconn.get_error_message()}")
    pgconn.finish()
    return error


def _set_verbosity(pgconn: PGconn, verbosity: int) -> None:
    setter = _verbosity_setter()
    # The address of libpq's own connection; psycopg's type leaves it out.
    address: int | None = getattr(pgconn, "pgconn_ptr", None)
    if setter is not None and address:
        setter(address, verbosity)


@cache
def _verbosity_setter() -> Callable[[int, int], int] | None:
    """Find libpq's PQsetErrorVerbosity, which psycopg does not offer.

    A look-up in psycopg's compiled module finds the libpq that it is linked with. Where there is
    no such module, or no such look-up, as on Windows, failures are told apart by their words.
    """
    module = sys.modules[pq.PGconn.__module__]
    try:
        setter = ctypes.CDLL(str(module.__file__)).PQsetErrorVerbosity
    except (OSError, AttributeError):
        return None
    setter.argtypes = [ctypes.c_void_p, ctypes.c_int]
    found: Callable[[int, int], int] = setter
    return found
