"""What the worker remembers between sweeps and polls, and which of two answers is the newer one."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain
from threading import RLock
from typing import TypeVar

import structlog

from worker.errors import Blocked, MirrorOutdated
from worker.ids import ID_BYTES, unpack_all
from worker.model import Users
from worker.store import Store
from worker.store.census import Census
from worker.store.connection import LONGEST_SECONDS, Connection
from worker.store.invalidations import MOST_TOUCHED
from worker.store.snapshots import Snapshot
from worker.store.suspects import Suspect
from worker.store.transaction import LIMITS, limits
from worker.sync.mirror import Delta, Mirror
from worker.sync.refusals import Refusals
from worker.sync.saved import Saved

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")


@dataclass(slots=True)
class Cache:
    """The mirror with what belongs to it, true as long as there is no other writer.

    `lock` is held from comparing an answer through applying to accepting it; answers are fetched
    outside. `suspects` and `quarantined` are what is recorded in the database: the digest of each
    record in quarantine, or none if its user was stored since. `refusals` are the users among them
    whom the database refused; `unmarked` those whom it refuses to mark deleted. `generation` rises
    when all of it is loaded again: answers requested before that are discarded.
    """

    mirror: Mirror = field(default_factory=Mirror)
    suspects: dict[str, Suspect] = field(default_factory=dict)
    quarantined: dict[str, str] = field(default_factory=dict)
    refusals: Refusals = field(default_factory=Refusals)
    unmarked: set[str] = field(default_factory=set)
    generation: int = 0
    census: Census | None = None
    # Whether all rows were compared with the list since they were loaded.
    compared: bool = False
    on_inserted: Callable[[Users], None] = lambda _users: None
    on_replaced: Callable[[], None] = lambda: None
    lock: RLock = field(default_factory=RLock)
    _under_way: list[datetime] = field(default_factory=list)
    # When an answer was asked for, and the packed ids of those of whom it was accepted.
    _accepted: list[tuple[datetime, bytes]] = field(default_factory=list)
    # The lease's `distrusted` at the last reload.
    _distrusted: int = 0
    # Live rows whose ids are not Stack Auth's.
    _strange: int = 0
    _saved: Saved = field(default_factory=Saved)

    def start(self, store: Store) -> None:
        """Load as `load` does, but know of each row what the snapshot says, if that is proven."""
        with self.lock:
            if not self._load_snapshot(store):
                self.load(store)

    def load(self, store: Store) -> None:
        """Load the table's shape, and what is live, suspected and in quarantine; no fingerprints.

        Raises Misconfigured for a table that is gone or cannot be used.
        """
        with self.lock:
            store.table = store.read(store.table.as_found)
            # Before the keys: what is written in between is counted the next time.
            self.census = store.read(store.table.census, LONGEST_SECONDS)
            if self.census:
                store.lease.forget_before(self.census.horizon)
            self.mirror = store.read(
                lambda conn: Mirror.load(store.table.load_keys(conn)), LONGEST_SECONDS
            )
            self._strange = self.census.live - len(self.mirror) if self.census else 0
            self.compared = False
            self._load_records(store)

    def _load_snapshot(self, store: Store) -> bool:
        """Load the snapshot, and what must be looked at again since; False if it is of no use."""
        store.table = store.read(store.table.as_found)
        found = store.read(
            lambda conn: store.snapshots.load(conn, store.lease.identity), LONGEST_SECONDS
        )
        if isinstance(found, Snapshot):
            origin = found.origin
            self.mirror, self._saved = Mirror.of_chunks(found.chunks), Saved.of(found)
            self.census = Census(moves=None, horizon=origin.horizon, live=0, by_others=0)
            store.lease.own_transactions[:] = origin.own
            self._strange = origin.strange
            try:
                outdated = self._amend(store, self.census)
            except Blocked as error:
                outdated = str(error)
            if not outdated:
                self.compared = True
                self._load_records(store)
                log.info("snapshot.loaded", users=len(self.mirror))
                return True
            found = outdated
        if found is not None:
            log.info("snapshot.ignored", reason=found)
        self._saved = Saved()
        return False

    def save(self, store: Store) -> None:
        """Save what is known of the rows, if it is another than what is saved, for the next start.

        Raises what writing raises.
        """
        with self.lock:
            if self.census is None or not self.compared or self._saved.writes == store.lease.writes:
                return
            if self._saved.differs(store, self.mirror):
                self._saved.save(store, self.mirror, self.census.horizon, self._strange)
            self._saved.writes = store.lease.writes

    def _load_records(self, store: Store) -> None:
        self.suspects = store.read(store.suspects.load)
        known = store.read(store.quarantine.load)
        self.quarantined = {record: each.digest for record, each in known.items()}
        self.refusals.load([record for record, each in known.items() if not each.permanent])
        self._accepted.clear()
        self.generation += 1

    def reload(self, store: Store, outdated: int) -> None:
        """Reload after another writer was detected; if several threads notice, only the first one.

        What commands wrote beside us is looked at again row by row; else everything is loaded.
        """
        with self.lock:
            if self.generation != outdated:
                return
            try:
                self._reload(store)
            except BaseException:
                # The next job finds the mirror still outdated.
                store.lease.distrust()
                raise

    def _reload(self, store: Store) -> None:
        gap = store.lease.resync()
        ids = None
        if gap is not None:
            ids = store.database.call(lambda conn: store.invalidations.between(conn, *gap))
        if ids is None:
            log.info("mirror.discarded")
            self.load(store)
        else:
            self._load_users(store, ids)
        if store.lease.distrusted != self._distrusted:
            self._distrusted = store.lease.distrusted
            self.on_replaced()

    def recount(self, store: Store, *, trust_counters: bool = True) -> None:
        """Look whether others wrote the table, and forget what was known of the rows they wrote.

        With `trust_counters` the table is read only if Postgres counted a write since.
        Raises MirrorOutdated if they removed rows, or wrote too many, and Blocked if the table is
        locked, or takes too long to read.
        """
        with self.lock:
            before = self.census
            if before is None:
                return
            outdated = self._amend(store, before if trust_counters else replace(before, moves=None))
            if outdated:
                store.lease.distrust()
                raise MirrorOutdated(outdated)

    def _amend(self, store: Store, before: Census) -> str | None:
        """Look at rows again that others wrote since; returns why that is not enough, if so."""
        own = store.lease.own_transactions
        found = _counted(store, lambda conn: store.table.census(conn, before, own))
        if found is None:
            return None
        if 0 < found.by_others <= MOST_TOUCHED:
            ids = _counted(store, lambda conn: store.table.written_by_others(conn, before, own))
            self._load_users(store, ids)
            self._saved.outdated = True
        if found.by_others > MOST_TOUCHED or found.live != len(self.mirror) + self._strange:
            return "others removed rows, or wrote many"
        self.census = found
        store.lease.forget_before(found.horizon)
        return None

    def _load_users(self, store: Store, ids: Sequence[str]) -> None:
        """Load what is live of these users, and all suspicions: a command may have ended some."""
        log.info("mirror.amended", users=len(ids))
        database = store.database
        keys = database.call(lambda conn: store.table.load_keys_of(conn, ids))
        self.mirror.replace(ids, keys)
        self._load_records(store)

    def check(self, generation: int) -> None:
        """Raise MirrorOutdated if the cache was loaded again since an answer was requested."""
        if self.generation != generation:
            raise MirrorOutdated("the mirror was loaded again meanwhile")

    def asked(self, asked_at: datetime) -> datetime:
        """Note that an answer is under way; returns the moment it was asked for."""
        with self.lock:
            self._under_way.append(asked_at)
        return asked_at

    def answered(self, asked_at: datetime) -> None:
        """Note that an answer is dealt with; what only it could have contradicted is forgotten."""
        with self.lock:
            if asked_at in self._under_way:
                self._under_way.remove(asked_at)
            oldest = min(self._under_way, default=None)
            self._accepted = [each for each in self._accepted if oldest and each[0] > oldest]

    def accepted(self, users: Users, observed_at: datetime) -> None:
        """Remember what this answer said of these users while an older answer is under way."""
        if any(asked_at < observed_at for asked_at in self._under_way):
            self._accepted.append((observed_at, users.packed))

    def stored(self, ids: AbstractSet[str]) -> None:
        """Note that these users are refused no longer; a sweep takes them out of quarantine."""
        known = self.quarantined.keys() & ids
        self.quarantined.update(dict.fromkeys(known, ""))
        self.refusals.forget(known)

    @property
    def remembered(self) -> int:
        """Of how many users it is remembered when they were accepted."""
        return sum(len(packed) for _, packed in self._accepted) // ID_BYTES

    def still_news(self, delta: Delta, observed_at: datetime) -> Delta:
        """Leave out the ids of which a later answer was accepted: this one says nothing of them."""
        later = [unpack_all(packed) for at, packed in self._accepted if at > observed_at]
        if not later:
            return delta
        outdated = set(chain.from_iterable(later))
        return Delta(
            delta.changed.without(outdated),
            [key for key in delta.missing if key[1] not in outdated],
            [key for key in delta.moved if key[1] not in outdated],
        )


def _counted(store: Store, look: Callable[[Connection], T]) -> T:
    """Read the table within the limits of a write: the lease must be renewed meanwhile."""

    def attempt(conn: Connection) -> T:
        with conn.transaction():
            conn.execute(LIMITS, limits(store.lease.seconds))
            return look(conn)

    return store.database.call(attempt)
