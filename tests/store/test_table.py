"""What applying users does to the table: a letter for each, and nothing that need not be."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.support.store_target import IGNORED, SIGNED_UP, Target, people, person, user_id
from worker.ids import pack
from worker.model import NO_MILLIS, Proof, User, Users
from worker.stack_auth.canonical_json import dump
from worker.store.batch import PART_BYTES, STATEMENT_BYTES
from worker.store.purge import Purging
from worker.store.table import MOST_MOVED

YEAR_10000 = 253_402_300_800_000
LATEST = 9_224_318_015_999_998
EARLIEST = -210_866_803_200_000

VERSIONS = "select id::text, ctid::text, xmin::text, xmax::text from users_sync order by id"

APPLICATION = """
create table posts (author_id {id_type} references users_sync (id));
insert into posts select id from users_sync
"""

Node = dict[str, Any]


def columns(user: User) -> tuple[Any, ...]:
    """Say what raw_json, name, email and created_at must hold."""
    record = user.record
    return record, record["display_name"], record["primary_email"], record["signed_up_at_millis"]


def set_moments(target: Target, user: User, **moments: str) -> None:
    """Write a row's moments as somebody else would; each is an expression."""
    for name, expression in moments.items():
        query = f"update users_sync set {name} = {expression} where id::text = %s"  # noqa: S608
        target.query(query, user.id)


def moved(target: Target, users: list[User]) -> tuple[Any, Any]:
    _, positions, millis = target.run(target.table().apply(Users.of(users), target.now()))
    return positions, millis


def test_nobody_has_no_letters(target: Target) -> None:
    assert target.apply([]) == ""


def test_new_user_is_inserted_and_has_no_version(target: Target) -> None:
    assert target.apply([person(1)]) == "i"
    assert target.row(person(1)) == (*columns(person(1)), None, None)


def test_changed_user_is_updated_at_the_moment_of_writing(target: Target) -> None:
    changed = person(1, display_name="New", primary_email=None)
    target.apply([person(1)])
    before = target.now()

    assert target.apply([changed]) == "u"

    *data, updated_at, deleted_at = target.row(changed)
    assert (tuple(data), deleted_at) == (columns(changed), None)
    assert before < updated_at < target.now()


def test_field_that_no_column_shows_is_a_change(target: Target) -> None:
    changed = person(1, server_metadata={"plan": "pro"})
    target.apply([person(1)])
    assert target.apply([changed]) == "u"
    assert columns(changed) == target.row(changed)[:4]


def test_activity_alone_is_no_change_and_is_not_written(target: Target) -> None:
    target.apply([person(1)])
    before = target.query(VERSIONS)

    assert target.apply([person(1, **{IGNORED: 5})]) == "="

    assert (before, columns(person(1))) == (target.query(VERSIONS), target.row(person(1))[:4])


def test_activity_comes_along_with_the_next_change(target: Target) -> None:
    changed = person(1, display_name="New", **{IGNORED: 5})
    target.apply([person(1)])
    target.apply([changed])
    assert changed.record == target.row(changed)[0]


def test_unchanged_rows_are_neither_written_nor_locked(target: Target) -> None:
    """A transaction gets no number of its own until it writes or locks."""
    users = people(*range(20))
    target.apply(users)
    before = target.query(VERSIONS)

    with target.conn.transaction():
        assert target.apply(users) == "=" * 20
        assert target.value("select pg_current_xact_id_if_assigned()") is None

    assert before == target.query(VERSIONS)
    assert {row[3] for row in before} == {"0"}


def test_letters_stand_in_the_order_of_the_users(target: Target) -> None:
    target.apply(people(1, 2, 3, 4))
    early = target.now()
    set_moments(target, person(3), deleted_at="clock_timestamp() - interval '1 hour'")
    set_moments(target, person(4), updated_at="clock_timestamp()")
    users = [
        person(1, display_name="New"),
        person(2),
        person(3),
        person(4, display_name="Old"),
        person(5),
    ]
    assert target.apply(users, early) == "u=rsi"


def test_user_who_came_back_is_restored_though_nothing_changed(target: Target) -> None:
    target.apply([person(1)])
    set_moments(target, person(1), deleted_at="clock_timestamp()")

    assert target.apply([person(1)]) == "r"

    *data, updated_at, deleted_at = target.row(person(1))
    assert (tuple(data), deleted_at) == (columns(person(1)), None)
    assert updated_at is not None


@pytest.mark.parametrize("moment", ["updated_at", "deleted_at"])
def test_row_that_is_newer_than_the_answer_is_left(target: Target, moment: str) -> None:
    target.apply([person(1)])
    asked = target.now()
    set_moments(target, person(1), **{moment: "clock_timestamp()"})
    before = target.row(person(1))

    assert target.apply([person(1, display_name="Old")], asked) == "s"

    assert before == target.row(person(1))


@pytest.mark.parametrize(
    ("moment", "letter"), [("updated_at", "u"), ("deleted_at", "r")], ids=["update", "deletion"]
)
@pytest.mark.parametrize("value", ["clock_timestamp() + interval '1 hour'", "'infinity'"])
def test_moment_in_the_future_is_not_believed(
    target: Target, moment: str, letter: str, value: str
) -> None:
    target.apply([person(1)])
    set_moments(target, person(1), **{moment: value})
    changed = person(1, display_name="New")

    assert target.apply([changed], grace_seconds=60) == letter

    *data, updated_at, deleted_at = target.row(changed)
    assert (tuple(data), deleted_at) == (columns(changed), None)
    assert updated_at < target.now()


def test_deleted_user_is_restored_only_after_the_grace_period(target: Target) -> None:
    """An answer may come from a replica that does not know of the deletion yet."""
    target.apply([person(1)])
    set_moments(target, person(1), deleted_at="clock_timestamp() - interval '60 s'")
    before = target.row(person(1))

    assert target.apply([person(1)], grace_seconds=100) == "s"
    assert before == target.row(person(1))
    assert target.apply([person(1)], target.now() - timedelta(seconds=20), grace_seconds=50) == "s"
    assert target.apply([person(1)], grace_seconds=50) == "r"


def test_grace_period_does_not_hold_up_changes(target: Target) -> None:
    target.apply([person(1)])
    target.apply([person(1, display_name="New")])
    assert target.apply([person(1, display_name="Newer")], grace_seconds=100) == "u"


@pytest.mark.parametrize(
    "millis",
    [0, 1, 999, -1, -62_135_596_800_001, EARLIEST, 1_759_276_799_999, YEAR_10000 - 1],
)
def test_sign_up_is_kept_to_the_millisecond(target: Target, millis: int) -> None:
    user = person(1, signed_up_at_millis=millis)
    target.apply([user])
    assert target.row(user)[3] == millis
    assert target.apply([user]) == "="
    with target.conn.transaction():
        assert [key[0] for key in target.table().load_keys(target.conn)] == [millis]


def test_adopted_table_with_a_default_gives_new_users_no_version(written: Target) -> None:
    written.query("alter table users_sync alter column updated_at set default now()")
    written.query("alter table users_sync alter column deleted_at set default now()")
    written.apply([person(1)])
    assert written.row(person(1))[4:] == (None, None)


def test_extra_columns_are_left_alone(target: Target) -> None:
    target.query("alter table users_sync add column plan text not null default 'free'")
    target.apply([person(1)])
    target.query("update users_sync set plan = 'pro'")
    target.apply([person(1, display_name="New"), person(2)])
    plans = target.query("select plan from users_sync order by id")
    assert plans == [("pro",), ("free",)]


def test_what_a_template_would_trip_over_is_stored_as_it_is(target: Target) -> None:
    text = "100%s {table} %(id)s '); drop table users_sync; --"
    user = person(1, display_name=text, server_metadata={text: [text, 2**70, 1.5, None]})
    assert target.apply([user, person(2)]) == "ii"
    assert columns(user) == target.row(user)[:4]
    assert target.apply([user]) == "="


@pytest.mark.parametrize(
    "raw_json", ["null", "'null'", "'1'", "'\"text\"'", "'[]'", "'[\"id\"]'", "'{}'"]
)
def test_row_without_a_record_gets_one(written: Target, raw_json: str) -> None:
    written.apply([person(1)])
    written.query(f"update users_sync set raw_json = {raw_json}")  # noqa: S608

    assert written.apply([person(1)]) == "u"

    assert columns(person(1)) == written.row(person(1))[:4]


@pytest.mark.parametrize(
    "wrong",
    [
        "name = 'Other'",
        "email = null",
        "created_at = null",
        "created_at = 'infinity'",
        "created_at = created_at + interval '1 ms'",
    ],
)
def test_column_that_disagrees_with_the_record_is_mended(written: Target, wrong: str) -> None:
    written.apply([person(1)])
    written.query(f"update users_sync set {wrong}")  # noqa: S608
    assert written.apply([person(1)]) == "u"
    assert columns(person(1)) == written.row(person(1))[:4]


def test_rows_whose_id_is_no_uuid_are_never_touched(plain: Target) -> None:
    ours = person(0xABC)
    for odd in ("admin", ours.id.upper(), "", f"{ours.id}\n", f"{{{ours.id}}}"):
        plain.query("insert into users_sync (id, name) values (%s, 'Somebody')", odd)
    before = plain.query("select * from users_sync order by id")

    assert plain.apply([ours]) == "i"
    assert plain.apply([ours]) == "="
    assert soft_delete(plain, [ours]) == "d"

    after = plain.query("select * from users_sync where id <> %s order by id", ours.id)
    assert before == after
    assert list(plain.table().load_keys(plain.conn)) == []


def test_moved_user_comes_back_with_the_place_it_had(target: Target) -> None:
    """The mirror must forget that place."""
    target.apply(people(1, 2, 3, 4))
    users = [
        person(1, display_name="New"),
        person(2, signed_up_at_millis=SIGNED_UP + 20),
        person(3),
        person(4, signed_up_at_millis=SIGNED_UP + 30),
        person(5),
    ]
    # In the order of the new keys 2 and 4 are the last ones.
    assert moved(target, users) == ([3, 4], [SIGNED_UP + 2, SIGNED_UP + 4])


def test_nobody_moved_is_said_as_nothing(target: Target) -> None:
    assert moved(target, people(1, 2)) == (None, None)
    assert moved(target, people(1, 2)) == (None, None)


@pytest.mark.parametrize("millis", [YEAR_10000, YEAR_10000 + 123, LATEST])
def test_place_in_the_far_future_is_exact(target: Target, millis: int) -> None:
    """Such a created_at is not: its double has no room for milliseconds."""
    target.apply([person(1, signed_up_at_millis=millis)])
    keys = list(target.table().load_keys(target.conn))
    assert moved(target, [person(1)]) == ([0], [millis])
    assert [key[0] for key in keys] == [millis]


@pytest.mark.parametrize("created_at", ["null", "'infinity'", "'-infinity'"])
def test_place_of_a_row_without_a_sign_up_is_before_all_others(
    written: Target, created_at: str
) -> None:
    written.apply([person(1)])
    set_moments(written, person(1), created_at=created_at)
    keys = list(written.table().load_keys(written.conn))
    assert moved(written, [person(1)]) == ([0], [NO_MILLIS])
    assert [key[0] for key in keys] == [NO_MILLIS]


@pytest.mark.parametrize(
    "raw_json",
    [
        "null",
        "'1'",
        "'{}'",
        """'{"signed_up_at_millis": "1e99"}'""",
        f"""'{{"signed_up_at_millis": {10**30}}}'""",
    ],
)
def test_far_future_without_a_readable_record_stops_nothing(written: Target, raw_json: str) -> None:
    written.apply([person(1)])
    written.query(
        f"update users_sync set created_at = '10000-01-01 00:00Z', raw_json = {raw_json}"  # noqa: S608
    )
    keys = list(written.table().load_keys(written.conn))
    assert moved(written, [person(1)]) == ([0], [YEAR_10000])
    assert [key[0] for key in keys] == [YEAR_10000]


def test_answers_of_a_transaction_fit_into_a_sockets_buffers(generated: Target) -> None:
    """A backend that sends more than that to a stopped client is ended by no time-out."""
    numbers = range(STATEMENT_BYTES // len(person(1).json))
    statements = -(-PART_BYTES // STATEMENT_BYTES)
    generated.apply(people(*numbers))
    changed = people(*numbers, signed_up_at_millis=LATEST)
    statement = generated.table().apply(Users.of(changed), generated.now())

    cursor = generated.conn.execute(statement.query, statement.params)

    result = cursor.pgresult
    assert result
    answer = sum(len(result.get_value(0, column) or b"") for column in range(3))
    assert answer * statements < 64_000
    letters, positions, millis = cursor.fetchall()[0]
    assert letters == "u" * len(numbers)
    assert len(positions) == len(millis) == MOST_MOVED


def nodes(plan: Node) -> list[Node]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


def quadratic(node: Node) -> bool:
    """Whether each row of one side is looked for among all of the other, without an index."""
    return node["Node Type"] == "Nested Loop" and not any(
        "Index" in inner["Node Type"] for inner in nodes(node["Plans"][1])
    )


@pytest.mark.parametrize("rows", [0, 2_000])
@pytest.mark.parametrize("analyzed", [True, False])
def test_no_plan_is_quadratic(target: Target, rows: int, *, analyzed: bool) -> None:
    """The server guesses 100 users, however many come."""
    target.apply(people(*range(rows)))
    target.query("analyze users_sync" if analyzed else "select")
    statement = target.table().apply(Users.of(people(*range(100))), target.now())
    query = b"explain (format json) " + statement.query.as_bytes(target.conn)

    (row,) = target.conn.execute(query, statement.params).fetchall()

    assert [node for node in nodes(row[0][0]["Plan"]) if quadratic(node)] == []


def refer(target: Target) -> Callable[[psycopg.Connection], None]:
    """Make a table of posts by each user; returns what writes one more by the first."""
    id_type = target.shape.id_type.as_string()
    target.query(APPLICATION.format(id_type=id_type))

    def write(conn: psycopg.Connection) -> None:
        conn.execute("insert into posts select id from users_sync order by id limit 1")

    return write


@pytest.mark.parametrize(("name", "letters"), [("User 1", "=i"), ("New", "ui")])
def test_open_transaction_of_an_application_holds_nothing_up(
    target: Target, name: str, letters: str
) -> None:
    target.apply([person(1)])
    post = refer(target)
    users = [person(1, display_name=name), person(2)]
    application = target.connect()
    with application.transaction():
        post(application)
        assert target.apply(users, conn=target.connect(lock_timeout="100ms")) == letters


@pytest.mark.parametrize(("name", "letters"), [("User 1", "=i"), ("New", "ui")])
def test_applying_holds_no_application_up(target: Target, name: str, letters: str) -> None:
    target.apply([person(1)])
    post = refer(target)
    users = [person(1, display_name=name), person(2)]
    with target.conn.transaction():
        assert target.apply(users) == letters
        post(target.connect(lock_timeout="100ms"))
    assert target.value("select count(*) from posts") == 2


def test_user_that_somebody_inserts_meanwhile_is_stale(
    target: Target, background: ThreadPoolExecutor
) -> None:
    other, ours = target.connect(), target.connect()
    theirs = person(1, display_name="Theirs")
    with other.transaction():
        target.apply([theirs], conn=other)
        letters = background.submit(target.apply, people(1, 2), conn=ours)
        target.await_waiting()

    assert letters.result(10) == "si"
    assert columns(theirs) == target.row(theirs)[:4]


def test_row_that_somebody_updates_meanwhile_is_judged_again(
    target: Target, background: ThreadPoolExecutor
) -> None:
    target.apply(people(1, 2))
    asked = target.now()
    other, ours = target.connect(), target.connect()
    theirs = person(1, display_name="Theirs")
    users = people(1, 2, display_name="Ours")
    with other.transaction():
        target.apply([theirs], conn=other)
        letters = background.submit(target.apply, users, asked, conn=ours)
        target.await_waiting()

    assert letters.result(10) == "su"
    assert columns(theirs) == target.row(theirs)[:4]


def test_row_that_an_application_only_locked_is_written_when_it_is_free(
    target: Target, background: ThreadPoolExecutor
) -> None:
    target.apply([person(1)])
    other, ours = target.connect(), target.connect()
    changed = person(1, display_name="Ours")
    with other.transaction():
        other.execute("select from users_sync for update")
        letters = background.submit(target.apply, [changed], conn=ours)
        target.await_waiting()

    assert letters.result(10) == "u"
    assert columns(changed) == target.row(changed)[:4]


def test_row_that_is_marked_deleted_meanwhile_stays_so(
    target: Target, background: ThreadPoolExecutor
) -> None:
    target.apply([person(1)])
    other, ours = target.connect(), target.connect()
    with other.transaction():
        other.execute("update users_sync set deleted_at = clock_timestamp()")
        letters = background.submit(
            target.apply, [person(1, display_name="Ours")], grace_seconds=60, conn=ours
        )
        target.await_waiting()

    assert letters.result(10) == "s"
    assert target.row(person(1))[5] is not None


def test_row_that_is_purged_meanwhile_is_stale(
    target: Target, background: ThreadPoolExecutor
) -> None:
    target.apply([person(1)])
    other, ours = target.connect(), target.connect()
    with other.transaction():
        other.execute("delete from users_sync")
        letters = background.submit(target.apply, [person(1, display_name="Ours")], conn=ours)
        target.await_waiting()

    assert (letters.result(10), target.ids()) == ("s", set())


def test_no_rows_have_no_keys(target: Target) -> None:
    assert list(target.table().load_keys(target.conn)) == []


def test_keys_come_in_the_order_of_the_list(target: Target) -> None:
    """By sign-up, then by id; letters sort after figures, as bytes and as lower-case text do."""
    ids = [
        "9fffffff-0000-4000-8000-000000000000",
        "a0000000-0000-4000-8000-000000000000",
        "00000000-0000-4000-8000-00000000000f",
        "00000000-0000-4000-8000-0000000000a0",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ]
    users = [person(1, id=each, signed_up_at_millis=millis) for millis in (7, -7) for each in ids]
    users = [
        User(user_id(n), u.millis, u.fingerprint, dump({**u.record, "id": user_id(n)}))
        if n < 5
        else u
        for n, u in enumerate(users)
    ]
    target.apply(users)

    keys = [(millis, key.hex()) for millis, key in target.table().load_keys(target.conn)]

    expected = sorted((user.millis, user.id) for user in users)
    assert keys == [(millis, text.replace("-", "")) for millis, text in expected]


def test_keys_are_those_of_live_users_alone(plain: Target) -> None:
    plain.apply(people(1, 2, 3))
    set_moments(plain, person(2), deleted_at="'infinity'")
    other = person(0xABC).id
    for odd in ("admin", other.upper(), "", f"{other}\n", f"{{{other}}}", other.replace("-", "")):
        plain.query("insert into users_sync (id) values (%s)", odd)
    keys = list(plain.table().load_keys(plain.conn))
    assert [key[0] for key in keys] == [SIGNED_UP + 1, SIGNED_UP + 3]


def test_time_outs_of_the_role_do_not_end_a_long_read(target: Target, plain_role: str) -> None:
    """Row-level security makes each row take longer than the role lets a statement take."""
    target.apply([person(1)])
    names = {"schema": sql.Identifier(target.schema), "role": sql.Identifier(plain_role)}
    target.conn.execute(sql.SQL(SLOW_READS).format(**names))
    slow = target.connect()
    slow.execute("set statement_timeout = '200ms'")
    slow.execute(sql.SQL("set role {role}").format(**names))
    with pytest.raises(psycopg.errors.QueryCanceled):
        slow.execute("select id from users_sync")
    slow.execute(LIMIT_TRANSACTIONS)

    keys = list(target.table().load_keys(slow))
    ids = target.table().sample_ids(slow, 5)
    purgeable = Purging(target.table(), 0).count_due(slow)

    assert purgeable == 0
    assert keys == [(SIGNED_UP + 1, pack(person(1).id))]
    assert ids == [person(1).id]
    assert slow.execute("show statement_timeout").fetchone() == ("200ms",)
    target.conn.execute(sql.SQL("drop owned by {role}").format(**names))


# Servers before 17 cannot.
LIMIT_TRANSACTIONS = """
select set_config(name, '200ms', false) from pg_settings where name = 'transaction_timeout'
"""

SLOW_READS = """
grant usage on schema {schema} to {role};
grant select on users_sync to {role};
alter table users_sync enable row level security;
create policy slow on users_sync using (pg_sleep(0.5)::text is not null)
"""


def test_row_without_a_sign_up_comes_first(generated: Target) -> None:
    generated.apply(people(1, signed_up_at_millis=EARLIEST))
    generated.query(
        "insert into users_sync (raw_json) values (jsonb_build_object('id', %s::text))", user_id(2)
    )
    keys = list(generated.table().load_keys(generated.conn))
    assert [key[0] for key in keys] == [NO_MILLIS, EARLIEST]


@pytest.mark.parametrize("live", [0, 20, 21, 45])
def test_sample_is_spread_over_the_live_rows(target: Target, live: int) -> None:
    target.apply(people(*range(live + 1)))
    set_moments(target, person(live), deleted_at="clock_timestamp()")

    ids = target.table().sample_ids(target.conn, 20)

    assert len(set(ids)) == len(ids) <= 20
    assert min(live, 10) <= len(ids)
    assert set(ids) <= {person(number).id for number in range(live)}
    assert not ids or ids[0] == person(0).id


@pytest.fixture
def number(target: Target) -> int:
    """Return the number of a sweep whose row is there, as it must be."""
    values = ("target, number, kind, started", "%s, 7, 'sweep', now()")
    counts = "pages users inserted updated restored deleted approved hidden stale quarantined held"
    target.query("insert into users_sync_worker.lease (target) values (%s)", target.schema)
    target.query(
        f"insert into users_sync_worker.sweep ({values[0]}, {', '.join(counts.split())})"  # noqa: S608
        f" values ({values[1]}, {', '.join('0' * 11)})",
        target.schema,
    )
    return 7


def soft_delete(
    target: Target,
    users: list[User],
    *,
    grace_seconds: float = 0,
    approved: bool = False,
    conn: psycopg.Connection | None = None,
) -> str:
    proofs = [Proof(user.id, target.now()) for user in users]
    statement = target.table(grace_seconds).soft_delete(proofs, 7, approved=approved)
    letters: str = target.run(statement, conn)[0]
    return letters


def counted(target: Target) -> list[tuple[Any, ...]]:
    return target.query(
        "select deleted, approved from users_sync_worker.sweep where target = %s", target.schema
    )


def test_nobody_is_marked_deleted(target: Target, number: int) -> None:
    target.apply(people(1))
    assert (soft_delete(target, []), counted(target)) == ("", [(0, 0)])


def test_proven_user_is_marked_deleted_and_counted_and_keeps_the_record(
    target: Target, number: int
) -> None:
    target.apply(people(1, 2))
    before = target.now()

    assert soft_delete(target, [person(1)], grace_seconds=60) == "d"

    *data, updated_at, deleted_at = target.row(person(1))
    assert (tuple(data), updated_at) == (columns(person(1)), None)
    assert before < deleted_at < target.now()
    assert target.row(person(2))[5] is None
    assert counted(target) == [(1, 0)]


def test_approved_deletions_are_counted_apart(target: Target, number: int) -> None:
    target.apply(people(1, 2, 3))
    soft_delete(target, people(3))
    soft_delete(target, people(1, 2), approved=True)
    assert counted(target) == [(1, 2)]


def test_young_rows_wait(target: Target, number: int) -> None:
    seconds_ago = int((target.now() - timedelta(seconds=5)).timestamp() * 1000)
    target.apply([person(1, signed_up_at_millis=seconds_ago), person(2), person(3)])
    set_moments(target, person(2), updated_at="clock_timestamp() - interval '5 s'")

    assert soft_delete(target, people(1, 2, 3), grace_seconds=60) == "wwd"

    assert [target.row(person(n))[5] is None for n in (1, 2, 3)] == [True, True, False]
    assert counted(target) == [(1, 0)]


def test_proof_that_is_older_than_the_lease_is_left_for_the_next_sweep(
    target: Target, number: int
) -> None:
    target.apply(people(1, 2))
    proofs = [
        Proof(person(1).id, target.now() - timedelta(seconds=61)),
        Proof(person(2).id, target.now() - timedelta(seconds=50)),
    ]

    letters = target.run(target.table().soft_delete(proofs, 7, approved=False))

    assert (letters, counted(target)) == (("wd",), [(1, 0)])
    assert [target.row(person(n))[5] is None for n in (1, 2)] == [True, False]


def test_moments_in_the_future_make_no_row_young_or_newer(target: Target, number: int) -> None:
    target.apply([person(1, signed_up_at_millis=YEAR_10000 - 1), person(2), person(3)])
    set_moments(target, person(2), updated_at="clock_timestamp() + interval '1 hour'")
    set_moments(target, person(3), updated_at="'infinity'")
    assert soft_delete(target, people(1, 2, 3), grace_seconds=60) == "ddd"


def test_row_newer_than_the_proof_is_left(target: Target, number: int) -> None:
    target.apply([person(1)])
    proofs = [Proof(person(1).id, target.now())]
    set_moments(target, person(1), updated_at="clock_timestamp()")

    letters = target.run(target.table().soft_delete(proofs, 7, approved=False))

    assert (letters, target.row(person(1))[5], counted(target)) == (("s",), None, [(0, 0)])


def test_row_that_is_deleted_or_gone_is_not_deleted_again(target: Target, number: int) -> None:
    target.apply([person(1)])
    soft_delete(target, [person(1)])
    before = target.row(person(1))
    assert soft_delete(target, people(1, 2)) == "ss"
    assert (before, counted(target)) == (target.row(person(1)), [(1, 0)])


def test_row_that_changes_while_its_deletion_waits_is_left(
    target: Target, number: int, background: ThreadPoolExecutor
) -> None:
    target.apply(people(1, 2))
    other, ours = target.connect(), target.connect()
    with other.transaction():
        target.apply([person(1, display_name="Back")], conn=other)
        proofs = [Proof(user.id, target.now() - timedelta(seconds=5)) for user in people(1, 2)]
        statement = target.table().soft_delete(proofs, 7, approved=False)
        letters = background.submit(target.run, statement, ours)
        target.await_waiting()

    assert letters.result(10) == ("sd",)
    assert (target.row(person(1))[5], counted(target)) == (None, [(1, 0)])


def test_deletion_and_applications_do_not_wait_for_each_other(target: Target, number: int) -> None:
    target.apply([person(1)])
    post = refer(target)
    application = target.connect(lock_timeout="100ms")
    with application.transaction():
        post(application)
        with target.conn.transaction():
            target.query("set local lock_timeout = '100ms'")
            assert soft_delete(target, [person(1)]) == "d"
            post(application)
    assert target.value("select count(*) from posts") == 3


def test_deletion_that_is_rolled_back_is_not_counted(target: Target, number: int) -> None:
    target.apply([person(1)])
    with target.conn.transaction(force_rollback=True):
        soft_delete(target, [person(1)])
    assert (target.row(person(1))[5], counted(target)) == (None, [(0, 0)])


def test_new_users_are_added_where_no_row_may_be_updated(target: Target) -> None:
    assert target.apply(people(1, 2)) == "ii"
    before = target.query("select *, xmin from users_sync order by id")
    users = [person(1), person(2, display_name="New"), person(3)]
    assert target.run(target.table().add(Users.of(users), target.now())) == ("=si", None, None)
    assert target.query("select *, xmin from users_sync order by id")[:2] == before
    assert target.ids() == {user.id for user in users}
