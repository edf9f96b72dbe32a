"""What can go wrong, named by what the caller must do about it.

UsersSyncError
├── Transient            try again now: network, 429, 5xx, broken body, lost connection, deadlock
├── SourceUnavailable    Stack Auth could not be read: its retries are used up
├── DatabaseUnavailable  the database could not be used: its retries are used up
├── SweepIncomplete      the list could not be walked to its end; nothing was deleted
├── LeaseLost            another worker may write now: stop at once
├── MirrorOutdated       another writer changed the table: reload, go on from the checkpoint
├── Blocked              a lock or statement time-out: try with fewer rows
├── Misconfigured        a person must act; the message says what, where, and the fix
│   ├── DataRefused      the database refuses some row: find it, quarantine it; else a person acts
│   ├── LimitRefused     the users API gives fewer users at once: ask for less, and remember
│   ├── OrderRefused     the users API does not know an order: do without
│   └── UpdatesRefused   the table takes new rows alone: insert them, then fail
└── Stopped              the worker was asked to stop
"""


class UsersSyncError(Exception):
    """Any error that this program raises on purpose."""


class Transient(UsersSyncError):
    """Worth another try.

    `retry_after` is what the server asked for, in seconds. `too_much` says that a smaller page
    might have passed: a time-out, a 5xx, a body that was cut off or too long. `unsent` says that
    the API cannot have acted on the request: there was no connection, or it answered 429.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        too_much: bool = False,
        unsent: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.too_much = too_much
        self.unsent = unsent


class SourceUnavailable(UsersSyncError):
    """Stack Auth could not be read within `stack.retry_minutes`."""


class DatabaseUnavailable(UsersSyncError):
    """The database could not be used within `database.retry_minutes`."""


class SweepIncomplete(UsersSyncError):
    """The list could not be walked to a proven end."""


class LeaseLost(UsersSyncError):
    """Another worker holds the lease, or took it."""


class MirrorOutdated(UsersSyncError):
    """Another writer changed the table since the mirror was loaded."""


class Blocked(UsersSyncError):
    """A row is locked for longer than we wait, or the statement took too long."""


class Misconfigured(UsersSyncError):
    """A person must act."""


class DataRefused(Misconfigured):
    """A statement that the database refuses for some row, or that code of the database's refuses.

    `code` is the SQLSTATE and the name of a constraint, all that may be kept of it: the server's
    own text may hold emails. Where no row is to blame, a person must act. `in_code` says that it
    arose in code such as a trigger, whose author may raise any SQLSTATE.
    """

    def __init__(
        self, message: str, sqlstate: str, constraint: str | None = None, *, in_code: bool = False
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.constraint = constraint
        self.in_code = in_code

    @property
    def blames_data(self) -> bool:
        """Whether the record itself is odd, as far as one can tell: a class of the data alone."""
        return self.sqlstate[:2] in {"22", "54"} and not self.in_code

    @property
    def code(self) -> str:
        return f"{self.sqlstate} {self.constraint}" if self.constraint else self.sqlstate


class LimitRefused(Misconfigured):
    """The users API refused the `limit` of a request.

    `largest` is the largest limit that it says it takes, or None if it names none.
    """

    def __init__(self, message: str, largest: int | None = None) -> None:
        super().__init__(message)
        self.largest = largest


class OrderRefused(Misconfigured):
    """The users API cannot list users by their activity."""


class UpdatesRefused(Misconfigured):
    """A publication, or a table without replica identity, forbids every update of the table."""


class Stopped(UsersSyncError):
    """A signal asked the worker to end."""


def told(error: Exception) -> str:
    """Say what went wrong; of an error that is not ours only its kind, for it may quote a user."""
    return str(error) if isinstance(error, UsersSyncError) else f"a bug: {type(error).__name__}"
