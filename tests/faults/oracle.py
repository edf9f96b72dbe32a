"""Judges each change of the table by what the API had answered until then."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.faults.model_users import People
from tests.faults.request_gate import Said
from tests.support.sweep_world import IGNORED

_ROWS = """
select id, (raw_json->'client_metadata'->>'version')::int, raw_json - %s, name, email,
       (extract(epoch from created_at) * 1000)::bigint, created_at, updated_at, deleted_at
from neon_auth.users_sync
"""
_CHECKPOINT = "select last_millis, last_id, started from users_sync_worker.checkpoint"
_COMPLETE = """
select number, started from users_sync_worker.sweep
where outcome in ('complete', 'held') and number > %s order by number
"""
_LEASE = """
select epoch, writes,
       (select coalesce(sum(hashtext(s::text)), 0) from users_sync_worker.sweep s),
       (select coalesce(sum(hashtext(c::text)), 0) from users_sync_worker.checkpoint c)
from users_sync_worker.lease
"""
_SUSPECTS = "select user_id, noticed_at from users_sync_worker.deletion"
_UNDECIDED = "select user_id from users_sync_worker.deletion where state in ('hidden', 'held')"

NEVER = datetime.min.replace(tzinfo=UTC)
# How much earlier than it was the worker may believe a moment to have been.
DRIFT = timedelta(seconds=1)
FEWEST_ON_A_PAGE = 3


@dataclass(frozen=True)
class Row:
    """A row of the table: which version of the user it holds, and when it was written."""

    version: int | None
    columns: tuple[Any, ...] = field(repr=False)
    created_at: datetime
    updated_at: datetime | None
    deleted_at: datetime | None

    @property
    def written_at(self) -> datetime:
        return max(self.updated_at or NEVER, self.deleted_at or NEVER)

    @property
    def live(self) -> bool:
        return self.deleted_at is None


@dataclass
class Judge:
    """What the table may hold, from what was answered, to which worker, and asked when."""

    people: People
    query: Callable[..., list[tuple[Any, ...]]]
    grace: timedelta
    patience: timedelta
    rows: dict[str, Row] = field(default_factory=dict)
    _floors: dict[str, int] = field(default_factory=dict)
    _by_hand: dict[str, datetime] = field(default_factory=dict)
    _lease: tuple[int, int] = (0, 0)
    _records: list[int] = field(default_factory=lambda: [0, 0])
    _holder: object = None
    _complete: int = 0
    _misled_at: datetime = NEVER
    _left_so: set[str] = field(default_factory=set)
    _shown: dict[str, datetime] = field(default_factory=dict)
    _accepted: dict[tuple[object, str], datetime] = field(default_factory=dict)
    _proven: dict[tuple[object, str], datetime] = field(default_factory=dict)

    def heard(self, worker: object, said: Said) -> None:
        """Take note of an answer that a worker gets now."""
        for user_id in said.there:
            self._shown[user_id] = max(said.asked_at, self._shown.get(user_id, NEVER))
        if said.gone:
            self._proven[worker, said.gone] = said.asked_at

    def accepted(self, worker: object, said: Said) -> None:
        """Take note of an answer that a worker has dealt with: no older one counts any more.

        One without the lease, who may not know it, has dealt with nothing.
        """
        for user_id in said.there if worker is self._holder else ():
            before = self._accepted.get((worker, user_id), NEVER)
            self._accepted[worker, user_id] = max(said.asked_at, before)

    def misled(self) -> None:
        """Take note that a list is falsely answered to be empty from its start.

        That nobody can know: a sweep under way ends with it, and has passed nobody.
        """
        self._misled_at = self.people.now()

    def wrote_by_hand(self, user_id: str) -> None:
        """Take note that somebody else has just written a row.

        If it says when, no older answer may touch it any more.
        """
        self.rows = self._read()
        self._left_so.add(user_id)
        if self.rows[user_id].written_at != NEVER:
            self._by_hand[user_id] = self.rows[user_id].written_at
            self._floors[user_id] = max(self.people.version(user_id), self._floors.get(user_id, 0))

    def acted(self, worker: object) -> None:
        """See that whoever has just acted wrote nothing unless the lease is theirs."""
        [(epoch, writes, *records)] = self.query(_LEASE)
        if epoch > self._lease[0]:
            self._holder = worker
        if writes > self._lease[1]:
            assert self._holder is worker, f"{worker} wrote, though the lease is another's"
            self.look()
        elif self._holder is not worker:
            same = (records, self._read()) == (self._records, self.rows)
            assert same, f"{worker} wrote without passing the fence"
        self._lease, self._records = (epoch, writes), records

    def tell_place(self, worker: object) -> str:
        return "the lease is still its own" if worker is self._holder else "another has the lease"

    def look(self) -> None:
        """See that whatever was written since the last look is true."""
        rows = self._read()
        assert rows.keys() >= self.rows.keys(), "a row is gone"
        for user_id, row in rows.items():
            before = self.rows.get(user_id)
            if row != before:
                self._judge(user_id, before, row)
                self._left_so.discard(user_id)
                self._floors[user_id] = max(row.version or 0, self._floors.get(user_id, 0))
        self.rows = rows
        self._judge_sweeps()
        self._judge_suspects()

    def _read(self) -> dict[str, Row]:
        rows = self.query(_ROWS, IGNORED)
        return {row[0]: Row(row[1], row[2:6], *row[6:]) for row in rows}

    def _judge(self, user_id: str, before: Row | None, row: Row) -> None:
        if before is None or row.columns != before.columns or (row.live and not before.live):
            self._judge_written(user_id, before, row)
        elif row.live:
            raise AssertionError(f"{user_id} was written, though nothing changed: {row}")
        if not row.live:
            self._judge_deleted(user_id, before, row)

    def _judge_written(self, user_id: str, before: Row | None, row: Row) -> None:
        known = self.people.states.get(user_id, ())
        assert row.columns in [state.row for state in known], f"{user_id} was never so: {row}"
        assert row.version is not None
        assert row.version >= self._floors.get(user_id, 0), f"{user_id} went back: {before}, {row}"
        asked_at = self._shown.get(user_id, NEVER)
        assert asked_at > self._by_hand.get(user_id, NEVER), f"{user_id} is newer: {before}"
        if before and before.deleted_at and row.live:
            late = before.deleted_at + self.grace
            assert asked_at > late, f"{user_id} was restored by an older answer: {before}"

    def _judge_deleted(self, user_id: str, before: Row | None, row: Row) -> None:
        assert row.deleted_at
        proofs = [
            asked_at
            for (worker, gone), asked_at in self._proven.items()
            if gone == user_id and asked_at > self._accepted.get((worker, gone), NEVER)
        ]
        assert proofs, f"{user_id} was deleted without a proof"
        written_at = before.written_at if before else NEVER
        assert max(proofs) > written_at, f"{user_id} was deleted by an older proof: {before}"
        young = max(row.created_at, row.updated_at or NEVER) + self.grace
        assert row.deleted_at > young, f"{user_id} was deleted too young: {before}"
        lived = self._lives_since(user_id, row.deleted_at)
        assert row.deleted_at - lived <= self.patience, f"{user_id} lives since {lived}: {row}"

    def _lives_since(self, user_id: str, moment: datetime) -> datetime:
        """Say since when the user lives who lives at that moment; or just that moment."""
        since = moment
        for state in reversed(self.people.states.get(user_id, ())):
            if state.at <= moment:
                if state.record is None:
                    break
                since = state.at
        return since

    def _judge_sweeps(self) -> None:
        """See that whoever a sweep has passed is in the table as the sweep has found them."""
        for millis, last_id, started in self.query(_CHECKPOINT):
            self._judge_up_to((millis, last_id), started)
        for number, started in self.query(_COMPLETE, self._complete):
            self._complete = number
            if started > self._misled_at:
                self._judge_up_to((math.inf, ""), started)

    def _judge_up_to(self, last: tuple[float, str], started: datetime) -> None:
        for user_id in self.people.states.keys() - self._left_so:  # an audit sees what others wrote
            states = self.people.states_since(user_id, started)
            steady = states[0].at <= started and len({state.key for state in states}) == 1
            storable = all(state.row and state.listed for state in states)
            key = states[0].key
            if steady and storable and key and key <= last:
                self._judge_passed(user_id, started)

    def _judge_suspects(self) -> None:
        """See that no user is suspected who stood still, or was seen since."""
        for user_id, noticed_at in self.query(_SUSPECTS):
            still = noticed_at > self._misled_at and self._stood_still(user_id, noticed_at)
            assert not still, f"{user_id} is suspected, though on the list all the time"
            if user_id in self._by_hand:
                continue
            seen_at = self._accepted.get((self._holder, user_id), NEVER)
            assert noticed_at + DRIFT > seen_at, f"{user_id} is suspected, though seen since"

    def _stood_still(self, user_id: str, since: datetime) -> bool:
        """Whether a user was on the list all the time, where the row has them, which is no newer.

        Then every list that was asked for since shows them there.
        """
        row, states = self.rows[user_id], self.people.states_since(user_id, since)
        steady = bool(states) and states[0].at <= since and row.written_at < since
        key = (row.columns[-1], user_id)
        return steady and all(state.listed and state.key == key for state in states)

    def _judge_passed(self, user_id: str, started: datetime) -> None:
        row = self.rows.get(user_id)
        assert row is not None, f"{user_id} is not there, though a sweep has passed"
        if row.deleted_at:
            assert row.deleted_at + self.grace > started - DRIFT, f"{user_id} is still deleted"
            return
        state = self.people.state_at(user_id, started)
        if (row.updated_at or NEVER) < started - DRIFT and state and state.record:
            version = state.record["client_metadata"]["version"]
            assert row.version is not None
            assert row.version >= version, f"{user_id} was not brought up to date: {row}"

    def compare(self, *, audited: bool) -> None:
        """See that table and project are equal.

        Before an audit a worker cannot know what others wrote, nor that of those who are hidden.
        """
        self.look()
        undecided = {row[0] for row in self.query(_UNDECIDED)} | self._left_so
        for user_id in self.rows.keys() | self.people.states.keys():
            if audited or user_id not in undecided:
                self._compare(user_id)

    def _compare(self, user_id: str) -> None:
        row = self.rows.get(user_id)
        now = self.people.state_at(user_id, self.people.now())
        if now is None or now.record is None:
            assert row is None or not row.live, f"{user_id} is live, though gone: {row}"
        elif now.row is not None and (now.listed or (row is not None and row.live)):
            assert row is not None, f"{user_id} is not there"
            assert row.live, f"{user_id} is deleted, though there: {row}"
            assert row.columns == now.row, f"{user_id} is not as it should be: {row}"
