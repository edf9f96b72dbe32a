"""What is saved of the mirror, and how it is cut into chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from worker.model import Key
from worker.store import Store
from worker.store.snapshots import Changes, Digest, Origin, Snapshot
from worker.sync.mirror import Mirror


@dataclass(slots=True)
class Saved:
    """The snapshot in the database, as this process last loaded or wrote it.

    `starts` are the first keys of its chunks. It is `outdated` once rows were met that it says
    nothing of. While the lease's `writes` are as they were, there is nothing new to save.
    """

    starts: Sequence[Key] = ()
    digests: Sequence[Digest] = ()
    outdated: bool = True
    writes: int | None = None

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """Take note of a snapshot that was loaded."""
        firsts = [next(iter(Mirror.of_chunks([chunk]).keys())) for chunk in snapshot.chunks]
        return cls(firsts, list(map(Digest.of, snapshot.chunks)), outdated=False)

    def differs(self, store: Store, mirror: Mirror) -> bool:
        """Whether the mirror is another than what is saved."""
        return self.outdated or bool(self._changes(store, mirror.cut(self.starts), mirror)[0])

    def save(self, store: Store, mirror: Mirror, horizon: str, strange: int) -> None:
        """Save the mirror, which is true of all rows that were not written since the horizon."""
        starts, lease = mirror.cut(self.starts), store.lease
        statements, digests = self._changes(store, starts, mirror)
        cluster = store.read(store.snapshots.cluster)
        origin = Origin(lease.identity, cluster, horizon, lease.own_transactions, strange)
        store.write([*statements, store.snapshots.put(origin, digests)], lease.sweep)
        self.starts, self.digests, self.outdated = starts, digests, False

    def _changes(self, store: Store, starts: Sequence[Key], mirror: Mirror) -> Changes:
        return store.snapshots.changes(mirror.chunks(starts), self.digests)
