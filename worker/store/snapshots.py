"""The mirror as it is kept in the database, so that the next run starts warm.

A snapshot is never believed without proof. Its seal, which takes the project's secret key, shows
that it is whole and ours. What table it was made of, on which server, and for which comparison is
sealed with it. And it says nothing of rows that were written since its horizon: a census of
the rows finds those.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import NamedTuple, Self

from psycopg import sql

from worker.model import Chunk
from worker.store.connection import Connection
from worker.store.transaction import Statement, long_transaction

# Transactions are told apart over half of their numbers; a snapshot this old is useless anyway.
MOST_TRANSACTIONS = 2**30

DIGEST_BYTES = 16

# How many chunks are on their way at once; each is some 130 KB.
_CHUNKS_AT_ONCE = 16

_LOAD = """
select made_for, seal, users_sync_worker.cluster(),
       pg_snapshot_xmin(pg_current_snapshot())::text,
       identity, cluster, horizon, own, strange
from users_sync_worker.snapshot where target = %(target)s
"""

_LOAD_CHUNKS = """
select keys, fingerprints from users_sync_worker.snapshot_chunk
where target = %(target)s order by number
"""

_PUT = """
insert into users_sync_worker.snapshot
    (target, made_for, identity, cluster, horizon, own, strange, seal, saved_at)
values (%(target)s, %(made_for)s, %(identity)s, %(cluster)s, %(horizon)s, %(own)s, %(strange)s,
        %(seal)b, clock_timestamp())
on conflict (target) do update
set made_for = excluded.made_for, identity = excluded.identity, cluster = excluded.cluster,
    horizon = excluded.horizon, own = excluded.own, strange = excluded.strange,
    seal = excluded.seal, saved_at = excluded.saved_at
"""

_PUT_CHUNK = """
insert into users_sync_worker.snapshot_chunk (target, number, keys, fingerprints)
values (%(target)s, %(number)s, %(keys)b, %(fingerprints)b)
on conflict (target, number) do update
set keys = excluded.keys, fingerprints = excluded.fingerprints
"""

_PUT_FINGERPRINTS = """
update users_sync_worker.snapshot_chunk set fingerprints = %(fingerprints)b
where target = %(target)s and number = %(number)s
"""

_CUT = """
delete from users_sync_worker.snapshot_chunk where target = %(target)s and number >= %(number)s
"""

_CLUSTER = "select users_sync_worker.cluster()"


class Digest(NamedTuple):
    """What tells a chunk from what is saved of it."""

    keys: bytes
    fingerprints: bytes

    @classmethod
    def of(cls, chunk: Chunk) -> Self:
        return cls(_digest(chunk.keys), _digest(chunk.fingerprints))


class Changes(NamedTuple):
    """How to bring what is saved up to date, and the digests of all chunks then."""

    statements: list[Statement]
    digests: list[Digest]


@dataclass(frozen=True, slots=True)
class Origin:
    """Of which table on which server it was made, and what it says nothing of.

    That is rows written since the horizon by other transactions than the `own` ones, and as many
    `strange` rows, which no mirror has.
    """

    identity: int | None
    cluster: str
    horizon: str
    own: Sequence[str]
    strange: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All live rows as they were at the horizon."""

    origin: Origin
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshot of one target; `made_for` says what its fingerprints are worth something for.

    `key` is a secret: who may write the tables, but does not know it, cannot forge a snapshot.
    """

    target: str
    made_for: str
    key: bytes

    def load(self, conn: Connection, identity: int | None) -> Snapshot | str | None:
        """Give the snapshot of the table of this identity, why there is none to use, or None."""
        with long_transaction(conn):
            row = conn.execute(_LOAD, self._params).fetchone()
            if row is None:
                return None
            made_for, seal, here, now, *of_origin = row
            origin = Origin(*of_origin)
            if made_for != self.made_for:
                return "it was made for another comparison"
            if origin.identity != identity:
                return "it was made of another table"
            age = int(now) - int(origin.horizon)
            if origin.cluster != here or not 0 <= age < MOST_TRANSACTIONS:
                return "it was made on another server, or long ago"
            with conn.cursor("users_sync_chunks", binary=True) as cursor:
                cursor.itersize = _CHUNKS_AT_ONCE
                chunks = [Chunk(*row) for row in cursor.execute(_LOAD_CHUNKS, self._params)]
        if seal != self._seal(origin, list(map(Digest.of, chunks))):
            return "it is not whole, or not ours"
        return Snapshot(origin, chunks)

    def cluster(self, conn: Connection) -> str:
        """Tell this server from others."""
        [(cluster,)] = conn.execute(_CLUSTER).fetchall()
        return str(cluster)

    def changes(self, chunks: Iterable[Chunk], saved: Sequence[Digest]) -> Changes:
        """Say how to write those chunks that differ from the saved ones."""
        statements, digests = [], []
        for number, chunk in enumerate(chunks):
            digest = Digest.of(chunk)
            digests.append(digest)
            before = saved[number] if number < len(saved) else None
            if before is None or before.keys != digest.keys:
                statements.append(
                    self._statement(
                        _PUT_CHUNK, number=number, keys=chunk.keys, fingerprints=chunk.fingerprints
                    )
                )
            elif before != digest:
                statements.append(
                    self._statement(
                        _PUT_FINGERPRINTS, number=number, fingerprints=chunk.fingerprints
                    )
                )
        if not saved or len(saved) != len(digests):
            statements.append(self._statement(_CUT, number=len(digests)))
        return Changes(statements, digests)

    def put(self, origin: Origin, digests: Sequence[Digest]) -> Statement:
        """Seal chunks with these digests."""
        return self._statement(
            _PUT,
            made_for=self.made_for,
            **asdict(origin),
            seal=self._seal(origin, digests),
        )

    def _statement(self, query: str, **params: object) -> Statement:
        return Statement(sql.SQL(query), {**self._params, **params})

    def _seal(self, origin: Origin, digests: Sequence[Digest]) -> bytes:
        chunks = [part.hex() for digest in digests for part in digest]
        text = json.dumps([self.target, self.made_for, asdict(origin), chunks])
        return blake2b(text.encode(), key=self.key).digest()

    @property
    def _params(self) -> dict[str, object]:
        return {"target": self.target}


def _digest(part: bytes) -> bytes:
    return blake2b(part, digest_size=DIGEST_BYTES).digest()
