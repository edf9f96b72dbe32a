"""The saved mirror: with it a run starts warm, and never takes a row for unchanged that is not."""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.support.sweep_world import World, numbered, sign_up
from tests.support.waiting import until
from worker import wiring
from worker.model import User, Users
from worker.store.snapshots import Origin, Snapshots
from worker.sync import cache, mirror
from worker.sync.mirror import Mirror

Logs = list[MutableMapping[str, Any]]

TABLE = "neon_auth.users_sync"
NAMES = ("lease", "checkpoint", "sweep", "deletion", "quarantine", "touched", "hint")
OWN = [f"users_sync_worker.{name}" for name in NAMES]
SAVED = ("users_sync_worker.snapshot", "users_sync_worker.snapshot_chunk")
WRITES = "select writes from users_sync_worker.lease"
HEADER = "select seal from users_sync_worker.snapshot"
CHUNKS = """
select number, keys, fingerprints, xmin::text from users_sync_worker.snapshot_chunk order by number
"""
CHUNK = "update users_sync_worker.snapshot_chunk"
FORGE = 'update {users_sync} set raw_json = raw_json || \'{{"display_name": "Forged"}}\''
# What a warm run writes, though nothing changed: the row of its sweep.
ROW_OF_THE_SWEEP = 1


@pytest.fixture
def logs() -> Iterator[Logs]:
    """Return what is logged, as it comes."""
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def saved(quick_world: World, logs: Logs) -> World:
    """Return a world of forty users whose rows and snapshot are as one run left them."""
    sign_up(quick_world.project, *range(40))
    assert quick_world.sweep().counts["inserted"] == 40
    assert quick_world.query(HEADER)
    logs.clear()
    return quick_world


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "CHUNK", 4)
    monkeypatch.setattr(mirror, "LONGEST_CHUNK", 8)


def user(number: int) -> User:
    return User(numbered(number), number // 3, bytes([number % 250 + 1] * 8), b"{}")


def events(logs: Logs) -> list[str]:
    return [str(line["event"]) for line in logs if str(line["event"]).startswith("snapshot")]


def ignored(logs: Logs) -> str:
    """Give the reason why the snapshot was not used."""
    [line] = [line for line in logs if line["event"] == "snapshot.ignored"]
    return str(line["reason"])


def writes(world: World) -> int:
    return int(world.query(WRITES)[0][0])


def wait_for_older_transactions(world: World) -> None:
    """Wait until what is open anywhere on the server, as of other tests, began later than now.

    What was written while an older one was open is looked at once more.
    """
    [(now,)] = world.query("select pg_current_xact_id()::text")
    ended = "select pg_snapshot_xmin(pg_current_snapshot()) > %s::xid8"
    until("older transactions have ended", lambda: world.query(ended, now) == [(True,)])


def is_right(world: World) -> bool:
    return bool(world.rows() == world.wanted())


def copied(world: World, *tables: str) -> Callable[[], None]:
    """Copy tables; returns what puts them back as they were."""
    copies = {table: f"copy_{number}" for number, table in enumerate(tables)}
    for table, copy in copies.items():
        world.query(f"create table {copy} as table {table}")

    def put_back() -> None:
        with world.conn.transaction():
            world.query("set local session_replication_role = replica")  # no foreign keys
            for table, copy in copies.items():
                columns = "raw_json, updated_at, deleted_at" if table == TABLE else "*"
                into = f"{table} ({columns})" if table == TABLE else table
                world.query(f"delete from {table}")  # noqa: S608
                world.query(f"insert into {into} select {columns} from {copy}")  # noqa: S608
                world.query(f"drop table {copy}")

    return put_back


# What a warm start costs.


def test_warm_run_compares_nobody_in_the_database(saved: World, logs: Logs) -> None:
    before, versions = writes(saved), saved.versions()
    report = saved.sweep()
    assert (report.unchanged, report.counts["users"]) == (40, 40)
    assert writes(saved) == before + ROW_OF_THE_SWEEP
    assert saved.versions() == versions
    assert events(logs) == ["snapshot.loaded"]


def test_warm_run_writes_whom_it_finds_changed_and_no_other(saved: World) -> None:
    changed, gone, *_ = sorted(saved.project.ids())[5:]
    saved.project.edit(changed, display_name="Changed")
    saved.project.delete(gone)
    [new] = sign_up(saved.project, 90)
    before = saved.versions()
    saved.sweep()
    assert {row[0] for row in saved.versions() ^ before} == {changed, gone, new}
    assert is_right(saved)


def test_run_after_changes_is_warm_again(saved: World, logs: Logs) -> None:
    saved.project.edit(sorted(saved.project.ids())[5], display_name="Changed")
    saved.sweep()
    before = writes(saved)
    saved.sweep()
    assert writes(saved) == before + ROW_OF_THE_SWEEP
    assert events(logs) == ["snapshot.loaded"] * 2


def test_unchanged_run_leaves_the_snapshot_as_it_is(saved: World) -> None:
    before = saved.query(HEADER), saved.query(CHUNKS)
    saved.sweep()
    assert (saved.query(HEADER), saved.query(CHUNKS)) == before


@pytest.mark.usefixtures("small_chunks")
def test_only_chunks_that_changed_are_written(quick_world: World) -> None:
    sign_up(quick_world.project, *range(40))
    quick_world.sweep()
    before = quick_world.query(CHUNKS)
    assert len(before) == 10
    quick_world.project.edit(sorted(quick_world.project.ids())[21], display_name="Changed")
    quick_world.sweep()
    after = quick_world.query(CHUNKS)
    assert [new[0] for old, new in zip(before, after, strict=True) if old != new] == [5]
    assert [row[1] for row in before] == [row[1] for row in after]


@pytest.mark.usefixtures("small_chunks")
def test_snapshot_follows_a_list_that_grows_and_shrinks(quick_world: World, logs: Logs) -> None:
    for numbers in (range(3), range(3, 40), range(100, 130)):
        sign_up(quick_world.project, *numbers)
        quick_world.sweep()
    for user_id in sorted(quick_world.project.ids())[4:66]:
        quick_world.project.delete(user_id)
    for _ in range(3):
        quick_world.sweep(max_fraction=1, max_count=100)
    logs.clear()
    before = writes(quick_world)
    quick_world.sweep()
    assert events(logs) == ["snapshot.loaded"]
    assert writes(quick_world) == before + ROW_OF_THE_SWEEP


def test_empty_project_has_a_snapshot_too(quick_world: World, logs: Logs) -> None:
    for _ in range(2):
        quick_world.sweep()
    assert events(logs) == ["snapshot.loaded"]


# What others wrote between two runs.


@pytest.mark.parametrize(
    "act",
    [
        f"{FORGE} where id = %s",
        "delete from {users_sync} where id = %s",
        "update {users_sync} set deleted_at = now() - interval '1 hour' where id = %s",
    ],
    ids=["changed", "removed", "marked deleted"],
)
@pytest.mark.parametrize("users", [1, 40])
def test_rows_that_others_wrote_are_put_right(saved: World, act: str, users: int) -> None:
    for user_id in sorted(saved.project.ids())[:users]:
        saved.query(act, user_id)
    assert not is_right(saved)
    saved.sweep()
    assert is_right(saved)


def test_only_rows_that_others_wrote_are_compared(saved: World, logs: Logs) -> None:
    victim = sorted(saved.project.ids())[5]
    saved.query("update {users_sync} set raw_json = raw_json where id = %s", victim)
    wait_for_older_transactions(saved)
    before = writes(saved)
    saved.sweep()
    assert "snapshot.loaded" in events(logs)
    compared, snapshot = 1, 1
    assert writes(saved) == before + compared + ROW_OF_THE_SWEEP + snapshot
    before = writes(saved)
    saved.sweep()
    assert writes(saved) == before + ROW_OF_THE_SWEEP


def test_too_many_rows_of_others_make_the_snapshot_worthless(
    saved: World, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_TOUCHED", 10)
    saved.query('update {users_sync} set raw_json = raw_json || \'{{"display_name": "F"}}\'')
    saved.sweep()
    assert ignored(logs) == "others removed rows, or wrote many"
    assert is_right(saved)


@pytest.mark.parametrize("savepoint", [False, True])
def test_transaction_that_was_open_while_the_snapshot_was_saved(
    quick_world: World, *, savepoint: bool
) -> None:
    sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    victim = sorted(quick_world.project.ids())[5]
    with psycopg.connect(quick_world.url) as other:
        other.execute("select pg_current_xact_id()")
        if savepoint:
            other.execute("savepoint one")
            other.execute("create temporary table has_a_number_of_its_own ()")
        quick_world.project.edit(sorted(quick_world.project.ids())[9], display_name="Changed")
        quick_world.sweep()
        other.execute(
            'update neon_auth.users_sync set raw_json = raw_json || \'{"display_name": "F"}\''
            " where id = %s",
            [victim],
        )
    assert not is_right(quick_world)
    quick_world.sweep()
    assert is_right(quick_world)


def test_what_others_wrote_during_a_run_is_not_saved_as_known(quick_world: World) -> None:
    sign_up(quick_world.project, *range(40))
    quick_world.sweep()
    ids = sorted(quick_world.project.ids())
    quick_world.project.edit(ids[-1], display_name="Changed")

    def forge(state: Any) -> None:
        if state.counts["pages"] == 5:
            quick_world.query(
                'update {users_sync} set raw_json = raw_json || \'{{"display_name": "F"}}\''
                " where id = %s",
                ids[2],
            )

    quick_world.sweep(forge)
    assert not is_right(quick_world)
    quick_world.sweep()
    assert is_right(quick_world)


# Restores.


@pytest.mark.parametrize(
    "put_back_tables",
    [
        [TABLE],
        [*OWN, *SAVED],
        SAVED,
        SAVED[:1],
        SAVED[1:],
        [TABLE, *OWN, *SAVED],
    ],
    ids=["table", "own schema", "snapshot", "seal", "chunks", "all"],
)
@pytest.mark.parametrize("project_too", [False, True])
def test_restore_of_any_part_is_found_out(
    saved: World, put_back_tables: list[str], *, project_too: bool
) -> None:
    """What is worse than a snapshot that is older than the table is one that fits the project."""
    ids = sorted(saved.project.ids())
    put_back = copied(saved, *put_back_tables)
    for user_id in ids[:5]:
        saved.project.edit(user_id, display_name="Later")
    saved.project.delete(ids[7])
    saved.sweep()
    saved.sweep()
    if project_too:
        for number, user_id in enumerate(ids[:5]):
            saved.project.edit(user_id, display_name=f"User {number}")
    put_back()
    for _ in range(2):
        saved.sweep()
    assert is_right(saved)


def test_table_that_took_the_place_of_another_is_found_out(quick_world: World) -> None:
    """Its rows were written long before the snapshot."""
    sign_up(quick_world.project, *range(40))
    quick_world.sweep()
    quick_world.query(
        "create table neon_auth.another (like {users_sync} including all);"
        " insert into neon_auth.another (raw_json)"
        ' select raw_json || \'{{"display_name": "Forged"}}\' from {users_sync}'
    )
    quick_world.project.edit(min(quick_world.project.ids()), display_name="Changed")
    quick_world.sweep()
    quick_world.query(
        "alter table {users_sync} rename to before;"
        " alter table neon_auth.another rename to users_sync"
    )
    assert not is_right(quick_world)
    quick_world.sweep()
    assert is_right(quick_world)
    quick_world.query("drop table neon_auth.before")


# Snapshots that are not ours, or not whole.


@pytest.mark.parametrize(
    "act",
    [
        f"{CHUNK} set fingerprints = decode(repeat('ab', 320), 'hex')",
        f"{CHUNK} set keys = keys || keys",
        f"{CHUNK} set fingerprints = substr(fingerprints, 1, 312)",
        "delete from users_sync_worker.snapshot_chunk",
        "insert into users_sync_worker.snapshot_chunk"  # noqa: ISC004
        " select target, 1, keys, fingerprints from users_sync_worker.snapshot_chunk",
        "update users_sync_worker.snapshot set horizon = (horizon::bigint + 1)::text",
        "update users_sync_worker.snapshot set own = array['123']",
        "update users_sync_worker.snapshot set strange = strange + 1",
        "update users_sync_worker.snapshot set seal = decode(repeat('ab', 64), 'hex')",
    ],
)
def test_forged_or_truncated_snapshot_is_found_out(saved: World, act: str, logs: Logs) -> None:
    saved.query(act)
    victim = sorted(saved.project.ids())[5]
    saved.project.edit(victim, display_name="Changed")
    saved.sweep()
    assert ignored(logs) in {
        "it is not whole, or not ours",
        "it was made on another server, or long ago",
    }
    assert is_right(saved)
    saved.sweep()
    assert events(logs)[-1] == "snapshot.loaded"


def test_snapshot_of_another_comparison_is_ignored(saved: World, logs: Logs) -> None:
    victim = sorted(saved.project.ids())[5]
    saved.project.edit(victim, client_metadata={"plan": "pro"})
    saved.sweep(ignored_fields=["last_active_at_millis", "client_metadata"])
    assert not is_right(saved)
    saved.sweep()
    reasons = [line["reason"] for line in logs if line["event"] == "snapshot.ignored"]
    assert reasons == ["it was made for another comparison"] * 2
    assert is_right(saved)


def test_snapshot_of_another_kind_of_fingerprint_is_ignored(
    saved: World, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "FINGERPRINT_VERSION", 0)
    saved.sweep()
    assert ignored(logs) == "it was made for another comparison"


def test_snapshot_of_another_server_is_ignored(world: World, logs: Logs) -> None:
    sign_up(world.project, *range(10))
    world.sweep()
    world.query(
        "create or replace function users_sync_worker.cluster() returns text"
        " language sql as $$ select 'another' $$"
    )
    world.sweep()
    assert ignored(logs) == "it was made on another server, or long ago"


@pytest.mark.parametrize("age", [-5, 2**30 + 5])
def test_horizon_that_is_not_in_the_past_of_this_server_is_not_believed(
    saved: World, age: int
) -> None:
    [(identity, cluster, now)] = saved.query(
        "select identity, cluster, pg_snapshot_xmin(pg_current_snapshot())::text"
        " from users_sync_worker.snapshot"
    )
    snapshots = Snapshots("neon_auth", "a comparison", b"key")
    statement = snapshots.put(Origin(identity, cluster, str(int(now) - age), [], 0), [])
    saved.conn.execute(statement.query, statement.params)
    found = snapshots.load(saved.conn, identity)
    assert found == "it was made on another server, or long ago"


def test_key_that_was_replaced_makes_one_run_cold(saved: World, logs: Logs) -> None:
    saved.project.secret_server_key = "ssk_" + "b" * 52
    saved.sweep()
    assert ignored(logs) == "it is not whole, or not ours"
    saved.sweep()
    assert events(logs)[-1] == "snapshot.loaded"


# Saving.


def test_snapshot_that_cannot_be_saved_fails_no_sweep(saved: World, logs: Logs) -> None:
    saved.query(
        "alter table users_sync_worker.snapshot_chunk add constraint no check (keys = '') not valid"
    )
    saved.project.edit(sorted(saved.project.ids())[5], display_name="Changed")
    try:
        assert saved.sweep().outcome == "complete"
    finally:
        saved.query("alter table users_sync_worker.snapshot_chunk drop constraint no")
    assert "snapshot.skipped" in events(logs)
    saved.sweep()
    assert is_right(saved)


def test_sweep_that_did_not_end_saves_nothing(saved: World) -> None:
    before = saved.query(HEADER)
    saved.project.edit(min(saved.project.ids()), display_name="Changed")

    def fail(state: Any) -> None:
        if state.counts["pages"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved.sweep(fail)
    assert saved.query(HEADER) == before
    saved.sweep()
    assert is_right(saved)


@given(st.lists(st.integers(0, 200), max_size=60), st.lists(st.integers(0, 200), max_size=5))
def test_chunks_hold_all_that_the_mirror_knows(numbers: list[int], cuts: list[int]) -> None:
    known = Mirror()
    known.accept(Users.of(user(n) for n in set(numbers)))
    starts = known.cut(user(n).key for n in cuts)
    chunks = list(known.chunks(starts))
    again = Mirror.of_chunks(chunks)
    assert list(again.keys()) == list(known.keys())
    assert list(again.chunks(again.cut([]))) == list(known.chunks(known.cut([])))
    assert all(len(chunk.keys) == 3 * len(chunk.fingerprints) > 0 for chunk in chunks)


@pytest.mark.usefixtures("small_chunks")
def test_chunk_that_grew_too_long_is_cut_and_the_others_stay() -> None:
    known = Mirror()
    known.accept(Users.of(user(n) for n in range(0, 80, 4)))
    starts = known.cut([])
    assert [len(chunk.fingerprints) // 8 for chunk in known.chunks(starts)] == [4] * 5
    known.accept(Users.of(user(n) for n in (17, 18, 19, 21, 22)))
    lengths = [len(chunk.fingerprints) // 8 for chunk in known.chunks(known.cut(starts))]
    assert lengths == [4, 4, 4, 1, 4, 4, 4]
