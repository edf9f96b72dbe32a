"""One odd record or one locked row costs the users of its page nothing."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from psycopg import sql

from tests.support.store_target import IGNORED, Target, people, person
from worker.errors import DatabaseUnavailable, LeaseLost, Transient
from worker.model import User, Users
from worker.store.batch import Batch, BatchResult
from worker.store.lease import Lease
from worker.store.quarantine import Quarantine
from worker.store.transaction import Statement

pytestmark = pytest.mark.usefixtures("short_lock_waits")

SWEEP = 3

QUARANTINED = """
select user_id, error, permanent from users_sync_worker.quarantine where target = %s
order by user_id
"""

RAISING = """
create function refuse() returns trigger language plpgsql as $$
begin
    if new.raw_json->>'display_name' = 'Odd' then
        raise exception 'not %', new.raw_json->>'primary_email' using errcode = '{state}';
    end if;
    return new;
end $$;
create trigger refuse before insert or update on users_sync for each row execute function refuse()
"""


@pytest.fixture
def generated(generated: Target) -> Target:
    """Return a target with a table that says how often something was committed."""
    generated.query("create table log (entry text)")
    return generated


def batch(target: Target, lease: Lease | None = None, **options: Any) -> Batch:
    return Batch(
        target.table(),
        lease or target.held_lease(),
        Quarantine(target.schema),
        SWEEP,
        target.now(),
        **options,
    )


def part_of(users: Sequence[User], parts: int) -> int:
    """Say how many bytes cut users into so many parts."""
    return Users.of(users).size // parts


def extra(target: Target) -> Statement:
    """Give what must be committed with the last part, and tells whom it found committed by then."""
    log, table = (sql.SQL(target.qualified(name)) for name in ("log", "users_sync"))
    query = "insert into {} select count(*)::text from {} where deleted_at is null"
    return Statement(sql.SQL(query).format(log, table))


def apply(target: Target, users: Sequence[User], **options: Any) -> BatchResult:
    return batch(target, **options).apply(Users.of(users), [extra(target)])


def letters(applied: BatchResult) -> dict[str, str]:
    return {
        user.id: letter
        for users, letters in applied.results
        for user, letter in zip(users, letters, strict=True)
    }


def in_order(applied: BatchResult) -> str:
    return "".join(letters for _, letters in applied.results)


def inserted(users: Sequence[User]) -> dict[str, str]:
    return {user.id: "i" for user in users}


def logged(target: Target) -> list[Any]:
    return [row[0] for row in target.query("select entry from log")]


def quarantined(target: Target) -> list[tuple[Any, ...]]:
    return target.query(QUARANTINED, target.schema)


def test_nothing_to_do_is_no_write(generated: Target) -> None:
    applied = batch(generated).apply(Users.of([]), [])
    assert (applied, generated.lease_row("writes")) == (BatchResult(), 0)


def test_no_users_are_no_reason_to_drop_the_extras(generated: Target) -> None:
    applied = apply(generated, [])
    assert (applied, logged(generated), generated.lease_row("writes")) == (BatchResult(), ["0"], 1)


def test_users_and_extras_are_one_write(generated: Target) -> None:
    users = people(1, 2, 3)
    applied = apply(generated, users)
    assert letters(applied) == inserted(users)
    assert (logged(generated), generated.lease_row("writes")) == (["3"], 1)
    assert generated.lease_row("sweep") == SWEEP


def test_moved_users_come_with_the_key_they_had(generated: Target) -> None:
    before = people(*range(5))
    apply(generated, before)
    after = [person(0), *people(1, 2, signed_up_at_millis=7), person(3), person(4)]
    applied = apply(generated, after, part_bytes=part_of(after, 5))
    assert applied.moved == [before[1].key, before[2].key]
    assert list(chain(*applied.by("u", "="))) == list(Users.of(after))


def test_many_bytes_go_in_parts_and_the_extras_with_the_last(generated: Target) -> None:
    users = people(*range(10))
    applied = apply(generated, users, part_bytes=part_of(users, 3))
    assert list(letters(applied)) == [user.id for user in users]
    assert (logged(generated), generated.lease_row("writes")) == (["10"], 4)


def test_some_bytes_go_in_statements_of_one_transaction(generated: Target) -> None:
    users = people(*range(7))
    applied = apply(generated, users, statement_bytes=part_of(users, 3))
    assert letters(applied) == inserted(users)
    assert (logged(generated), generated.lease_row("writes")) == (["7"], 1)


def test_moved_users_are_found_in_any_statement(generated: Target) -> None:
    before = people(*range(6))
    apply(generated, before)
    after = [*people(*range(5)), person(5, signed_up_at_millis=7)]
    applied = apply(generated, after, statement_bytes=part_of(after, 3))
    assert (applied.moved, [list(users) for users in applied.by("u")]) == (
        [before[5].key],
        [after[5:]],
    )


def test_new_known_and_deleted_users_are_told_apart_in_one_write(generated: Target) -> None:
    users = people(*range(6))
    apply(generated, users[2:4])
    generated.query("update users_sync set deleted_at = 'epoch' where id::text = %s", users[3].id)
    applied = batch(generated, statement_bytes=part_of(users, 3)).apply(Users.of(users), [])
    assert in_order(applied) == "ii=rii"
    assert generated.lease_row("writes") == 2


def test_users_larger_than_a_part_go_one_by_one(generated: Target) -> None:
    users = people(1, 2)
    assert letters(apply(generated, users, part_bytes=part_of(users, 100))) == inserted(users)
    assert (logged(generated), generated.lease_row("writes")) == (["2"], 2)


@pytest.mark.parametrize("odd", [0, 3, 5])
def test_refused_record_stands_alone_in_quarantine_and_the_extras_are_committed_once(
    generated: Target, odd: int
) -> None:
    generated.query("alter table users_sync add constraint no_odd check (name <> 'Odd')")
    users = people(*range(6))
    users[odd] = person(odd, display_name="Odd")
    rest = [user for user in users if user != users[odd]]

    applied = apply(generated, users)

    assert letters(applied) == inserted(rest)
    assert generated.ids() == {user.id for user in rest}
    assert [rejected.user_id for rejected in applied.rejected] == [users[odd].id]
    assert quarantined(generated) == [
        (users[odd].id, "refused by the database: 23514 no_odd", False)
    ]
    assert logged(generated) == ["5"]


def test_only_user_may_be_refused(generated: Target) -> None:
    generated.query("alter table users_sync add check (name <> 'Odd')")
    applied = apply(generated, [person(1, display_name="Odd")])
    assert (applied.results, len(applied.rejected)) == ([], 1)
    assert logged(generated) == ["0"]


def test_several_refused_records_stand_apart(generated: Target) -> None:
    generated.query("alter table users_sync add check (name <> 'Odd')")
    users = [person(n, display_name="Odd" if n in {0, 3, 4} else "Fine") for n in range(6)]
    applied = apply(generated, users, part_bytes=part_of(users, 2))
    assert {rejected.user_id for rejected in applied.rejected} == {users[n].id for n in (0, 3, 4)}
    assert generated.ids() == {users[n].id for n in (1, 2, 5)}
    assert logged(generated) == ["3"]


@pytest.mark.parametrize(
    "state",
    [
        "P0001",
        "P0002",
        "23000",
        "44000",
        "U0001",
        "22023",
        "54001",
        "42601",
        "42501",
        "3F000",
        "28000",
        "0A000",
        "55000",
        "58030",
        "08001",
        "53400",
        "25006",
        "XX000",
        "40001",
        "40P01",
        "55P03",
        "57014",
        "57P01",
        "HV000",
        "20000",
    ],
)
def test_record_that_a_trigger_refuses_is_quarantined_without_the_triggers_words(
    generated: Target, state: str
) -> None:
    generated.query(RAISING.format(state=state))
    users = [person(1), person(2, display_name="Odd"), person(3)]

    applied = apply(generated, users)

    assert letters(applied) == inserted([users[0], users[2]])
    assert quarantined(generated) == [(users[1].id, f"refused by the database: {state}", False)]
    assert logged(generated) == ["2"]


@pytest.mark.parametrize(
    ("work", "state"),
    [
        ("perform 1 / (length(new.name) - 3)", "22012"),
        ("if new.name = 'Odd' then insert into no_such_table values (1); end if", "42P01"),
        ("if new.name = 'Odd' then set local role no_such_role; end if", "22023"),
        ("if new.name = 'Odd' then perform lastval(); end if", "55000"),
        ("if new.name = 'Odd' then execute 'nonsense'; end if", "42601"),
    ],
)
def test_record_at_which_a_triggers_work_fails_is_quarantined(
    plain: Target, work: str, state: str
) -> None:
    plain.query(f"""
    create function fail() returns trigger language plpgsql as $$ begin {work}; return new; end $$;
    create trigger fail before insert or update on users_sync for each row execute function fail()
    """)
    users = [person(1), person(2, display_name="Odd"), person(3)]
    applied = batch(plain).apply(Users.of(users), [])
    assert letters(applied) == inserted([users[0], users[2]])
    assert quarantined(plain) == [(users[1].id, f"refused by the database: {state}", False)]


def test_those_who_are_refused_cost_no_connection_and_are_recorded_together(
    generated: Target,
) -> None:
    generated.query("alter table users_sync add check (name <> 'Odd')")
    database = generated.database()
    lease = generated.held_lease(database)
    pid = database.call(lambda conn: conn.info.backend_pid)
    applied = batch(generated, lease).apply(Users.of(people(*range(8), display_name="Odd")), [])
    assert (len(applied.rejected), len(quarantined(generated))) == (8, 8)
    assert database.call(lambda conn: conn.info.backend_pid) == pid
    assert generated.lease_row("writes") == 1


@pytest.mark.parametrize(
    ("millis", "state"),
    [(1.5, "22P02"), ("soon", "22P02"), (10**30, "22003"), (10**17, "22008")],
)
def test_record_that_would_break_the_whole_statement_is_quarantined(
    target: Target, millis: Any, state: str
) -> None:
    users = [person(1), person(2, signed_up_at_millis=millis), person(3)]
    applied = batch(target).apply(Users.of(users), [])
    assert letters(applied) == inserted([users[0], users[2]])
    assert quarantined(target) == [(users[1].id, f"refused by the database: {state}", False)]


def test_addresses_that_must_be_unique_refuse_the_second(plain: Target) -> None:
    plain.query("create unique index one_each on users_sync (email)")
    users = [person(1), person(2), person(3, primary_email="1@example.com"), person(4)]
    applied = batch(plain).apply(Users.of(users), [])
    assert [rejected.error for rejected in applied.rejected] == [
        "refused by the database: 23505 one_each"
    ]
    assert len(plain.ids()) == 3
    assert "example.com" not in quarantined(plain)[0][1]


def test_row_that_an_application_keeps_locked_is_stale_and_the_rest_is_stored(
    generated: Target,
) -> None:
    generated.apply(people(*range(6)))
    users = people(*range(6), display_name="New")
    with generated.conn.transaction():
        generated.query("select from users_sync where id = %s for update", users[4].id)
        applied = apply(generated, users)
    assert [letters(applied)[user.id] for user in users] == list("uuuusu")
    assert generated.query("select count(*) from users_sync where name = 'New'") == [(5,)]
    assert (quarantined(generated), len(logged(generated))) == ([], 1)


def test_last_user_may_be_the_locked_one(generated: Target) -> None:
    generated.apply(people(1))
    with generated.conn.transaction():
        generated.query("select from users_sync for update")
        applied = apply(generated, people(1, display_name="New"))
    assert in_order(applied) == "s"
    assert logged(generated) == ["1"]


def test_locks_on_rows_far_apart_are_not_taken_for_one_on_the_table(generated: Target) -> None:
    generated.apply(people(*range(6)))
    users = people(*range(6), display_name="New")
    locked = [users[n].id for n in (0, 2, 4)]
    with generated.conn.transaction():
        generated.query("select from users_sync where id = any(%s) for update", locked)
        applied = apply(generated, users)
    assert [letters(applied)[user.id] for user in users] == list("sususu")


def test_neighbours_that_an_application_keeps_locked_hold_up_nobody(generated: Target) -> None:
    generated.apply(people(*range(40)))
    users = [*people(*range(40), display_name="New"), person(40)]
    locked = [user.id for user in users[10:35]]
    with generated.conn.transaction():
        generated.query("select from users_sync where id = any(%s) for share", locked)
        applied = apply(generated, users)
    found = letters(applied)
    assert {user_id for user_id in found if found[user_id] == "s"} == set(locked)
    assert len(found) == 41
    assert generated.query("select count(*) from users_sync where name = 'New'") == [(15,)]
    assert (len(generated.ids()), len(logged(generated))) == (41, 1)


def test_all_of_them_may_be_locked(generated: Target) -> None:
    generated.apply(people(*range(5)))
    with generated.conn.transaction():
        generated.query("select from users_sync for update")
        applied = apply(generated, people(*range(5), display_name="New"))
    assert in_order(applied) == "sssss"
    assert len(logged(generated)) == 1


def test_lock_on_the_table_is_an_outage(generated: Target) -> None:
    """It is tried again as long as any, and no user is taken for the culprit."""
    generated.apply(people(*range(4)))
    database = generated.database()
    lease = generated.held_lease(database)
    users = people(*range(4), display_name="New")
    with generated.conn.transaction():
        generated.query("alter table users_sync add column plan text")
        with pytest.raises(DatabaseUnavailable, match="users_sync is locked") as caught:
            database.retry.call(
                lambda: batch(generated, lease).apply(Users.of(users), [extra(generated)])
            )
    assert isinstance(caught.value.__cause__, Transient)
    assert logged(generated) == []


def test_lost_lease_ends_a_batch_at_once(generated: Target) -> None:
    lease = generated.held_lease()
    generated.run_out()
    generated.lease(holder="second").acquire()
    with pytest.raises(LeaseLost):
        batch(generated, lease).apply(Users.of(people(1, 2)), [extra(generated)])
    assert (generated.ids(), logged(generated)) == (set(), [])


def test_batch_that_is_repeated_changes_nothing_more(generated: Target) -> None:
    users = people(*range(6))
    apply(generated, users, part_bytes=part_of(users, 3))
    again = [person(int(n), **{IGNORED: 1}) for n in range(6)]
    applied = apply(generated, again, part_bytes=part_of(again, 3))
    assert set(letters(applied).values()) == {"="}
